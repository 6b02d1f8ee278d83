"""One run from where it stands to its end."""

import traceback
from pathlib import Path

from kfqn.race import process_group
from kfqn.race.failure import Failure
from kfqn.race.runs.run import Run
from kfqn.race.runs.trainer import Trainer
from kfqn.race.runs.warm_up import warm_up


def train(run: Run, data_dir: Path | None) -> None:
    """Do a run from where it stands to its end; what goes wrong in it becomes its last record.

    One of several processes then also ends, so that the others do not wait for it.
    """
    try:
        warm_up(run, data_dir)
        Trainer(run, data_dir).train()
    except Exception as error:
        reason = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        run.write(
            [*run.epochs(), {"status": "failed", "reason": reason, "traceback": traceback.format_exc()}]
        )
        if process_group.size() > 1:
            raise

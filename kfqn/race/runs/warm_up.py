"""Warming up a process: imports at first use, kernels and thread pools are ready before a clock runs."""

import warnings
from pathlib import Path

from kfqn.race.runs.run import Run
from kfqn.race.runs.trainer import Trainer

STEPS = 2

_WARM: set[tuple[object, ...]] = set()  # kinds of runs that this process has done


def warm_up(run: Run, data_dir: Path | None) -> None:
    """Some steps of a trainer that is thrown away, all on one batch, if this process has not done the like.

    The first run of a process has then no more to pay than the others. Nothing is written.
    """
    config = run.config
    kind = (config.entrant, config.problem, config.width, config.batch_size, config.device, config.threads)
    if kind not in _WARM:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say is said of the run itself
            trainer = Trainer(run, data_dir)
            closure = next(trainer.task.epoch(trainer.trained, trainer.generator))
            trainer.model.train()
            for _ in range(STEPS):
                trainer.step(closure)
            trainer.synchronise()
        _WARM.add(kind)

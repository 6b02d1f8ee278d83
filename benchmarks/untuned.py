"""When optimizers that need no settings reach the training loss that each tuned one ends at.

    kfqn race --problem digits --optimizers kfbfgs:auto adam sgd ... --out FOLDER
    python benchmarks/untuned.py FOLDER [FOLDER ...]

For every tuned optimizer of a race: the lowest loss it reaches, its seconds until then, and those of every
automatic one until it first is there; medians over the seeds (`kfqn.race.summary`).
"""

import argparse
import math
from pathlib import Path

from kfqn.race.entrants import entrant_of
from kfqn.race.runs import Run
from kfqn.race.summary import Standing


def standings(folder: Path) -> list[Standing]:
    """The finished runs of a race, by optimizer and settings."""
    found: dict[str, list[Run]] = {}
    for place in sorted((folder / "runs").iterdir()):
        run = Run(place)
        if (run.end() or {}).get("status") == "finished":
            found.setdefault(f"{run.config.entrant} {run.config.settings}", []).append(run)
    return [Standing(runs) for runs in found.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        field = standings(folder)
        untuned = [s for s in field if entrant_of(s.config.entrant).automatic]
        names = "".join(f"{s.label:>20}" for s in untuned)
        print(f"\n{folder.name}\n  {'':<52}{'its loss':>10}{'its s':>8}{names}")
        for standing in field:
            if standing in untuned:
                continue
            target = standing.lowest
            times = [s.reached(target, "seconds") for s in (standing, *untuned)]
            own, *theirs = (f"{t:.2f}" if math.isfinite(t) else "never" for t in times)
            print(f"  {standing.label:<52}{target:>10.3g}{own:>8}" + "".join(f"{t:>20}" for t in theirs))


if __name__ == "__main__":
    main()

"""The settings an entrant races with unless told otherwise: what sweeps found, or the paper."""

from pathlib import Path

from kfqn.race.entrants import sweep_file
from kfqn.race.entrants.grids import TABLE_3, in_torch, rivals, usual
from kfqn.race.entrants.registry import DEFAULT_FIELD, ENTRANTS, PAPER_FIELD
from kfqn.race.entrants.settings import Settings
from kfqn.race.failure import Failure


def best_settings(problem: str, entrant: str, sweep: Path) -> tuple[Settings, str]:
    """The settings an entrant races with unless told otherwise, and where they come from.

    From ``sweep``, a file of `kfqn sweep`, if it is there; else from the sweep committed in
    ``tuned.json``; else from the paper, or what is usual on the development set.
    Raises Failure if none of them knows the entrant.
    """
    committed = Path(__file__).with_name("tuned.json")
    if entrant in ENTRANTS and ENTRANTS[entrant].automatic:
        return {}, "the optimizer's defaults"
    for file, source in ((sweep, str(sweep)), (committed, "the package's own sweep")):
        entry = sweep_file.read(file).get(problem, {}).get(entrant, {})
        if entry.get("best"):
            return dict(entry["best"]), source
    if entrant in TABLE_3.get(problem, {}):
        return in_torch(entrant, TABLE_3[problem][entrant]), "the paper's Table 3"
    settings = usual(problem, entrant)
    if settings is not None:
        return settings, "what is usual"
    if entrant not in ENTRANTS:
        return {}, "the defaults of its class"
    raise Failure(
        f"no settings are known for {entrant} on {problem}: give them, as in --optimizers "
        f"{entrant}:{','.join(f'{key}=...' for key in ENTRANTS[entrant].required)}, or run 'kfqn sweep "
        f"--problem {problem}' with the same --out first."
    )


def default_field(problem: str) -> tuple[str, ...]:
    """Who races unless told otherwise: on the development set ours without settings, and its rivals."""
    return ("kfbfgs:auto", *rivals(problem)) if rivals(problem) else DEFAULT_FIELD


def swept_field(problem: str) -> tuple[str, ...]:
    """Who is swept unless told otherwise."""
    return rivals(problem) or PAPER_FIELD

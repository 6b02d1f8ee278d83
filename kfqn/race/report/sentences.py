"""Runs in words: the title, the verdict, what did not finish and why, the conditions."""

import math
from collections.abc import Sequence

from kfqn.race.problems import problem_of
from kfqn.race.report.results import Result, common_target, learned
from kfqn.race.runs import Run

UNFINISHED = "unfinished: its process was killed, or another command is doing it; run the same command again"


def title_of(runs: Sequence[Run]) -> str:
    """The problem and how much of it."""
    config = runs[0].config
    problem = problem_of(config.problem)
    seeds = len({run.config.seed for run in runs})
    width = f" of width {config.width}" if config.width else ""
    parts = [f"{problem.title}{width}", f"batch {config.batch_size}"]
    if config.train_size is not None:
        parts.append(f"{config.train_size} training {'images' if problem.images else 'data'}")
    return ", ".join([*parts, f"{seeds} seed{'s' if seeds > 1 else ''}"])


def verdict(results: Sequence[Result]) -> str:
    """The race in a few sentences: who was first at the common target, who ended lowest, who has no say."""
    measure, target = results[0].measure, common_target(results)
    finished = [s for s in results if math.isfinite(s.lowest)]
    if not finished:
        return "No run finished." if not any(s.epochs for s in results) else "Most runs were lost."
    able = sorted(learned(results), key=lambda s: (s.reached(target, measure.time), s.final))
    if not able:
        guess = problem_of(results[0].config.problem).guess
        noun = "an error" if measure.loss == "test_error" else "a loss"
        return f"Nobody learned: {guess.who} has {noun} of {guess.of(measure.loss):.3g}."
    times = [f"{s.reached(target, measure.time):.2f} {measure.second}" for s in able]
    first = f"{able[0].label} was first at the common target, {measure.first.told(target)}"
    sentences = [
        f"{first}: after {times[0]}, before {able[1].label} after {times[1]}."
        if len(able) > 1
        else f"{first}, after {times[0]}."
    ]
    if len(able) > 1:
        lowest = min(able, key=lambda s: s.final)
        sentences.append(f"{lowest.label} ended lowest, at {measure.first.short(lowest.final)}.")
    too_little = [s.label for s in finished if s not in able]
    sentences += [f"Learned too little to have a say: {', '.join(too_little)}."] if too_little else []
    return " ".join(sentences)


def unfinished(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Every run that did not finish: its name, why, and the traceback of a failed one."""
    ends = [(run, run.end()) for run in runs]
    return [
        (run.config.identity, UNFINISHED if end is None else end["reason"], (end or {}).get("traceback", ""))
        for run, end in ends
        if end is None or end["status"] != "finished"
    ]


def merged_conditions(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What the figures hold for; where runs differ, every value."""
    ends = [run.end() or {} for run in runs]
    merged: dict[str, dict[str, None]] = {}
    for run, end in zip(runs, ends, strict=True):
        config = run.config
        facts = dict(end.get("conditions") or {"evaluated images": f"first {config.evaluated}"})
        facts |= {
            "threads": str(config.threads),
            "seeds": str(config.seed),
            "epochs": str(config.epochs or "no limit"),
            "CPU seconds": f"{config.budget:g}" if config.budget else "no limit",
            "weight decay": f"{config.weight_decay:g}",
        }
        for key, value in facts.items():
            merged.setdefault(key, {})[value] = None
    return [(key, ", ".join(values)) for key, values in merged.items()]

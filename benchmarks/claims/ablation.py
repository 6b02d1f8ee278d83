"""What each part of `kfqn.KFBFGS(model)` is worth: one taken out, or replaced, at a time, at real scale.

    python -m benchmarks.claims.ablation --data-dir DIR [--problems …] [--seeds 2] [--schedule cosine]

Runs `kfqn race`, in runs/ablation, so that it resumes, and finished runs are not done again; prints a table
of what each problem goes by (test error, validation loss) after each third of the run, and CPU seconds.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from kfqn.race.problems import PROBLEMS
from kfqn.race.report.results import Result, race_measure
from kfqn.race.runs import Run

VARIANTS = {
    "as it is": "",
    "H_A = I": "input=none",
    "H_A by BFGS, eq. (12)": "input=action",
    "H_A at every 10th step": "interval=10",
    "H_G by BFGS": "output=bfgs",
    "not orthogonalised": "direction=plain",
    "momentum without Nesterov's": "average=ema",
    "without momentum": "average=none",
    "steps that do not fall": "steps=constant",
    "half the step": "steps=half",
    "twice the step": "steps=twice",
    "weights not averaged": "weights=latest",
    "averaged over an eighth": "weights=longer",
    "averaged over a thirty-second": "weights=shorter",
    "factors of up to 256 rows": "largest=256",
    "no weight decay": "decay=0",
    "less memory: triangles": "input=triangles",
    "less memory: bfloat16": "average=bfloat16",
    "less memory: both": "input=triangles,average=bfloat16",
}
USUAL = ("cifar10-small-plain", "cifar10-small-resnet", "char-gpt")


def entrant(variant: str, schedule: str) -> str:
    """What `kfqn race` is asked for."""
    settings = ",".join(filter(None, (VARIANTS[variant], "schedule=cosine" if schedule == "cosine" else "")))
    return f"kfbfgs:auto:{settings}" if settings else "kfbfgs:auto"


def race(problem: str, options: argparse.Namespace) -> Path:
    """Run what is not done yet; the folder of the runs."""
    out: Path = options.out / problem
    command = [sys.executable, "-m", "kfqn", "race", "--problem", problem, "--out", str(out)]
    for key in ("seeds", "data_dir", "epochs", "train_size", "width", "jobs"):
        if (value := getattr(options, key)) is not None:
            command += [f"--{key.replace('_', '-')}", str(value)]
    command += ["--optimizers", *(entrant(variant, options.schedule) for variant in options.variants)]
    subprocess.run(command, check=True)
    return out / "runs"


def results(problem: str, folder: Path, schedule: str) -> dict[str, Result]:
    """What came out, by variant."""
    found: dict[str, list[Run]] = {}
    for run in (Run(place) for place in sorted(folder.iterdir())):
        settings = ",".join(f"{key}={value}" for key, value in run.config.settings.items())
        name = f"kfbfgs:auto:{settings}" if settings else "kfbfgs:auto"
        found.setdefault(name.replace(".0", ""), []).append(run)
    measure = race_measure(PROBLEMS[problem])
    wanted = {variant: found.get(entrant(variant, schedule)) for variant in VARIANTS}
    return {variant: Result(runs, measure) for variant, runs in wanted.items() if runs}


def line(variant: str, result: Result) -> str:
    """A row of the table: what counts after each third, and CPU seconds."""
    quantity = result.measure.first
    if not result.epochs:
        return f"| {variant} | {result.lost} | |"
    curve = result.curve(quantity.key)
    at = [max(0, round(len(curve.mean) * third / 3) - 1) for third in (1, 2, 3)]
    values = ", ".join(f"{quantity.scale * curve.mean[i]:.4g}" for i in at)
    error = quantity.scale * curve.error[-1]
    return f"| {variant} | {values} ± {error:.1g} | {result.curve('cpu_seconds').mean[-1]:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", nargs="+", default=USUAL, choices=[*PROBLEMS], metavar="PROBLEM")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS], metavar="VARIANT")
    parser.add_argument("--schedule", default="constant", choices=["constant", "cosine"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    for problem in options.problems:
        folder = race(problem, options)
        quantity = PROBLEMS[problem].quantities[0]
        print(f"\n{PROBLEMS[problem].title}, {options.schedule} steps, {options.seeds} seeds\n")
        print(f"| | {quantity.label} after each third | CPU s |\n| --- | --- | --- |")
        for variant, result in results(problem, folder, options.schedule).items():
            print(line(variant, result))


if __name__ == "__main__":
    main()

"""AgentRefine's experiment on one base: what does tuning on mistakes and their corrections improve?

    python -m bench.refinement                    # all arms, seeds 0 1 2 of the main ones; hours on a CPU
    python -m bench.refinement --seeds 0 --limit 20

A base (models/tiny-neutral: random walks, no solutions; or a pretrained model) is tuned on ALFWorld demonstrations, on
synthetic trajectories with mistakes (refine.py), on half of each, and on the synthetic ones under the paper's three
controls. Each arm is evaluated on generated ALFWorld games in the original wording and five others, on synthetic worlds
in seen and in unseen vocabulary, on BabyAI and on PDDL, with --tell-commands and greedy decoding. Runs the stages'
commands, each of which resumes if it was killed; prints a table and, as the last line, JSON.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import itertools
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from artifacts.cli import Range, run_main
from artifacts.scores import WORDINGS, directory_name, read_scores, wilson

MAIN = ("demo", "refine", "both")
CONTROLS = ("mask-refined", "drop-errors", "no-mask")
# Evaluations: world, panels, wordings, turns.
MEASURED = (
    ("alfworld", ("gen_valid-100",), "all", 20),
    ("synthetic", ("syn_valid-60", "syn_held-60"), "none", 20),
    ("babyai", ("babyai_test-112",), "none", 30),
    ("pddl", ("pddl_test-60",), "none", 30),
)


@dataclass(frozen=True, kw_only=True)
class Args:
    runs: Path = Path("runs/refinement")
    """Folder for the runs, one per arm and seed."""
    model: Path = Path("models/tiny-neutral")
    """The neutral base."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the main arms; the controls use only the first."""
    arms: tuple[str, ...] = (*MAIN, *CONTROLS)
    """Arms to run."""
    count: int = 2000
    """Trajectories that an arm is tuned on, for one epoch."""
    rank: int = 32
    """LoRA rank, on all linear layers; alpha is twice the rank."""
    learning_rate: float = 8e-3
    """Peak learning rate of Adam on the adapter."""
    context: Annotated[int, Range(16, 10**7)] = 1536
    """Maximum tokens of an attempt."""
    row_length: Annotated[int, Range(2, 2**20)] = 1792
    """Tokens per packed row."""
    limit: int = 60
    """Tasks per panel."""


def run(*words: object) -> None:
    """Runs a command of the project; raises CalledProcessError if it fails."""
    print("$ python", *words, flush=True)
    subprocess.run([sys.executable, *map(str, words)], check=True)


def make_data(args: Args, arm: str, seed: int) -> list[Path]:
    """Makes the data of an arm; returns its directories."""
    directories, count = [], args.count // 2 if arm == "both" else args.count
    folder = args.runs / f"data_{count}_{seed}"
    if arm in ("demo", "both"):
        command = ("-m", "models.demonstrations", "--out", folder / "demo", "--tell-commands")
        run(*command, "--count", count, "--seed", seed)
        directories.append(folder / "demo")
    if arm != "demo":
        run("refine.py", "--run", folder, "--count", count, "--seed", seed)
        directories.append(folder / "refine")
    return directories


def evaluate(args: Args, directory: Path, *subject: str) -> None:
    """Runs all evaluations that are not finished yet."""
    for env, panels, perturb, turns in MEASURED:
        run(
            "evaluate.py",
            "--run",
            directory,
            *subject,
            "--model",
            args.model,
            "--env",
            env,
            "--panels",
            *panels,
            "--limit",
            args.limit,
            "--perturb",
            perturb,
            "--max-turns",
            turns,
            "--context",
            args.context,
            "--tell-commands",
        )


def run_arm(args: Args, arm: str, seed: int) -> Path:
    """Tunes and evaluates one arm with one seed; returns the run's directory."""
    directory = args.runs / f"{arm}_{seed}"
    refinement = arm if arm in CONTROLS else "mask-errors"
    run(
        "train_pg.py",
        "--run",
        directory,
        "--round",
        0,
        "--inputs",
        *make_data(args, arm, seed),
        "--refinement",
        refinement,
        "--model",
        args.model,
        "--epochs",
        1,
        "--rank",
        args.rank,
        "--alpha",
        2 * args.rank,
        "--learning-rate",
        args.learning_rate,
        "--row-length",
        args.row_length,
        "--world-weight",
        0,
        "--seed",
        seed,
    )
    evaluate(args, directory, "--round", "0")
    return directory


def load_scores(directory: Path, subject: str) -> dict[str, dict[str, float]]:
    """{panel, or panel and wording: {success, progress, n}} of one run."""
    scores = {}
    for env, _, perturb, _ in MEASURED:
        for wording in WORDINGS if perturb == "all" else ("none",):
            for panel, s in read_scores(directory, directory_name(env, wording, 1))[subject].items():
                label = panel.rpartition("-")[0] + (f" {wording}" if wording != "none" else "")
                scores[label] = {"success": s["rate"], "progress": s["progress"], "n": s["n"]}
    perturbed = [scores[f"gen_valid {wording}"] for wording in WORDINGS[1:]]
    means = {key: statistics.mean(p[key] for p in perturbed) for key in ("success", "progress")}
    return scores | {"gen_valid P1..P5": means | {"n": sum(p["n"] for p in perturbed)}}


def table(results: dict[str, list[dict]]) -> str:
    """One row per arm: for each panel, success with its interval over the tasks of all seeds, and progress, in %."""
    labels = list(next(iter(results.values()))[0])
    lines = ["| arm (seeds) | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    for name, runs in results.items():
        cells = []
        for label in labels:
            n = sum(r[label]["n"] for r in runs)
            rate, progress = (statistics.mean(r[label][key] for r in runs) for key in ("success", "progress"))
            low, high = (100 * x for x in wilson(rate * n, n))
            cells.append(f"{100 * rate:.1f} [{low:.1f}, {high:.1f}]; {100 * progress:.1f}")
        lines.append(f"| {name} ({len(runs)}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: Args) -> None:
    base = args.runs / "neutral"
    evaluate(args, base, "--base")
    results = {"neutral": [load_scores(base, "base")]}
    for seed, arm in itertools.product(args.seeds, args.arms):
        if arm in MAIN or seed == args.seeds[0]:
            results.setdefault(arm, []).append(load_scores(run_arm(args, arm, seed), "0"))
    print(table(results))
    print("each cell: success in %, its 95 % interval over the tasks of all seeds, and progress in %")
    print(json.dumps(results))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

"""Sends the figures of a run to TensorBoard, Weights & Biases or Trackio; docs/looking.md says where they appear.

    python -m artifacts.track --run runs/a3t --to tensorboard

One run of the tracker per trained round (round_0, ...: metrics.jsonl by optimizer step) and one over the rounds
(rounds: the numbers of rollouts, compositions, training and evaluations, by the names in done.json and scores.json;
those of the base and of a given adapter are at round 0). Sent again, they replace what was sent before. The stages'
flag --track does the same as they go.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.cli import run_main
from artifacts.json_io import read_json
from artifacts.metrics import metrics_curves
from artifacts.scores import evaluations, read_scores
from artifacts.stage import read_run
from artifacts.trackers import PACKAGES, Curves, Tracker, require_package


@dataclass(frozen=True, kw_only=True)
class Args:
    run: Path = Path("runs/a3t")
    """Directory of the run."""
    to: Tracker
    """The tracker: tensorboard, wandb or trackio."""

    def check(self) -> None:
        require_package(f"--to {self.to}", PACKAGES[self.to])


def rounds(run: Path) -> dict[int, Path]:
    """{index: folder} of the run's rounds, in order; other folders, such as round_old, are not rounds."""
    found = ((re.fullmatch("round_(0|[1-9][0-9]*)", path.name), path) for path in run.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def round_lines(run: Path) -> list[dict[str, Any]]:
    """A line per round, in order, with the figures of its finished stages: {"step": 1, "rollout/success": 74,
    "evaluate/gen_valid-100/rate": 0.7, "base/evaluate/gen_valid-100/rate": ..., ...}."""
    lines: dict[int, dict[str, Any]] = defaultdict(dict)
    for round_index, folder in rounds(run).items():
        for stage in ("rollout", "actre", "train_pg"):
            if (done := folder / stage / "done.json").exists():
                counts = read_json(done, dict[str, Any])
                lines[round_index] |= {f"{stage}/{name}": value for name, value in counts.items() if name != "round"}
    for evaluation in evaluations(run):
        for subject, by_panel in read_scores(run, evaluation).items():
            round_index, prefix = (int(subject), "") if subject.isdecimal() else (0, f"{subject}/")
            for panel, score in by_panel.items():
                best = {f"best_of/{name}": value for name, value in (score["best_of"] or {}).items()}
                named = {f"{prefix}{evaluation}/{panel}/{name}": value for name, value in (score | best).items()}
                lines[round_index] |= named
    return [{"step": round_index} | lines[round_index] for round_index in sorted(lines)]


def track_rounds(run: Path, to: Tracker | None) -> bool:
    """Sends the curves over the rounds, if there is a tracker. Returns whether it took them."""
    if to is None:
        return True
    curves = Curves(to, run, "rounds", read_run(run), round_lines(run))
    curves.close()
    return not curves.failed


def track_steps(directory: Path, to: Tracker) -> bool:
    """Sends the curves of a train_pg directory. Returns whether the tracker took them."""
    curves = metrics_curves(to, directory)
    curves.close()
    return not curves.failed


def main(args: Args) -> None:
    if not args.run.is_dir():
        raise ValueError(f"no such run: {args.run}")
    trained = [folder / "train_pg" for folder in rounds(args.run).values()]
    sent = [track_steps(directory, args.to) for directory in trained if (directory / "metrics.jsonl").exists()]
    if round_lines(args.run):
        sent.append(track_rounds(args.run, args.to))
    if not sent:
        raise ValueError(f"{args.run} has no figures yet; python rollout.py --run {args.run} begins a round")
    if not all(sent):
        raise ValueError(f"{args.to} took {sum(sent)} of {len(sent)} sets of curves; see above, then run this again")
    print(f"{len(sent)} sets of curves of {args.run} -> {args.to}")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

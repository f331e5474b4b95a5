"""How often do composed trajectories succeed? The table of p, with and without ActRe, that A3T's reviewers asked for.

Plays a panel greedily with one policy, then retries the failed tasks with each setting, `trials` times each. p = 0 is
resampling alone. The claim behind the defaults of actre.py.

    python -m bench.composition --panel valid-60
    python -m bench.composition --panel valid-60 --run runs/a3t --round 1     # with round 0's adapter
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from agent.attempt import AttemptSettings, Compose, Job
from agent.local import LocalPolicy
from agent.loop import PlayLoop
from artifacts.cli import parse
from artifacts.scores import wilson
from artifacts.stage import adapter_of_round, run_main
from artifacts.trajectory import Trajectory
from envs.make import make_world
from envs.panel import pick_tasks


@dataclass(frozen=True, kw_only=True)
class Args:
    panel: str = "valid-60"
    """Panel whose failed tasks are retried."""
    limit: int | None = None
    """Play only so many tasks of the panel."""
    run: Path = Path("runs/a3t")
    """Run whose adapter plays."""
    round: int = 0
    """Round whose policy plays; 0 is the base."""
    probabilities: tuple[float, ...] = (0.0, 0.05, 0.1, 0.25, 0.5)
    """Values of p."""
    variants: tuple[str, ...] = ("commands/actre", "commands/template", "commands/empty", "verbs/actre")
    """sample/reason pairs, as actre.py's flags; p = 0 is measured with the first only."""
    trials: int = 2
    """Compositions per failed task and setting."""
    temperature: float = 1.0
    """Of the agent's own turns."""
    model: Path = Path("models/tiny-alfworld")
    """Base model."""
    data: str | None = None
    """The world's data."""
    max_turns: int = 20
    """Turns of an attempt."""
    patience: int = 3
    """Repetitions of a turn that end an attempt; 0: none does."""
    slots: int = 64
    """Attempts at once."""
    seed: int = 0
    """Seed of every draw."""


def main(args: Args) -> None:
    adapter = adapter_of_round(args.run, args.round)
    react, actre = (LocalPolicy(args.model, a, slots=args.slots, context=1024) for a in (adapter, None))
    tasks, _ = pick_tasks(args.panel, args.limit)

    def collect(jobs: Iterable[Job], temperature: float, compose: Compose | None) -> list[Trajectory]:
        settings = AttemptSettings(
            env="alfworld",
            stage="composition",
            round=args.round,
            seed=args.seed,
            temperature=temperature,
            max_turns=args.max_turns,
            patience=args.patience,
            compose=compose,
        )
        return list(PlayLoop(jobs, settings, lambda: make_world("alfworld", data=args.data), react, actre))

    alone = collect([Job(task, 0) for task in tasks], 0.0, None)
    failed = sorted(t.task_id for t in alone if not t.success)
    jobs = [Job(task, trial) for task in failed for trial in range(args.trials)]
    rows = []
    for p in args.probabilities:
        for variant in args.variants if p else args.variants[:1]:
            sample, reason = variant.split("/")
            done = collect(jobs, args.temperature, Compose(probability=p, sample=sample, reason=reason))
            won = [t for t in done if t.success]
            row = {
                "p": p,
                "sample": sample,
                "reason": reason,
                "success": len(won),
                "n": len(done),
                "wilson95": [round(x, 3) for x in wilson(len(won), len(done))],
                "solved": len({t.task_id for t in won}),
                "failed_tasks": len(failed),
            }
            rows.append(row)
            print(
                f"p {p:<5} {sample:<9}{reason:<9} {len(won):>3}/{len(done):<4} {100 * len(won) / len(done):5.1f} % "
                f"[{100 * row['wilson95'][0]:.1f}, {100 * row['wilson95'][1]:.1f}]  "
                f"{row['solved']}/{len(failed)} tasks solved"
            )
    print(json.dumps({"panel": args.panel, "alone": len(tasks) - len(failed), "n": len(tasks), "rows": rows}))


if __name__ == "__main__":
    run_main(main, parse(Args, __doc__))

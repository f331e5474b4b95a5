"""How often do composed trajectories succeed? The table over p, with and without ActRe, that A3T's reviewers requested.

Plays a panel greedily with one policy, then retries the failed tasks `trials` times under each setting. p = 0 only
resamples. Justifies the defaults of actre.py.

    python -m bench.composition --panel valid-60
    python -m bench.composition --panel valid-60 --run runs/a3t --round 1     # with round 0's adapter
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from agent.attempt import AttemptSettings, Compose, Job
from agent.local import LocalPolicy
from agent.loop import PlayLoop
from artifacts.cli import run_main
from artifacts.scores import wilson
from artifacts.stage import adapter_of_round
from artifacts.trajectory import Trajectory
from envs.make import make_world
from envs.panel import pick_tasks


@dataclass(frozen=True, kw_only=True)
class Args:
    panel: str = "valid-60"
    """Panel whose failed tasks are retried."""
    limit: int | None = None
    """Maximum number of tasks to play (default: the whole panel)."""
    run: Path = Path("runs/a3t")
    """Run whose adapter to use."""
    round: int = 0
    """Round whose policy to use; 0 is the base."""
    probabilities: tuple[float, ...] = (0.0, 0.05, 0.1, 0.25, 0.5)
    """Values of p."""
    variants: tuple[str, ...] = ("commands/actre", "commands/template", "commands/empty", "verbs/actre")
    """sample/reason pairs, named like actre.py's flags; p = 0 uses only the first."""
    trials: int = 2
    """Attempts per failed task and setting."""
    temperature: float = 1.0
    """Sampling temperature of the agent's own turns."""
    model: Path = Path("models/tiny-alfworld")
    """Base model."""
    data: str | None = None
    """Folder that holds json_2.1.1 (default: $ALFWORLD_DATA, else generated games)."""
    max_turns: int = 20
    """Maximum turns per attempt."""
    patience: int = 3
    """End an attempt after this many repetitions of a turn; 0: never."""
    slots: int = 64
    """Maximum concurrent attempts."""
    seed: int = 0
    """Seed of all sampling."""


def main(args: Args) -> None:
    adapter = adapter_of_round(args.run, args.round)
    react, actre = (LocalPolicy(args.model, a, slots=args.slots, context=1024) for a in (adapter, None))
    tasks, _ = pick_tasks(args.panel, args.limit)

    def play(jobs: Iterable[Job], temperature: float, compose: Compose | None) -> list[Trajectory]:
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

    greedy = play([Job(task, 0) for task in tasks], 0.0, None)
    failed = sorted(t.task_id for t in greedy if not t.success)
    jobs = [Job(task, trial) for task in failed for trial in range(args.trials)]
    rows = []
    for p in args.probabilities:
        for variant in args.variants if p else args.variants[:1]:
            sample, reason = variant.split("/")
            played = play(jobs, args.temperature, Compose(probability=p, sample=sample, reason=reason))
            successes = [t for t in played if t.success]
            row = {
                "p": p,
                "sample": sample,
                "reason": reason,
                "success": len(successes),
                "n": len(played),
                "wilson95": [round(x, 3) for x in wilson(len(successes), len(played))],
                "solved": len({t.task_id for t in successes}),
                "failed_tasks": len(failed),
            }
            rows.append(row)
            print(
                f"p {p:<5} {sample:<9}{reason:<9} {len(successes):>3}/{len(played):<4} "
                f"{100 * len(successes) / len(played):5.1f} % "
                f"[{100 * row['wilson95'][0]:.1f}, {100 * row['wilson95'][1]:.1f}]  "
                f"{row['solved']}/{len(failed)} tasks solved"
            )
    print(json.dumps({"panel": args.panel, "alone": len(tasks) - len(failed), "n": len(tasks), "rows": rows}))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

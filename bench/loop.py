"""Trajectories per hour of the play loop, with our ALFWorld engine and with TextWorld.

The tiny base plays the same games three times: with our engine, stepped in this process; with TextWorld in
subprocesses, two per core, as in `rollout.py --engine textworld`; and with TextWorld stepped in this process, where
every attempt waits while one world steps, as in loops without subprocesses. A warm-up with our engine keeps compilation
out of the figures; starting the subprocesses is included.

    python -m bench.loop          # minutes

Left out: larger models, whose share of the time is larger, and ActRe.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

from agent.attempt import AttemptSettings, Job
from agent.local import LocalPolicy
from agent.loop import PlayLoop
from artifacts.cli import run_main
from artifacts.trajectory import Trajectory
from envs.alfworld.world import AlfWorld
from envs.base import World
from envs.panel import default_panels, pick_tasks


@dataclass(frozen=True, kw_only=True)
class Args:
    games: int = 24
    """Games to play, spread evenly over the panel."""
    panel: str | None = None
    """Panel to play from (default: valid_seen-140 with real games, gen_valid-100 with generated ones)."""
    data: str | None = None
    """Folder that holds json_2.1.1 (default: $ALFWORLD_DATA, else generated games)."""
    model: Path = Path("models/tiny-alfworld")
    """Base model."""
    slots: int = 64
    """Maximum concurrent attempts."""


def inline(data: str | None) -> World:
    """TextWorld stepped in this process, like our engine."""
    world = AlfWorld(data=data, engine="textworld")
    world.isolated = False
    return world


def measure(name: str, make, tasks: list[str], args: Args) -> tuple[dict, list[Trajectory]]:
    """The rates of playing all tasks, and the trajectories."""
    policy = LocalPolicy(args.model, slots=args.slots)
    settings = AttemptSettings(env="alfworld", stage=name, round=0, seed=0, max_turns=20, patience=3, temperature=0.0)
    loop = PlayLoop([Job(task, 0) for task in tasks], settings, make, policy)
    trajectories = sorted(loop, key=lambda trajectory: trajectory.key)
    return loop.rates.summary(), trajectories


def main(args: Args) -> None:
    panel = args.panel or default_panels("evaluate", "alfworld", args.data)[0]
    tasks, _ = pick_tasks(panel, args.games)
    makers = {
        "ours": functools.partial(AlfWorld, data=args.data),
        "TextWorld": functools.partial(AlfWorld, data=args.data, engine="textworld"),
        "TextWorld, in this process": functools.partial(inline, args.data),
    }
    rates, played = {}, {}
    measure("warm-up", makers["ours"], tasks, args)
    for name, make in makers.items():
        rates[name], played[name] = measure(name, make, tasks, args)
    hourly = {name: rate["trajectories_per_hour"] for name, rate in rates.items()}
    ids = {name: [trajectory.ids for trajectory in trajectories] for name, trajectories in played.items()}
    same = all(engine_ids == ids["ours"] for engine_ids in ids.values())
    print(f"{len(tasks)} games of {panel}, {os.cpu_count()} cores; same ids in all three: {same}")
    for name, rate in rates.items():
        print(
            f"{name:<28}{hourly[name]:>8,.0f} trajectories/h, ours / this {hourly['ours'] / hourly[name]:6.1f}, "
            f"waiting for worlds {rate['waiting_for_worlds']:4.0%}, for the model {rate['waiting_for_model']:4.0%}"
        )
    print(
        json.dumps(
            {
                "bench": "loop",
                "panel": panel,
                "games": len(tasks),
                "same_ids": same,
                "rates": rates,
                "ratio": round(hourly["ours"] / hourly["TextWorld"], 1),
            }
        )
    )


if __name__ == "__main__":
    run_main(main, Args, __doc__)

"""Does memory stay flat while one process plays thousands of games?

Each game is generated for this run, so none repeats. They go through the play loop, 64 at a time, and into a
trajectories file, as in a stage. The player is a script (the demonstrator, with half of its actions replaced by random
ones) or the tiny base.

    python -m bench.soak                              # 2,000 games by the script, half a minute
    python -m bench.soak --player tiny                # by the tiny base, minutes

Memory is the resident set size after every 200 games (Linux). Left out: worlds in subprocesses, which are replaced
regularly (envs/process.py).
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import functools
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from agent.attempt import AttemptSettings, Compose, Job
from agent.local import LocalPolicy
from agent.loop import PlayLoop
from agent.scripted import DemonstratorScript, ScriptedPolicy
from artifacts.cli import run_main
from artifacts.trajectory import Writer
from envs.alfworld.generate import SEED, write_split
from envs.alfworld.rooms import family
from envs.alfworld.world import AlfWorld

EVERY = 200


@dataclass(frozen=True, kw_only=True)
class Args:
    games: int = 2000
    """Games to play."""
    player: Literal["script", "tiny"] = "script"
    """Player: the script or the tiny base."""
    seed: int = SEED
    """Seed of the games and of all sampling."""


def resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+([0-9]+) kB", status)[1]) / 1024


def main(args: Args) -> None:
    split, memory = f"{family()}_train", []
    with tempfile.TemporaryDirectory() as folder, Writer(Path(folder, "trajectories.jsonl")) as writer:
        write_split(Path(folder), split, args.seed, args.games)
        world = functools.partial(AlfWorld, data=folder)
        jobs = [Job(task, 0) for task in world().tasks(split)]
        policy = ScriptedPolicy(DemonstratorScript) if args.player == "script" else LocalPolicy("models/tiny-alfworld")
        compose = Compose(probability=0.5, reason="template") if args.player == "script" else None
        settings = AttemptSettings(
            env="alfworld",
            stage="soak",
            round=0,
            seed=args.seed,
            max_turns=20,
            patience=3,
            temperature=0.0,
            compose=compose,
        )

        loop = PlayLoop(jobs, settings, world, policy)
        for trajectory in loop:
            writer.write(trajectory)
            if len(writer.known) % EVERY == 0:
                memory.append(round(resident_mib(), 1))
                tqdm.write(f"{len(writer.known):>6} games  {memory[-1]:>8.1f} MiB")
    rates = loop.rates.summary()
    growth = round(memory[-1] - memory[0], 1)
    print(
        f"{args.player}: {len(jobs)} different games in one process, {rates['trajectories_per_hour']:,.0f} per hour; "
        f"{growth:+.1f} MiB from game {EVERY} to the last"
    )
    print(
        json.dumps(
            {
                "bench": "soak",
                "player": args.player,
                "games": len(jobs),
                "resident_mib": memory,
                "growth_mib": growth,
                "rates": rates,
            }
        )
    )


if __name__ == "__main__":
    run_main(main, Args, __doc__)

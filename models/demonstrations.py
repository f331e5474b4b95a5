"""Writes demonstrations of ALFWorld games as a finished stage, an input for train_pg.py.

    python -m models.demonstrations --out runs/refine/demo --count 600 --tell-commands
    python train_pg.py --run runs/refine --inputs runs/refine/demo

The scripted demonstrator plays generated games and, if the data is available, real ones; no game is in a panel. In the
place of a run's round_0/rollout, they are what round 0 trains on (`./run.sh smollm2`).

Left out: ActRe, careless players (models/pretrain.py trains on both).
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from tqdm import tqdm

from artifacts.cli import Range, run_main
from artifacts.stage import Stage
from artifacts.trajectory import write_file
from envs.alfworld.engine import COMMANDS
from envs.wording import told_commands
from models.corpus import alfworld
from models.corpus.args import CorpusArgs


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = Path("runs/refine/demo")
    """Directory of the stage."""
    count: Annotated[int, Range(1, 10**6)] = 600
    """Number of games."""
    tell_commands: bool = False
    """Append the list of commands to the first observation, as the flag of that name does in play."""
    displaced: Annotated[float, Range(0, 1)] = 0.0
    """Probability per turn of a random action, two in five of them refused, from which the player recovers. It is
    marked as a mistake, which train_pg.py masks (--refinement)."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seeds the games and their order."""


def main(args: Args) -> None:
    with Stage(args.out, args, {}) as stage:
        if not stage.finished:
            demonstrate(args, stage)


def demonstrate(args: Args, stage: Stage) -> None:
    corpus = CorpusArgs(generated=args.count, displaced=(args.displaced,), careless=(0.0,), seed=args.seed)
    games = itertools.islice(alfworld.demonstrations(corpus), args.count)
    trajectories = []
    for index, game in enumerate(tqdm(games, total=args.count, unit="game")):
        opening = game.first_observation
        opening = told_commands(opening, COMMANDS["0.4"]) if args.tell_commands else opening
        turns = [msgspec.structs.replace(t, errors=["logic"] * (t.action_by == "sampled")) for t in game.turns]
        trajectories.append(msgspec.structs.replace(game, first_observation=opening, turns=turns, trial=index))
    write_file(args.out / "trajectories.jsonl", trajectories)
    stage.finish({"trajectories": len(trajectories), "success": sum(t.success for t in trajectories)})
    print(f"{len(trajectories)} demonstrations -> {args.out}")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

"""Writes demonstrations of ALFWorld or WebShop as a finished stage, an input for train_pg.py.

    python -m models.demonstrations --out runs/refine/demo --count 600 --tell-commands
    python train_pg.py --run runs/refine --inputs runs/refine/demo

The scripted demonstrator plays generated games and, if the data is available, real ones; or buys what earns the whole
reward, from the real catalogue or else the generated one. No task is in a panel. In the place of a run's
round_0/rollout, they are what round 0 trains on (`./run.sh smollm2`).

Left out: ActRe, careless players (models/pretrain.py trains on both); demonstrations of a panel, or of a world of the
user's (rollout.py --script).
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from tqdm import tqdm

from artifacts.cli import Range, run_main
from artifacts.seeds import generator
from artifacts.stage import Stage
from artifacts.trajectory import Trajectory, write_file
from envs.alfworld.engine import COMMANDS
from envs.wording import told_commands
from models.corpus import alfworld, webshop
from models.corpus.args import CorpusArgs


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = Path("runs/refine/demo")
    """Directory of the stage."""
    env: Literal["alfworld", "webshop"] = "alfworld"
    """World."""
    count: Annotated[int, Range(1, 10**6)] = 600
    """Number of games, or purchases."""
    tell_commands: bool = False
    """(ALFWorld) Append the list of commands to the first observation, as the flag of that name does in play."""
    displaced: Annotated[float, Range(0, 1)] = 0.0
    """Probability per turn of a random action, in ALFWorld two in five of them refused, from which the player recovers.
    It is marked as a mistake, which train_pg.py masks (--refinement)."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seeds the games and their order."""

    def check(self) -> None:
        if self.tell_commands and self.env != "alfworld":
            raise ValueError("--tell-commands is for --env alfworld")


def main(args: Args) -> None:
    with Stage(args.out, args, {}) as stage:
        if not stage.finished:
            demonstrate(args, stage)


def purchases(corpus: CorpusArgs) -> Iterator[Trajectory]:
    """An endless stream of WebShop demonstrations that earn the whole reward, on real pages (models/corpus/webshop.py
    shortens and rewords them)."""
    world, products, _ = webshop.sources(corpus)[0]
    for index in itertools.count():
        rng = generator(corpus.seed, "purchase", index)
        goals = products[rng.integers(len(products))]
        purchase = webshop.demonstrate(world, goals[rng.integers(len(goals))], rng, corpus)
        if purchase is not None and purchase.success:
            yield purchase


def demonstrate(args: Args, stage: Stage) -> None:
    corpus = CorpusArgs(generated=args.count, displaced=(args.displaced,), careless=(0.0,), seed=args.seed)
    games = alfworld.demonstrations(corpus) if args.env == "alfworld" else purchases(corpus)
    trajectories = []
    for index, game in enumerate(tqdm(itertools.islice(games, args.count), total=args.count, unit="game")):
        opening = game.first_observation
        opening = told_commands(opening, COMMANDS["0.4"]) if args.tell_commands else opening
        turns = [msgspec.structs.replace(t, errors=["logic"] * (t.action_by == "sampled")) for t in game.turns]
        trajectories.append(msgspec.structs.replace(game, first_observation=opening, turns=turns, trial=index))
    write_file(args.out / "trajectories.jsonl", trajectories)
    stage.finish({"trajectories": len(trajectories), "success": sum(t.success for t in trajectories)})
    print(f"{len(trajectories)} demonstrations -> {args.out}")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

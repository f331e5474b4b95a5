"""The ALFWorld base's corpus: demonstrations of games that are in no panel.

The scripted demonstrator plays generated games and, if the data is available, real train games outside train-600 and
valid-60. It is careful or careless, and is displaced now and then by a random action (CorpusArgs).

    for trajectory in itertools.islice(demonstrations(CorpusArgs(generated=100)), 20): ...

Left out: rendering, weights and batches (models/pretrain.py).
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from artifacts.render import actre_segments, react_segments, text_of
from artifacts.seeds import generator
from artifacts.trajectory import Trajectory, Turn
from envs.alfworld.demonstrator import Demonstrator, kind
from envs.alfworld.engine import NOTHING, Game
from envs.alfworld.generate import generate_games
from envs.alfworld.world import AlfWorld
from envs.panel import excluded_ids
from models.corpus.args import CorpusArgs

LENGTHS = (256, 320, 384, 480, 640, 1024)  # row lengths: one text per row, padded to the next of these
SHORT = 384  # the longest text in the first third of the steps
READING = r"((?<=[a-z])(?:\.|, and the \w+ \d+)(?= I check| is ))"  # the first "." of "I need a mug. I check ...", etc.
# Pieces: list separators; words with their leading space, their number (so "mug 2" is copied as one token) and the
# harness's colon or bracket; and the newline, which ends a reply and must stay a separate token.
PRETOKENIZER = r", (?:and )?a(?![A-Za-z])| OK\.| ?[A-Za-z]+(?: \d+)?[:\[]?| ?\d+|\n|[^\sA-Za-z\d]+|\s"


def spellings(trajectory: Trajectory) -> list[str]:
    """The texts that the tokenizer is trained on."""
    return [text_of(react_segments(trajectory)), text_of(actre_segments(trajectory))]


class Source(NamedTuple):
    """Games to demonstrate on: their ids, a loader, and how often receptacle types hold object types in them."""

    task_ids: list[str]
    load: Callable[[str], Game]
    places: dict[str, dict[str, float]]


def count_places(games: Iterable[Game]) -> dict[str, dict[str, float]]:
    """places[object type][receptacle type]: the share of such receptacles that initially hold such an object."""
    total: Counter[str] = Counter()
    holding: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for game in games:
        for receptacle, objects in game.contents.items():
            receptacle_type = kind(game.names[receptacle])
            total[receptacle_type] += 1
            for object_type in {kind(game.names[o]) for o in objects}:
                holding[object_type][receptacle_type] += 1
    return {o: {r: round(n / total[r], 3) for r, n in places.items()} for o, places in holding.items()}


@functools.lru_cache(maxsize=1)
def sources(args: CorpusArgs) -> list[Source]:
    """Real train games that are in no panel, if their data is available, and generated games."""
    found = []
    folder = args.data or os.environ.get("ALFWORLD_DATA")
    if folder:
        excluded = excluded_ids()
        task_ids = [t for t in AlfWorld(data=folder).tasks("train") if t not in excluded]
        root = Path(folder).expanduser() / "json_2.1.1"
        found.append((task_ids, lambda task_id: Game(json.loads((root / task_id / "game.tw-pddl").read_bytes()))))
    games = {
        task_id: {k: game[k] for k in ("pddl_problem", "grammar")}
        for task_id, game, _ in generate_games(args.seed, "gen_demo", args.generated)
    }
    found.append((sorted(games), lambda task_id: Game(games[task_id])))
    return [
        Source(
            task_ids=task_ids,
            load=load,
            places=count_places(load(t) for t in tqdm(task_ids, desc="counting places", leave=False)),
        )
        for task_ids, load in found
        if task_ids
    ]


def displaced_action(rng: np.random.Generator, admissible: list[str], player: Demonstrator, last: str) -> str:
    """A random action in place of the demonstrator's: an admissible one, or now and then one that will not work."""
    if rng.random() < 0.4:
        here, there = rng.choice(player.receptacles, 2)
        wrong = [f"open {here}", f"go to {here}", f"examine {there}", last]
        if player.at:  # a tiny model's commonest mistake; rare here, so that a name in a text implies it was seen
            wrong += [f"take {player.target} {rng.integers(1, 4)} from {player.at}"]
        seen = sorted(thing for listed in player.contents.values() for thing in listed)
        if seen:
            wrong += [f"take {rng.choice(seen)} from {there}", f"move {rng.choice(seen)} to {here}"]
        wrong = [a for a in wrong if a and a not in admissible]
        if wrong:
            return str(rng.choice(wrong))
    if rng.random() < 0.5:  # draw the verb first: half of all commands are "go to"
        verb = rng.choice(sorted({a.split(" ")[0] for a in admissible}))
        admissible = [a for a in admissible if a.split(" ")[0] == verb]
    return str(rng.choice(admissible))


def careless_share(args: CorpusArgs, player: Demonstrator) -> float:
    """The share of careless players for this kind of task: one of `args.careless`, drawn for its type and object."""
    task_type = "look" if player.lamp else "two" if player.needed == 2 else (player.treatment or ("put",))[0]
    return float(generator(args.seed, "careless", task_type, player.target).choice(args.careless))


def demonstrate(
    game: Game, task_id: str, places: dict, rng: np.random.Generator, args: CorpusArgs
) -> Trajectory | None:
    """Plays one game with a demonstrator, displaced with one of `args.displaced`.

    Returns None if a careful player fails; a careless one that fails looks around twice and stops.
    """
    displaced = rng.choice(args.displaced)
    player = Demonstrator(game.text, places)
    player.careless = bool(rng.random() < careless_share(args, player))
    first, task, turns = game.text, game.task, []
    met, total = game.conditions()
    looks = 0
    while len(turns) < args.max_turns and met < total and looks < 2:
        looks += player.done
        thought, action = player.decide()
        action_by = "demo"
        if rng.random() < displaced:
            action = displaced_action(rng, game.actions(), player, turns[-1].action if turns else "")
            thought, action_by = player.explain(action), "sampled"
        reply = game.act(action)
        observation = NOTHING if reply is None else reply
        player.observe(action, observation)
        turns.append(
            Turn(
                thought=thought,
                action=action,
                observation=observation,
                thought_by="demo",
                action_by=action_by,
                valid=reply is not None,
            )
        )
        met, total = game.conditions()
    if not turns or (met < total and not player.done):
        return None
    return Trajectory(
        env="alfworld",
        split=task_id.split("/")[0],
        task_id=task_id,
        task=task,
        trial=0,
        round=0,
        seed=0,
        source="demo",
        first_observation=first,
        turns=turns,
        reward=float(met == total),
        progress=met / total,
        success=met == total,
        end="success" if met == total else "finished",
    )


def demonstrations(args: CorpusArgs) -> Iterator[Trajectory]:
    """An endless stream of demonstrations, determined by the seed, without any panel's task."""
    *real, generated = sources(args)
    for index in itertools.count():
        rng = generator(args.seed, "pretrain", index)
        source = generated if not real or rng.random() < args.generated_share else real[0]
        task_id = source.task_ids[rng.integers(len(source.task_ids))]
        trajectory = demonstrate(source.load(task_id), task_id, source.places, rng, args)
        if trajectory is not None:
            yield trajectory

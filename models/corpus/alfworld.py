"""What the ALFWorld base learns from: demonstrations of games that no panel holds.

Real train games outside train-600 and valid-60 (where there is data) and generated ones, played by the scripted
demonstrator, careful or careless. See CorpusArgs for what can be chosen.
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

LENGTHS = (256, 320, 384, 480, 640, 1024)  # one text a row, padded to the next of these
SHORT = 384  # the longest text of the first third of the steps
READING = r"((?<=[a-z])(?:\.|, and the \w+ \d+)(?= I check| is ))"  # of "I need a mug. I check ..." and its like
# Pieces: the separators of lists, words with their leading space, their number ("mug 2" can be copied in one glance)
# and the harness's colon or bracket, and the newline, which ends a reply and must stay a token of its own.
PRETOKENIZER = r", (?:and )?a(?![A-Za-z])| OK\.| ?[A-Za-z]+(?: \d+)?[:\[]?| ?\d+|\n|[^\sA-Za-z\d]+|\s"


def spellings(trajectory: Trajectory) -> list[str]:
    """What the tokenizer is made from."""
    return [text_of(react_segments(trajectory)), text_of(actre_segments(trajectory))]


class Source(NamedTuple):
    """Games to demonstrate on: their ids, how to load one, and where things lie in them."""

    task_ids: list[str]
    load: Callable[[str], Game]
    places: dict[str, dict[str, float]]


def count_places(games: Iterable[Game]) -> dict[str, dict[str, float]]:
    """places[object type][receptacle type]: the share of such receptacles that hold such an object at the start."""
    total: Counter[str] = Counter()
    holding: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for game in games:
        for receptacle, held in game.contents.items():
            where = kind(game.names[receptacle])
            total[where] += 1
            for thing in {kind(game.names[t]) for t in held}:
                holding[thing][where] += 1
    return {o: {r: round(n / total[r], 3) for r, n in places.items()} for o, places in holding.items()}


@functools.lru_cache(maxsize=1)
def sources(args: CorpusArgs) -> list[Source]:
    """Real train games that no panel holds (where there is data), and generated ones."""
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
        Source(ids, load, count_places(load(i) for i in tqdm(ids, desc="counting places", leave=False)))
        for ids, load in found
        if ids
    ]


def displaced_action(rng: np.random.Generator, admissible: list[str], player: Demonstrator, last: str) -> str:
    """An action that the demonstrator did not choose: an admissible one, or now and then one that will not work."""
    if rng.random() < 0.4:
        here, there = rng.choice(player.receptacles, 2)
        wrong = [f"open {here}", f"go to {here}", f"examine {there}", last]
        if player.at:  # a tiny model's commonest mistake; rare here, for a name in a text is to prove that it was seen
            wrong += [f"take {player.target} {rng.integers(1, 4)} from {player.at}"]
        seen = sorted(thing for listed in player.contents.values() for thing in listed)
        if seen:
            wrong += [f"take {rng.choice(seen)} from {there}", f"move {rng.choice(seen)} to {here}"]
        wrong = [a for a in wrong if a and a not in admissible]
        if wrong:
            return str(rng.choice(wrong))
    if rng.random() < 0.5:  # verbs first: half of all commands are "go to"
        verb = rng.choice(sorted({a.split(" ")[0] for a in admissible}))
        admissible = [a for a in admissible if a.split(" ")[0] == verb]
    return str(rng.choice(admissible))


def careless_share(args: CorpusArgs, player: Demonstrator) -> float:
    """How many players are careless at this kind of task: one of `args.careless`, drawn for its type and object."""
    type_of = "look" if player.lamp else "two" if player.needed == 2 else (player.treatment or ("put",))[0]
    return float(generator(args.seed, "careless", type_of, player.target).choice(args.careless))


def demonstrate(
    game: Game, task_id: str, places: dict, rng: np.random.Generator, args: CorpusArgs
) -> Trajectory | None:
    """Plays one game with a demonstrator, displaced with one of the probabilities.

    None if a careful one fails; a careless one who fails looks around twice and ends.
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
        by = "demo"
        if rng.random() < displaced:
            action = displaced_action(rng, game.actions(), player, turns[-1].action if turns else "")
            thought, by = player.explain(action), "sampled"
        answer = game.act(action)
        observation = NOTHING if answer is None else answer
        player.observe(action, observation)
        turns.append(Turn(thought, action, observation, "demo", by, answer is not None))
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
    """An endless stream of demonstrations, the same for the same seed; no panel's task among them."""
    *real, generated = sources(args)
    for number in itertools.count():
        rng = generator(args.seed, "pretrain", number)
        source = generated if not real or rng.random() < args.generated_share else real[0]
        task_id = source.task_ids[rng.integers(len(source.task_ids))]
        trajectory = demonstrate(source.load(task_id), task_id, source.places, rng, args)
        if trajectory is not None:
            yield trajectory

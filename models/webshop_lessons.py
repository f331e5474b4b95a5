"""What the WebShop base learns from: demonstrations of goals that no panel holds.

Goals of the real catalogue ($WEBSHOP_DATA or --data, where it is there) but for its test split, of the demo split of
the generated one, and all goals of generated ones with other seeds, bought by the scripted demonstrator, hasty or
careless. Many results pages are short: what to look for is found more easily among less. Read by models/pretrain.py,
whose Args say what can be chosen.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from attempt import sample_action
from envs.panel import excluded_ids
from envs.webshop import PAGE, WebShop
from envs.webshop_demonstrator import Demonstrator
from envs.webshop_generate import FOLDER, PRODUCTS, SEED, ensure_catalogue
from stage import generator
from trajectory import Trajectory, Turn, actre_segments, react_segments, text_of

if TYPE_CHECKING:
    from models.pretrain import Args

LENGTHS = (384, 512, 768, 1024, 1536, 2048, 3072)  # one text a row, padded to the next of these
SHORT = 768  # the longest text of the first third of the steps
READING = r"( it is (?:not )?here|, too much|\. I open it)"  # what a thought says of the thing it has just named
# Pieces: the separator, a product's id (alike whatever stands before it), words with their leading space, numbers,
# signs.
SPLIT = (r" \[SEP\]|\s(?=[A-Z\d]{10}\b)|[A-Z\d]{10}\b| OK\.| ?[A-Za-z]+(?:'[a-z]+)?[:\[]?| ?\d+|\n|\]+"
         r"| ?[^\sA-Za-z\d\]]|\s")  # fmt: skip
PAGES = (1, 2, 4, PAGE, PAGE)  # products on a results page; a demonstration draws one of them


def spellings(trajectory: Trajectory) -> list[str]:
    """What the tokenizer is made from: both texts, and the task's words without the blanks before them, as actions have
    them."""
    words = trajectory.task.replace(" ", "\n")
    return [text_of(react_segments(trajectory)), text_of(actre_segments(trajectory)), *4 * [words]]


@functools.lru_cache(maxsize=1)
def sources(args: Args) -> list[tuple[WebShop, list[str]]]:
    """(world, task ids) of the real catalogue, where there is one, and of the generated ones."""
    excluded, found = excluded_ids(), []
    folder = args.data or os.environ.get("WEBSHOP_DATA")
    if folder:
        world = WebShop(folder)
        splits = ("small_train", "small_demo", "small_valid")
        found.append((world, [task for split in splits for task in world.tasks(split) if task not in excluded]))
    for number in range(-(-args.generated // PRODUCTS)):
        folder = ensure_catalogue(FOLDER.with_name(f"{FOLDER.name}_{number}") if number else FOLDER, SEED + number)
        world = WebShop(str(folder))
        splits = ("gen_train", "gen_demo", "gen_valid", "gen_test") if number else ("gen_demo",)
        found.append((world, [task for split in splits for task in world.tasks(split) if task not in excluded]))
    return found


def careless_share(args: Args, player: Demonstrator) -> float:
    """How many players are careless at this kind of task: one of `args.careless`, drawn for the last word wanted."""
    return float(generator(args.seed, "careless", player.words[-1]).choice(args.careless))


def demonstrate(world: WebShop, task_id: str, rng: np.random.Generator, args: Args) -> Trajectory | None:
    """Buys for one goal, displaced with one of the probabilities. None if nothing is bought in time."""
    displaced = rng.choice(args.displaced)
    opening = world.reset(task_id)
    player = Demonstrator(opening.text)
    player.brief, player.reads = True, False
    player.careless = bool(rng.random() < careless_share(args, player))
    turns: list[Turn] = []
    result = None
    while len(turns) < args.max_turns and not (result and result.done):
        thought, action = player.decide()
        by = "demo"
        if rng.random() < displaced:
            action = sample_action(world.actions(), "verbs", rng, opening.task)
            thought, by = player.explain(action), "sampled"
        result = world.step(action)
        turns.append(Turn(thought, action, result.observation, "demo", by, result.valid))
        if not result.done:
            player.observe(action, result.observation)
    if not result.done:
        return None
    return Trajectory(
        env="webshop", split=task_id.split("/")[0], task_id=task_id, task=opening.task, trial=0, round=0, seed=0,
        source="demo", first_observation=opening.text, turns=turns, reward=result.reward, progress=result.progress,
        success=result.success, end="success" if result.success else "finished",
    )  # fmt: skip


def demonstrations(args: Args) -> Iterator[Trajectory]:
    """An endless stream of demonstrations, the same for the same seed; no panel's task among them."""
    worlds = sources(args)
    real = len(worlds) > -(-args.generated // PRODUCTS)
    for number in itertools.count():
        rng = generator(args.seed, "pretrain", number)
        first = real and rng.random() >= args.generated_share
        world, task_ids = worlds[0] if first else worlds[int(rng.integers(real, len(worlds)))]
        world.page = int(rng.choice(PAGES))
        trajectory = demonstrate(world, task_ids[rng.integers(len(task_ids))], rng, args)
        if trajectory is not None:
            yield trajectory

"""What the neutral base learns from: random walks in the worlds that refinement tuning trains on, without solutions.

Generated ALFWorld games and synthetic worlds, with their commands told, in which somebody tries one thing after the
other, mostly what the world accepts. So the base knows how a text goes on, and nothing of goals. No panel's task is
among them. Read by models/pretrain.py, whose Args say what can be chosen.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from attempt import template_reason
from envs.alfworld import AlfWorld
from envs.generate import family
from envs.panel import excluded_ids
from envs.synthetic import Synthetic
from envs.wording import TellCommands
from stage import generator
from trajectory import Trajectory, Turn, react_segments, text_of

if TYPE_CHECKING:
    from models.pretrain import Args

LENGTHS = (384, 512, 768, 1024, 1536)  # one text a row, padded to the next of these
SHORT = 768  # the longest text of the first third of the steps
READING = r"(?!)"  # no words weigh more
# Pieces: words with their leading space, numbers, signs; a template's braces keep their word apart.
SPLIT = r" OK\.| ?[A-Za-z]+[:\[]?| ?\d+|\n|\]+| ?[^\sA-Za-z\d\]]|\s"
TURNS = (4, 8, 12, 16)  # of a walk; a walk draws one of them
REFUSED = 0.15  # share of actions that are another world's


def spellings(trajectory: Trajectory) -> list[str]:
    """What the tokenizer is made from."""
    return [text_of(react_segments(trajectory))]


@functools.lru_cache(maxsize=1)
def sources() -> list[tuple[TellCommands, list[str]]]:
    """(world, task ids) of generated games and of synthetic worlds."""
    excluded = excluded_ids()
    worlds = ((AlfWorld(), f"{family()}_demo"), (Synthetic(), "syn_train"))
    return [(TellCommands(world), [task for task in world.tasks(split) if task not in excluded])
            for world, split in worlds]  # fmt: skip


def walk(world: TellCommands, task_id: str, strange: str, rng: np.random.Generator) -> Trajectory | None:
    """A random walk; none if it reaches the goal by chance. `strange`: an action of another world."""
    opening, turns = world.reset(task_id), []
    for _ in range(rng.choice(TURNS)):
        actions = [action for action in world.actions() if action != "help"]  # its answer is long
        action = strange if rng.random() < REFUSED else str(rng.choice(actions))
        result = world.step(action)
        turns.append(Turn(template_reason(action), action, result.observation, "teacher", "teacher", result.valid))
        if result.success:
            return None
    return Trajectory(
        env="neutral", split=task_id.split("/")[0], task_id=task_id, task=opening.task, trial=0, round=0, seed=0,
        source="demo", first_observation=opening.text, turns=turns, reward=0.0, progress=result.progress,
        success=False, end="max_turns",
    )  # fmt: skip


def demonstrations(args: Args) -> Iterator[Trajectory]:
    """An endless stream of walks, the same for the same seed; half of them in each source."""
    worlds, strange = sources(), "look"
    for number in itertools.count():
        rng = generator(args.seed, "walk", number)
        world, task_ids = worlds[rng.integers(len(worlds))]
        trajectory = walk(world, task_ids[rng.integers(len(task_ids))], strange, rng)
        if trajectory is not None:
            strange = trajectory.turns[-1].action
            yield trajectory

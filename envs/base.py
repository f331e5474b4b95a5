"""What every text world offers: tasks in, observations out.

A world is a plain object that plays one task at a time. Hundreds of them may be alive at once, so what is heavy is
loaded once and shared. The turn limit is the runner's business.
Left out: thoughts, prompts, and how an agent's line becomes an action.

Try one: python -m envs.play --env alfworld --tasks --split valid_seen
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the agent sees before its first action: the whole opening `text`, and the `task` (goal in words) alone."""

    text: str
    task: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one action brought.

    `observation`: the world's words, verbatim. `reward`: the world's own number, 0..1. `progress`: the largest share of
    the goal reached so far, 0..1, never falling. `success`: the task is solved. `done`: nothing more can be done.
    `valid`: the world accepted the action; if it did not, the state is as before.
    """

    observation: str
    reward: float
    progress: float
    success: bool
    done: bool
    valid: bool


class World(Protocol):
    """A text world. Not thread-safe: one world, one player. `isolated`: it is not ours, may be slow, hang or crash, and
    is therefore played in a process of its own (`envs/process.py`). `facts`: what a score must name beside panel and
    split, such as the size of a catalogue."""

    isolated: bool
    facts: dict[str, Any]

    def tasks(self, split: str) -> Sequence[str]:
        """Sorted, stable task ids of a split. Raises ValueError for a split that is not there."""
        ...

    def reset(self, task_id: str) -> Observation:
        """Start a task. Raises ValueError for an id that is in no split or a task that cannot be read."""
        ...

    def step(self, action: str) -> Result:
        """Do one action; no text raises. Raises RuntimeError before the first reset and after the task is done."""
        ...

    def actions(self) -> list[str]:
        """Every action that is accepted now, sorted. One that ends in an opening bracket, `search[`, stands for all
        that words and a closing bracket make of it. Raises RuntimeError before the first reset."""
        ...

    def commands(self) -> list[str]:
        """Templates of all that can be done in this task, here or elsewhere, in the world's wording and in a natural
        order: "take {object} from {receptacle}". Every action fits one. Raises RuntimeError before the first reset."""
        ...


def check_stamp(folder: Path, name: str, wanted: Any) -> None:
    """Raises ValueError unless generated data says, in its file `name`, that it was made as it is wanted."""
    stamp = folder / name
    found = json.loads(stamp.read_text()) if stamp.is_file() else "no record of how it was made"
    if found != wanted:
        raise ValueError(f"{folder} holds {found}, expected {wanted}: delete it or choose another folder")


def check_split(split: str, splits: Iterable[str]) -> None:
    """Raises ValueError, naming those that there are, unless the split is one of them."""
    if split not in splits:
        raise ValueError(f"no split {split!r}: expected one of {', '.join(splits)}")


def check_task(
    task_id: str, env: str, form: str, splits: Iterable[str], ids_of: Callable[[str], Sequence[str]]
) -> None:
    """Raises ValueError, naming the `form` of an id after its split, unless the id is one of its split's."""
    split = task_id.partition("/")[0]
    if split not in splits or task_id not in ids_of(split):
        raise ValueError(
            f"unknown task {task_id!r}: expected <split>/{form} with the splits {', '.join(splits)}; "
            f"`python -m envs.play --env {env} --tasks --split SPLIT` lists ids"
        )

"""The contract of every text world: tasks in, observations out.

A world is a plain object that plays one task at a time. Hundreds may be alive at once, so heavy data is loaded once and
shared. The runner enforces the turn limit.
Left out: thoughts, prompts, and parsing an agent's line into an action.

Try one: python -m envs.play --env alfworld --tasks --split valid_seen
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from artifacts.json_io import read_json


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the agent sees before its first action: the whole opening `text`, and the `task` in it (goal in words)."""

    text: str
    task: str

    def __post_init__(self):
        _require_types(self, text=str, task=str)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of one action.

    `observation`: the world's text, verbatim. `reward`: the world's own score, 0..1. `progress`: the largest share of
    the goal reached so far, 0..1, never decreasing. `success`: the task is solved. `done`: the task accepts no more
    actions. `valid`: the world accepted the action; a rejected action leaves the state unchanged. Raises TypeError for
    a value of another type, ValueError for a number outside its range.
    """

    observation: str
    reward: float
    progress: float
    success: bool
    done: bool
    valid: bool

    def __post_init__(self):
        _require_types(self, observation=str, reward=float, progress=float, success=bool, done=bool, valid=bool)
        if not (0 <= self.reward <= 1 and 0 <= self.progress <= 1):
            raise ValueError(f"got reward {self.reward} and progress {self.progress}; expected both from 0 to 1")


def _require_types(values: Any, **types: type) -> None:
    """Raises TypeError unless the fields have exactly these types; an int passes for a float."""
    for name, expected in types.items():
        found = type(getattr(values, name))
        if found is not expected and (found, expected) != (int, float):
            raise TypeError(f"{type(values).__name__}.{name} is {found.__name__}; expected {expected.__name__}")


class World(Protocol):
    """A text world. Not thread-safe: one player per world. docs/your-own-world.md has one to copy; `python -m
    envs.check` tells whether a world keeps this contract.

    `isolated`: third-party code that may be slow, hang or crash, so it runs in a subprocess (process.py). `facts`: what
    a score must state besides panel and split, such as the size of a catalogue.
    """

    isolated: bool
    facts: dict[str, Any]

    def tasks(self, split: str) -> Sequence[str]:
        """Sorted, stable task ids of a split. Raises ValueError for an unknown split."""
        ...

    def left_out(self, split: str) -> Mapping[str, str]:
        """{id: reason} of further tasks of a split, which are named but cannot be played. Raises ValueError for an
        unknown split."""
        ...

    def fingerprint(self, task_ids: Iterable[str]) -> str:
        """sha256 of the content of tasks, in any order: the same ids with other texts have another one. Works without
        a reset and starts no process. Raises ValueError for an unknown id."""
        ...

    def reset(self, task_id: str) -> Observation:
        """Start a task. Raises ValueError for an unknown id or a task that cannot be read."""
        ...

    def step(self, action: str) -> Result:
        """Take one action, any text. Raises RuntimeError before the first reset and after the task is done."""
        ...

    def actions(self) -> list[str]:
        """Every action accepted now, sorted. One ending in an opening bracket, `search[`, stands for its completions
        with any words and a closing bracket. Raises RuntimeError before the first reset."""
        ...

    def commands(self) -> list[str]:
        """Templates of all commands of this task, accepted now or later, in the world's wording and a natural order:
        "take {object} from {receptacle}". Every action matches one. Raises RuntimeError before the first reset."""
        ...


def ask(world: World, method: str, *args: Any) -> Any:
    """What a method of a world returns. Raises TypeError for what it may not return."""
    value = getattr(world, method)(*args)
    if expected := {"reset": Observation, "step": Result}.get(method):
        if not isinstance(value, expected):
            raise TypeError(f"{method} returned {value!r:.200}; expected an envs.base.{expected.__name__}")
    elif method == "actions" and not (isinstance(value, list) and value and all(isinstance(a, str) for a in value)):
        raise TypeError(f"actions returned {value!r:.200}; expected a list of one command or more")
    return value


_hashes_ids = ContextVar("hashes_ids", default=True)


def content_hash(task_ids: Iterable[str], content: Callable[[str], bytes]) -> str:
    """The sha256 in hex of tasks and of the content of each, whatever their order."""
    digest = hashlib.sha256()
    for task_id in sorted(set(task_ids)):
        name = hashlib.sha256(task_id.encode()).digest() if _hashes_ids.get() else b""
        digest.update(name + hashlib.sha256(content(task_id)).digest())
    return digest.hexdigest()


@contextmanager
def content_alone() -> Iterator[None]:
    """In here, content_hash leaves out the ids, so that the same task by two names has one fingerprint."""
    token = _hashes_ids.set(False)
    try:
        yield
    finally:
        _hashes_ids.reset(token)


def check_stamp(folder: Path, name: str, expected: Any) -> None:
    """Raises ValueError unless the file `name` in a folder of generated data records the expected settings."""
    stamp = folder / name
    found = read_json(stamp) if stamp.is_file() else "no record of how it was made"
    if found != expected:
        raise ValueError(f"{folder} holds {found}, expected {expected}: delete it or choose another folder")


def check_split(split: str, splits: Iterable[str]) -> None:
    """Raises ValueError, listing the known splits, for any other."""
    if split not in splits:
        raise ValueError(f"no split {split!r}: expected one of {', '.join(splits)}")


def check_task(
    task_id: str, env: str, form: str, splits: Iterable[str], ids_of: Callable[[str], Sequence[str]]
) -> None:
    """Raises ValueError for a task id that is not in its split; `form` describes an id after its split."""
    split = task_id.partition("/")[0]
    if split not in splits or task_id not in ids_of(split):
        raise ValueError(
            f"unknown task {task_id!r}: expected <split>/{form} with the splits {', '.join(splits)}; "
            f"`python -m envs.play --env {env} --tasks --split SPLIT` lists ids"
        )

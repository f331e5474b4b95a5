"""The playable ALFWorld games of a split, and why the others are left out.

A game is a folder `<split>/<task>/<trial>` with a `game.tw-pddl`. As in the stock loader, it is left out if its path
has `movable` or `Sliced`, if it has no `traj_data.json`, or unless its file says that it is solvable. An index file
keeps what the game files say, with the size and time of each, so that a start reads only games that are new or changed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import msgspec
from tqdm import tqdm

from artifacts.atomic import atomic_write
from artifacts.json_io import parse_json, read_json

TASK_TYPES = (
    "pick_and_place_simple",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "look_at_obj_in_light",
    "pick_two_obj_and_place",
)

INDEX_VERSION = 2
MOVABLE, NO_RECORD = "movable or sliced objects", "no traj_data.json"
UNSOLVABLE, UNMARKED = "marked unsolvable", "no `solvable` in its game.tw-pddl"

Table = dict[str, tuple[int, int, str]]  # id -> size and time of change of its game file; why that is left out, or ""


class Games(NamedTuple):
    """The games of a split: sorted ids of those that can be played, and {id: reason} of the others."""

    playable: tuple[str, ...]
    left_out: dict[str, str]


class Index(msgspec.Struct):
    """The index file's content."""

    version: int = INDEX_VERSION
    splits: dict[str, Table] = {}


def task_type(task_id: str) -> str:
    """The task's type, one of TASK_TYPES, from its folder name. Raises ValueError for an id of another form."""
    parts = task_id.split("/")
    kind = parts[1].split("-")[0] if len(parts) == 3 else ""
    if kind not in TASK_TYPES:
        raise ValueError(f"no task type in {task_id!r}: expected <split>/<type>-.../<trial>, type one of {TASK_TYPES}")
    return kind


def split_names(root: Path) -> list[str]:
    """The splits below `root`, a `json_2.1.1` folder, sorted."""
    return [name for name in _folders(root) if name[0] != "."]


@lru_cache
def cached_games(root: Path, split: str) -> Games:
    """`find_games`, once per process."""
    return find_games(root, split)


def find_games(root: Path, split: str) -> Games:
    """The games of a split below `root`, a `json_2.1.1` folder. Reads the game files that the index file does not know
    as they are now, and updates it.

    The index file is in `root` or, if that is read-only, below ~/.cache/a3t. Raises OSError for an unreadable folder.
    """
    name = hashlib.sha256(str(root).encode()).hexdigest()[:16]
    paths = (root / ".a3t_index.json", Path.home() / ".cache" / "a3t" / f"alfworld_{name}.json")
    indices = [_read_index(path) for path in paths]
    known = [index.splits.get(split, {}) for index in indices]
    table, left_out, unread = {}, {}, []
    for task_id, mark, complete in sorted(_scan(root, split)):
        if "movable" in task_id or "Sliced" in task_id:
            left_out[task_id] = MOVABLE
        elif not complete:
            left_out[task_id] = NO_RECORD
        elif entry := next((old for each in known if (old := each.get(task_id)) and old[:2] == mark), None):
            table[task_id] = entry
        else:
            unread.append((task_id, mark))
    for task_id, mark in tqdm(unread, desc=f"indexing {split}", unit="game", delay=1):
        table[task_id] = (*mark, _reason(root / task_id / "game.tw-pddl"))
    if table not in known:
        for path, index in zip(paths, indices, strict=True):  # if neither can be written, the next start reads again
            if _write_index(path, Index(splits=index.splits | {split: table})):
                break
    left_out |= {task_id: reason for task_id, (_, _, reason) in table.items() if reason}
    playable = sorted(task_id for task_id, (_, _, reason) in table.items() if not reason)
    return Games(playable=tuple(playable), left_out=dict(sorted(left_out.items())))


def _folders(path: str | Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _scan(root: Path, split: str) -> Iterator[tuple[str, tuple[int, int], bool]]:
    """(id, size and time of change of its game file, whether it has a traj_data.json) of every game of a split."""
    for task in _folders(root / split):
        for trial in _folders(root / split / task):
            folder = f"{root}/{split}/{task}/{trial}"
            try:
                game = os.stat(f"{folder}/game.tw-pddl")
            except FileNotFoundError:
                continue
            # Not st_mtime, which unpacking an archive resets.
            mark = (game.st_size, game.st_ctime_ns)
            yield f"{split}/{task}/{trial}", mark, os.path.isfile(f"{folder}/traj_data.json")


def _read_index(path: Path) -> Index:
    """An index file; an empty one if it is missing, corrupt or of another version."""
    try:
        index = read_json(path, Index)
    except (OSError, ValueError):
        return Index()
    return index if index.version == INDEX_VERSION else Index()


def _write_index(path: Path, index: Index) -> bool:
    """Whether the file could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(msgspec.json.encode(index))
    except OSError:
        return False
    return True


def _reason(file: Path) -> str:
    """Why the stock loader skips a game file, or "". A broken file is played, so that its reset reports it."""
    try:
        content = file.read_bytes()
        if marks := re.findall(rb'"solvable"\s*:\s*(true|false)', content):
            return "" if marks[-1] == b"true" else UNSOLVABLE
        parse_json(content)
    except (OSError, ValueError):
        return ""
    return UNMARKED

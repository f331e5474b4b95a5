"""The playable ALFWorld games: their task ids and types, cached in an index file.

It lists the games that the stock loader lists: none with `movable` or `Sliced` in its path, none marked unsolvable.
With the index file a start need not read thousands of games.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from artifacts.atomic import atomic_write

TASK_TYPES = (
    "pick_and_place_simple",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "look_at_obj_in_light",
    "pick_two_obj_and_place",
)

INDEX_VERSION = 1


def task_type(task_id: str) -> str:
    """The task's type, one of TASK_TYPES, from its folder name. Raises ValueError for an id of another form."""
    parts = task_id.split("/")
    kind = parts[1].split("-")[0] if len(parts) == 3 else ""
    if kind not in TASK_TYPES:
        raise ValueError(f"no task type in {task_id!r}: expected <split>/<type>-.../<trial>, type one of {TASK_TYPES}")
    return kind


@lru_cache
def cached_index(root: Path) -> dict[str, tuple[str, ...]]:
    """`load_index`, once per process."""
    return load_index(root)


def load_index(root: Path) -> dict[str, tuple[str, ...]]:
    """The playable task ids of every split below `root` (a `json_2.1.1` folder), from the index file or a scan.

    The index file is in `root` or, if that is read-only, below ~/.cache/a3t. A split is scanned again if task or trial
    folders were added or removed (`_split_mark`), or if no index can be read. Changes inside a trial folder are not
    noticed: delete the index after them.
    """
    name = hashlib.sha256(str(root).encode()).hexdigest()[:16]
    paths = (root / ".a3t_index.json", Path.home() / ".cache" / "a3t" / f"alfworld_{name}.json")
    found = [_read_index(path) for path in paths]
    index = {}
    for split in sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."):
        mark = _split_mark(root / split)
        kept = [entry for splits in found if (entry := splits.get(split)) and entry["mark"] == mark]
        index[split] = kept[0] if kept else {"mark": mark, "ids": scan_split(root, split)}
    if index not in found:
        text = json.dumps({"version": INDEX_VERSION, "splits": index})
        for path in paths:  # if neither can be written, the next start scans again
            if _write_index(path, text):
                break
    return {split: tuple(entry["ids"]) for split, entry in index.items()}


def _split_mark(folder: Path) -> list[int]:
    """Changes when a task or trial folder is added or removed. Not st_mtime: unpacking an archive resets it."""
    changed = [entry.stat().st_ctime_ns for entry in os.scandir(folder) if entry.is_dir()]
    return [len(changed), max(changed, default=0), folder.stat().st_ctime_ns]


def _read_index(path: Path) -> dict[str, dict]:
    """The splits in an index file; none if it is missing, corrupt or of another version."""
    try:
        content = json.loads(path.read_bytes())
        splits = content["splits"].items() if content["version"] == INDEX_VERSION else ()
        return {split: {"mark": list(entry["mark"]), "ids": list(map(str, entry["ids"]))} for split, entry in splits}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_index(path: Path, text: str) -> bool:
    """Whether the file could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(text)
    except OSError:
        return False
    return True


def scan_split(root: Path, split: str) -> list[str]:
    """Sorted ids of the playable games in a split's folders."""
    folders = [file.parent for file in (root / split).glob("*/*/game.tw-pddl")]
    ids = sorted(folder.relative_to(root).as_posix() for folder in folders if (folder / "traj_data.json").is_file())
    kept = [task_id for task_id in ids if "movable" not in task_id and "Sliced" not in task_id]
    bar = tqdm(kept, desc=f"indexing {split}", unit="game", delay=1)
    return [task_id for task_id in bar if _playable(root / task_id / "game.tw-pddl")]


def _playable(file: Path) -> bool:
    """Whether the stock loader plays the game. A broken file counts as playable, so that its reset reports it."""
    try:
        content = file.read_bytes()
        marks = re.findall(rb'"solvable"\s*:\s*(true|false)', content)
        if marks:
            return marks[-1] == b"true"
        json.loads(content)
    except (OSError, ValueError):
        return True
    return False  # valid JSON without the mark: the stock loader skips it

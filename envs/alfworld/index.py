"""Which ALFWorld games there are: task ids, their types, and the index file that lists the playable ones.

Games are listed as the stock loader lists them: paths with `movable` or `Sliced`, and games marked unsolvable, are left
out. The index file spares a start from reading thousands of files."""

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

_INDEX_VERSION = 1


def task_type(task_id: str) -> str:
    """The task's type, one of TASK_TYPES, from its folder's name. ValueError for an id of another form."""
    parts = task_id.split("/")
    kind = parts[1].split("-")[0] if len(parts) == 3 else ""
    if kind not in TASK_TYPES:
        raise ValueError(f"no task type in {task_id!r}: expected <split>/<type>-.../<trial>, type one of {TASK_TYPES}")
    return kind


@lru_cache
def _index(root: Path) -> dict[str, tuple[str, ...]]:
    return load_index(root)


def load_index(root: Path) -> dict[str, tuple[str, ...]]:
    """The playable task ids of every split below `root` (a `json_2.1.1` folder), from the index file or by a scan.

    The index lies in `root` or, where that cannot be written, below ~/.cache/a3t. A split is scanned when task or trial
    folders have come or gone since (see `_split_mark`) and when no index can be read. A game that changes inside an
    existing trial folder is not noticed: delete the index then.
    """
    name = hashlib.sha256(str(root).encode()).hexdigest()[:16]
    places = (root / ".a3t_index.json", Path.home() / ".cache" / "a3t" / f"alfworld_{name}.json")
    found = [_read_index(place) for place in places]
    index = {}
    for split in sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."):
        mark = _split_mark(root / split)
        kept = [entry for splits in found if (entry := splits.get(split)) and entry["mark"] == mark]
        index[split] = kept[0] if kept else {"mark": mark, "ids": _scan_split(root, split)}
    if index not in found:
        text = json.dumps({"version": _INDEX_VERSION, "splits": index})
        for place in places:  # where neither can be written, the next start scans again
            if _write_index(place, text):
                break
    return {split: tuple(entry["ids"]) for split, entry in index.items()}


def _split_mark(folder: Path) -> list[int]:
    """Changes when a task or trial folder comes or goes. Not st_mtime: unpacking an archive sets that back."""
    changed = [entry.stat().st_ctime_ns for entry in os.scandir(folder) if entry.is_dir()]
    return [len(changed), max(changed, default=0), folder.stat().st_ctime_ns]


def _read_index(place: Path) -> dict[str, dict]:
    """What an index file holds; nothing where it is missing, corrupt or of another version."""
    try:
        content = json.loads(place.read_bytes())
        splits = content["splits"].items() if content["version"] == _INDEX_VERSION else ()
        return {split: {"mark": list(entry["mark"]), "ids": list(map(str, entry["ids"]))} for split, entry in splits}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_index(place: Path, text: str) -> bool:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(place) as temporary:
            temporary.write_text(text)
    except OSError:
        return False
    return True


def _scan_split(root: Path, split: str) -> list[str]:
    folders = [file.parent for file in (root / split).glob("*/*/game.tw-pddl")]
    ids = sorted(folder.relative_to(root).as_posix() for folder in folders if (folder / "traj_data.json").is_file())
    kept = [task_id for task_id in ids if "movable" not in task_id and "Sliced" not in task_id]
    bar = tqdm(kept, desc=f"indexing {split}", unit="game", delay=1)
    return [task_id for task_id in bar if _playable(root / task_id / "game.tw-pddl")]


def _playable(file: Path) -> bool:
    """Whether the stock loader plays it. A broken file counts too: it is no silent gap, as its reset names it."""
    try:
        content = file.read_bytes()
        marks = re.findall(rb'"solvable"\s*:\s*(true|false)', content)
        if marks:
            return marks[-1] == b"true"
        json.loads(content)
    except (OSError, ValueError):
        return True
    return False  # whole, but never checked: the stock loader skips it

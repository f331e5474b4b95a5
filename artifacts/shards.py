"""Shards: the shares of a stage's tasks that processes on several machines play in a folder that they all see.

    python rollout.py --shard 1/2        # and, on another machine, --shard 2/2

    runs/a3t/round_0/shards/rollout.1-of-2/    a stage of its own: killed, it resumes with its own command
    runs/a3t/round_0/rollout/                  made by the shard that finishes last, as if one process had played all

Left out: starting the processes, and training on several machines (lora/sharding.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from artifacts.json_io import read_json
from artifacts.stage import Busy, Stage, StageError, differences
from artifacts.trajectory import FAULTS, Writer, read_trajectories

T = TypeVar("T")


def parse_shard(shard: str) -> tuple[int, int]:
    """(2, 4) for "2/4". Raises ValueError for anything but a share of so many."""
    found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", shard)
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
        raise ValueError(f"--shard is {shard!r}; expected the number of this share and that of all, such as 2/4")
    return index, count


def share(tasks: Sequence[T], shard: str | None) -> list[T]:
    """Every n-th task, beginning with the shard's; all without a shard."""
    index, count = parse_shard(shard) if shard else (1, 1)
    return list(tasks[index - 1 :: count])


def shard_directory(whole: Path, shard: str | None) -> Path:
    """Where a shard of the stage directory `whole` is played; `whole` itself without a shard."""
    return whole.parent / "shards" / f"{whole.name}.{shard.replace('/', '-of-')}" if shard else whole


def open_shard(whole: Path, args: Any, facts: dict[str, Any], identity: dict[str, Any]) -> Stage:
    """The stage that args.shard plays: its own, or the whole without a shard, or where the whole is finished."""
    shard = None if (whole / "done.json").exists() else args.shard
    return Stage(shard_directory(whole, shard), args, facts, identity)


def finish_shards(whole: Path, shard: str | None, finish: Callable[[], Any]) -> None:
    """Calls `finish`, which does the stage `whole` without shards, once all shards of this division are finished."""
    if not shard or (whole / "done.json").exists():
        return
    _, count = parse_shard(shard)
    names = [f"{index}/{count}" for index in range(1, count + 1)]
    missing = [name for name in names if not (shard_directory(whole, name) / "done.json").exists()]
    if missing:
        print(f"{whole}: shard {shard} is finished, not yet {', '.join(missing)}; the last one to finish joins them")
        return
    try:
        finish()
    except Busy:
        print(f"{whole}: another shard joins them")


def adopt(stage: Stage, writer: Writer) -> dict[str, Any]:
    """Adds the trajectories of finished shards to the file of the whole stage, but for those that ended in a fault,
    which are played again. Returns an entry for its done.json: that of each shard, if there are any. Raises StageError
    for a shard that was played with other settings."""
    whole, counts = stage.directory, {}
    for done in sorted(whole.parent.glob("shards/*/done.json")):
        folder = done.parent
        if not re.fullmatch(rf"{re.escape(whole.name)}\.[0-9]+-of-[0-9]+", folder.name):
            continue
        if differing := differences(read_json(folder / "config.json", dict[str, Any]), stage.config, stage.args):
            raise StageError(
                f"{folder} was played with other settings ({'; '.join(differing)}). Use those settings, or remove it."
            )
        for trajectory in read_trajectories(folder / "trajectories.jsonl"):
            if trajectory.end not in FAULTS and trajectory.key not in writer.known:
                writer.write(trajectory)
        counts[folder.name] = read_json(done, dict[str, Any])
    return {"shards": counts} if counts else {}

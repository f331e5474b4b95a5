"""The record that all stages share: one attempt at a task, one JSON line of `trajectories.jsonl` (schema 1).

A trajectory is the world's first observation, then turns of (thought, action, observation). render.py turns it into
text, packing.py into token ids and weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from artifacts.atomic import atomic_write

SCHEMA = 1
End = Literal["success", "finished", "stuck", "max_turns", "context_full", "env_error", "llm_error", "timeout"]
FAULTS = ("env_error", "llm_error", "timeout")  # kept as evidence; neither training data nor failures of the agent


class Turn(msgspec.Struct, forbid_unknown_fields=True):
    """One turn. `observation` is what the world returned AFTER `action`."""

    thought: str
    action: str
    observation: str
    thought_by: Literal["react", "actre", "demo", "teacher"]
    action_by: Literal["react", "sampled", "demo", "teacher"]
    valid: bool
    errors: list[Literal["parameter", "place", "logic"]] = []


class Trajectory(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One attempt at one task; docs/artifacts.md explains the fields."""

    schema: int = SCHEMA
    env: str
    split: str
    task_id: str
    task: str
    trial: int
    round: int
    seed: int
    source: Literal["react", "actre", "demo", "refine"]
    first_observation: str
    turns: list[Turn]
    reward: Annotated[float, msgspec.Meta(ge=0, le=1)]
    progress: Annotated[float, msgspec.Meta(ge=0, le=1)]
    success: bool
    end: End
    ids: list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]] = []
    sampled: list[Annotated[int, msgspec.Meta(ge=0, le=1)]] = []  # 1 where the model sampled the token, 0 elsewhere

    @property
    def key(self) -> tuple[str, int]:
        return self.task_id, self.trial


# ---- reading and writing ---------------------------------------------------------------------------------------------

_decoder = msgspec.json.Decoder(Trajectory)
_encoder = msgspec.json.Encoder()


def read_trajectories(path: str | Path, *, partial: bool = False) -> Iterator[Trajectory]:
    """Yields the trajectories of a JSONL file in order.

    Only the byte 0x0A ends a line: U+2028 and the like are ordinary text inside a string. Raises ValueError with
    file:line for anything but a complete record of this schema, and for a second one of the same task and trial. With
    partial=True a last line that is cut, as a stage leaves it that is at work or was killed, is left out.
    """
    known: set[tuple[str, int]] = set()
    with open(path, "rb") as file:
        for index, line in enumerate(file, 1):
            if partial and not line.endswith(b"\n"):
                return
            trajectory = parse_line(line, f"{path}:{index}")
            if trajectory.key in known:
                raise ValueError(
                    f"{path}:{index}: a second row of {trajectory.task_id} trial {trajectory.trial}; expected one: did "
                    "two processes write this file? Remove the directory and run its stage again"
                )
            known.add(trajectory.key)
            yield trajectory


def trajectory_files(run: str | Path) -> list[Path]:
    """Every trajectories.jsonl below a folder, round 10 after round 9. Those of shards only until they are joined."""

    def natural(path: Path) -> list[tuple[str, int]]:
        return [(text, int(number or 0)) for text, number in re.findall(r"([^0-9]*)([0-9]*)", str(path))]

    def is_joined(path: Path) -> bool:
        shards, name = path.parent.parent, re.sub(r"\.[0-9]+-of-[0-9]+$", "", path.parent.name)
        return shards.name == "shards" and (shards.parent / name / path.name).exists()

    return sorted((path for path in Path(run).glob("**/trajectories.jsonl") if not is_joined(path)), key=natural)


def parse_line(line: bytes, where: str) -> Trajectory:
    """Parses one JSONL line. Raises ValueError with `where` (file:line) and what is wrong."""
    if not line.endswith(b"\n"):
        raise ValueError(f"{where}: the line is cut off (no newline at its end); rerun the stage that writes it")
    try:
        trajectory = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not a trajectory record: {error}") from error
    if trajectory.schema != SCHEMA:
        raise ValueError(f"{where}: schema {trajectory.schema}, but this code reads schema {SCHEMA}")
    if len(trajectory.ids) != len(trajectory.sampled):
        raise ValueError(f"{where}: {len(trajectory.ids)} ids but {len(trajectory.sampled)} sampled flags")
    return trajectory


def to_line(trajectory: Trajectory) -> bytes:
    return _encoder.encode(trajectory) + b"\n"


class Writer:
    """Appends one flushed line per trajectory, so that a killed stage loses at most the line in flight.

    `with Writer(path) as writer: writer.write(trajectory)`. Opening an existing file drops an unterminated last line,
    and rows that ended in a fault, which are played again; `writer.known` holds the remaining (task_id, trial) keys.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.known: set[tuple[str, int]] = set()
        if self.path.exists():
            data = self.path.read_bytes()
            complete = data.rfind(b"\n") + 1
            if complete < len(data):
                os.truncate(self.path, complete)
            found = list(read_trajectories(self.path))
            kept = [trajectory for trajectory in found if trajectory.end not in FAULTS]
            if len(kept) < len(found):
                write_file(self.path, kept)
                print(f"{self.path}: {len(found) - len(kept)} trajectories ended in a fault and are played again")
            self.known = {trajectory.key for trajectory in kept}
        self._file = open(self.path, "ab")

    def write(self, trajectory: Trajectory) -> None:
        if trajectory.key in self.known:
            raise ValueError(f"{self.path}: {trajectory.key} is already there; a (task_id, trial) is written once")
        self._file.write(to_line(trajectory))
        self._file.flush()
        self.known.add(trajectory.key)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def sort_file(path: str | Path) -> list[Trajectory]:
    """Atomically rewrites a finished file sorted by (task_id, trial), and returns its trajectories."""
    trajectories = sorted(read_trajectories(path), key=lambda t: t.key)
    write_file(path, trajectories)
    return trajectories


def write_file(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Atomically writes a file of trajectories."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"".join(map(to_line, trajectories)))

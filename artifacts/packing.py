"""Token weights, packed rows, and the files that record what was trained on (packed.npz, packed.jsonl).

Shapes: N packed rows, L tokens.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from artifacts.atomic import atomic_write
from artifacts.json_io import parse_json
from artifacts.tokens import Tokens
from artifacts.trajectory import Trajectory, read_trajectories


def token_weights(
    tokens: Tokens, value: float, *, world_weight: float = 1.0, masked: Collection[int] = ()
) -> list[float]:
    """One weight per token: `value` on the whole trajectory, observations included (A3T, Eq. 1).

    world_weight: factor on the tokens that the world wrote. masked: turns with weight 0 (AgentRefine: mistakes).
    """
    return [
        0.0 if turn in masked else value * (1.0 if agent else world_weight)
        for agent, turn in zip(tokens.agent, tokens.turn, strict=True)
    ]


# ---- packing ---------------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Rows of whole trajectories: ids_NL int32, segments_NL int32 (1, 2, ...; 0 = padding), weights_NL float32, and the
    (row, segment) of each trajectory, in the order given."""

    ids_NL: np.ndarray
    segments_NL: np.ndarray
    weights_NL: np.ndarray
    positions: list[tuple[int, int]]


def pack(sequences: Sequence[tuple[Sequence[int], Sequence[float]]], length: int) -> Packed:
    """Packs (ids, weights) into rows of `length` tokens, longest first, each into the first row with room.

    Deterministic. Raises ValueError if a sequence is longer than a row.
    """
    too_long = [len(ids) for ids, _ in sequences if len(ids) > length]
    if too_long:
        raise ValueError(
            f"{len(too_long)} trajectories of up to {max(too_long)} tokens do not fit rows of {length}; "
            "raise --row-length"
        )
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda i: (-len(sequences[i][0]), i)):
        size = len(sequences[index][0])
        row = next((r for r, free in enumerate(room) if free >= size), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(length)
        rows[row].append(index)
        room[row] -= size
    shape = (len(rows), length)
    packed = Packed(
        ids_NL=np.zeros(shape, np.int32),
        segments_NL=np.zeros(shape, np.int32),
        weights_NL=np.zeros(shape, np.float32),
        positions=[],
    )
    positions: dict[int, tuple[int, int]] = {}
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, 1):
            ids, weights = sequences[index]
            stop = start + len(ids)
            packed.ids_NL[row, start:stop] = ids
            packed.weights_NL[row, start:stop] = weights
            packed.segments_NL[row, start:stop] = segment
            positions[index] = (row, segment)
            start = stop
    return packed._replace(positions=[positions[i] for i in range(len(sequences))])


# ---- files -----------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A training trajectory, its weight, and the file and line that it was read from."""

    trajectory: Trajectory
    weight: float
    file: str
    line: int


class Place(msgspec.Struct):
    """A line of packed.jsonl: a packed trajectory, its weight, and where it was read from."""

    row: int
    segment: int
    weight: float
    file: str
    line: int


def places_of(packed: Packed, examples: Sequence[Example]) -> list[Place]:
    """The examples in the order of rows and segments."""
    places = [
        Place(row=row, segment=segment, weight=e.weight, file=e.file, line=e.line)
        for (row, segment), e in zip(packed.positions, examples, strict=True)
    ]
    return sorted(places, key=lambda place: (place.row, place.segment))


def read_examples(directory: Path, name: str) -> list[Example]:
    """The trajectories of a stage's directory, without weights yet; `name` stands for the file in packed.jsonl."""
    numbered = enumerate(read_trajectories(directory / "trajectories.jsonl"), 1)
    return [Example(trajectory=trajectory, weight=0.0, file=name, line=line) for line, trajectory in numbered]


def require_trajectories(directory: Path) -> Path:
    """The directory, given by --inputs. Raises ValueError if it has no trajectories, with the folders in it that do."""
    if not (directory / "trajectories.jsonl").exists():
        inside = [*directory.glob("*/trajectories.jsonl"), *directory.glob("*/*/trajectories.jsonl")][:4]
        meant = f"did you mean {' or '.join(str(path.parent) for path in inside)}?" if inside else "expected a stage"
        raise ValueError(f"--inputs {directory} has no trajectories.jsonl; {meant}")
    return directory


def save_packed(directory: Path, packed: Packed, examples: Sequence[Example]) -> None:
    """Writes packed.npz, and packed.jsonl with the source of each (row, segment)."""
    with atomic_write(directory / "packed.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, ids_NL=packed.ids_NL, segments_NL=packed.segments_NL, weights_NL=packed.weights_NL)
    lines = [json.dumps(msgspec.structs.asdict(place)) + "\n" for place in places_of(packed, examples)]
    with atomic_write(directory / "packed.jsonl") as temporary:
        temporary.write_text("".join(lines))


def load_packed(directory: Path) -> tuple[Packed, list[Place]]:
    """What `save_packed` wrote. Raises ValueError, with the file's name, for files that are damaged."""
    path = directory / "packed.jsonl"
    lines = path.read_bytes().splitlines()
    places = [parse_json(line, Place, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    path = directory / "packed.npz"
    try:
        with np.load(path) as arrays:
            ids_NL, segments_NL, weights_NL = (arrays[f"{name}_NL"] for name in ("ids", "segments", "weights"))
        if not all(0 <= place.row < len(ids_NL) for place in places):
            raise ValueError(f"it has {len(ids_NL)} rows, packed.jsonl names others")
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a whole file of packed rows ({error}); restore it, or train again") from error
    positions = [(place.row, place.segment) for place in places]
    return Packed(ids_NL=ids_NL, segments_NL=segments_NL, weights_NL=weights_NL, positions=positions), places

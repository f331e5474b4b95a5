"""Token weights, packed rows, and the files that record what was trained on (packed.npz, packed.jsonl).

Shapes: N packed rows, L tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from artifacts.atomic import atomic_write
from artifacts.render import react_segments
from artifacts.trajectory import Trajectory


class Tokens(NamedTuple):
    """ids [L], agent [L] (1 on thoughts, actions and their line ends, whoever wrote them), turn [L] (-1: opening)."""

    ids: list[int]
    agent: list[int]
    turn: list[int]


def tokens_of(trajectory: Trajectory, encode: Callable[[str, bool], list[int]]) -> Tokens:
    """The trajectory's token ids, each with its author and turn.

    `ids` are the played ids if the record has them. A text-only record is rendered and encoded segment by segment;
    `first` marks the first one in `encode(text, first)` (lora.tokenizer.encode_piece). Raises ValueError if the played
    ids do not spell the record's text.
    """
    ids, agent, turn = [], [], []
    played, sampled = trajectory.ids, trajectory.sampled
    for segment in react_segments(trajectory):
        start = len(ids)
        if played and start == len(played):
            break  # the context was full before this segment
        if played and segment.agent and sampled[start]:
            end = start
            while end < len(played) and sampled[end]:
                end += 1
            piece = played[start:end]
            newline = encode("\n", False)  # the harness ends a reply that its token limit cut off
            if played[end : end + len(newline)] == newline and piece[-len(newline) :] != newline:
                piece = piece + newline
        else:
            piece = encode(segment.text, not ids)
            if played and played[start : start + len(piece)] != piece:
                raise ValueError(
                    f"{trajectory.task_id} trial {trajectory.trial}: the ids from position {start} do not spell "
                    f"{segment.text[:60]!r}; were they played with another tokenizer?"
                )
        ids += piece
        agent += [int(segment.agent)] * len(piece)
        turn += [segment.turn] * len(piece)
    return Tokens(ids=ids, agent=agent, turn=turn)


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


# ---- examples --------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A training trajectory, its weight, and the file and line that it was read from."""

    trajectory: Trajectory
    weight: float
    file: str
    line: int


def save_packed(directory: Path, packed: Packed, examples: list[Example]) -> None:
    """Writes packed.npz, and packed.jsonl with the source of each (row, segment)."""
    with atomic_write(directory / "packed.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, ids_NL=packed.ids_NL, segments_NL=packed.segments_NL, weights_NL=packed.weights_NL)
    lines = [
        {"row": row, "segment": segment, "weight": e.weight, "file": e.file, "line": e.line}
        for (row, segment), e in zip(packed.positions, examples, strict=True)
    ]
    lines.sort(key=lambda line: (line["row"], line["segment"]))
    with atomic_write(directory / "packed.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def preview(packed: Packed, examples: list[Example], decode: Callable[[list[int]], str], count: int) -> None:
    """Prints packed trajectories, coloured by weight: green +, red -, plain 0."""
    for (row, segment), example in list(zip(packed.positions, examples, strict=True))[:count]:
        print(f"--- row {row} segment {segment}: {example.file}:{example.line} weight {example.weight:+g}")
        inside = packed.segments_NL[row] == segment
        ids, weights = packed.ids_NL[row][inside], packed.weights_NL[row][inside]
        for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(weights)) + 1):
            colour = {1: "\033[32m", -1: "\033[31m", 0: ""}[int(np.sign(weights[run[0]]))]
            print(f"{colour}{decode(ids[run].tolist())}\033[0m", end="")
        print()

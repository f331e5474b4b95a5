"""The record that every stage reads and writes, and its one rendering into text, token weights and packed rows.

A trajectory is one attempt at one task: what the world first said, then turns of (thought, action, observation).
On disk it is one JSON line (`trajectories.jsonl`, schema 1). As text it has A3T's surface form (papers: A3T, prompts in
the appendix): a thought is an action of its own that the harness answers with "OK.", a command is wrapped in act[...]:

    Observation: Your task is to: put a mug in desk. You are in the middle of a room. ...
    Action: think[I need a mug. I check shelf 1.]
    Observation: OK.
    Action: act[go to shelf 1]
    Observation: You arrive at shelf 1. On the shelf 1, you see a mug 2.

ActRe sees the same trajectory with the order inside a turn changed to (observation, action, reason):

    Action: act[go to shelf 1]
    Reason for the action: [I need a mug. I check shelf 1.]
    Observation: You arrive at shelf 1. On the shelf 1, you see a mug 2.

Left out on purpose: prompts and chat templates (policy.py), rewards turned into weights (train_pg.py).

Shapes: N rows, L tokens.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np

SCHEMA = 1
End = Literal["success", "finished", "stuck", "max_turns", "context_full", "env_error", "llm_error", "timeout"]
FAULTS = ("env_error", "llm_error", "timeout")  # evidence, never training data and never a failure of the agent


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
    """One attempt at one task; the fields are explained in the README ("The record")."""

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
    reward: float
    progress: float
    success: bool
    end: End
    ids: list[int] = []
    sampled: list[int] = []  # 1 where the model sampled the token, 0 elsewhere

    @property
    def key(self) -> tuple[str, int]:
        return self.task_id, self.trial


# ---- reading and writing ---------------------------------------------------------------------------------------------

_decoder = msgspec.json.Decoder(Trajectory)
_encoder = msgspec.json.Encoder()


def read_trajectories(path: str | Path) -> Iterator[Trajectory]:
    """Yields the trajectories of a JSONL file in order.

    Lines end at the byte 0x0A only: U+2028 and its like are ordinary text inside a string.
    Raises ValueError naming file:line for anything that is not a whole record of this schema.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield parse_line(line, f"{path}:{number}")


def parse_line(line: bytes, where: str) -> Trajectory:
    """One JSONL line into a Trajectory; ValueError names `where` (file:line) and what was wrong."""
    if not line.endswith(b"\n"):
        raise ValueError(f"{where}: the line is cut off (no newline at its end); run the stage that writes it again")
    try:
        trajectory = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
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
    and rows that ended in a fault, so that a mended world or server is asked again; `writer.known` holds the (task_id,
    trial) keys that stay.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.known: set[tuple[str, int]] = set()
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(self.path, whole)
            there = list(read_trajectories(self.path))
            kept = [trajectory for trajectory in there if trajectory.end not in FAULTS]
            if len(kept) < len(there):
                write_file(self.path, kept)
                print(f"{self.path}: {len(there) - len(kept)} trajectories ended in a fault and are played again")
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
    """Rewrites a finished file sorted by (task_id, trial), atomically, and returns its trajectories."""
    trajectories = sorted(read_trajectories(path), key=lambda t: t.key)
    write_file(path, trajectories)
    return trajectories


def write_file(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Writes a whole file, atomically."""
    temporary = Path(f"{path}.tmp")
    temporary.write_bytes(b"".join(map(to_line, trajectories)))
    os.replace(temporary, path)


def fault_note(trajectories: Iterable[Trajectory], directory: Path) -> str:
    """What a stage says at its end of rows that ended in a fault; nothing where none did."""
    ends = Counter(t.end for t in trajectories if t.end in FAULTS)
    named = ", ".join(f"{end}: {count}" for end, count in sorted(ends.items()))
    return f"\n  not the agent's failures: {named}; to play them again, remove {directory}/done.json" if ends else ""


# ---- the rendering ---------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """A piece of the rendering: who wrote it and in which turn (-1: the opening)."""

    text: str
    agent: bool
    turn: int


ACTION = "Action:"
REASON = "Reason for the action:"
OK = f"Observation: OK.\n{ACTION}"


def flat(text: str) -> str:
    """One line: runs of newlines become a space, so that a text cannot imitate the harness. Nothing else changes."""
    return re.sub(r"\s*\n\s*", " ", text.strip("\n ")).replace("\r", " ")


def opening_text(first_observation: str, task: str) -> str:
    """The first observation with the paragraph that states the task moved to the front, as A3T's prompts have it."""
    paragraphs = [p for p in first_observation.split("\n\n") if p.strip()]
    stating = [p for p in paragraphs if task and task in p]
    ordered = stating + [p for p in paragraphs if p not in stating]
    return f"Observation: {flat(' '.join(ordered))}\n{ACTION}"


def observation_text(observation: str) -> str:
    return f"Observation: {flat(observation)}\n{ACTION}"


def last_observation_text(observation: str) -> str:
    return f"Observation: {flat(observation)}\n"


def think_line(thought: str) -> str:
    return f" think[{flat(thought)}]\n"


def act_line(action: str) -> str:
    return f" act[{flat(action)}]\n"


def reason_line(reason: str) -> str:
    return f" [{flat(reason)}]\n"


def parse_reply(line: str) -> tuple[Literal["think", "act"], str]:
    """What the agent's line says: ("think", thought) or ("act", command). A line in neither form is a command as it
    stands, which the world will not know: a malformed reply is an invalid action, never a crash."""
    line = line.strip()
    for kind in ("think", "act"):
        if line.startswith(f"{kind}[") and line.endswith("]"):
            return kind, line[len(kind) + 1 : -1].strip()
    return "act", line


def parse_reason(line: str) -> str:
    """The text inside ActRe's brackets; a line without brackets is taken whole."""
    line = line.strip()
    return line[1:-1].strip() if line.startswith("[") and line.endswith("]") else line


def react_segments(trajectory: Trajectory) -> list[Segment]:
    """The ReAct rendering: (observation, thoughts, action) in order; concatenated texts are the whole trajectory."""
    segments = [Segment(opening_text(trajectory.first_observation, trajectory.task), False, -1)]
    for number, turn in enumerate(trajectory.turns):
        for thought in filter(None, turn.thought.split("\n")):
            segments += [Segment(think_line(thought), True, number), Segment(OK, False, number)]
        segments.append(Segment(act_line(turn.action), True, number))
        last = number == len(trajectory.turns) - 1
        segments.append(Segment((last_observation_text if last else observation_text)(turn.observation), False, number))
    return segments


def actre_turn_text(turn: Turn) -> str:
    """One turn as ActRe's session sees it, up to the observation: the action, then the reason where there is one."""
    reason = f"{REASON}{reason_line(turn.thought)}" if turn.thought else ""
    return act_line(turn.action) + reason


def actre_segments(trajectory: Trajectory) -> list[Segment]:
    """The ActRe rendering, synchronised with the ReAct one: (observation, action, reason). Agent = the reasons."""
    segments = [Segment(opening_text(trajectory.first_observation, trajectory.task), False, -1)]
    for number, turn in enumerate(trajectory.turns):
        segments.append(Segment(act_line(turn.action) + (REASON if turn.thought else ""), False, number))
        if turn.thought:
            segments.append(Segment(reason_line(turn.thought), True, number))
        last = number == len(trajectory.turns) - 1
        segments.append(Segment((last_observation_text if last else observation_text)(turn.observation), False, number))
    return segments


def text_of(segments: Iterable[Segment]) -> str:
    return "".join(segment.text for segment in segments)


# ---- tokens and weights ----------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """ids [L], agent [L] (1 on thoughts, actions and their line ends, whoever wrote them), turn [L] (-1: opening)."""

    ids: list[int]
    agent: list[int]
    turn: list[int]


def tokens_of(trajectory: Trajectory, encode: Callable[[str, bool], list[int]]) -> Tokens:
    """The trajectory's token ids, each with its author and turn.

    `ids` are those that were played where the record has them; a text-only record is rendered and encoded segment by
    segment: `encode(text, first)` is told of the first one (lora.tokenizer.encode_piece). Raises ValueError where the
    played ids do not spell the record's own text.
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
            newline = encode("\n", False)  # a reply cut off by its token limit was closed by the harness
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
    return Tokens(ids, agent, turn)


def token_weights(
    tokens: Tokens, value: float, *, world_weight: float = 1.0, masked: Collection[int] = ()
) -> list[float]:
    """One weight per token: `value` on the whole trajectory, observations included (A3T, Eq. 1).

    world_weight: share of it on the tokens that the world wrote. masked: turns that have 0 (AgentRefine: mistakes).
    """
    return [
        0.0 if turn in masked else value * (1.0 if agent else world_weight)
        for agent, turn in zip(tokens.agent, tokens.turn, strict=True)
    ]


class Packed(NamedTuple):
    """Rows of whole trajectories: ids_NL int32, segments_NL int32 (1, 2, ...; 0 = padding), weights_NL float32,
    and for each trajectory, in the order given, its (row, segment)."""

    ids_NL: np.ndarray
    segments_NL: np.ndarray
    weights_NL: np.ndarray
    places: list[tuple[int, int]]


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
    packed = Packed(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32), [])
    places: dict[int, tuple[int, int]] = {}
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, 1):
            ids, weights = sequences[index]
            stop = start + len(ids)
            packed.ids_NL[row, start:stop] = ids
            packed.weights_NL[row, start:stop] = weights
            packed.segments_NL[row, start:stop] = segment
            places[index] = (row, segment)
            start = stop
    return packed._replace(places=[places[i] for i in range(len(sequences))])

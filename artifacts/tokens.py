"""The token ids of a record, each with its author and turn; ids that do not spell the record are refused.

    codec = read_codec("models/tiny-alfworld")
    tokens = tokens_of(trajectory, codec)

Left out: weights and rows (packing.py), the text itself (render.py).
Shapes: L tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from artifacts.render import OK, SEGMENTS, Form, act_line, parse_reply, think_line
from artifacts.trajectory import Trajectory
from lora.config import Config
from lora.tokenizer import encode_piece, line_of, load_tokenizer, newline_ids

ADVICE = "were they changed, or played with another base or tokenizer?"


class Codec(NamedTuple):
    """From text to a base's ids and back: `encode(text, first)` is `lora.tokenizer.encode_piece`, `decode(ids)` gives
    the line that a reply of these ids was played as, `newlines` are the ids that end one in a newline, and `vocabulary`
    is the number of ids that the base has."""

    encode: Callable[[str, bool], list[int]]
    decode: Callable[[list[int]], str]
    newlines: frozenset[int]
    vocabulary: int


def read_codec(model_dir: str | Path) -> Codec:
    """The codec of a base's folder."""
    tokenizer, config = load_tokenizer(model_dir), Config.read(model_dir)
    return Codec(
        encode=functools.partial(encode_piece, tokenizer),
        decode=functools.partial(line_of, tokenizer, end_ids=config.eos_token_ids),
        newlines=newline_ids(tokenizer, model_dir),
        vocabulary=config.vocab_size,
    )


class Tokens(NamedTuple):
    """ids [L], agent [L] (1 on thoughts, actions and their line ends, whoever wrote them), turn [L] (-1: opening)."""

    ids: list[int]
    agent: list[int]
    turn: list[int]


def tokens_of(trajectory: Trajectory, codec: Codec, where: str = "", form: Form = "react") -> Tokens:
    """The trajectory's token ids, each with its author and turn.

    A text-only record is rendered and encoded segment by segment. A record with ids keeps them, up to its last turn:
    what the model sampled must read as the record's thought or action, however it is spelled, and end with its line;
    all other ids must be the encoding of the record's text. Raises ValueError, starting with `where` (default: task and
    trial), if not. In ActRe's form, every record is text, and only reasons count as the agent's.
    """
    where = where or f"{trajectory.task_id} trial {trajectory.trial}"
    if strange := [i for i in trajectory.ids if not 0 <= i < codec.vocabulary]:
        raise ValueError(f"{where}: got id {strange[0]}, but the base's are 0 to {codec.vocabulary - 1}; {ADVICE}")
    found = Tokens(ids=[], agent=[], turn=[])
    if form == "actre":  # what the agent was sampled in is the other form
        trajectory = msgspec.structs.replace(trajectory, ids=[], sampled=[])
    reader = Reader(ids=trajectory.ids, sampled=trajectory.sampled, codec=codec, found=found, where=where)
    for segment in SEGMENTS[form](trajectory):
        if segment.agent and reader.is_sampled():
            reader.take_reply(segment.text, segment.turn)
        else:
            reader.take_text(segment.text, segment.agent, segment.turn)
    rest = len(trajectory.ids) - len(found.ids)
    if trajectory.ids and rest and trajectory.end != "context_full":
        raise ValueError(f"{where}: {rest} ids follow the record's last turn, expected none; {ADVICE}")
    return found


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Takes a record's ids from left to right and adds them to `found`; without ids, those that its text has."""

    ids: list[int]
    sampled: list[int]
    codec: Codec
    found: Tokens
    where: str

    def is_sampled(self) -> bool:
        """Whether the model sampled the next id."""
        start = len(self.found.ids)
        return start < len(self.ids) and bool(self.sampled[start])

    def follows(self, text: str) -> bool:
        start, piece = len(self.found.ids), self.codec.encode(text, False)
        return self.ids[start : start + len(piece)] == piece

    def add(self, piece: list[int], agent: bool, turn: int) -> None:
        self.found.ids.extend(piece)
        self.found.agent.extend([int(agent)] * len(piece))
        self.found.turn.extend([turn] * len(piece))

    def take_text(self, text: str, agent: bool, turn: int) -> None:
        """Takes a text that the model did not sample. Raises ValueError if other ids follow."""
        start = len(self.found.ids)
        piece = self.codec.encode(text, start == 0)
        if self.ids and self.ids[start : start + len(piece)] != piece:
            raise ValueError(f"{self.where}: the ids from position {start} do not spell {text[:60]!r}; {ADVICE}")
        self.add(piece, agent, turn)

    def take_reply(self, line: str, turn: int) -> None:
        """Takes what the model sampled for a line of the record. Raises ValueError if it is another one."""
        start, reply = len(self.found.ids), self.sampled_line(turn)
        while parse_reply(reply) == ("think", "") and self.follows(OK):  # the record leaves out empty thoughts
            self.take_text(OK, False, turn)
            start, reply = len(self.found.ids), self.sampled_line(turn)
        kind, text = parse_reply(reply)
        # A thought too many was taken as an action.
        if line != act_line(text) and (kind, line) != ("think", think_line(text)):
            raise ValueError(f"{self.where}: the ids from position {start} read {reply!r}, not {line!r}; {ADVICE}")

    def sampled_line(self, turn: int) -> str:
        """Takes sampled ids to their end, and the newline that the harness added if they hold none: the reply was cut
        by its limit, or ended by an end token. Returns the line that they were played as."""
        start = end = len(self.found.ids)
        while end < len(self.ids) and self.sampled[end]:
            end += 1
        piece, newlines = self.ids[start:end], self.codec.newlines
        if not newlines.isdisjoint(piece[:-1]):
            raise ValueError(f"{self.where}: the ids from position {start} run past the end of their line; {ADVICE}")
        self.add(piece, True, turn)
        if newlines.isdisjoint(piece):
            self.take_text("\n", True, turn)
        return self.codec.decode(piece)

"""Who answers: policies over append-only sessions.

A policy holds many sessions. `open(text)` starts one, `extend(session, text)` appends what the world (or the sampling
rule) wrote, `reply(asks)` lets it write one line in each of many sessions at once, `close(session)` frees it. Text is
only ever appended, so the ids of a session are never tokenised twice: they are what was played and what is trained on.

    LocalPolicy     a JAX model (lora/engine.py), with or without an adapter
    ScriptedPolicy  a demonstration or a replay

Left out so far: ServerPolicy, any OpenAI-compatible server; it has its place beside LocalPolicy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from envs.demonstrator import Demonstrator
from lora.convert import load_adapter, load_model
from lora.engine import Engine
from lora.tokenizer import load_tokenizer
from trajectory import act_line, parse_reply, think_line


class Ask(NamedTuple):
    """One line wanted: temperature 0 is greedy; the same seed in the same session gives the same line."""

    session: int
    temperature: float
    seed: int


class Policy(Protocol):
    slots: int  # how many sessions may be open at once

    def open(self, text: str) -> int: ...

    def extend(self, session: int, text: str) -> None: ...

    def reply(self, asks: Sequence[Ask]) -> list[str | None]:
        """One line for each ask, with its newline; None where the context is full."""
        ...

    def close(self, session: int) -> tuple[list[int], list[int]]:
        """Ends the session; its token ids as played and which of them the model sampled (empty: text only)."""
        ...


class LocalPolicy:
    """A local JAX model. Sessions live in the slots of one engine, each with its KV cache over all its turns."""

    def __init__(
        self,
        model_dir: str | Path,
        adapter: str | Path | None = None,
        *,
        weights: str = "nf4",
        slots: int = 64,
        context: int = 1024,
        max_new_tokens: int = 64,
    ):
        self.slots, self.context = slots, context
        self._tokenizer = load_tokenizer(model_dir)
        model = load_model(model_dir, weights=weights) if adapter is None else load_adapter(model_dir, adapter, weights)
        self._newline = self.encode("\n")
        if len(self._newline) != 1:
            raise ValueError(f"{model_dir}: a newline is {len(self._newline)} tokens; one was expected, as the stop")
        self._engine = Engine(
            model, slots=slots, context=context, max_new_tokens=max_new_tokens, stop_id=self._newline[0]
        )
        self._ids: dict[int, list[int]] = {}
        self._sampled: dict[int, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def open(self, text: str) -> int:
        session = self._engine.open()
        self._ids[session], self._sampled[session] = [], []
        self.extend(session, text)
        return session

    def extend(self, session: int, text: str) -> None:
        self._append(session, self.encode(text), 0)

    def _append(self, session: int, ids: list[int], sampled: int) -> None:
        self._ids[session] += ids
        self._sampled[session] += [sampled] * len(ids)
        if not sampled:  # sampled ids are in the cache already
            self._engine.extend(session, ids)

    def reply(self, asks: Sequence[Ask]) -> list[str | None]:
        """See Policy. A line that its token limit cut off is closed with a newline, so that the form holds."""
        lines: list[str | None] = []
        replies = self._engine.reply([(a.session, a.temperature, a.seed) for a in asks])
        for ask, ids in zip(asks, replies, strict=True):
            if ids is None:
                lines.append(None)
                continue
            self._append(ask.session, ids, 1)
            if ids[-1] != self._newline[0]:
                self._append(ask.session, self._newline, 0)
            lines.append(self._tokenizer.decode(ids, skip_special_tokens=False))
        return lines

    def close(self, session: int) -> tuple[list[int], list[int]]:
        self._engine.close(session)
        return self._ids.pop(session), self._sampled.pop(session)


class ScriptedPolicy:
    """Plays a script: `make(opening text)` gives, for each session, an object with extend(text) and reply() -> line."""

    def __init__(self, make: Callable[[str], object], slots: int = 64):
        self.slots = slots
        self._make = make
        self._scripts: dict[int, object] = {}
        self._opened = 0

    def open(self, text: str) -> int:
        self._opened += 1
        self._scripts[self._opened] = self._make(text)
        return self._opened

    def extend(self, session: int, text: str) -> None:
        self._scripts[session].extend(text)

    def reply(self, asks: Sequence[Ask]) -> list[str | None]:
        return [self._scripts[ask.session].reply() for ask in asks]

    def close(self, session: int) -> tuple[list[int], list[int]]:
        del self._scripts[session]
        return [], []


class DemonstratorScript:
    """The demonstrator behind the session's text: it reads what an agent reads and writes what an agent writes."""

    def __init__(self, opening: str, places: dict | None = None):
        self._player = Demonstrator(opening, places)
        self._action: str | None = None  # decided, its thought already said
        self._last = ""  # the action in the session's text that waits for its observation

    def extend(self, text: str) -> None:
        _, said = parse_reply(text)
        if text == act_line(said):
            self._last, self._action = said, None
        elif text.startswith("Observation: ") and not text.startswith("Observation: OK."):
            self._player.observe(self._last, text.removeprefix("Observation: ").split("\n")[0])

    def reply(self) -> str:
        if self._action is None:
            thought, self._action = self._player.decide()
            return think_line(thought)
        self._last, self._action = self._action, None
        return act_line(self._last)


class ReplayScript:
    """A fixed list of lines, one a reply; used by tests and to play a recorded trajectory again."""

    def __init__(self, lines: Sequence[str]):
        self._lines = iter(lines)

    def extend(self, text: str) -> None:
        """A replay does not listen."""

    def reply(self) -> str | None:
        return next(self._lines, None)

"""Who answers: policies over append-only sessions.

A policy holds many sessions. `open(text)` starts one, `extend(session, text)` appends what the world (or the sampling
rule) wrote, `ask(...)` wants one line of it in a session, `lines()` gives the lines that have come, `close(session)`
frees it. Text is only ever appended, so the ids of a session are never tokenised twice: they are what was played and
what is trained on.

    LocalPolicy     a JAX model (lora/engine.py), with or without an adapter
    ServerPolicy    any OpenAI-compatible server (server.py)
    ScriptedPolicy  a demonstration or a replay

A prompt (prompts/) is an example that stands before every session and is no part of it: what is trained on is the
session alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from artifacts.render import act_line, parse_reply, think_line
from envs.alfworld.demonstrator import Demonstrator
from lora.convert import load_adapter, load_model
from lora.decoding import RolloutWeights
from lora.engine import Engine
from lora.tokenizer import encode_piece, load_tokenizer, prompt_ids

if TYPE_CHECKING:
    from server import Server


class Ask(NamedTuple):
    """One line wanted: temperature 0 is greedy; the same seed in the same session gives the same line."""

    session: int
    temperature: float
    seed: int


class NoReply(Exception):
    """A server gave no usable reply, however often it was asked: the trajectory ends as llm_error."""


# What came of an ask: the line with its newline, None where the context is full, or why there is none.
Line = str | None | NoReply


class Policy(Protocol):
    slots: int  # how many sessions may be open at once
    counts: dict[str, int]  # what was asked of the model, for done.json

    def open(self, text: str) -> int: ...

    def extend(self, session: int, text: str) -> None: ...

    def ask(self, ask: Ask) -> None: ...

    def lines(self, wait: bool = True) -> list[tuple[int, Line]]:
        """Lines that have come, each with its session. May be empty; `wait` gives them time to come, or makes them."""
        ...

    def close(self, session: int) -> tuple[list[int], list[int]]:
        """Ends the session; its token ids as played and which of them the model sampled (empty: text only)."""
        ...


class LocalPolicy:
    """A local JAX model. Sessions live in the slots of one engine, each with its KV cache over all its turns.

    A `prompt` is held once for all sessions (lora.tokenizer.prompt_ids). The ids of a session are what they would be
    without it, and so are those that are trained on; what the tokenizer puts before a text (<s>) is played once,
    before the prompt.
    """

    def __init__(
        self,
        model_dir: str | Path,
        adapter: str | Path | None = None,
        *,
        weights: str = "nf4",
        rollout_weights: RolloutWeights | None = None,
        slots: int = 64,
        context: int = 1024,
        max_new_tokens: int = 64,
        prompt: str = "",
        top_p: float = 1.0,
    ):
        self.slots, self.context, self._top_p = slots, context, top_p
        self._tokenizer = load_tokenizer(model_dir)
        on_cpu = jax.default_backend() == "cpu"
        rollout_weights = rollout_weights or ("fp32" if on_cpu else "bf16")
        narrow = weights == "nf4" and rollout_weights != "fp32" and not on_cpu
        how = {"weights": weights, "dtype": jnp.bfloat16 if narrow else None}
        model = load_model(model_dir, **how) if adapter is None else load_adapter(model_dir, adapter, **how)
        self._newline = self.encode("\n", first=False)
        if len(self._newline) != 1:
            raise ValueError(f"{model_dir}: a newline is {len(self._newline)} tokens; one was expected, as the stop")
        self._end = model.config.eos_token_id  # what ends an instructed model's reply where a newline does not
        stop_ids = self._newline if self._end is None else [*self._newline, self._end]
        prefix = prompt_ids(self._tokenizer, model_dir, prompt) if prompt else []
        self._played = len(self._tokenizer.encode("").ids) if prompt else 0  # ids of a session that the prefix has too
        self._engine = Engine(
            model,
            slots=slots,
            context=context,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            prefix=prefix,
            weights=rollout_weights,
        )
        self.counts = {"prompt_tokens": len(prefix), "completion_tokens": 0}
        self._ids: dict[int, list[int]] = {}
        self._sampled: dict[int, list[int]] = {}

    def encode(self, text: str, first: bool) -> list[int]:
        return encode_piece(self._tokenizer, text, first)

    def open(self, text: str) -> int:
        session = self._engine.open()
        self._ids[session], self._sampled[session] = [], []
        self._append(session, self.encode(text, first=True), 0)
        return session

    def extend(self, session: int, text: str) -> None:
        self._append(session, self.encode(text, first=False), 0)

    def _append(self, session: int, ids: list[int], sampled: int) -> None:
        if not sampled:  # sampled ids are in the cache already
            self._engine.extend(session, ids if self._ids[session] else ids[self._played :])
        self._ids[session] += ids
        self._sampled[session] += [sampled] * len(ids)
        self.counts["completion_tokens" if sampled else "prompt_tokens"] += len(ids)

    def ask(self, ask: Ask) -> None:
        self._engine.ask(*ask, self._top_p)

    def lines(self, wait: bool = True) -> list[tuple[int, Line]]:
        """See Policy. A line that has no newline (cut off by its limit, or ended) gets one, so that the form holds."""
        lines: list[tuple[int, Line]] = []
        for session, reply in self._engine.replies(wait).items():
            if reply is None:
                lines.append((session, None))
                continue
            self._append(session, reply.ids, 1)
            if reply.ids[-1] != self._newline[0]:
                self._append(session, self._newline, 0)
            lines.append(
                (session, self._tokenizer.decode([i for i in reply.ids if i != self._end], skip_special_tokens=False))
            )
        return lines

    def close(self, session: int) -> tuple[list[int], list[int]]:
        self._engine.close(session)
        return self._ids.pop(session), self._sampled.pop(session)


def make_policy(
    server: Server,
    cache: Path,
    model: Path,
    adapter: Path | None,
    *,
    prompt: Path | None = None,
    top_p: float = 1.0,
    **shape,
) -> Policy:
    """The server's policy if one is named, else the local model's (`shape`: see LocalPolicy)."""
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p is {top_p}; expected more than 0 and at most 1")
    from server import ServerPolicy  # on demand, as it builds on this file

    example = prompt.read_text().rstrip("\n") + "\n\n" if prompt else ""
    how = {"prompt": example, "top_p": top_p}
    return ServerPolicy(server, cache, **how) if server.url else LocalPolicy(model, adapter, **how, **shape)


def prompt_facts(*prompts: Path | None) -> dict[str, str]:
    """sha256 of prompts, for a stage's config.json."""
    return {f"prompt {path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in prompts if path}


# ---- scripts ---------------------------------------------------------------------------------------------------------


class ScriptedPolicy:
    """Plays a script: `make(opening text)` gives, for each session, an object with extend(text) and reply() -> line."""

    def __init__(self, make: Callable[[str], object], slots: int = 64):
        self.slots = slots
        self._make = make
        self._scripts: dict[int, object] = {}
        self._asked: list[int] = []
        self.counts: dict[str, int] = {}
        self._opened = 0

    def open(self, text: str) -> int:
        self._opened += 1
        self._scripts[self._opened] = self._make(text)
        return self._opened

    def extend(self, session: int, text: str) -> None:
        self._scripts[session].extend(text)

    def ask(self, ask: Ask) -> None:
        self._asked.append(ask.session)

    def lines(self, wait: bool = True) -> list[tuple[int, Line]]:
        asked, self._asked = self._asked, []
        return [(session, self._scripts[session].reply()) for session in asked]

    def close(self, session: int) -> tuple[list[int], list[int]]:
        del self._scripts[session]
        return [], []


class DemonstratorScript:
    """A world's demonstrator behind the session's text: it reads what an agent reads and writes what an agent writes.
    `player` makes it of the opening: ALFWorld's, or envs.webshop.demonstrator.Demonstrator (in the mode "text")."""

    def __init__(self, opening: str, player: Callable = Demonstrator):
        self._player = player(opening.removeprefix("Observation: ").split("\n")[0])
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

"""Who answers: policies over append-only sessions.

A policy holds many sessions. `open(text)` starts one, `extend(session, text)` appends what the world (or the sampling
rule) wrote, `ask(...)` wants one line of it in a session, `lines()` gives the lines that have come, `close(session)`
frees it. Text is only ever appended, so the ids of a session are never tokenised twice: they are what was played and
what is trained on.

    LocalPolicy     a JAX model (lora/engine.py), with or without an adapter
    ServerPolicy    any OpenAI-compatible server (agent/server.py)
    ScriptedPolicy  a demonstration or a replay

A prompt (prompts/) is an example that stands before every session and is no part of it: what is trained on is the
session alone.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


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

    def submit(self, ask: Ask) -> None: ...

    def poll(self, wait: bool = True) -> list[tuple[int, Line]]:
        """Lines that have come, each with its session. May be empty; `wait` gives them time to come, or makes them."""
        ...

    def close(self, session: int) -> tuple[list[int], list[int]]:
        """Ends the session; its token ids as played and which of them the model sampled (empty: text only)."""
        ...


# ---- scripts ---------------------------------------------------------------------------------------------------------

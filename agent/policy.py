"""The policy protocol: models, servers and scripts that write lines into append-only sessions.

A policy holds many sessions. `open(text)` starts one, `extend(session, text)` appends what the world (or the sampling
rule) wrote, `submit(ask)` requests one line in a session, `poll()` returns the finished replies, and `close(session)`
frees the session. Text is only appended, so no text is tokenised twice: a session's ids are both what was played and
what is trained on.

    LocalPolicy     a JAX model, with or without an adapter (local.py)
    ServerPolicy    any OpenAI-compatible server of text (server.py)
    TokensPolicy    vLLM with the run's base and adapters, and token ids (vllm.py)
    ScriptedPolicy  a demonstration or a replay (scripted.py)

A prompt (prompts/) is an example that precedes every session without being part of it: only the session is trained on.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Ask(NamedTuple):
    """A request for one line. Temperature 0 is greedy; the same seed in the same session gives the same line."""

    session: int
    temperature: float
    seed: int


class NoReply(Exception):
    """A server gave no usable reply after all retries, or a script failed: the trajectory ends as llm_error."""


# The reply to an Ask: the line with its newline, None if the context is full, or why there is no line.
Line = str | None | NoReply


class Policy(Protocol):
    remote: bool  # a server: a session may be closed while its reply is due, and lines may have any form
    slots: int  # maximum number of open sessions
    counts: dict[str, int]  # usage of the model, for done.json

    def open(self, text: str) -> int: ...

    def extend(self, session: int, text: str) -> None: ...

    def submit(self, ask: Ask) -> None: ...

    def poll(self, wait: bool = True) -> list[tuple[int, Line]]:
        """Finished replies, each with its session; may be empty. `wait` waits for replies, or computes them."""
        ...

    def close(self, session: int) -> tuple[list[int], list[int]]:
        """Ends the session. Returns its token ids as played and 1 for each sampled one (both empty: text only)."""
        ...

    def knows_the_form(self) -> bool:
        """(If remote) Whether any reply, in earlier runs too, had the form of a thought or a command."""
        ...

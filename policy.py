"""Who answers: policies over append-only sessions.

A policy holds many sessions. `open(text)` starts one, `extend(session, text)` appends what the world (or the sampling
rule) wrote, `ask(...)` wants one line of it in a session, `lines()` gives the lines that have come, `close(session)`
frees it. Text is only ever appended, so the ids of a session are never tokenised twice: they are what was played and
what is trained on.

    LocalPolicy     a JAX model (lora/engine.py), with or without an adapter
    ServerPolicy    any OpenAI-compatible server; its replies are kept on disk, so that none is paid for twice
    ScriptedPolicy  a demonstration or a replay
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from envs.demonstrator import Demonstrator
from lora.convert import load_adapter, load_model
from lora.engine import Engine
from lora.tokenizer import encode_piece, load_tokenizer
from trajectory import ACTION, REASON, act_line, flat, parse_reply, think_line


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
        self._newline = self.encode("\n", first=False)
        if len(self._newline) != 1:
            raise ValueError(f"{model_dir}: a newline is {len(self._newline)} tokens; one was expected, as the stop")
        self._end = model.config.eos_token_id  # what ends an instructed model's reply where a newline does not
        stop_ids = self._newline if self._end is None else [*self._newline, self._end]
        self._engine = Engine(model, slots=slots, context=context, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        self.counts = {"prompt_tokens": 0, "completion_tokens": 0}
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
        self._ids[session] += ids
        self._sampled[session] += [sampled] * len(ids)
        self.counts["completion_tokens" if sampled else "prompt_tokens"] += len(ids)
        if not sampled:  # sampled ids are in the cache already
            self._engine.extend(session, ids)

    def ask(self, ask: Ask) -> None:
        self._engine.ask(*ask)

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


# ---- servers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where to ask instead of a local model, and how."""

    url: str | None = None
    """Base URL of an OpenAI-compatible server, such as http://localhost:8000/v1 (default: the local model)."""
    model: str = ""
    """Name of the model there; for an adapter a name that is never given to another one."""
    api: Literal["chat", "completions"] = "chat"
    """Chat messages, or plain completions of the text (what a base model wants)."""
    key: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; a server of your own may need none."""
    prompt: Path | None = None
    """File with an example that stands before every session (prompts/)."""
    concurrency: int = 16
    """Requests under way at once."""
    retries: int = 6
    """Further tries, with growing pauses, after 429, 5xx, a timeout, a dropped connection or an unreadable reply."""
    timeout: float = 60.0
    """Seconds that one try may take."""
    max_tokens: int = 128
    """Most tokens of a line."""


SYSTEM = (
    "You play a text game. The user gives the transcript so far. Reply with the one line that comes next after its "
    "last words, in the form that earlier lines have, and with nothing else."
)


# What reading a reply raises that is no JSON, or JSON without a choice.
UNREADABLE = (AttributeError, IndexError, TypeError, json.JSONDecodeError)


class ServerPolicy:
    """Sessions whose lines come from an OpenAI-compatible server: a session is its text, sent whole with each request.

    Replies are kept in `cache`, a SQLite file keyed by the sha256 of the request, before they are used: a resumed run
    asks only what was not answered. The `openai` client repeats 429 (after Retry-After), 5xx, timeouts and dropped
    connections; when that is of no use the line is NoReply. A server that has not answered once, a wrong key, address
    or model (401, 403, 404) and requests that it will never take (400, 422) raise ValueError: nothing could be played.
    """

    def __init__(self, server: Server, cache: str | Path):
        import openai

        if not server.model:
            raise ValueError(f"the server at {server.url} needs the name of its model")
        self.slots = server.concurrency
        self._server, self._openai = server, openai
        self._prompt = server.prompt.read_text() if server.prompt else ""
        self._client = openai.OpenAI(
            base_url=server.url, api_key=os.environ.get(server.key) or "none", timeout=server.timeout,
            max_retries=server.retries,
        )  # fmt: skip
        self._cache = sqlite3.connect(cache)
        self._cache.execute("PRAGMA journal_mode=WAL")
        self._cache.execute("CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID")
        self._pool = ThreadPoolExecutor(server.concurrency)
        self._text: dict[int, str] = {}
        self._opened = 0
        self._waiting: dict[Future, tuple[int, str]] = {}
        self._ready: list[tuple[int, Line]] = []
        self.counts = {"requests": 0, "from_cache": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def open(self, text: str) -> int:
        self._opened += 1
        self._text[self._opened] = self._prompt + text
        return self._opened

    def extend(self, session: int, text: str) -> None:
        self._text[session] += text

    def ask(self, ask: Ask) -> None:
        request = self._request(ask)
        key = hashlib.sha256(json.dumps([self._server.url, request], sort_keys=True).encode()).hexdigest()
        known = self._cache.execute("SELECT reply FROM replies WHERE request = ?", (key,)).fetchone()
        if known:
            self.counts["from_cache"] += 1
            self._finish(ask.session, json.loads(known[0]))
        else:
            self._waiting[self._pool.submit(self._send, request)] = ask.session, key

    def lines(self, wait: bool = True) -> list[tuple[int, Line]]:
        """See Policy. Raises ValueError where the server refuses whatever is asked."""
        if self._waiting and not self._ready:
            done, _ = wait_for(self._waiting, timeout=0.1 if wait else 0, return_when=FIRST_COMPLETED)
            for future in done:
                session, key = self._waiting.pop(future)
                self._take(session, key, future)
        ready, self._ready = self._ready, []
        return ready

    def close(self, session: int) -> tuple[list[int], list[int]]:
        """Ends the session: a text, without ids."""
        del self._text[session]
        return [], []

    def _request(self, ask: Ask) -> dict:
        """The arguments of the client's call."""
        text = self._text[ask.session]
        what = {"model": self._server.model, "temperature": ask.temperature, "seed": ask.seed % 2**31,
                "max_tokens": self._server.max_tokens}  # fmt: skip
        if self._server.api == "completions":
            return what | {"prompt": text, "stop": "\n"}
        return what | {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]}

    def _send(self, request: dict) -> dict:
        """Asks the server, in a thread of the pool. Replies that are no JSON or hold no choice are asked for again."""
        create = self._client.completions.create if "prompt" in request else self._client.chat.completions.create
        for attempt in range(self._server.retries + 1):
            try:
                reply = create(**request)
                choice = reply.choices[0]
                text = choice.text if "prompt" in request else choice.message.content
                usage = reply.usage
                return {"text": text or "", "prompt_tokens": usage.prompt_tokens if usage else 0,
                        "completion_tokens": usage.completion_tokens if usage else 0}  # fmt: skip
            except (*UNREADABLE, self._openai.APIResponseValidationError):
                if attempt == self._server.retries:
                    raise
                time.sleep(min(8.0, 0.5 * 2**attempt))
        raise AssertionError("unreachable")

    def _take(self, session: int, key: str, future: Future) -> None:
        """Keeps a reply that has come; says what became of one that has not."""
        openai, server = self._openai, self._server
        try:
            reply = future.result()
        except openai.BadRequestError as error:
            if "context" not in str(error).lower():
                raise ValueError(f"{server.url} does not take the request: {error}") from error
            self._ready.append((session, None))
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError,
                openai.UnprocessableEntityError) as error:  # fmt: skip
            raise ValueError(
                f"{server.url} refuses model {server.model!r} with the key in ${server.key}: {error}. Check the "
                "address, the model's name and the key; what was played is kept."
            ) from error
        except (*UNREADABLE, openai.APIError) as error:
            if not self.counts["requests"]:
                raise ValueError(
                    f"{server.url} has not answered once: {type(error).__name__}: {error}. Is it up, and the address "
                    "that of an OpenAI-compatible server?"
                ) from error
            self._ready.append((session, NoReply(f"{type(error).__name__}: {error}"[:500])))
        else:
            with self._cache:
                self._cache.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, json.dumps(reply)))
            self.counts["requests"] += 1
            self.counts["prompt_tokens"] += reply["prompt_tokens"]
            self.counts["completion_tokens"] += reply["completion_tokens"]
            self._finish(session, reply)

    def _finish(self, session: int, reply: dict) -> None:
        """The reply's first line of text, without the words it was to follow and no longer than its tokens allow."""
        said = next((line for line in reply["text"].splitlines() if line.strip()), "").strip()
        for words in (REASON, ACTION):
            said = said.removeprefix(words).strip()
        line = f" {flat(said[: 16 * self._server.max_tokens])}\n"
        self._text[session] += line
        self._ready.append((session, line))


def make_policy(server: Server, cache: Path, model: Path, adapter: Path | None, **shape) -> Policy:
    """The server's policy if one is named, else the local model's (`shape`: see LocalPolicy)."""
    return ServerPolicy(server, cache) if server.url else LocalPolicy(model, adapter, **shape)


def server_facts(*servers: Server) -> dict[str, str | None]:
    """sha256 of the servers' prompts, for a stage's config.json."""
    paths = [server.prompt for server in servers if server.url and server.prompt]
    return {f"prompt {path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


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

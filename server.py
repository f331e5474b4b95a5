"""Any OpenAI-compatible server as a policy: vLLM, transformers serve, llama.cpp, a hosted API.

    python rollout.py --server.url http://localhost:8000/v1 --server.model NAME --server.api completions

Left out: streaming, several choices of one request, log-probabilities and token ids (a session is a text).
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from policy import Ask, Line, NoReply
from trajectory import ACTION, REASON, flat


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
    extra: str = "{}"
    """JSON object of further parameters of each request; null takes one out. Hosted reasoning models want
    '{"max_tokens": null, "temperature": null, "seed": null, "max_completion_tokens": 4096}'."""
    concurrency: int = 16
    """Requests under way at once."""
    retries: int = 6
    """Further tries, with growing pauses, after 429, 5xx, a timeout, a dropped connection or an unreadable reply."""
    timeout: float = 60.0
    """Seconds that one try may be without a byte from the server."""
    max_tokens: int = 128
    """Most tokens of a line."""


SYSTEM = (
    "You play a text game. The user gives the transcript so far. Reply with the one line that comes next after its "
    "last words, in the form that earlier lines have, and with nothing else."
)


# What reading a reply raises that is no JSON, or JSON without a choice.
UNREADABLE = (AttributeError, IndexError, TypeError, json.JSONDecodeError)
# How servers say, in an error 400 or 422, that a session has become too long.
FULL = ("context", "too long", "maximum number of tokens")
# What the client's methods take by name; all else goes into the request's body as it is.
NAMED = ("model", "messages", "prompt")


class ServerPolicy:
    """Sessions whose lines come from an OpenAI-compatible server: a session is its text, sent whole with each request.

    Replies are kept in `cache`, a SQLite file keyed by the sha256 of the request, before they are used: a resumed run
    asks only what was not answered. The `openai` client repeats 429 (after Retry-After), 5xx, timeouts and dropped
    connections; when that is of no use the line is NoReply. Raised is ValueError, for nothing could be played on: for a
    wrong key, address or model (401, 403, 404), where the first request is refused or gets no reply, and where as many
    requests in a row as sessions can be open, and one more, got none.
    """

    def __init__(self, server: Server, cache: str | Path, *, prompt: str = "", top_p: float = 1.0):
        import openai

        if not server.model:
            raise ValueError(f"the server at {server.url} needs the name of its model")
        if min(server.concurrency, server.max_tokens) < 1 or server.retries < 0 or server.timeout <= 0:
            raise ValueError(f"{server}: concurrency, max_tokens and timeout must be positive, retries not negative")
        try:
            self._extra = dict(json.loads(server.extra))
        except (TypeError, ValueError) as error:
            raise ValueError(f"--server.extra is {server.extra!r} ({error}); expected a JSON object") from error
        self.slots = server.concurrency
        self._server, self._openai, self._prompt, self._top_p = server, openai, prompt, top_p
        self._client = openai.OpenAI(
            base_url=server.url, api_key=os.environ.get(server.key) or "none", timeout=server.timeout,
            max_retries=server.retries,
        )  # fmt: skip
        self._cache = sqlite3.connect(cache)
        self._cache.execute("PRAGMA journal_mode=WAL")
        self._cache.execute("CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID")
        self._answered = bool(self._cache.execute("SELECT EXISTS (SELECT * FROM replies)").fetchone()[0])
        self._permits = threading.Semaphore(server.concurrency)
        self._came: queue.SimpleQueue = queue.SimpleQueue()
        self._text: dict[int, str] = {}
        self._opened = self._failed = 0
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
        else:  # a daemon, so that a run that is interrupted or stops does not wait for the server
            threading.Thread(target=self._send, args=(ask.session, key, request), daemon=True).start()

    def lines(self, wait: bool = True) -> list[tuple[int, Line]]:
        """See Policy. Raises ValueError where the server refuses whatever is asked."""
        patience = 0.1 if wait and not self._ready else 0.0
        while True:
            try:
                self._take(*self._came.get(timeout=patience))
            except queue.Empty:
                break
            patience = 0.0
        ready, self._ready = [each for each in self._ready if each[0] in self._text], []
        return ready

    def close(self, session: int) -> tuple[list[int], list[int]]:
        """Ends the session: a text, without ids. A reply that is still to come is kept, and is no line of `lines`."""
        del self._text[session]
        return [], []

    def _request(self, ask: Ask) -> dict:
        """The request's body."""
        text = self._text[ask.session]
        what = {"model": self._server.model, "temperature": ask.temperature, "seed": ask.seed % 2**31,
                "max_tokens": self._server.max_tokens}  # fmt: skip
        if self._top_p < 1:
            what["top_p"] = self._top_p
        if self._server.api == "completions":
            what |= {"prompt": text, "stop": "\n"}
        else:
            what["messages"] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        return {name: value for name, value in (what | self._extra).items() if value is not None}

    def _send(self, session: int, key: str, request: dict) -> None:
        """Asks the server, in a thread of its own, and queues (session, key, the reply or what went wrong)."""
        with self._permits:
            try:
                came = self._reply(request)
            except (*UNREADABLE, self._openai.OpenAIError) as error:
                came = error
        self._came.put((session, key, came))

    def _reply(self, request: dict) -> dict:
        """One reply. One that is no JSON or holds no choice is asked for again."""
        create = self._client.completions.create if "prompt" in request else self._client.chat.completions.create
        named = {name: request[name] for name in NAMED if name in request}
        rest = {name: value for name, value in request.items() if name not in NAMED}
        for attempt in range(self._server.retries + 1):
            try:
                reply = create(**named, extra_body=rest)
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

    def _take(self, session: int, key: str, came: dict | Exception) -> None:
        """Keeps a reply that has come; says what became of one that has not."""
        openai, server = self._openai, self._server
        refused = isinstance(came, (openai.BadRequestError, openai.UnprocessableEntityError))
        if isinstance(came, dict):
            with self._cache:
                self._cache.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, json.dumps(came)))
            self._failed, self._answered = 0, True
            self.counts["requests"] += 1
            self.counts["prompt_tokens"] += came["prompt_tokens"]
            self.counts["completion_tokens"] += came["completion_tokens"]
            return self._finish(session, came)
        if refused and any(word in str(came).lower() for word in FULL):
            return self._ready.append((session, None))
        if isinstance(came, (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)):
            raise ValueError(
                f"{server.url} refuses model {server.model!r} with the key in ${server.key}: {came}. Check the "
                "address, the model's name and the key; what was played is kept."
            ) from came
        self._failed += 1
        answered = self._answered if refused else self.counts["requests"] > 0
        if not answered or self._failed > self.slots:
            what = "has not answered" if not refused else "does not take the request"
            raise ValueError(
                f"{server.url} {what} ({self._failed} in a row): {type(came).__name__}: {came}. Is it up? Are "
                "address, model and --server.api right? --server.extra '{\"NAME\": null}' takes out a parameter. What "
                "was played is kept: run again to go on."
            ) from came
        return self._ready.append((session, NoReply(f"{type(came).__name__}: {came}"[:500])))

    def _finish(self, session: int, reply: dict) -> None:
        """The reply's first line of text after what it thought, if it says that, without the words that it was to
        follow and no longer than its tokens allow."""
        text = reply["text"].rpartition("</think>")[2]
        said = next((line for line in text.splitlines() if line.strip()), "").strip()
        for words in (REASON, ACTION):
            said = said.removeprefix(words).strip()
        line = f" {flat(said[: 16 * self._server.max_tokens])}\n"
        if session in self._text:
            self._text[session] += line
        self._ready.append((session, line))

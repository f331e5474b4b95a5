"""Any OpenAI-compatible server as a policy: vLLM, transformers serve, llama.cpp, a hosted API.

    python rollout.py --server.url http://localhost:8000/v1 --server.model NAME --server.api completions

Left out: streaming, several choices per request, log-probabilities and token ids (a session is plain text).
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

from agent.policy import Ask, Line, NoReply
from artifacts.render import ACTION, REASON, flat


@dataclass(frozen=True, kw_only=True)
class Server:
    """An OpenAI-compatible server, and how requests are sent to it."""

    url: str | None = None
    """Base URL, such as http://localhost:8000/v1; without it no server is used."""
    model: str = ""
    """Name of the model on the server. Cached replies are keyed by this name: give each new adapter a new one."""
    api: Literal["chat", "completions"] = "chat"
    """Chat messages, or plain text completions (for base models)."""
    key: str = "OPENAI_API_KEY"
    """Environment variable with the API key; your own server may need none."""
    extra: str = "{}"
    """JSON object of additional request parameters; null removes one. Hosted reasoning models need
    '{"max_tokens": null, "temperature": null, "seed": null, "max_completion_tokens": 4096}'."""
    concurrency: int = 16
    """Concurrent requests."""
    retries: int = 6
    """Retries, with backoff, after 429, 5xx, a timeout, a dropped connection or an unreadable reply."""
    timeout: float = 60.0
    """Seconds to wait for the next byte before a retry."""
    max_tokens: int = 128
    """Token limit of one reply."""


SYSTEM = (
    "You play a text game. The user gives the transcript so far. Reply with the one line that comes next after its "
    "last words, in the form that earlier lines have, and with nothing else."
)


# Raised by a reply that is not JSON, or JSON without a choice.
UNREADABLE = (AttributeError, IndexError, TypeError, json.JSONDecodeError)
# Words by which an error 400 or 422 says that the session is too long.
FULL = ("context", "too long", "maximum number of tokens")
# Parameters that the client takes by name; all others are passed on in the request's body.
NAMED = ("model", "messages", "prompt")


class ServerPolicy:
    """Sessions continued by an OpenAI-compatible server. A session is text, sent whole with each request.

    Replies are stored in `cache`, a SQLite file keyed by the sha256 of URL and request, before they are used: a resumed
    run sends only unanswered requests. The `openai` client retries 429 (after Retry-After), 5xx, timeouts and dropped
    connections. If that fails, a short probe tells a bad session from a bad server: if the probe is answered, the reply
    is NoReply; if not, or if the key, address or model is wrong, no session can continue and `poll` raises ValueError.
    `whole`: sessions are complete prompts instead of transcripts, and replies are returned with all their lines.
    """

    def __init__(self, server: Server, cache: str | Path, *, prompt: str = "", top_p: float = 1.0, whole: bool = False):
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
        self._server, self._openai, self._prompt, self._top_p, self._whole = server, openai, prompt, top_p, whole
        self._client = openai.OpenAI(
            base_url=server.url, api_key=os.environ.get(server.key) or "none", timeout=server.timeout
        )
        self._cache = sqlite3.connect(cache)
        self._cache.execute("PRAGMA journal_mode=WAL")
        self._cache.execute("CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID")
        self._permits = threading.Semaphore(server.concurrency)
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._text: dict[int, str] = {}
        self._opened = 0
        self._ready: list[tuple[int, Line]] = []
        self.counts = {"requests": 0, "from_cache": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def open(self, text: str) -> int:
        self._opened += 1
        self._text[self._opened] = self._prompt + text
        return self._opened

    def extend(self, session: int, text: str) -> None:
        self._text[session] += text

    def submit(self, ask: Ask) -> None:
        request = self._request(self._text[ask.session], ask.temperature, ask.seed)
        key = hashlib.sha256(json.dumps([self._server.url, request], sort_keys=True).encode()).hexdigest()
        known = self._cache.execute("SELECT reply FROM replies WHERE request = ?", (key,)).fetchone()
        if known:
            self.counts["from_cache"] += 1
            self._finish(ask.session, json.loads(known[0]))
        else:  # a daemon, so that an interrupted run does not wait for the server
            threading.Thread(target=self._send, args=(ask.session, key, request), daemon=True).start()

    def poll(self, wait: bool = True) -> list[tuple[int, Line]]:
        """See Policy. Raises ValueError if the server refuses every request."""
        patience = 0.1 if wait and not self._ready else 0.0
        while True:
            try:
                self._take(*self._results.get(timeout=patience))
            except queue.Empty:
                break
            patience = 0.0
        ready, self._ready = [each for each in self._ready if each[0] in self._text], []
        return ready

    def close(self, session: int) -> tuple[list[int], list[int]]:
        """Ends the session, which has no ids. A reply that is still due is cached, but `poll` does not return it."""
        del self._text[session]
        return [], []

    def _request(self, text: str, temperature: float, seed: int) -> dict:
        """The body of a request."""
        body = {
            "model": self._server.model,
            "temperature": temperature,
            "seed": seed % 2**31,
            "max_tokens": self._server.max_tokens,
        }
        if self._top_p < 1:
            body["top_p"] = self._top_p
        if self._server.api == "completions":
            body |= {"prompt": text, "stop": None if self._whole else "\n"}
        else:
            system = [] if self._whole else [{"role": "system", "content": SYSTEM}]
            body["messages"] = [*system, {"role": "user", "content": text}]
        return {name: value for name, value in (body | self._extra).items() if value is not None}

    def _send(self, session: int, key: str, request: dict) -> None:
        """Runs in a thread: sends the request and queues the session, the request's key and the result."""
        with self._permits:
            try:
                result = self._reply(request, self._server.retries)
            except (*UNREADABLE, self._openai.OpenAIError) as error:
                result = self._judge(error)
        self._results.put((session, key, result))

    def _reply(self, request: dict, retries: int) -> dict:
        """Returns the reply to a request. Retries if it is not JSON or has no choice."""
        client = self._client.with_options(max_retries=retries)
        create = client.completions.create if "prompt" in request else client.chat.completions.create
        named = {name: request[name] for name in NAMED if name in request}
        rest = {name: value for name, value in request.items() if name not in NAMED}
        for attempt in range(retries + 1):
            try:
                reply = create(**named, extra_body=rest)
                choice = reply.choices[0]
                text = choice.text if "prompt" in request else choice.message.content
                usage = reply.usage
                result = {
                    "text": text or "",
                    "prompt_tokens": usage.prompt_tokens if usage else 0,
                    "completion_tokens": usage.completion_tokens if usage else 0,
                }
                cached = getattr(usage and usage.prompt_tokens_details, "cached_tokens", None)
                return result if cached is None else result | {"cached_tokens": cached}  # few servers report it
            except (*UNREADABLE, self._openai.APIResponseValidationError):
                if attempt == retries:
                    raise
                time.sleep(min(8.0, 0.5 * 2**attempt))
        raise AssertionError("unreachable")

    def _judge(self, error: Exception) -> NoReply | ValueError | None:
        """The meaning of a failed request: the context is full (None), or the session or the server is at fault."""
        openai, server, reason = self._openai, self._server, f"{type(error).__name__}: {error}"
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)):
            return ValueError(
                f"{server.url} refuses model {server.model!r} with the key in ${server.key}: {error}. Check the "
                "address, the model's name and the key; what was played is kept."
            )
        refused = isinstance(error, (openai.BadRequestError, openai.UnprocessableEntityError))
        if refused and any(word in str(error).lower() for word in FULL):
            return None
        try:
            self._reply(self._request("Say OK.", 0.0, 0), min(1, server.retries))
        except (*UNREADABLE, openai.OpenAIError):
            return ValueError(
                f"{server.url} {'does not take the request' if refused else 'does not answer'}: {reason}. Is it up? "
                "Are address, model and --server.api right? --server.extra '{\"NAME\": null}' removes a parameter. "
                "What was played is kept: run again to resume."
            )
        return NoReply(reason[:500])

    def _take(self, session: int, key: str, result: dict | NoReply | ValueError | None) -> None:
        """Caches and counts a reply; passes on or raises what a failed request means."""
        if isinstance(result, ValueError):
            raise result
        if isinstance(result, NoReply) or result is None:
            return self._ready.append((session, result))
        with self._cache:
            self._cache.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, json.dumps(result)))
        self.counts["requests"] += 1
        for name in result.keys() - {"text"}:
            self.counts[name] = self.counts.get(name, 0) + result[name]
        return self._finish(session, result)

    def _finish(self, session: int, reply: dict) -> None:
        """Queues the first non-empty line after the reply's reasoning, if any, without a repeated "Action:" and cut to
        what its tokens allow."""
        text = reply["text"].rpartition("</think>")[2]
        if self._whole:
            self._ready.append((session, text))
            return
        content = next((line for line in text.splitlines() if line.strip()), "").strip()
        for words in (REASON, ACTION):
            content = content.removeprefix(words).strip()
        line = f" {flat(content[: 16 * self._server.max_tokens])}\n"
        if session in self._text:
            self._text[session] += line
        self._ready.append((session, line))

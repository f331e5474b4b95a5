"""Any OpenAI-compatible server as a policy: vLLM, transformers serve, llama.cpp, a hosted API.

    python rollout.py --server.url http://localhost:8000/v1 --server.model NAME --server.api completions

Left out: reading replies and errors (reply.py), sessions of token ids and adapters (vllm.py), streaming, several
choices per request, log-probabilities.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import queue
import re
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, AnyStr, Literal

import httpx2
import msgspec
from tqdm import tqdm

from agent.policy import Ask, Line, NoReply
from agent.reply import Fault, Reply, answer_in, has_form, line_in, read_fault, read_reply
from artifacts.cli import Range
from artifacts.json_io import parse_json

SYSTEM = (
    "You play a text game. The user gives the transcript so far. Reply with the one line that comes next after its "
    "last words, in the form that earlier lines have, and with nothing else."
)
LONGEST_BODY = 2**25  # bytes of a reply
PATIENCE = 10  # a reply that comes in drops may take so many times --server.timeout
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two requests for a line; the server may ask for more
SHORTEST_SECRET = 8  # characters; shorter keys are placeholders, such as EMPTY, and words of any text
make_tls = functools.cache(httpx2.create_ssl_context)  # reads all certificates, which takes a while
NAME_THE_KEY = "put it into an environment variable, and give the variable's name by --server.key"


@dataclass(frozen=True, kw_only=True)
class Server:
    """An OpenAI-compatible server, and how requests are sent to it."""

    url: str | None = None
    """Base URL, such as http://localhost:8000/v1; without it no server is used."""
    model: str = ""
    """Name of the model on the server. Cached replies are keyed by this name: give each new adapter a new one (token
    ids: the base's name; adapters get theirs)."""
    api: Literal["chat", "completions", "tokens"] = "chat"
    """Chat messages, plain text completions (for base models), or token ids: then vLLM serves the run's base and loads
    each round's adapter, and records hold the ids as played, as those of the local model do."""
    key: str = "OPENAI_API_KEY"
    """Name of the environment variable with the API key, never the key; your own server may need none."""
    extra: str = "{}"
    """JSON object of additional request parameters; null removes one. Hosted reasoning models need
    '{"max_tokens": null, "temperature": null, "seed": null, "max_completion_tokens": 4096}'."""
    concurrency: Annotated[int, Range(1, 1024)] = 16
    """Concurrent requests."""
    retries: Annotated[int, Range(0, 100)] = 6
    """Retries for one line in all, with growing pauses: after 429, 5xx, a timeout, a dropped connection, an error in
    place of a reply or an unreadable one."""
    timeout: Annotated[float, Range(0, 86_400, above=True)] = 60.0
    """Seconds to wait for the next byte before a retry."""
    max_tokens: Annotated[int, Range(1, 10**6)] = 128
    """Token limit of one reply; a model that thinks before it answers needs thousands (token ids: --max-new-tokens)."""

    @property
    def takes_text(self) -> bool:
        """Whether this is a server, and of text: what it writes has no ids, and it may serve any model."""
        return self.url is not None and self.api != "tokens"

    def check(self) -> None:
        """Raises ValueError for settings with which no server can be asked, and for secrets, which it does not show."""
        if self.key != Server.key and not os.environ.get(self.key):
            raise ValueError(
                "--server.key names no environment variable that is set; expected the name of the variable with the "
                f"key, such as {Server.key}, and not the key"
            )
        if re.search(r"api[-_ ]?key|authorization|bearer|password", self.extra, re.I):
            raise ValueError(f"--server.extra holds a key; {NAME_THE_KEY}")
        self.parameters()
        if self.url is not None:
            self._check_url()
        if bool(self.model) != bool(self.url):
            missing, given = ("--server.url", "--server.model") if self.model else ("--server.model", "--server.url")
            raise ValueError(f"{given} is {self.model or self.url} and {missing} is missing: a server needs both")

    def _check_url(self) -> None:
        if re.match(r"(.*?//)?[^/]*@|.*[?#]", self.url, re.S):
            raise ValueError(
                "--server.url holds credentials or parameters; expected the plain address, such as "
                f"http://localhost:8000/v1. If there is a key, {NAME_THE_KEY}"
            )
        try:
            parts = urllib.parse.urlsplit(self.url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"--server.url is {self.url!r}; expected an address such as http://localhost:8000/v1")

    def parameters(self) -> dict[str, Any]:
        """The additional request parameters. Raises ValueError if `extra` is no JSON object."""
        try:
            return parse_json(self.extra, dict[str, Any], "it")
        except ValueError as error:
            raise ValueError(f"--server.extra is {self.extra[:100]!r} ({error}); expected a JSON object") from error

    def secret(self) -> str:
        """The API key, if there is one. Raises ValueError if no request can carry it."""
        key = os.environ.get(self.key, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"${self.key} holds a character that no key has; set it again")
        return key


def pause(attempt: int, fault: Fault | None) -> None:
    """Waits before a request is repeated: not before the first (attempt 0), then longer each time, or as told."""
    if attempt:
        time.sleep(min(LONGEST_PAUSE, fault.pause or FIRST_PAUSE * 2 ** min(attempt - 1, 4)))


def _folded(request: dict[str, Any]) -> dict[str, Any]:
    """A request whose system message heads the user's."""
    text = "\n\n".join(message["content"] for message in request["messages"])
    return request | {"messages": [{"role": "user", "content": text}]}


def has_line(reply: Reply) -> bool:
    return line_in(reply.text, 1) is not None


class Replies:
    """The replies of a stage, in a SQLite file that is made with the first one that is kept. Whatever goes wrong with
    the file is raised as ValueError. `playable`: whether a reply that was kept can be used."""

    def __init__(self, path: str | Path, playable: Callable[[Reply], bool] = has_line):
        self._path, self._playable, self._database = Path(path), playable, None

    def find(self, key: str) -> Reply | None:
        """The reply to a request; None if there is none, or none that can be played, which is then forgotten."""
        if not self._path.exists():
            return None
        with self._opened() as database:
            row = database.execute("SELECT reply FROM replies WHERE request = ?", (key,)).fetchone()
            reply = self._read(row[0]) if row else None
            if row and reply is None:
                database.execute("DELETE FROM replies WHERE request = ?", (key,))
        return reply

    def keep(self, key: str, reply: Reply) -> None:
        with self._opened() as database:
            text = msgspec.json.encode(reply).decode()
            database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, text))

    def texts(self) -> list[str]:
        """The texts of all replies, in no order."""
        if not self._path.exists():
            return []
        with self._opened() as database:
            found = [self._read(row[0]) for row in database.execute("SELECT reply FROM replies")]
        return [reply.text for reply in found if reply]

    def _read(self, row: Any) -> Reply | None:
        try:
            reply = parse_json(row, Reply)
        except (ValueError, TypeError):
            return None
        return reply if self._playable(reply) else None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            if self._database is None:
                self._database = sqlite3.connect(self._path)
                self._database.text_factory = bytes
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.execute(
                    "CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID"
                )
            with self._database:
                yield self._database
        except sqlite3.Error as error:
            raise ValueError(
                f"{self._path}: {error}. If the disk is full, free some space; if the file is damaged, move it away: "
                "what was played is kept, and only the lines of unfinished attempts are asked for again"
            ) from error


class ServerPolicy:
    """Sessions continued by an OpenAI-compatible server. A session is text, sent whole with each request.

    Replies are stored in `cache`, a SQLite file keyed by the sha256 of URL and request, before they are used: a resumed
    run sends only unanswered requests. A reply that cannot be played is not stored. For one line `retries` + 1 requests
    are sent at most, whatever goes wrong with each. If all fail, a short probe tells a bad session from a bad server:
    if the probe is answered, the reply is NoReply; if not, or if the key, address or model is wrong, no session can
    continue and `poll` raises ValueError.
    A server that refuses a system message gets it at the head of the transcript.
    `whole`: sessions are complete prompts instead of transcripts, and replies are returned with all their lines.
    """

    remote = True

    def __init__(self, server: Server, cache: str | Path, *, prompt: str = "", top_p: float = 1.0, whole: bool = False):
        server.check()
        self.slots = server.concurrency
        self._server, self._prompt, self._top_p, self._whole = server, prompt, top_p, whole
        self._name = server.model
        self._extra, self._key = server.parameters(), server.secret()
        bearer = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx2.Client(
            base_url=server.url,
            headers={"Content-Type": "application/json", **bearer},
            timeout=server.timeout,
            verify=make_tls(),
            follow_redirects=True,  # to another origin without the key
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=server.concurrency),
        )
        self._replies = Replies(cache)
        self._permits = threading.Semaphore(server.concurrency)
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._one_turn = False  # whether the model knows no system message
        self._sessions: dict[int, Any] = {}
        self._opened = 0
        self._ready: list[tuple[int, Line]] = []
        self._failure: ValueError | None = None
        self.counts = {"requests": 0, "from_cache": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def open(self, text: str) -> int:
        self._opened += 1
        self._sessions[self._opened] = self._begin(self._prompt + text)
        return self._opened

    def _begin(self, text: str) -> Any:
        """What a new session holds."""
        return text

    def extend(self, session: int, text: str) -> None:
        self._sessions[session] += text

    def submit(self, ask: Ask) -> None:
        request = self._request(self._sessions[ask.session], ask.temperature, ask.seed)
        key = hashlib.sha256(json.dumps([self._server.url, request], sort_keys=True).encode()).hexdigest()
        known = self._replies.find(key)
        if known:
            self.counts["from_cache"] += 1
            self._finish(ask.session, known)
        else:  # a daemon, so that an interrupted run does not wait for the server
            threading.Thread(target=self._send, args=(ask.session, key, request), daemon=True).start()

    def poll(self, wait: bool = True) -> list[tuple[int, Line]]:
        """See Policy. Raises ValueError if the server refuses every request, after all replies that came are kept."""
        patience = 0.1 if wait and not self._ready else 0.0
        while True:
            try:
                self._take(*self._results.get(timeout=patience))
            except queue.Empty:
                break
            patience = 0.0
        failure, self._failure = self._failure, None
        if failure:
            raise failure
        ready, self._ready = [each for each in self._ready if each[0] in self._sessions], []
        return ready

    def close(self, session: int) -> tuple[list[int], list[int]]:
        """Ends the session, which has no ids. A reply that is still due is kept, but `poll` does not return it, and its
        request is not repeated."""
        del self._sessions[session]
        return [], []

    def knows_the_form(self) -> bool:
        """Whether any reply that is kept, of an earlier run too, has the form of a thought or a command."""
        return any(has_form(line_in(text, len(text))) for text in self._replies.texts())

    # ---- requests, in threads ----------------------------------------------------------------------------------------

    def _request(self, text: Any, temperature: float, seed: int) -> dict[str, Any]:
        """The body of a request, given what its session holds."""
        body = {
            "model": self._name,
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

    def _send(self, session: int, key: str, request: dict[str, Any]) -> None:
        """Runs in a thread: queues the session, the request's key and the result, without the API key in any text."""
        with self._permits:
            try:
                result = self._ask(session, request)
            except Exception as error:  # a blanket except: without a result, the run would wait forever
                result = NoReply(f"{type(error).__name__}: {error}"[:500])
        if isinstance(result, Reply):
            result = msgspec.structs.replace(result, text=self._masked(result.text))
        elif result is not None:
            result = type(result)(self._masked(str(result)))
        self._results.put((session, key, result))

    def _masked(self, text: AnyStr) -> AnyStr:
        """The text without the API key, which a server may echo."""
        if len(self._key) < SHORTEST_SECRET:
            return text
        secret, mask = self._key, "[API key]"
        return text.replace(secret.encode(), mask.encode()) if isinstance(text, bytes) else text.replace(secret, mask)

    def _ask(self, session: int, request: dict[str, Any]) -> Reply | NoReply | ValueError | None:
        """Sends a request until it is answered, at most `retries` + 1 times, or until nobody waits for the answer."""
        fault = Fault("the session is closed")
        for attempt in range(self._server.retries + 1):
            pause(attempt, fault)
            if session not in self._sessions:
                return NoReply(str(fault))
            try:
                return self._exchange(request)
            except NoReply as reason:
                return reason
            except Fault as error:
                if error.full:
                    return None
                fault = error
                if not fault.passes:
                    break
        return self._judge(fault)

    def _exchange(self, request: dict[str, Any]) -> Reply | None:
        """One request, or two at first if the model knows no system message. Raises as read_reply does."""
        has_system = len(request.get("messages", [])) > 1
        if has_system and self._one_turn:
            return self._post(_folded(request))
        try:
            return self._post(request)
        except Fault as fault:
            if not (has_system and fault.one_turn):
                raise
            reply = self._post(_folded(request))
            first, self._one_turn = not self._one_turn, True
            if first:
                tqdm.write(
                    self._masked(f"{self._server.url} takes no system message ({fault}): it heads the transcript")
                )
            return reply

    def _post(self, request: dict[str, Any]) -> Reply | None:
        """One request. Raises as read_reply does."""
        path = "/chat/completions" if self._server.api == "chat" else "/completions"
        return self._read(self._call("POST", path, request), request)

    def _read(self, data: bytes, request: dict[str, Any]) -> Reply | None:
        limit = request.get("max_tokens", request.get("max_completion_tokens"))
        return read_reply(data, limit if isinstance(limit, int) else None, self._whole)

    def _call(self, method: str, path: str, request: Any = None) -> bytes:
        """One HTTP request, to an address or to a path below the server's. Returns the body of a 200, without the API
        key in it. Raises Fault."""
        content, data = None if request is None else json.dumps(request, allow_nan=False), bytearray()
        end = time.monotonic() + PATIENCE * self._server.timeout
        try:
            with self._client.stream(method, path, content=content) as response:
                for piece in response.iter_bytes():
                    data += piece
                    if len(data) > LONGEST_BODY or time.monotonic() > end:
                        raise Fault(f"the reply does not end ({len(data)} bytes so far)")
        except httpx2.HTTPError as error:
            raise Fault(f"{type(error).__name__}: {error}") from error
        body = self._masked(bytes(data))  # before any of it is cut
        if not response.is_success:
            raise read_fault(response.status_code, body, response.headers.get("Retry-After", ""))
        return body

    def _judge(self, fault: Fault) -> NoReply | ValueError:
        """The meaning of a request that failed for good: the session or the server is at fault."""
        server = self._server
        if fault.status in (401, 403, 404):
            key = f"the key in ${server.key}{'' if self._key else ' (which is not set)'}"
            return ValueError(
                f"{server.url} refuses model {self._name!r} with {key}: {fault}. Check the address, the model's name "
                "and the key; what was played is kept."
            )
        with contextlib.suppress(NoReply):  # an answer all the same
            try:
                self._exchange(self._request(self._begin("Say OK."), 0.0, 0))
            except Fault as again:
                if not again.full:
                    return self._stop(fault)
        return NoReply(str(fault)[:500])

    def _stop(self, fault: Fault) -> ValueError:
        """Why no session can continue."""
        kept = "What was played is kept: run again to resume."
        if fault.spent:
            return ValueError(
                f"{self._server.url} limits its use: {fault}. {kept} If it is a limit of the rate, lower "
                "--server.concurrency."
            )
        does = "does not take the request" if 400 <= fault.status < 500 else "does not answer"
        return ValueError(
            f"{self._server.url} {'answers with an error' if fault.status == 200 else does}: {fault}. Is it up? Are "
            "address, model and --server.api right? --server.extra '{\"NAME\": null}' removes a parameter. "
            f"{kept}"
        )

    # ---- results -----------------------------------------------------------------------------------------------------

    def _take(self, session: int, key: str, result: Reply | NoReply | ValueError | None) -> None:
        """Keeps and counts a reply; passes on what a failed request means."""
        if isinstance(result, ValueError):
            self._failure = self._failure or result
        elif isinstance(result, Reply):
            self._replies.keep(key, result)
            self.counts["requests"] += 1
            for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
                if (count := getattr(result, name)) is not None:  # few servers report cached ones
                    self.counts[name] = self.counts.get(name, 0) + count
            if None in (result.prompt_tokens, result.completion_tokens):
                self.counts["without_usage"] = self.counts.get("without_usage", 0) + 1
            self._finish(session, result)
        else:
            self._ready.append((session, result))

    def _finish(self, session: int, reply: Reply) -> None:
        """Queues the line of a reply, cut to what its tokens allow."""
        line = answer_in(reply.text) if self._whole else line_in(reply.text, 16 * self._server.max_tokens)
        if session in self._sessions and not self._whole:
            self._sessions[session] += line
        self._ready.append((session, line))

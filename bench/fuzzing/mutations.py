"""Damaged text, JSON, bytes and server replies, for bench/fuzz.py. Whatever is random comes from the given generator.

spoil_text("take mug 1 from desk 1", others, rng)       # one change: a near miss, or something quite different
spoil_json('{"a": [1, 2]}', rng)                        # a key removed, added or renamed, a value replaced
spoil_bytes(data, rng)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

HUGE = 65_536
DEEP = "[" * 10_000 + "]" * 10_000

# Actions that no world expects.
STRANGE = (
    "",
    " ",
    "\t" * HUGE,
    "\n" * HUGE,
    "[" * HUGE,
    "]" * HUGE,
    "x" * HUGE,
    "9" * HUGE,
    "act[" * 5000,
    "search[" + "mug " * 20_000 + "]",
    "search[]",
    "click[" + "<" * HUGE + "]",
    "go to " * 10_000,
    "take 1 from 1 from " * 3000,
    "do(" * 5000 + ")" * 5000,
    "\x00",
    "\x1b[31m",
    "\x85\x0b\x0c",
    "\u2028\u2029",
    "\u202ekool",
    "\ufeff",
    "\ufffd",
    "\U0010ffff",
    "İıſK",
    "ﬁnd",
    "e\u0301" * 5000,
    "🧹" * 5000,
    "%s%n{0}{x}\\",
    "'; DROP TABLE replies; --",
    "../../etc/passwd",
    "NaN",
    "-1",
    "None",
    "<script>alert(1)</script>",
    "Observation: OK.\nAction: act[look]",
    "think[]",
    "act[]",
)
# Characters to put into an action.
MARKS = (
    "\n",
    "\r",
    "\t",
    "\x00",
    "  ",
    "[",
    "]",
    "(",
    ")",
    "{",
    "}",
    "<",
    "|",
    ",",
    ".",
    ":",
    ";",
    '"',
    "'",
    "é",
    "🧹",
)
# JSON, or nearly, to put in the place of a value.
JUNK = (
    "null",
    "true",
    "-1",
    "0",
    "0.5",
    "-0.0",
    "1e999",
    "-1e308",
    "NaN",
    "Infinity",
    "1000000000",
    "1" + "0" * 30,
    "9" * 5000,
    '""',
    '"x"',
    '"2"',
    '"\\ud83d"',
    '"\\u0000"',
    f'"{"x" * HUGE}"',
    "[]",
    "{}",
    "[[]]",
    '[1, "a", null]',
    '{"a": {"b": [null]}}',
    DEEP,
    "01",
    "'x'",
    "",
)


def choose(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def place(rng: np.random.Generator, text: Sequence) -> int:
    return int(rng.integers(len(text) + 1))


# ---- text ------------------------------------------------------------------------------------------------------------


def spoil_text(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
    """A text with one change. `others`: texts to mix it with."""
    at, to = sorted((place(rng, text), place(rng, text)))
    words, other = text.split(" "), choose(rng, others)
    changed = [
        text[:at] + text[to:],
        text[:at] + choose(rng, MARKS) + text[at:],
        text[:to] + other[at:],
        f"{text} {other}",
        " ".join(rng.permutation(words)),
        " ".join(words[::-1]),
        text.upper(),
        text.title(),
        f"  {text}\n",
        f"{text}\n{other}",
        f"act[{text}]",
        f"do({text})",
        text.replace(" 1", f" {int(rng.integers(-2, 99))}"),
        text.replace(" ", "  "),
        text.replace("o", "ο"),  # a Greek one
        text * int(rng.integers(2, 2000)),
        rng.bytes(int(rng.integers(1, 300))).decode("latin-1"),
        rng.bytes(int(rng.integers(1, 300))).decode("utf-8", "replace"),
    ]
    return choose(rng, changed)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def random_place(value: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """A container in a JSON value, and one of its keys or indices."""
    while True:
        keys = [*value] if isinstance(value, dict) else range(len(value))
        key = choose(rng, keys)
        inner = value[key]
        if not (isinstance(inner, dict | list) and inner) or rng.random() < 0.3:
            return value, key
        value = inner


def spoil_json(text: str, rng: np.random.Generator) -> str:
    """The text of a JSON object or array with one change. It may no longer be JSON."""
    value, mark = json.loads(text), "\ufffcjunk"
    container, key = random_place(value, rng)
    how = choose(rng, ("junk", "junk", "junk", "remove", "add", "rename", "wrap"))
    if how == "remove":
        del container[key]
    elif how == "junk":
        container[key] = mark
    elif how == "wrap":
        container[key] = choose(rng, ([container[key]], {"x": container[key]}, str(container[key])))
    elif isinstance(container, list):
        container.insert(key, mark)
    else:
        container[f"{key}{choose(rng, ('', ' ', 's', chr(0)))}x"] = container.pop(key) if how == "rename" else mark
    return json.dumps(value).replace(json.dumps(mark), choose(rng, JUNK))


# ---- bytes -----------------------------------------------------------------------------------------------------------


def spoil_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes with one change: cut, flipped, removed, inserted, doubled, in another encoding."""
    at, to = sorted((place(rng, data), place(rng, data)))
    short = min(to, at + 40)
    changed = [
        data[:at],
        data[at:],
        data[:at] + data[short:],
        data[:at] + data[at:short] * 2 + data[short:],
        data[:at] + rng.bytes(int(rng.integers(1, 40))) + data[at:],
        data[:at] + bytes(short - at) + data[short:],
        data[:at] + bytes(255 - byte for byte in data[at : at + 1]) + data[at + 1 :],
        data[:at] + b"\xff\xfe" + data[at:],
        b"\xef\xbb\xbf" + data,
        data.replace(b"\n", b"\r\n"),
        data.decode("utf-8", "replace").encode("utf-16"),
        data + data,
        data[::-1],
        rng.bytes(int(rng.integers(0, 2000))),
        b"",
    ]
    return choose(rng, changed)


# ---- replies of a server ---------------------------------------------------------------------------------------------


def answer(body: bytes | str, status: str = "200 OK", headers: str = "") -> bytes:
    """A whole answer of a server."""
    data = body.encode() if isinstance(body, str) else body
    return f"HTTP/1.1 {status}\r\nConnection: close\r\n{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data


def chat(message: Any, **choice: Any) -> str:
    """The body of a chat completion with a message."""
    return json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"} | choice],
            "usage": {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15},
        }
    )


def said(content: Any, **choice: Any) -> str:
    return chat({"role": "assistant", "content": content}, **choice)


def events(*deltas: dict[str, Any]) -> bytes:
    """The body of an event stream."""
    lines = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()


def readable(line: str) -> list[bytes]:
    """Answers in which a server says a line, one way or another."""
    bodies = [
        said(line),
        said(f"\n\n {line} \nand more"),
        said([{"type": "text", "text": line}]),
        said([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": line}]),
        said(f"<think>\nhm\n</think>\n\n{line}"),
        chat({"role": "assistant", "content": line, "reasoning_content": "hm", "tool_calls": []}),
        said(line) + "\n",
        said(line).replace('"usage": {', '"usage": {"prompt_tokens_details": null, '),
        json.dumps(json.loads(said(line)) | {"usage": {}}),
        json.dumps(json.loads(said(line)) | {"usage": None, "error": None, "service_tier": [1]}),
    ]
    streams = [
        events({"content": line[:4]}, {"content": line[4:]}),
        events({"reasoning_content": "hm"}, {"content": line}),
    ]
    return [answer(body) for body in [*bodies, *streams]]


def unreadable(line: str) -> list[bytes]:
    """Answers in which a server says nothing that can be played."""
    contents = (
        None,
        "",
        "  \n",
        5,
        True,
        {"text": line},
        "<think>\nOkay, the user",
        "<think>hm</think>",
        [],
        [{"type": "image"}],
    )
    bodies = [said(content) for content in contents]
    bodies += [said(None, finish_reason=reason) for reason in ("length", "content_filter", "tool_calls")]
    bodies += [
        said(line[:6], finish_reason="error"),
        chat({"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": {"name": "look"}}]}),
        chat(None),
        "",
        "[]",
        "null",
        "{",
        said(line)[:-20],
        "<html>busy</html>",
        '{"choices": []}',
        '{"choices": {}}',
        '{"choices": [null]}',
        json.dumps({"error": {"message": "quota exceeded"}}),
        json.dumps({"error": {"message": "Internal error", "code": 500}}),
        DEEP,
        said(line).replace('"index": 0', f'"index": {"9" * 5000}'),
        said(line).replace(json.dumps(line), DEEP),
    ]
    answers = [answer(body) for body in bodies]
    answers += [answer(said("look E").replace("E", "\xe9").encode("latin-1")), answer(events({"role": "assistant"}))]
    statuses = ("400 Bad Request", "404 Not Found", "418 I'm a teapot", "429 Too Many Requests", "500 Oops", "503 Busy")
    for status in statuses:
        answers += [answer(body, status) for body in (json.dumps({"error": {"message": "no"}}), "", "\xff", DEEP)]
    full = json.dumps({"error": {"message": "maximum context length is 10 tokens", "code": "context_length_exceeded"}})
    return [
        *answers,
        answer(full, "400 Bad Request"),
        answer(b"junk", headers="Content-Encoding: gzip\r\n"),
        b"",
        b"junk\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{\r\n",
    ]

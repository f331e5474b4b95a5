"""Reads what a server sends, in one place: the text of a reply, the line in it, and what an error means.

    reply = read_reply(body, limit=128)               # of a 200; None: cut off because the context is full
    line = line_in(reply.text, longest=2048)          # None: there is nothing to play in it
    fault = read_fault(429, body)                     # of anything else
    reply, finish = read_ids(body)                    # of a request for token ids

Content may be text, a list of parts, or null with the answer in a field of reasoning; reasoning may stand in tags; the
body may be an event stream that nobody asked for, or an error in spite of its status.
Left out: requests and retries (server.py).
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from agent.policy import NoReply
from artifacts.render import ACTION, REASON, flat, parse_reply

REMEDY = (
    "raise --server.max-tokens, or switch the model's thinking off (many servers: --server.extra "
    '\'{"chat_template_kwargs": {"enable_thinking": false}}\')'
)
# Reasoning in the text of a reply: how it begins and ends.
TAGS = [(f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "seed:think")]
TAGS += [
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
]
CUT = ("length", "max_tokens", "max_output_tokens")  # reasons to finish: the limit of a reply, or of the context
FULL = ("model_length", "model_context_window_exceeded", "context_length_exceeded")  # certainly the context's
FILTERED = ("content_filter", "safety", "recitation", "prohibited_content", "blocklist", "sensitive")
BROKEN = ("error", "abort", "cancelled", "network_error", "insufficient_system_resource")  # the server gave up halfway

# What an error says, in lower case and without punctuation. That the session is too long for the model:
TOO_LONG = re.compile(
    r"context (length|window|size|limit|overflow|shift)|exceed\w* .{0,40}\bcontext\b"
    r"|\bmax\w* (\w+ ){0,2}len\w*"
    r"|\b(prompt|inputs?|messages?|request|conversation|sequence)\b.{0,60}\b(longer than|too (long|large)|exceed)"
    r"|\b(is|are) too long|too many (\w+ ){0,2}tokens|\btoken (limit|count)\b.{0,60}|maximum number of (\w+ )?tokens"
    r"|reduce (the|your) (length|prompt|input|number of tokens)|less than \d+ tokens|range of input length"
    r"|inputs tokens max new tokens must be|\bmax (\w+ )?tokens must be (at least|greater|positive|a positive)"
    r"|超长|长度超"
)
# What looks like it and is not, unless the error's code says so:
TRANSIENT = re.compile(
    r"rate limit|quota|throttl|per (minute|min|hour|day|second)|too many requests|billing|credit|balance"
    r"|deadline|timeout|timed? ?out|took too long|cancel"
)
SAYS_FULL = re.compile("context (length|window) exceeded|exceed context size error")
SPENT = re.compile(r"quota|rate limit|too many requests|per (minute|min|hour|day)|billing|credits?\b|balance|throttl")
# That the model's template knows no system message:
ALTERNATE = re.compile(
    r"must alternate|(role|system|developer instruction)\b.{0,60}\b(not (be )?(supported|allowed|enabled)|t supported"
    r"|not support|unsupported|invalid|unexpected)|should be user|\bonly user\b.{0,40}\broles?\b"
    r"|(unsupported|unexpected|invalid|unknown|not support)\b.{0,30}\b(role|system)\b"
)


class Fault(Exception):
    """What a server sent in place of a reply, in its own words. `status` is HTTP's, or the one that an error inside a
    200 names; 0 if nothing came or it cannot be read. `pause`: seconds that the server asks to wait."""

    def __init__(self, words: str, status: int = 0, pause: float | None = None):
        super().__init__(words)
        self.status, self.pause = status, pause
        said = re.sub(r"[\W_]+", " ", words.lower()) if status else ""  # otherwise they are ours
        too_long = SAYS_FULL.search(said) or (TOO_LONG.search(said) and not TRANSIENT.search(said))
        self.full = bool(too_long)  # the session has no room for a reply
        self.one_turn = status in (200, 400, 422, 500) and bool(ALTERNATE.search(said))  # without a system message
        self.spent = status in (402, 429) or bool(SPENT.search(said))
        self.passes = status in (0, 200, 408, 409, 425, 429) or status >= 500  # the same request may yet succeed


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The text of a reply and the tokens that it took, as far as the server says; `ids` if they were asked for."""

    text: str
    ids: list[int] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


# ---- the JSON of a body: only what is read, other keys may hold anything ---------------------------------------------


class Part(msgspec.Struct):
    type: str = "text"
    text: str | None = None


Content = str | list[str | Part] | None


class Message(msgspec.Struct):
    content: Content = None
    reasoning_content: Content = None
    reasoning: Content = None
    refusal: str | None = None
    tool_calls: Any = None


class Choice(msgspec.Struct):
    index: int | None = None
    text: str | None = None  # of a completion
    message: Message | None = None
    delta: Message | None = None  # of an event
    finish_reason: str | None = None
    token_ids: Any = None
    error: Any = None


class Body(msgspec.Struct):
    choices: list[Choice] | None = None
    usage: Any = None
    error: Any = None
    message: Any = None  # of an error without an envelope
    detail: Any = None


class Said(msgspec.Struct):
    """A reply with the pieces of its events joined."""

    text: str = ""
    thinking: str = ""
    refusal: str = ""
    finish: str = ""
    called_tools: bool = False
    usage: Any = None


# ---- replies ---------------------------------------------------------------------------------------------------------


def read_reply(data: bytes, limit: int | None = None, whole: bool = False) -> Reply | None:
    """Reads the body of a 200. `limit`: the tokens that were asked for; `whole`: all lines are wanted, not one.

    Returns None if the context was full before a line was complete. Raises NoReply, with the remedy, if there is
    nothing to play: the reply is empty, only reasoning, cut within it, filtered, a call of tools; and Fault if the body
    is an error, cut or unreadable.
    """
    said = _join(_bodies(data))
    reply = _counted(said)
    if said.finish in BROKEN:
        raise Fault(f"the reply ends with {said.finish!r}", 200)
    if said.finish in FILTERED:
        raise NoReply("the server's content filter withheld the reply")
    if not reply.text.strip() and said.finish not in (*CUT, *FULL) and _is_answer(said.thinking, whole):
        reply = msgspec.structs.replace(reply, text=_clean(said.thinking))
    answer = answer_in(reply.text)
    playable = answer.strip() if whole else line_in(answer, len(answer))
    no_room = _context_ended(said, limit)
    if playable and (whole or "\n" in answer or not no_room):
        return reply
    if playable or said.finish in FULL or (no_room and reply.completion_tokens == 0):
        return None
    raise NoReply(_why_nothing(said, reply))


def read_ids(data: bytes) -> tuple[Reply, str]:
    """Reads the body of a 200 to a request for token ids: the reply, whose `ids` are None if it has none that are
    numbers, and the reason why it finished. Raises Fault if the body is an error, cut or unreadable."""
    bodies = _bodies(data)
    said, [choice, *_] = _join(bodies), [choice for body in bodies for choice in body.choices or []]
    if said.finish in BROKEN:
        raise Fault(f"the reply ends with {said.finish!r}", 200)
    ids = choice.token_ids
    good = isinstance(ids, list) and all(type(i) is int for i in ids)
    return msgspec.structs.replace(_counted(said), ids=ids if good else None), said.finish


def _counted(said: Said) -> Reply:
    return Reply(
        text=_clean(said.text),
        prompt_tokens=_count(said.usage, "prompt_tokens"),
        completion_tokens=_count(said.usage, "completion_tokens"),
        cached_tokens=_count(said.usage, "prompt_tokens_details", "cached_tokens"),
    )


def answer_in(text: str) -> str:
    """The text after its reasoning; empty if there is none, or if the reasoning does not end."""
    for begin, end in TAGS:
        text = text.rpartition(end)[2]
        if begin in text:
            return ""
    return text.lstrip()


def line_in(text: str, longest: int) -> str | None:
    """The first line of a reply's answer that says something, without a repeated "Action:", cut to `longest`
    characters; None if there is none."""
    for line in answer_in(text).splitlines():
        for words in (REASON, ACTION):
            line = line.strip().removeprefix(words).strip()
        if line:
            return f" {flat(line[:longest])}\n"
    return None


def has_form(line: str) -> bool:
    """Whether a line has the form of a thought or a command: think[...] or act[...]."""
    kind, said = parse_reply(line)
    return kind == "think" or said != line.strip()


def _is_answer(thinking: str, whole: bool) -> bool:
    """Whether a server put the answer where the reasoning belongs: it has the form of a line."""
    line = line_in(thinking, len(thinking))
    return line is not None and (whole or has_form(line) or re.fullmatch(r"\[.*\]", line.strip()) is not None)


def _context_ended(said: Said, limit: int | None) -> bool:
    """Whether the context ended the reply, and not its own limit. `total` counts reasoning where `completion` does not;
    a server may count an end more or less."""
    made, asked, total = (_count(said.usage, f"{name}_tokens") for name in ("completion", "prompt", "total"))
    if said.finish not in CUT or limit is None or not asked or made is None:
        return said.finish in FULL
    return max(made, (total or 0) - asked) < limit - 1


def _why_nothing(said: Said, reply: Reply) -> str:
    if said.finish in CUT:
        after = "" if reply.completion_tokens is None else f" after {reply.completion_tokens} tokens"
        return f"the reply was cut off{after}, while the model was still thinking: {REMEDY}"
    if said.called_tools:
        return "the model called a tool in place of a reply"
    if said.refusal:
        return f"the model refuses: {_clean(said.refusal)[:300]}"
    if said.thinking or (reply.text.strip() and not answer_in(reply.text)):
        return f"the reply is only thinking: {REMEDY}"
    return f"the reply is empty ({said.finish or 'no reason given'})"


def _bodies(data: bytes) -> list[Body]:
    """The JSON of a body; of an event stream, that of each event. Raises Fault if it is an error or cannot be read."""
    try:
        text = data.decode("utf-8-sig").strip()
        streamed = re.match(r"(data|event|id|retry)?:", text) is not None
        pieces = re.findall(r"^data: ?(\{.*)$", text, re.M) if streamed else [text]
        values = [json.loads(piece) for piece in pieces]  # unlike msgspec's, it takes half an emoji
        bodies = [msgspec.convert(value, Body) for value in values]
    except (ValueError, RecursionError) as error:  # bad UTF-8, not JSON, of other types; nested too deeply
        raise Fault(f"the reply cannot be read ({error}): {data[:100]!r}") from error
    for body, value in zip(bodies, values, strict=True):
        wrong = body.error or next((choice.error for choice in body.choices or [] if choice.error), None)
        if wrong or (body.choices is None and (body.message or body.detail)):
            raise Fault(_words(wrong or value) or "an error without words", _status(wrong or value))
    if not any(body.choices for body in bodies):
        raise Fault(f"the reply has no choice: {data[:100]!r}")
    if streamed and not re.search(r"^data: ?\[DONE\]", text, re.M) and not _join(bodies).finish:
        raise Fault("the reply is an event stream that breaks off")
    return bodies


def _join(bodies: list[Body]) -> Said:
    """What the first choice says, over all events."""
    said = Said()
    for body in bodies:
        said.usage = body.usage or said.usage
        for choice in [choice for choice in body.choices or [] if not choice.index][:1]:
            part = choice.message or choice.delta or Message(content=choice.text)
            said.text += _text(part.content)
            said.thinking += _text(part.reasoning_content) or _text(part.reasoning)
            said.refusal += part.refusal or ""
            said.finish = (choice.finish_reason or said.finish).lower()
            said.called_tools |= bool(part.tool_calls)
    return said


def _text(content: Content) -> str:
    """The text of content, without the parts that are reasoning."""
    if isinstance(content, list):
        parts = [Part(text=part) if isinstance(part, str) else part for part in content]
        return "".join(part.text or "" for part in parts if not re.search("think|reason", part.type))
    return content or ""


def _clean(text: str) -> str:
    """Text that can be written as UTF-8: half an emoji, as of a reply cut within one, becomes a replacement mark."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(usage: Any, *names: str) -> int | None:
    """A number of tokens; None if the server does not say."""
    for name in names:
        usage = usage.get(name) if isinstance(usage, dict) else None
    return usage if type(usage) is int and 0 <= usage < 2**53 else None


# ---- errors ----------------------------------------------------------------------------------------------------------


def read_fault(status: int, data: bytes, retry_after: str = "") -> Fault:
    """What an answer other than a 200 says."""
    try:
        words = _words(json.loads(data))
    except (ValueError, RecursionError):
        words = re.sub(r"<[^>]*>|\s+", " ", data[:2000].decode("utf-8", "replace"))
    pause = float(retry_after) if re.fullmatch(r"\d{1,6}(\.\d+)?", retry_after) else None
    return Fault(f"HTTP {status}{f': {words.strip()}' if words.strip() else ''}", status, pause)


def _words(value: Any, depth: int = 5) -> str:
    """What an error says, with its code and type, in whatever of the known layouts; at most 500 characters."""
    if isinstance(value, list):
        return "; ".join(filter(None, (_words(each, depth - 1) for each in value[:3]))) if depth else ""
    if not isinstance(value, dict) or not depth:
        return _clean(" ".join(value.split()))[:500] if isinstance(value, str) else ""
    said = (_words(value.get(name), depth - 1) for name in ("message", "msg", "detail", "error", "error_msg", "title"))
    metadata = value.get("metadata")
    raw = _words(metadata.get("raw"), depth - 1) if isinstance(metadata, dict) else ""
    codes = [str(value[name]) for name in ("code", "type") if isinstance(value.get(name), str | int) and value[name]]
    words = next(filter(None, said), "") + (f" {raw}" if raw else "")
    return f"{words} ({', '.join(codes)})"[:500] if words and codes else (words or ", ".join(codes))[:500]


def _status(error: Any) -> int:
    """The HTTP status that an error inside a 200 names, or 200."""
    code = error.get("code") if isinstance(error, dict) else None
    return int(code) if re.fullmatch(r"[45]\d\d", str(code)) else 200

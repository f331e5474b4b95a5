"""ServerPolicy against a scripted HTTP server on loopback: every shape of a reply and every fault that servers are
known for, and a killed run.

And against `transformers serve` (slow)."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import actre
import rollout
import train_pg
from agent.attempt import Job
from agent.loop import PlayLoop
from agent.policy import Ask, NoReply
from agent.server import Server, ServerPolicy
from artifacts.cli import parse
from artifacts.json_io import read_json
from artifacts.trajectory import read_trajectories
from lora import convert
from tests.support.helpers import next_line
from tests.support.rooms import TASK, Room
from tests.test_agent import settings

ROOT = Path(__file__).parent.parent


def completion(text, tokens=3, **details) -> bytes:
    """A chat reply and a completion in one; `details` are the usage's of the prompt's tokens."""
    choice = {"index": 0, "finish_reason": "stop", "text": text, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens}
    if details:
        usage["prompt_tokens_details"] = details
    reply = {"id": "x", "object": "x", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(reply).encode()


@pytest.fixture
def server(monkeypatch):
    """`server.answers` are given one after the other, the last one ever after: bytes, (status, headers, bytes), "drop",
    "hang", or a function of the request; `server.requests` are the bodies that came, `server.keys` their keys."""
    requests, keys, stop = [], [], threading.Event()
    monkeypatch.setattr("agent.server.FIRST_PAUSE", 0.01)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body | {"path": self.path})
            keys.append(self.headers["Authorization"])
            answer = http.answers.pop(0) if len(http.answers) > 1 else http.answers[0]
            answer = answer(body) if callable(answer) else answer
            if answer == "hang":
                stop.wait(20)
            if answer in ("drop", "hang"):
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, headers, data = answer if isinstance(answer, tuple) else (200, {}, answer)
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json", "Content-Length": len(data)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            """Nothing is printed."""

    http = ThreadingHTTPServer(("localhost", 0), Handler)
    http.answers, http.requests, http.keys = [completion("act[look]")], requests, keys
    http.url = f"http://localhost:{http.server_port}/v1"
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield http
    stop.set()
    http.shutdown()
    http.server_close()


def line_of(policy: ServerPolicy, text: str = "Observation: a room.\nAction:", seed: int = 0, temperature: float = 0.0):
    return next_line(policy, policy.open(text), seed, temperature)


def policy_of(server, path: Path, **changes) -> ServerPolicy:
    how = {name: changes.pop(name) for name in ("prompt", "top_p", "whole") if name in changes}
    settings = {"url": server.url, "model": "m", "retries": 2, "timeout": 2.0} | changes
    return ServerPolicy(Server(**settings), path / "replies.sqlite", **how)


FAULTS = {
    "429": (429, {"Retry-After": "1"}, b"{}"),
    "500": (500, {}, b"oops"),
    "503": (503, {}, b""),
    "hang": "hang",
    "dropped": "drop",
    "no JSON": b'{"choices": [',
    "a page": (200, {"Content-Type": "text/html"}, b"<html>"),
    "no choice": b'{"choices": []}',
    "null": b"null",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_asked_again(server, tmp_path, fault):
    server.answers[:0] = [FAULTS[fault]]
    start = time.time()
    assert line_of(policy_of(server, tmp_path)) == " act[look]\n"
    assert len(server.requests) == 2
    assert fault != "429" or time.time() - start >= 1


@pytest.mark.parametrize("fault", ["500", "no JSON", "dropped"])
def test_a_fault_that_stays_is_no_reply_and_is_not_kept(server, tmp_path, fault):
    policy = policy_of(server, tmp_path, retries=1)
    line_of(policy)
    server.answers[:] = [lambda body: completion("OK.") if "Say OK." in str(body) else FAULTS[fault]]
    assert isinstance(line_of(policy, "another"), NoReply)
    assert len(server.requests) == 4  # twice, and whether it answers anything
    server.answers[:] = [completion("act[wait]")]
    assert line_of(policy, "another") == " act[wait]\n"


def test_a_server_that_answers_nothing_stops_the_run(server, tmp_path):
    server.answers[:] = [(500, {}, b"")]
    with pytest.raises(ValueError, match="does not answer: HTTP 500.*Is it up"):
        line_of(policy_of(server, tmp_path, retries=0))
    with pytest.raises(ValueError, match="localhost:1/v1 does not answer: ConnectError"):
        line_of(policy_of(server, tmp_path, retries=0, url="http://localhost:1/v1"))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_will_never_work_stops_the_run_and_says_what_to_check(server, tmp_path, status):
    server.answers[:] = [(status, {}, b'{"error": {"message": "the model `m` does not exist"}}')]
    with pytest.raises(ValueError, match=r"refuses model 'm' with the key in \$OPENAI_API_KEY.*does not exist"):
        line_of(policy_of(server, tmp_path))
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 422])
def test_a_context_that_is_full_and_other_bad_requests(server, tmp_path, status):
    policy = policy_of(server, tmp_path)
    server.answers[:] = [(status, {}, b'{"error": {"message": "maximum context length is 4096 tokens"}}')]
    assert line_of(policy) is None
    server.answers[:] = [(status, {}, b'{"error": {"message": "seed is not supported"}}')]
    with pytest.raises(ValueError, match=r"does not take the request.*seed is not supported.*--server\.extra"):
        line_of(policy)
    server.answers[:] = [(status, {}, b'{"error": {"message": "content filter"}}'), completion("OK.")]
    assert isinstance(line_of(policy), NoReply)  # one session that is refused stops nothing


def test_parameters_are_added_and_taken_out(server, tmp_path):
    extra = '{"max_tokens": null, "temperature": null, "seed": null, "max_completion_tokens": 99, "top_k": 5}'
    line_of(policy_of(server, tmp_path, extra=extra, top_p=0.9))
    assert server.requests[0].keys() == {"path", "model", "messages", "max_completion_tokens", "top_k", "top_p"}
    line_of(policy_of(server, tmp_path))
    assert server.requests[1].keys() == {"path", "model", "messages", "max_tokens", "temperature", "seed"}


@pytest.mark.parametrize(
    "said, line",
    [
        ("\n\n  Action: act[look]\nObservation: x", " act[look]\n"),
        ("Reason for the action: [It is dark.]", " [It is dark.]\n"),
        ("Action:\nact[look]", " act[look]\n"),
        ("<think>A desk.\nact[x]</think>\n\nact[look]", " act[look]\n"),
        ("think[I\rwait.]", " think[I\n"),
        ("x" * 200_000, f" {'x' * 2048}\n"),
    ],
)
def test_whatever_is_said_is_one_line_of_bounded_length(server, tmp_path, said, line):
    server.answers[:] = [completion(said)]
    policy = policy_of(server, tmp_path)
    assert line_of(policy) == line
    policy.extend(1, "Observation: OK.\nAction:")
    policy.submit(Ask(1, 0.0, 0))
    while not policy.poll():
        pass
    text = server.requests[1]["messages"][1]["content"]
    assert text == f"Observation: a room.\nAction:{line}Observation: OK.\nAction:"


def test_a_request_is_paid_once_and_told_apart_by_seed_and_prompt(server, tmp_path):
    first = policy_of(server, tmp_path)
    assert [line_of(first), line_of(first)] == [" act[look]\n"] * 2
    assert first.counts == {"requests": 1, "from_cache": 1, "prompt_tokens": 10, "completion_tokens": 3}
    again = policy_of(server, tmp_path)
    line_of(again), line_of(again, seed=1)
    assert again.counts["from_cache"] == 1 and len(server.requests) == 2
    with_prompt = policy_of(server, tmp_path, prompt="An example.\n\n", api="completions")
    line_of(with_prompt)
    assert server.requests[2]["prompt"] == "An example.\n\nObservation: a room.\nAction:"
    assert server.requests[2]["stop"] == "\n" and server.requests[2]["path"] == "/v1/completions"


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_what_the_server_had_in_its_cache_is_counted_where_it_says_so(server, tmp_path, api):
    said = [
        completion("x"),
        completion("x", audio_tokens=0),
        completion("x", cached_tokens=0),
        completion("x", cached_tokens=7),
    ]
    server.answers = said
    policy, counts = policy_of(server, tmp_path, api=api), []
    for seed in range(len(said)):
        line_of(policy, seed=seed)
        counts.append(policy.counts.get("cached_tokens"))
    assert counts == [None, None, 0, 7] and policy.counts["prompt_tokens"] == 40
    line_of(policy, seed=3)  # known, and asked of nobody
    assert policy.counts["cached_tokens"] == 7


def test_a_session_closed_before_its_reply_comes_leaves_the_reply_for_later(server, tmp_path):
    policy = policy_of(server, tmp_path)
    session = policy.open("Observation: a room.\nAction:")
    policy.submit(Ask(session, 0.0, 0))
    policy.close(session)
    deadline = time.time() + 60
    while not policy.counts["requests"] and time.time() < deadline:
        assert policy.poll() == []
    assert line_of(policy) == " act[look]\n" and policy.counts["from_cache"] == 1 == len(server.requests)


# ---- replies of every shape ------------------------------------------------------------------------------------------


def chat(message, finish="stop", usage="known", **fields) -> bytes:
    """A chat reply with any message, and any usage."""
    known = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": known if usage == "known" else usage} | fields).encode()


def events(*deltas, end=b"data: [DONE]\n\n", finish="stop") -> bytes:
    """A chat reply as an event stream."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    chunks.append({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 3}})
    return b": a comment\n\n" + b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + end


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
SHAPES = {
    "parts": chat({"content": [THOUGHT, {"type": "text", "text": "act["}, {"type": "text", "text": "look]"}]}),
    "parts that are text": chat({"content": ["act[look]"]}),
    "null, in reasoning_content": chat({"content": None, "reasoning_content": "act[look]"}),
    "null, in reasoning": chat({"content": None, "reasoning": "act[look]"}),
    "empty, after reasoning in its field": chat({"content": "", "reasoning_content": "hm</think>act[look]"}),
    "beside reasoning": chat({"content": "act[look]", "reasoning_content": "I could act[wait]."}),
    "after tags": chat({"content": "<thinking>hm</thinking>\nact[look]"}),
    "after tags of the prompt": chat({"content": "hm\n</think>\nact[look]"}),
    "after tags in brackets": chat({"content": "[THINK]hm[/THINK]act[look]"}),
    "after a channel": chat({"content": "<|channel|>analysis<|message|>hm<|end|><|channel|>final<|message|>act[look]"}),
    "an event stream": events({"role": "assistant"}, {"reasoning": "hm"}, {"content": "act["}, {"content": "look]"}),
    "an event stream of other line ends": events({"content": "act[look]"}).replace(b"\n", b"\r\n"),
    "an event stream without its last line": events({"content": "act[look]"}, end=b""),
    "no usage": chat({"content": "act[look]"}, usage=None),
    "an empty usage": chat({"content": "act[look]"}, usage={}),
    "a usage of nulls": chat({"content": "act[look]"}, usage={"prompt_tokens": None, "completion_tokens": None}),
    "a usage of text": chat({"content": "act[look]"}, usage="12"),
    "no reason to finish": chat({"content": "act[look]"}, finish=None),
    "unknown fields": chat({"content": "act[look]", "audio": 5}, finish="eos", logprobs=float("nan"), error=None),
    "a mark of the byte order": b"\xef\xbb\xbf" + chat({"content": "act[look]"}),
    "half an emoji after the line": chat({"content": "act[look]\n\ud83d"}),
    "cut after the line": chat({"content": "act[look]\nObserva"}, finish="length"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_reply_of_any_shape_is_read_and_kept(server, tmp_path, shape):
    server.answers[:] = [SHAPES[shape]]
    assert line_of(policy_of(server, tmp_path)) == " act[look]\n"
    server.answers[:] = [completion("act[wait]")]
    assert line_of(policy_of(server, tmp_path)) == " act[look]\n"
    assert len(server.requests) == 1


def test_half_an_emoji_is_replaced_in_a_line_and_in_what_is_kept(server, tmp_path):
    server.answers[:] = [chat({"content": "act[say \ud83d]"})]
    assert [line_of(policy_of(server, tmp_path)) for _ in range(2)] == [" act[say \ufffd]\n"] * 2
    assert len(server.requests) == 1


def test_tokens_that_a_server_does_not_count_are_counted_as_unknown(server, tmp_path):
    server.answers = [
        chat({"content": "x"}, usage=usage)
        for usage in ({}, None, {"prompt_tokens": 5, "completion_tokens": None}, {"prompt_tokens": -1}, "known")
    ]
    policy = policy_of(server, tmp_path)
    for seed in range(5):
        line_of(policy, seed=seed)
    assert policy.counts == {
        "requests": 5,
        "from_cache": 0,
        "prompt_tokens": 15,
        "completion_tokens": 3,
        "without_usage": 4,
    }


NOTHING = {  # what is said -> why nothing of it is played
    "cut while thinking": (chat({"content": None, "reasoning_content": "Okay, the"}, "length"), "--server.max-tokens"),
    "cut within tags": (chat({"content": "<think>\nOkay, the user"}, "length"), "--server.max-tokens"),
    "tags without an end": (chat({"content": "<think>\nOkay, the user"}), "--server.extra"),
    "only thinking": (chat({"content": None, "reasoning_content": "Okay, the user wants a line."}), "only thinking"),
    "only thinking in tags": (chat({"content": "<think>Okay.</think>\n"}), "only thinking"),
    "only thinking in parts": (chat({"content": [THOUGHT]}), "empty"),
    "an answer in the reasoning that was cut": (chat({"content": None, "reasoning": "act[look]"}, "length"), "cut off"),
    "cut at once": (chat({"content": None}, "length"), "cut off after 3 tokens"),
    "null": (chat({"content": None}), "empty"),
    "empty": (chat({"content": ""}), "empty"),
    "blank": (chat({"content": " \n\n"}), "empty"),
    "a label": (chat({"content": "Action:"}), "empty"),
    "an empty message": (chat({}), "empty"),
    "filtered": (chat({"content": None}, "content_filter"), "content filter"),
    "filtered halfway": (chat({"content": "act[go to"}, "content_filter"), "content filter"),
    "a call of tools": (chat({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls"), "called a tool"),
    "a refusal": (chat({"content": None, "refusal": "I cannot help."}), "refuses: I cannot help"),
}


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("said", NOTHING)
def test_a_reply_with_nothing_to_play_is_no_reply_says_the_remedy_and_is_not_kept(server, tmp_path, said, api):
    body, why = NOTHING[said]
    server.answers[:] = [body]
    for requests in (1, 2):  # neither asked again by itself nor kept
        line = line_of(policy_of(server, tmp_path, api=api))
        assert isinstance(line, NoReply) and why in str(line)
        assert len(server.requests) == requests
    assert not list(tmp_path.iterdir())


UNREADABLE = {
    "a number": chat({"content": 5}),
    "true": chat({"content": True}),
    "an object": chat({"content": {"text": "act[look]"}}),
    "choices that are an object": b'{"choices": {"0": {}}}',
    "bad UTF-8": completion("act[look]").replace(b"look", b"\xff\xfe"),
    "Latin-1": completion("act[look]").replace(b"look", "près".encode("latin-1")),
    "nested": b'{"choices": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "a number of 5,000 digits": completion("act[look]", tokens=7).replace(b"7", b"7" * 5_000),
    "a stream that breaks off": events({"content": "act[lo"})[:150],
    "a stream without an event": b"data: [DONE]\n\n",
    "an error at the end": chat({"content": "act[go to"}, "error"),
    "an abort": chat({"content": "act[go to"}, "abort"),
    "an error in a 200": b'{"error": {"message": "overloaded"}}',
    "an error in a choice": b'{"choices": [{"message": {"content": "act[go"}, "error": {"code": 502}}]}',
    "an error in a stream": b'data: {"error": "overloaded"}\n\n',
    "a list": b"[1]",
}


@pytest.mark.parametrize("fault", UNREADABLE)
def test_an_unreadable_reply_is_asked_again_then_no_reply_and_never_kept(server, tmp_path, fault):
    server.answers[:] = [lambda body: completion("OK.") if "Say OK." in str(body) else UNREADABLE[fault]]
    assert isinstance(line_of(policy_of(server, tmp_path, retries=1)), NoReply)
    assert len(server.requests) == 3 and not list(tmp_path.iterdir())  # twice, and whether it answers anything
    server.answers[:] = [UNREADABLE[fault], completion("act[wait]")]
    assert line_of(policy_of(server, tmp_path, retries=1)) == " act[wait]\n"


KEPT = ['{"text": 5}', '{"text": "\\ud83d"}', '{"text": ""}', '{"text": "<think>hm"}', "{", b"\xff", None]


@pytest.mark.parametrize("row", KEPT)
def test_what_is_kept_and_cannot_be_read_is_asked_again_and_replaced(server, tmp_path, row):
    line_of(policy_of(server, tmp_path))
    with sqlite3.connect(tmp_path / "replies.sqlite") as database:
        database.execute("UPDATE replies SET reply = ?", (row,))
    database.close()
    assert [line_of(policy_of(server, tmp_path)) for _ in range(2)] == [" act[look]\n"] * 2
    assert len(server.requests) == 2


def test_a_damaged_file_of_replies_is_named(server, tmp_path):
    (tmp_path / "replies.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match="replies.sqlite: file is not a database.*move it away"):
        line_of(policy_of(server, tmp_path))


def test_whole_replies_keep_their_lines_and_lose_their_thinking(server, tmp_path):
    server.answers[:] = [chat({"content": [THOUGHT, {"type": "text", "text": "<think>hm</think>{\n}\n"}]})]
    assert line_of(policy_of(server, tmp_path, whole=True)) == "{\n}\n"
    server.answers[:] = [chat({"content": None, "reasoning": "hm"}, "length")]
    assert isinstance(line_of(policy_of(server, tmp_path, whole=True), "another"), NoReply)


# ---- a full context --------------------------------------------------------------------------------------------------


def error(status: int, message: str, **fields) -> tuple:
    return status, {}, json.dumps({"error": {"message": message} | fields}).encode()


TGI = "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. Given: 2000 `inputs` tokens"
FULL = {
    "422 of TGI": (422, {}, json.dumps({"error": TGI, "error_type": "validation"}).encode()),
    "400 without room": error(400, "max_tokens must be at least 1, got 0"),
    "500 of llama.cpp": error(500, "Context size has been exceeded."),
    "a code": error(400, "Please shorten it.", code="context_length_exceeded"),
    "a type": error(413, "Too big.", type="exceed_context_size_error"),
    "in a 200": (200, {}, json.dumps({"error": {"message": "prompt is too long: 9 tokens > 8 maximum"}}).encode()),
    "a reply cut by the context": chat(
        {"content": "act[go to the"}, "length", {"prompt_tokens": 90, "completion_tokens": 8, "total_tokens": 98}
    ),
    "a reply without a token": chat({"content": ""}, "length", {"prompt_tokens": 98, "completion_tokens": 0}),
    "a reason to finish": chat({"content": "act[go to the"}, "model_length"),
}


@pytest.mark.parametrize("words", FULL)
def test_a_context_is_full_in_whatever_words_and_is_not_asked_again(server, tmp_path, words):
    server.answers[:] = [FULL[words]]
    assert line_of(policy_of(server, tmp_path)) is None
    assert len(server.requests) == 1 and not list(tmp_path.iterdir())


def test_a_line_that_its_own_limit_cuts_is_played(server, tmp_path):
    counts = {"prompt_tokens": 90, "completion_tokens": 40, "total_tokens": 218}  # 128 with the thinking
    for seed, usage in enumerate([counts, counts | {"completion_tokens": 128}, None, {}]):
        server.answers[:] = [chat({"content": "act[go to the"}, "length", usage)]
        assert line_of(policy_of(server, tmp_path), seed=seed) == " act[go to the\n"


@pytest.mark.parametrize(
    "fault", [error(400, "context deadline exceeded"), error(422, "context canceled"), error(400, "took too long")]
)
def test_a_fault_that_sounds_like_a_full_context_is_none(server, tmp_path, fault):
    server.answers[:] = [fault, completion("OK.")]
    assert isinstance(line_of(policy_of(server, tmp_path)), NoReply)


# ---- templates, limits, retries --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [
        error(400, "Conversation roles must alternate user/assistant/user/assistant/..."),
        error(400, "System role not supported"),
        error(500, "Only user, assistant and tool roles are supported, got system."),
        (400, {}, b'{"error": {"message": "\'messages[0].role\' does not support \'system\' with this model."}}'),
        (422, {}, b'{"detail": [{"loc": ["messages", 0], "msg": "Input should be \'user\' or \'assistant\'"}]}'),
    ],
)
def test_a_system_message_that_is_refused_heads_the_transcript(server, tmp_path, refusal, capfd):
    server.answers[:] = [lambda body: refusal if body["messages"][0]["role"] == "system" else completion("act[look]")]
    policy = policy_of(server, tmp_path, retries=0)
    assert [line_of(policy, seed=seed) for seed in range(2)] == [" act[look]\n"] * 2
    refused, folded, _ = server.requests  # and remembered
    [system, user] = refused["messages"]
    [only] = folded["messages"]
    assert only == {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
    assert capfd.readouterr().out.count("takes no system message") == 1
    assert line_of(policy_of(server, tmp_path)) == " act[look]\n" and len(server.requests) == 3  # it was kept


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b'{"error": {"message": "quota exceeded"}}'),
        error(429, "You exceeded your current quota exceeded", code="insufficient_quota"),
        error(402, "quota exceeded: add credits"),
    ],
)
def test_a_quota_is_said_in_the_providers_words(server, tmp_path, answer):
    server.answers[:] = [answer]
    with pytest.raises(ValueError, match="limits its use: .*quota exceeded.*run again to resume"):
        line_of(policy_of(server, tmp_path, retries=0))


def test_one_line_has_one_budget_of_requests_whatever_goes_wrong(server, tmp_path):
    wrong = itertools.cycle([(500, {}, b""), b"{", "drop", (429, {"Retry-After": "0"}, b"{}"), UNREADABLE["nested"]])
    server.answers[:] = [lambda body: completion("OK.") if "Say OK." in str(body) else next(wrong)]
    assert isinstance(line_of(policy_of(server, tmp_path, retries=2)), NoReply)
    assert len(server.requests) == 4  # three for the line, and whether it answers anything


def test_a_request_for_a_closed_session_is_not_repeated(server, tmp_path):
    policy = policy_of(server, tmp_path)
    session = policy.open("Observation: a room.\nAction:")
    server.answers[:] = [
        lambda body: policy.close(session) and (500, {}, b"") if "room" in str(body) else completion("act[look]")
    ]
    policy.submit(Ask(session, 0.0, 0))
    while session in policy._sessions:
        time.sleep(0.01)
    assert line_of(policy, "another") == " act[look]\n" and len(server.requests) == 2


def test_replies_that_came_after_a_failure_are_kept(server, tmp_path):
    policy = policy_of(server, tmp_path, retries=0)
    server.answers[:] = [lambda body: completion("act[look]") if body["seed"] else (401, {}, b"{}")]
    for seed in (0, 1):
        policy.submit(Ask(policy.open("Observation: a room.\nAction:"), 0.0, seed))
        deadline = time.time() + 60
        while policy._results.qsize() == seed and time.time() < deadline:
            time.sleep(0.01)
    with pytest.raises(ValueError, match="refuses model"):
        policy.poll()
    assert line_of(policy_of(server, tmp_path), seed=1) == " act[look]\n" and len(server.requests) == 2


# ---- no run waits forever -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("a bug"), UnicodeError("a key"), RecursionError(), OSError("x")])
def test_whatever_goes_wrong_in_a_request_is_its_result(server, tmp_path, monkeypatch, error):
    policy = policy_of(server, tmp_path)

    def fails(request):
        raise error

    monkeypatch.setattr(policy, "_post", fails)
    line = line_of(policy)
    assert isinstance(line, NoReply) and type(error).__name__ in str(line)


def test_a_temperature_that_is_no_number_is_no_reply(server, tmp_path):
    assert isinstance(line_of(policy_of(server, tmp_path), temperature=float("nan")), NoReply)
    assert not server.requests


def test_a_reply_that_never_comes_does_not_keep_its_slot(server, tmp_path, monkeypatch):
    """As if the thread of the first request had died."""
    policy, polls = policy_of(server, tmp_path, concurrency=1), iter(range(500))
    send, poll = policy._send, policy.poll
    monkeypatch.setattr(policy, "_send", lambda session, *rest: session == 1 or send(session, *rest))
    monkeypatch.setattr(policy, "poll", lambda wait: next(polls) < 499 and poll(wait))
    loop = PlayLoop([Job(TASK, trial) for trial in range(3)], settings(max_turns=1), Room, policy)
    loop.overdue = lambda attempt: attempt.job.trial == 0
    assert {t.trial: t.end for t in loop} == {0: "timeout", 1: "max_turns", 2: "max_turns"}
    assert policy._sessions == {}


# ---- settings and secrets --------------------------------------------------------------------------------------------

SECRET = "sk-Abc123Def456Ghi789"


@pytest.mark.parametrize(
    "words, why",
    [
        (["--server.concurrency", "0"], "--server.concurrency is 0; expected at least 1"),
        (["--server.concurrency", "1000000"], "--server.concurrency"),
        (["--server.retries", "-1"], "--server.retries is -1; expected at least 0"),
        (["--server.timeout", "0"], "--server.timeout is 0.0; expected more than 0"),
        (["--server.timeout", "nan"], "--server.timeout is nan"),
        (["--server.max-tokens", "0"], "--server.max-tokens is 0; expected at least 1"),
        (["--server.model", "m"], "--server.model is m and --server.url is missing"),
        (["--server.url", "http://localhost:1/v1"], "--server.model is missing"),
        (["--server.url", "localhost:8000/v1", "--server.model", "m"], "expected an address such as http://"),
        (["--server.url", "http://x:99999/v1", "--server.model", "m"], "expected an address such as http://"),
        (["--server.url", "", "--server.model", "m"], "expected an address such as http://"),
        (["--server.extra", "top_k=5"], "--server.extra is 'top_k=5'.*expected a JSON object"),
        (["--server.extra", '{"x": NaN}'], "--server.extra.*expected a JSON object"),
        (["--server.extra", "[1]"], "--server.extra.*expected a JSON object"),
        (["--server.extra", "[" * 10_000], "--server.extra.*expected a JSON object"),
        (["--server.key", "NO_SUCH_VARIABLE"], "--server.key names no environment variable that is set"),
        (["--server.key", SECRET], "--server.key names no environment variable.*and not the key"),
        (["--server.url", f"https://u:{SECRET}@x/v1", "--server.model", "m"], "--server.url holds credentials"),
        (["--server.url", f"https://u:{SECRET}@x:99999/v1", "--server.model", "m"], "--server.url holds credentials"),
        (["--server.url", f"u:{SECRET}@x/v1", "--server.model", "m"], "--server.url holds credentials"),
        (["--server.url", f"https://x/v1?api_key={SECRET}", "--server.model", "m"], "--server.url holds credentials"),
        (["--server.extra", json.dumps({"api_key": SECRET})], "--server.extra holds a key"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_secrets_among_them_not_shown(words, why):
    with pytest.raises(ValueError, match=why) as refused:
        parse(rollout.Args, "", words)
    assert SECRET not in str(refused.value)


def test_a_key_that_no_request_can_carry_is_refused_by_the_name_of_its_variable(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}é")
    with pytest.raises(ValueError, match=r"\$OPENAI_API_KEY holds a character that no key has") as refused:
        policy_of(server, tmp_path)
    assert SECRET not in str(refused.value)


def test_a_key_is_sent_and_an_echo_of_it_is_masked_wherever_it_comes(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("A_KEY", f"{SECRET}\n")
    policy = policy_of(server, tmp_path, key="A_KEY", retries=0)
    server.answers[:] = [completion(f"act[say {SECRET}]")]
    assert line_of(policy) == " act[say [API key]]\n" and server.keys == [f"Bearer {SECRET}"]
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in SECRET)
    for echo in (SECRET, escaped, "x" * 490 + SECRET):  # plain, written otherwise, and where the words are cut
        server.answers[:] = [(400, {}, b'{"error": "Bearer %s"}' % echo.encode()), completion("OK.")]
        line = line_of(policy, "another")
        assert isinstance(line, NoReply) and SECRET[:8] not in str(line)
    server.answers[:] = [error(401, f"Incorrect API key provided: {SECRET}")]
    with pytest.raises(ValueError, match=r"Incorrect API key provided: \[API key\]"):
        line_of(policy, "another")
    server.answers[:] = [error(400, f"System role not supported {SECRET}"), completion("act[look]")]
    assert line_of(policy, "another") == " act[look]\n"
    assert "[API key]" in (out := capfd.readouterr().out) and SECRET not in out
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_a_key_does_not_follow_a_redirect_to_another_origin(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    elsewhere = server.url.replace("localhost", "127.0.0.1")
    server.answers[:] = [(307, {"Location": f"{elsewhere}/chat/completions"}, b""), completion("act[look]")]
    assert line_of(policy_of(server, tmp_path)) == " act[look]\n"
    assert server.keys == [f"Bearer {SECRET}", None]


# ---- a run -----------------------------------------------------------------------------------------------------------


def flags(server, run: Path) -> list[str]:
    return [
        "--run",
        str(run),
        "--trials",
        "2",
        "--limit",
        "100",
        "--max-turns",
        "3",
        "--temperature",
        "1",
        "--server.url",
        server.url,
        "--server.model",
        "m",
        "--server.concurrency",
        "8",
    ]


def test_a_killed_run_loses_nothing_and_asks_nothing_twice(server, tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.chdir(ROOT)
    server.answers[:] = [lambda body: completion("think[I look.]" if body["seed"] % 3 else "act[look]")]
    path = tmp_path / "round_0/rollout/trajectories.jsonl"
    command = [sys.executable, "rollout.py", *flags(server, tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= 60:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    assert 60 <= path.read_bytes().count(b"\n") < 200
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = list(read_trajectories(path))
    assert len(rows) == 200 == len({row.key for row in rows}) and {row.end for row in rows} == {"max_turns"}
    asked = Counter(json.dumps(request, sort_keys=True) for request in server.requests)
    assert sum(asked.values()) - len(asked) <= 8  # those that were under way when it was killed
    assert read_json(path.parent / "done.json")["asked"]["requests"] > 0


def test_a_server_that_goes_down_stops_the_run_which_goes_on_as_if_nothing_had_been(server, tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.chdir(ROOT)
    server.answers[:] = [completion("act[look]")] * 6 + [(500, {}, b"")]
    args = rollout.Args(run=tmp_path, limit=6, server=Server(url=server.url, model="m", retries=0, concurrency=1))
    path = tmp_path / "round_0/rollout/trajectories.jsonl"
    with pytest.raises(ValueError, match=r"does not answer: HTTP 500.*run again to resume"):
        rollout.main(args)
    assert [row.end for row in read_trajectories(path)] == ["stuck"]
    server.answers[:] = [completion("act[look]")]
    rollout.main(args)
    assert [row.end for row in read_trajectories(path)] == ["stuck"] * 6
    assert len(server.requests) == 6 * 4 + 2  # those that failed: one of a game, and whether it answers anything


def test_a_game_that_a_server_cannot_answer_is_no_failure_of_the_agent(server, tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.chdir(ROOT)
    server.answers[:] = [lambda body: (500, {}, b"") if "keychain" in str(body) else completion("act[look]")]
    args = rollout.Args(run=tmp_path, limit=10, server=Server(url=server.url, model="m", retries=0))
    rollout.main(args)
    ends = {row.task: row.end for row in read_trajectories(tmp_path / "round_0/rollout/trajectories.jsonl")}
    assert set(ends.values()) == {"llm_error", "stuck"}
    assert all((end == "llm_error") == ("keychain" in task) for task, end in ends.items()), ends


def test_an_interrupted_run_does_not_wait_for_a_server_that_hangs(server, tmp_path):
    server.answers[:] = ["hang"]
    command = [sys.executable, "rollout.py", *flags(server, tmp_path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    deadline = time.time() + 60
    while len(server.requests) < 8 and time.time() < deadline:  # all that may be under way: nothing left but to wait
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert len(server.requests) == 8
    assert process.wait(timeout=60) != 0  # the server would let it wait for more than two minutes


@pytest.fixture
def transformers_serve(tmp_path):
    """The address of `transformers serve` on the CPU: the model of a request is any folder of weights."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--device", "cpu", "--port", str(port)]
    with open(tmp_path / "serve.log", "w") as log:
        alone = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # threads of torch wait for busy cores
        process = subprocess.Popen(command, stdout=log, stderr=log, env=alone)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                break
        time.sleep(0.1)
    assert process.poll() is None, (tmp_path / "serve.log").read_text()
    yield f"http://localhost:{port}/v1"
    process.terminate()
    process.wait()


@pytest.mark.slow
def test_transformers_serve_plays_and_explains_as_the_local_model_does(transformers_serve, tmp_path, monkeypatch):
    """Round 0 by the base, round 1 by an exported merged model, ActRe by the base, and the base after an example, each
    from the server and here.

    All is greedy, in float32, with the same draws of sampled actions, so that only rounding can tell them apart.
    """
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.chdir(ROOT)
    base, merged = Path("models/tiny-alfworld"), tmp_path / "merged"

    def at(model: Path) -> Server:
        return Server(url=transformers_serve, model=str(model.absolute()), api="completions", concurrency=4)

    def games(run: Path, agent: Server, explainer: Server, **how) -> None:
        how |= {"run": run, "weights": "fp32", "temperature": 0.0}
        rollout.main(rollout.Args(server=agent, limit=6, **how))
        actre.main(actre.Args(server=agent, actre_server=explainer, probability=0.3, budget=1, **how))

    here, there = tmp_path / "here", tmp_path / "there"
    games(here, Server(), Server())
    train_pg.main(train_pg.Args(run=here, weights="fp32", epochs=(4,), learning_rate=0.01))
    adapter = here / "round_0/train_pg/adapter"
    convert.main(convert.Args(model=base, adapter=adapter, weights="fp32", out=merged))
    games(here, Server(), Server())
    games(there, at(base), at(base))
    shutil.copytree(adapter.parent, there / "round_0/train_pg")
    games(there, at(merged), at(base))
    example = {"prompt": Path("prompts/alfworld_react.txt"), "limit": 3, "weights": "fp32"}
    rollout.main(rollout.Args(run=here / "prompted", **example))
    rollout.main(rollout.Args(run=there / "prompted", server=at(base), **example))
    played = {}
    for stage in ("prompted/round_0/rollout", "round_0/rollout", "round_1/rollout", "round_1/actre"):
        ours, theirs = (list(read_trajectories(run / stage / "trajectories.jsonl")) for run in (here, there))
        assert [row.key for row in ours] == [row.key for row in theirs] != []
        played[stage] = [row.turns for row in theirs]
        alike = sum((a.turns, a.end) == (b.turns, b.end) for a, b in zip(ours, theirs, strict=True))
        asked = read_json(there / stage / "done.json")["asked"]
        print(
            f"{stage}: {alike} of {len(ours)} games alike, won {sum(row.success for row in ours)} here and "
            f"{sum(row.success for row in theirs)} there; {asked}"
        )
        assert alike >= len(ours) - 1
    assert played["round_0/rollout"] != played["round_1/rollout"]  # else the adapter may be lost in the export
    written = [turn for row in theirs for turn in row.turns if turn.thought_by == "actre"]
    assert written and all(turn.thought and turn.action_by == "sampled" for turn in written)

"""What servers say of a full context, and what only sounds like it; errors in every layout; any JSON and any bytes."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.policy import NoReply
from agent.reply import Fault, Reply, answer_in, has_form, line_in, read_fault, read_reply

TOO_LONG = [
    "This model's maximum context length is 4097 tokens. However, you requested 5000 tokens",
    "The decoder prompt (length 3000) is longer than the maximum model length of 2048.",
    "'max_tokens' is too large: 128. This model's maximum context length is 2048 tokens and your request has 2000",
    "max_tokens must be at least 1, got -5.",
    "`inputs` must have less than 1024 tokens. Given: 1500",
    "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4097. Given: 4000 `inputs` tokens",
    "the request exceeds the available context size (4096 tokens), try increasing it",
    "Trying to keep the first 5000 tokens when context overflows.",
    "The number of tokens to keep from the initial prompt is greater than the context length",
    "prompt is too long: 210000 tokens > 200000 maximum",
    "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000",
    "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum context length",
    "Too many tokens overall: 33000 > 32768",
    "The input (3000 tokens) is longer than the model's context length (2048 tokens).",
    "Requested token count exceeds the model's maximum context length of 2048 tokens.",
    "Input length 131393 exceeds the maximum allowed input length of 131040 tokens.",
    "The input token count (1196265) exceeds the maximum number of tokens allowed (1048575).",
    "This model's maximum prompt length is 131072 but the request contains 140000 tokens.",
    "Please reduce the length of the messages or completion.",
    "Invalid request: Your request exceeded model token limit: 262144 (requested: 291351)",
    "Range of input length should be [1, 30720]",
    "invalid params, context window exceeds limit (2013)",
    "Prompt too long: 5152 tokens exceeds max_seq_len 2048 (leave room for output tokens)",
    "Prompt too long",
    "Prompt 超长",
    "Input is too long for requested model.",
    "Request Entity Too Large",
]
OTHERWISE = [
    "context deadline exceeded",
    'Post "http://upstream/v1": context deadline exceeded (Client.Timeout exceeded while awaiting headers)',
    "context canceled",
    "The request took too long to complete",
    "Request too large for gpt-4 on tokens per min (TPM): Limit 10000, Requested 15000.",
    "ThrottlingException: Too many tokens, please wait before trying again.",
    "Rate limit reached: token limit 90000 per day",
    "max_tokens is too large: 200000. This model supports at most 16384 completion tokens",
    "seed is not supported",
    "The response was filtered by the content management policy.",
    "Invalid value for top_p",
]


@pytest.mark.parametrize("words", TOO_LONG)
def test_a_session_that_is_too_long_is_known_by_the_words_of_any_server(words):
    for body in ({"error": {"message": words}}, {"object": "error", "message": words}, {"detail": [{"msg": words}]}):
        for status in (400, 422, 413, 500):
            assert read_fault(status, json.dumps(body).encode()).full
    assert read_fault(400, words.encode()).full


@pytest.mark.parametrize("words", OTHERWISE)
def test_what_sounds_like_it_is_told_apart(words):
    assert not any(read_fault(status, json.dumps({"error": words}).encode()).full for status in (400, 422, 429, 500))


@pytest.mark.parametrize("code", ["context_length_exceeded", "exceed_context_size_error"])
def test_a_code_tells_whatever_the_words_and_the_status(code):
    for place in ("code", "type"):
        body = {"error": {"message": "Rate limit? Quota? No.", place: code}}
        assert read_fault(429, json.dumps(body).encode()).full


@pytest.mark.parametrize(
    "body, words",
    [
        ({"error": {"message": "No more.", "code": "insufficient_quota"}}, "HTTP 400: No more. (insufficient_quota)"),
        ({"error": "No more."}, "HTTP 400: No more."),
        ({"object": "error", "message": "No more.", "code": 40303}, "HTTP 400: No more. (40303)"),
        ({"detail": [{"msg": "field required"}, {"msg": "too short"}]}, "HTTP 400: field required; too short"),
        ([{"error": {"message": "No more."}}], "HTTP 400: No more."),
        ({"error": {"message": "Provider", "metadata": {"raw": "No more."}}}, "HTTP 400: Provider No more."),
        ("No\n more.", "HTTP 400: No more."),
        ({}, "HTTP 400"),
        ({"error": {"message": {"message": [[[[[[[]]]]]]]}}}, "HTTP 400"),
    ],
)
def test_the_words_of_an_error_are_found_in_every_layout(body, words):
    assert str(read_fault(400, json.dumps(body).encode())) == words


def test_the_words_of_a_page_are_its_text_and_are_bounded():
    assert str(read_fault(502, b"<html><h1>Bad Gateway</h1>\xff</html>")) == "HTTP 502: Bad Gateway \ufffd"
    assert len(str(read_fault(500, b"x" * 10**6))) < 3000
    assert len(str(read_fault(500, json.dumps({"error": "x" * 10**6}).encode()))) < 600
    assert str(read_fault(500, b"[" * 10**5)).startswith("HTTP 500: [[[")


@pytest.mark.parametrize(
    "said, pause", [("", None), ("2", 2.0), ("0.5", 0.5), ("Wed, 21 Oct 2026", None), ("-1", None)]
)
def test_a_server_says_how_long_to_wait(said, pause):
    assert read_fault(429, b"{}", said).pause == pause


def test_the_form_of_a_line():
    assert all(map(has_form, (" think[x]\n", "act[]", " act[look]\n")))
    assert not any(map(has_form, (" look\n", " [x]\n", "think[x", "Sure! act[look]", "")))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[]), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "message",
                    "delta",
                    "content",
                    "text",
                    "type",
                    "reasoning",
                    "finish_reason",
                    "index",
                    "error",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.fixed_dictionaries({"choices": st.lists(ANY, max_size=2), "usage": ANY, "error": ANY}) | ANY, st.booleans())
def test_any_json_is_a_reply_that_can_be_kept_and_played_or_a_reason(value, streamed):
    data = json.dumps(value).encode()
    try:
        reply = read_reply(b"data: " + data + b"\n\ndata: [DONE]" if streamed else data, 128)
    except (Fault, NoReply) as reason:
        assert str(reason)
        return
    if reply is not None:
        assert msgspec.json.decode(msgspec.json.encode(reply), type=Reply) == reply
        line = line_in(reply.text, 100)
        assert line.endswith("\n") and line.strip() and line.count("\n") == 1


@given(st.binary(max_size=200))
def test_any_bytes_are_a_fault(data):
    with pytest.raises(Fault):
        read_reply(data)
    assert str(read_fault(500, data)).startswith("HTTP 500")


def test_a_body_of_a_megabyte_is_read_in_a_moment():
    for text in ("<think>" * 10**5, "</think>" * 10**5, "act[" + "x" * 10**6, "\n" * 10**6, "Action:" * 10**5):
        answer_in(text), line_in(text, 100)
    read_fault(500, b"<" * 10**6), read_fault(500, b"context " * 10**5)
    with pytest.raises(Fault):
        read_reply(b"data: {" * 10**5)

"""Mistral's tokenizer and chat form: pinned ids, and mistral-common and SentencePiece where they are installed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lora.tokenizer import chat_ids, encode_piece, load_tokenizer, prompt_ids
from models.tokenizer import byte_tokenizer

CHAT = [
    {"role": "user", "content": "Put a mug in the desk."},
    {"role": "assistant", "content": "think[I need a mug.]"},
    {"role": "user", "content": "OK."},
]
# <s> [INST] Put a mug in the desk. [/INST] think[I need a mug.]</s> [INST] OK. [/INST]
CHAT_IDS = [
    1,
    733,
    16289,
    28793,
    10331,
    264,
    290,
    786,
    297,
    272,
    9431,
    28723,
    733,
    28748,
    16289,
    28793,
    1073,
    28792,
    28737,
    927,
    264,
    290,
    786,
    20148,
    2,
    733,
    16289,
    28793,
    12206,
    28723,
    733,
    28748,
    16289,
    28793,
]
SYSTEM = {"role": "system", "content": "Be brief."}
SYSTEM_IDS = [*CHAT_IDS[:4], 1739, 6817, 28723, 13, 13, 16280, *CHAT_IDS[5:]]


@pytest.fixture(scope="module")
def pieces():
    """tokenizer.model of Mistral-7B-Instruct-v0.2: mistral-common brings the same file."""
    mistral_common = pytest.importorskip("mistral_common")
    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


@pytest.fixture(scope="module")
def tokenizer(pieces, tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("mistral")
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    return load_tokenizer(folder)


def test_pieces_of_a_transcript_have_the_ids_of_the_whole_text(tokenizer):
    """As in play: opening, the agent's lines, the world's; a blank before every piece would be another text."""
    pieces = [
        "Observation: You see a desk 1.\nAction:",
        " think[I check it. é😀]\n",
        "Observation: OK.\nAction:",
        " act[go to desk 1]\n",
        "Observation: Nothing happens.\n",
    ]
    ids = [i for number, piece in enumerate(pieces) for i in encode_piece(tokenizer, piece, number == 0)]
    assert ids == tokenizer.encode("".join(pieces)).ids
    assert ids[0] == 1 and 1 not in ids[1:]  # <s>, once
    assert encode_piece(tokenizer, "\n", False) == [13]  # one id, that a line can end with
    assert encode_piece(tokenizer, pieces[2], False) != tokenizer.encode(pieces[2], add_special_tokens=False).ids


def test_ids_of_a_chat(tokenizer):
    assert chat_ids(tokenizer, CHAT) == CHAT_IDS
    assert chat_ids(tokenizer, [SYSTEM, *CHAT]) == SYSTEM_IDS
    assert chat_ids(tokenizer, CHAT[:1]) == CHAT_IDS[:16]  # what comes later changes nothing before it


def test_a_prompt_and_the_text_after_it_are_a_chat_where_the_model_is_instructed(tokenizer, tmp_path):
    example, text = "Observation: an example.\n\n", "Observation: a room.\nAction:"
    after = tokenizer.encode(text).ids[1:]  # the text's own, without <s>
    assert prompt_ids(tokenizer, tmp_path, example) == tokenizer.encode(example).ids
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ \'[INST]\' }}"}')
    chat = [{"role": "user", "content": example.strip()}, {"role": "assistant", "content": text}]
    assert prompt_ids(tokenizer, tmp_path, example) + after + [2] == chat_ids(tokenizer, chat)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert prompt_ids(tokenizer, tmp_path, example) == tokenizer.encode(example).ids
    (tmp_path / "chat_template.jinja").write_text("[INST]")
    assert prompt_ids(tokenizer, tmp_path, example) + after + [2] == chat_ids(tokenizer, chat)


def test_a_chat_is_mistral_common_s(tokenizer):
    messages = pytest.importorskip("mistral_common.protocol.instruct.messages")
    request = pytest.importorskip("mistral_common.protocol.instruct.request")
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer.v1()
    kinds = {"user": messages.UserMessage, "assistant": messages.AssistantMessage, "system": messages.SystemMessage}
    for chat in (CHAT, CHAT[:1], [SYSTEM, *CHAT]):
        theirs = [kinds[message["role"]](content=message["content"]) for message in chat]
        expected = mistral.encode_chat_completion(request.ChatCompletionRequest(messages=theirs)).tokens
        assert chat_ids(tokenizer, chat) == expected


def test_texts_are_sentencepiece_s_where_spaces_bytes_and_brackets_meet(tokenizer, pieces):
    sentencepiece = pytest.importorskip("sentencepiece").SentencePieceProcessor(str(pieces))
    rng = random.Random(0)
    texts = ["", " ", "\n", "  two", "a\n\nb", "Observation: On the shelf 1, you see a mug 1.\nthink["]
    texts += ["".join(rng.choice("abc \n  [].,é😀XYZ12\t▁>") for _ in range(rng.randint(1, 30))) for _ in range(500)]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False).ids == sentencepiece.encode(text)
    assert tokenizer.encode("hi").ids == [1, 12014]  # <s> first, as lora.score has it
    assert tokenizer.encode("\n", add_special_tokens=False).ids[-1] == 13


@pytest.mark.parametrize("chat", [[], [SYSTEM], CHAT[1:], [CHAT[0], CHAT[0]], [CHAT[0], SYSTEM]])
def test_a_chat_out_of_order_is_refused(chat):
    with pytest.raises(ValueError, match="expected an optional system, then user and assistant in turn"):
        chat_ids(byte_tokenizer(), chat)


def test_a_folder_without_a_tokenizer_and_with_a_broken_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"cut")
    with pytest.raises(ValueError, match="tokenizer.model is not a valid tokenizer"):
        load_tokenizer(tmp_path)
    for broken in ("{", '{"model": {}}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ValueError, match="tokenizer.json is not (valid JSON|a valid tokenizer)"):
            load_tokenizer(tmp_path)

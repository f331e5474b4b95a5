"""Tokenizers and chat forms of the supported families, against transformers, mistral-common and SentencePiece."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from lora.tokenizer import chat_ids, encode_piece, line_of, load_tokenizer, newline_ids, prompt_ids, tokenizer_sha
from models.tokenizer import byte_tokenizer
from tests.support.published import PUBLISHED, write_published

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


CHATS = [CHAT, CHAT[:1], [SYSTEM, *CHAT], [SYSTEM, CHAT[0]]]
PIECES = [
    "Observation: You see a desk 1 (closed).\nAction:",
    " think[I check it. é😀]\n",
    "Observation: OK.\nAction:",
    " act[go to desk 12]\n",
    "Observation: Nothing happens.\n",
]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A function from the name of a published tokenizer to it and its folder."""
    made: dict[str, tuple[Tokenizer, Path]] = {}

    def load(name: str) -> tuple[Tokenizer, Path]:
        if name not in made:
            folder = write_published(name, tmp_path_factory.mktemp("published") / name)
            made[name] = load_tokenizer(folder), folder
        return made[name]

    return load


@pytest.fixture
def folder(tmp_path):
    """The hand-made tokenizer, in a folder that may be changed."""
    return write_published("hand", tmp_path / "hand")


def change_config(folder: Path, **changes) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_pieces_of_a_transcript_have_the_ids_of_the_whole_text(published, name):
    """As in play: opening, the agent's lines, the world's; with a tokenizer's prefix once."""
    tokenizer, folder = published(name)
    ids = [i for number, piece in enumerate(PIECES) for i in encode_piece(tokenizer, piece, number == 0)]
    assert ids == tokenizer.encode("".join(PIECES)).ids
    prefix = tokenizer.encode("").ids
    assert ids[: len(prefix)] == prefix and not set(prefix) & set(ids[len(prefix) :])
    # The newline that the harness adds to a line, where two newlines are one token too.
    [newline] = encode_piece(tokenizer, "\n", False)
    assert tokenizer.decode([newline], skip_special_tokens=False) == "\n"
    assert encode_piece(tokenizer, "", False) == []


def test_a_later_piece_gets_no_space_before_it(published):
    tokenizer, _ = published("mistral-v0.1")
    assert encode_piece(tokenizer, PIECES[2], False) != tokenizer.encode(PIECES[2], add_special_tokens=False).ids


@pytest.mark.parametrize(("pair", "text"), [(("Ċ", "O"), "Observation"), (("a", "Ċ"), "\n")])
def test_a_tokenizer_that_joins_a_text_with_what_comes_before_is_refused(pair, text):
    vocabulary = json.loads(byte_tokenizer().to_str())["model"]["vocab"]
    tokenizer = byte_tokenizer()
    tokenizer.model = models.BPE(vocab=vocabulary | {"".join(pair): 256}, merges=[pair])
    with pytest.raises(ValueError, match="the tokenizer joins .* expected every line to start a new token"):
        encode_piece(tokenizer, text, False)
    assert encode_piece(tokenizer, " think[x]\n", False)


NEWLINES = {"hand": 5, "llama3_1": 2255, "qwen3": 2178, "tekken": 1069, "smollm2": 129}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_line_ends_at_every_token_that_holds_a_newline(published, name):
    tokenizer, folder = published(name)
    newlines = newline_ids(tokenizer, folder)
    assert len(newlines) == NEWLINES.get(name, 1)  # SentencePiece has the byte alone
    assert {tokenizer.decode([i]) for i in newlines} >= ({"\n", "\n\n"} if name in NEWLINES else {"\n"})
    for text in ("a\n", "a]\n", "a\n\n\n", "act[go]\r\n", "x\n    y", "(b)\n\n\n\n"):
        ids = tokenizer.encode(text).ids
        assert newlines & set(ids)
        assert line_of(tokenizer, ids, tokenizer.encode("").ids) == text[: text.index("\n") + 1]


def test_a_line_is_the_text_up_to_its_newline_without_end_tokens(folder):
    tokenizer = load_tokenizer(folder)
    end, both, tab = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "ĊĊ", "Ċĉ"))
    act = tokenizer.encode(" act[look]").ids
    for tail, line in (([both], " act[look]\n"), ([tab], " act[look]\n"), ([end], " act[look]"), ([], " act[look]")):
        assert line_of(tokenizer, [*act, *tail], {end}) == line
    assert line_of(tokenizer, [*act, end], ()) == " act[look]<|im_end|>"  # only the model's own end tokens are left out


def test_a_tokenizer_without_a_newline_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer has no token that holds a newline"):
        newline_ids(Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])), tmp_path)


# ---- chats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_chat_is_what_transformers_makes_of_it(published, name):
    """Also for Qwen3, whose template has an empty thought where thinking is off."""
    transformers = pytest.importorskip("transformers")
    tokenizer, folder = published(name)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    how = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
    for chat in CHATS:
        assert chat_ids(tokenizer, folder, chat) == theirs.apply_chat_template(chat, **how)


@pytest.mark.parametrize("name", ["mistral-v0.1", "mistral-v0.3", "tekken"])
def test_a_chat_is_mistral_common_s(published, name):
    messages = pytest.importorskip("mistral_common.protocol.instruct.messages")
    request = pytest.importorskip("mistral_common.protocol.instruct.request")
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer
    reference = mistral.v1() if name == "mistral-v0.1" else mistral.v3(is_tekken=name == "tekken")
    kinds = {"user": messages.UserMessage, "assistant": messages.AssistantMessage, "system": messages.SystemMessage}
    for chat in CHATS:
        theirs = request.ChatCompletionRequest(messages=[kinds[m["role"]](content=m["content"]) for m in chat])
        assert chat_ids(*published(name), chat) == reference.encode_chat_completion(theirs).tokens


def test_ids_of_a_chat(published):
    tokenizer, folder = published("mistral-v0.1")
    assert chat_ids(tokenizer, folder, CHAT) == CHAT_IDS
    assert chat_ids(tokenizer, folder, [SYSTEM, *CHAT]) == SYSTEM_IDS
    assert chat_ids(tokenizer, folder, CHAT[:1]) == CHAT_IDS[:16]  # what comes later changes nothing before it


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_prompt_is_the_user_s_message_where_there_is_a_template_and_plain_text_where_there_is_none(
    published, name, tmp_path
):
    (tokenizer, folder), example = published(name), "Observation: an example.\n\n"
    chat = [{"role": "user", "content": example.strip()}]
    found = prompt_ids(tokenizer, folder, example)
    assert found == chat_ids(tokenizer, folder, chat) != tokenizer.encode(example).ids
    assert example.strip() in tokenizer.decode(found, skip_special_tokens=False)
    assert prompt_ids(tokenizer, tmp_path, example) == tokenizer.encode(example).ids
    with pytest.raises(ValueError, match=f"{tmp_path} has no chat template"):
        chat_ids(tokenizer, tmp_path, chat)


def test_a_prompt_and_the_text_after_it_are_mistral_s_chat(published):
    (tokenizer, folder), example, text = published("mistral-v0.1"), "Observation: an example.\n\n", PIECES[0]
    chat = [{"role": "user", "content": example.strip()}, {"role": "assistant", "content": text}]
    after = tokenizer.encode(text).ids[1:]  # the text's own, without <s>
    assert prompt_ids(tokenizer, folder, example) + after + [2] == chat_ids(tokenizer, folder, chat)


DATED = (
    "\n{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today Date: {{ date_string }}, {{ strftime_now('%Y-%m-%d %B') }}\n{{ messages[0].content }}"
)


def test_a_template_that_prints_the_date_gives_the_same_ids_every_day(folder):
    (folder / "chat_template.jinja").write_text(DATED)
    tokenizer = load_tokenizer(folder)
    text = tokenizer.decode(chat_ids(tokenizer, folder, CHAT[:1]), skip_special_tokens=False)
    assert text == f"\nToday Date: 26 Jul 2024, 2024-07-26 July\n{CHAT[0]['content']}"


def test_of_several_templates_the_default_one_is_used_and_of_two_files_the_one_that_transformers_takes(folder):
    tokenizer, texts = load_tokenizer(folder), {}
    several = [{"name": name, "template": f"{name}: {{{{ messages[0].content }}}}"} for name in ("rag", "default")]
    for case, templates in (("default", several), ("one", "one: {{ messages[0].content }}")):
        change_config(folder, chat_template=templates)
        texts[case] = tokenizer.decode(chat_ids(tokenizer, folder, CHAT[:1]))
    (folder / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    texts["file"] = tokenizer.decode(chat_ids(tokenizer, folder, CHAT[:1]))
    assert texts == {case: f"{case}: {CHAT[0]['content']}" for case in ("default", "one", "file")}
    (folder / "chat_template.jinja").unlink()
    change_config(folder, chat_template=several[:1])
    with pytest.raises(
        ValueError, match=r"tokenizer_config.json has the chat templates \['rag'\]; expected one called"
    ):
        chat_ids(tokenizer, folder, CHAT)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('Only user and assistant roles are supported!') }}", "Only user and assistant roles are"),
        ("{% for message in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0] + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[5].content.x }}", "UndefinedError"),
        ("{{ 'a' * 10 ** 30 }}", "Error"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("[INST]", "it leaves out the last message"),
    ],
)
def test_a_template_that_fails_refuses_the_chat_or_drops_it_is_a_sentence(folder, template, why):
    change_config(folder, chat_template=template)
    with pytest.raises(
        ValueError, match=f"hand: its chat template cannot render a chat of system, user .*{why}"
    ) as got:
        chat_ids(load_tokenizer(folder), folder, [SYSTEM, CHAT[0]])
    assert "\n" not in str(got.value)


def test_a_special_token_that_a_template_prints_must_be_given_and_known(folder):
    tokenizer, template = load_tokenizer(folder), "{{ bos_token }}{{ messages[0].content }}"
    change_config(folder, chat_template=template)
    for changes in ({}, {"bos_token": "<s>"}, {"bos_token": {"content": "<s>"}}):
        change_config(folder, **changes)
        with pytest.raises(ValueError, match="its chat template prints bos_token, '(<s>)?' in tokenizer_config.json"):
            chat_ids(tokenizer, folder, CHAT[:1])
    plain = tokenizer.encode(CHAT[0]["content"]).ids
    change_config(folder, bos_token=None)  # as in Qwen's: there is none
    assert chat_ids(tokenizer, folder, CHAT[:1]) == plain
    before = tokenizer_sha(folder)
    change_config(folder, bos_token={"content": "<|im_start|>"})
    assert chat_ids(tokenizer, folder, CHAT[:1]) == [tokenizer.token_to_id("<|im_start|>"), *plain]
    assert tokenizer_sha(folder) != before


def test_a_chat_without_messages_is_refused(folder):
    with pytest.raises(ValueError, match="hand: its chat template cannot render a chat of"):
        chat_ids(load_tokenizer(folder), folder, [])


# ---- files -----------------------------------------------------------------------------------------------------------


def test_texts_are_sentencepiece_s_where_spaces_bytes_and_brackets_meet(published):
    """But a text that starts with a space has one space fewer, as in transformers: in a chat, texts stand behind
    special tokens, where a template prints the spaces that belong there. No opening of a game starts with one."""
    tokenizer, folder = published("mistral-v0.1")
    pieces = folder / "tokenizer.model"
    sentencepiece = pytest.importorskip("sentencepiece").SentencePieceProcessor(str(pieces))
    rng = random.Random(0)
    texts = ["", "\n", "  two", "a\n\nb", "Observation: On the shelf 1, you see a mug 1.\nthink["]
    texts += ["".join(rng.choice("abc \n  [].,é😀XYZ12\t▁>") for _ in range(rng.randint(1, 30))) for _ in range(500)]
    spaced = 0
    for text in texts:
        fewer = text[1:] if text[:1] in (" ", "▁") and len(text) > 1 else text
        spaced += fewer != text
        if text not in (" ", "▁"):
            assert tokenizer.encode(text, add_special_tokens=False).ids == sentencepiece.encode(fewer)
    assert 20 < spaced < 200
    assert tokenizer.encode("hi").ids == [1, 12014]  # <s> first, as lora.score has it
    assert tokenizer.encode("\n", add_special_tokens=False).ids[-1] == 13


def test_texts_are_tekken_s(published):
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer
    reference = mistral.v3(is_tekken=True).instruct_tokenizer.tokenizer
    tokenizer, rng = published("tekken")[0], random.Random(0)
    letters = "abc   \n\n[](){}.,:;éÉ😀XYZ129\t\r/>'s"
    texts = [*PIECES, "".join(PIECES)]
    texts += ["".join(rng.choice(letters) for _ in range(rng.randint(1, 40))) for _ in range(200)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text, bos=False, eos=False) and tokenizer.decode(ids) == text


def test_neither_loading_a_tokenizer_nor_a_plain_prompt_imports_transformers():
    code = (
        "import sys; from lora.tokenizer import *; base = 'models/tiny-alfworld'; tokenizer = load_tokenizer(base);"
        "newline_ids(tokenizer, base); prompt_ids(tokenizer, base, 'a'); print('transformers' in sys.modules)"
    )
    root = Path(__file__).parent.parent
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_a_tokenizer_of_a_newer_library_is_refused_with_the_installed_version(folder):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": {"type": "FromTheFuture"}}))
    with pytest.raises(
        ValueError, match=r"tokenizer.json is not a valid tokenizer to tokenizers \d.*; upgrade tokenizers and transf"
    ):
        load_tokenizer(folder)


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

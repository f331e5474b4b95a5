"""Text, chats and lines as token ids: loads the tokenizer of a Hugging Face folder and applies its chat template.

    tokenizer = load_tokenizer("qwen3-4b")
    ids = chat_ids(tokenizer, "qwen3-4b", [{"role": "user", "content": "Hello"}])
    stops = newline_ids(tokenizer, "qwen3-4b")              # a sampled line ends at any of them
    line = line_of(tokenizer, sampled_ids, end_ids)

Left out: tools, images, templates that are not the default one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import tokenizers
from tokenizers import Tokenizer

from artifacts.json_io import read_json
from lora.config import Config

# What a tokenizer.model is read with (from_sentencepiece).
SENTENCEPIECE = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")  # that a chat template may print
# Precedes every chat template: one that prints today's date (Llama 3.2, 3.3) would give other ids tomorrow. The day is
# the one that Llama's templates name where they cannot know the date.
FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format.replace('%d', '26').replace('%b', 'Jul').replace('%B', 'July')"
    ".replace('%m', '07').replace('%Y', '2024') }}{% endmacro +%}"
)


class TokenizerModel(msgspec.Struct):
    dropout: float | None = None
    continuing_subword_prefix: str | None = None


class TokenizerFile(msgspec.Struct):
    """A tokenizer.json: what the library does not check, or would use without a word."""

    model: TokenizerModel


class NamedTemplate(msgspec.Struct):
    name: str
    template: str


class AddedToken(msgspec.Struct):
    content: str


SpecialToken = str | AddedToken | None | msgspec.UnsetType


class TokenizerConfigFile(msgspec.Struct):
    """A tokenizer_config.json: its chat template, or several, each with a name, and special tokens."""

    chat_template: str | list[NamedTemplate] | None = None
    bos_token: SpecialToken = msgspec.UNSET
    eos_token: SpecialToken = msgspec.UNSET
    unk_token: SpecialToken = msgspec.UNSET
    pad_token: SpecialToken = msgspec.UNSET


class ChatTemplate(NamedTuple):
    """A template, and the special tokens that the folder names: None where it says that there is none."""

    text: str
    tokens: dict[str, str | None]


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """Loads a folder's tokenizer.json, or converts its SentencePiece tokenizer.model (transformers, without torch).

    Texts are never truncated or padded, whatever the file says. Raises FileNotFoundError if there is neither file, and
    ValueError for an invalid one, or for ids that the vocabulary of the folder's config.json does not have.
    """
    path = tokenizer_path(model_dir)
    if path.suffix == ".json":
        model = read_json(path, TokenizerFile).model
        if model.continuing_subword_prefix or model.dropout:  # the library ends the process; it draws at random
            raise ValueError(f"{path} has {model}; expected BPE without dropout and without a prefix of subwords.")
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path.suffix == ".json" else from_sentencepiece(model_dir)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = [*tokenizer.encode("a\n").ids, *tokenizer.get_vocab().values()]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the libraries raise nothing narrower, and a panic of theirs is no Exception
        raise ValueError(
            f"{path} is not a valid tokenizer to tokenizers {tokenizers.__version__} ({error}); upgrade tokenizers and "
            "transformers if a newer version wrote it, else copy it from the model again"
        ) from error
    if (path.parent / "config.json").exists():
        size = Config.read(model_dir).vocab_size
        if max(ids, default=0) >= size:
            raise ValueError(
                f"{path} has ids up to {max(ids)}, but the model's vocab_size is {size}: it is not this model's "
                "tokenizer. Copy both from the same place."
            )
    return tokenizer


def tokenizer_path(model_dir: str | Path) -> Path:
    """The file that a folder's tokenizer is read from. Raises FileNotFoundError if there is none."""
    path = Path(model_dir) / "tokenizer.json"
    found = next((file for file in (path, path.with_name("tokenizer.model")) if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no {path}; expected a Hugging Face folder with tokenizer.json or tokenizer.model")
    return found


def tokenizer_sha(model_dir: str | Path) -> str:
    """sha256, in hex, of the files that a text's ids depend on, and of the chat template."""
    path = tokenizer_path(model_dir)
    files = [path] if path.suffix == ".json" else [file for n in SENTENCEPIECE if (file := path.with_name(n)).exists()]
    parts = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return hashlib.sha256(json.dumps([parts, chat_template(model_dir)]).encode()).hexdigest()


def chat_template(model_dir: str | Path) -> ChatTemplate | None:
    """The chat template of a folder, the default one of several; None if it has none."""
    config, own = (Path(model_dir) / name for name in ("tokenizer_config.json", "chat_template.jinja"))
    file = read_json(config, TokenizerConfigFile) if config.exists() else TokenizerConfigFile()
    text = file.chat_template
    if own.exists():
        try:
            text = own.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{own} is not UTF-8 ({error}); copy it from the model again") from error
    elif isinstance(text, list):
        named = {each.name: each.template for each in text}
        if "default" not in named:
            raise ValueError(f"{config} has the chat templates {sorted(named)}; expected one called 'default'")
        text = named["default"]
    tokens = {name: getattr(file, name) for name in SPECIAL}
    tokens = {name: token.content if isinstance(token, AddedToken) else token for name, token in tokens.items()}
    given = {name: token for name, token in tokens.items() if token is not msgspec.UNSET}
    return None if text is None else ChatTemplate(text=text, tokens=given)


def from_sentencepiece(model_dir: str | Path) -> Tokenizer:
    """A tokenizer.model as converted by transformers, corrected to give SentencePiece's ids for runs of spaces.

    SentencePiece, like Mistral's tokenizer.json, merges runs of spaces last (their scores are lowest); the conversion
    merges them first. As in transformers, only a text that starts without a space gets one, where SentencePiece always
    adds one, and the texts between the special tokens of a chat get none (unless the folder says `legacy`).
    """
    from transformers import LlamaTokenizer  # imported here because the import takes a second

    chat_template(model_dir)  # raises, with the file's name, if what transformers is about to read is damaged
    fields = json.loads(LlamaTokenizer.from_pretrained(str(model_dir), add_bos_token=True).backend_tokenizer.to_str())
    fields["model"]["merges"].sort(key=lambda pair: set(pair[0] + pair[1]) == {"▁"})
    return Tokenizer.from_str(json.dumps(fields))


# ---- lines -----------------------------------------------------------------------------------------------------------


def encode_piece(tokenizer: Tokenizer, text: str, first: bool) -> list[int]:
    """Ids of one piece of a longer text that is encoded piece by piece.

    The `first` piece gets the tokenizer's prefix (Mistral: <s> and a space); later ones are encoded as if they followed
    a newline, or a letter if they start with a newline, as two newlines may be one token. Concatenated, the pieces have
    the ids of the full text if no token spans two of them. Raises ValueError for a tokenizer that joins what comes
    before with the text.
    """
    if first:
        return tokenizer.encode(text).ids
    context = "a" if text.startswith("\n") else "\n"
    before, ids = (tokenizer.encode(t, add_special_tokens=False).ids for t in (context, context + text))
    if ids[: len(before)] != before:
        raise ValueError(
            f"the tokenizer joins {context!r} with {text[:20]!r}; expected every line to start a new token"
        )
    return ids[len(before) :]


def newline_ids(tokenizer: Tokenizer, model_dir: str | Path) -> frozenset[int]:
    """All ids whose text holds a newline, each of which ends a sampled line: "\\n", but also "\\n\\n" and "]\\n".

    Raises ValueError, with the folder's name, if there are none.
    """
    ids = list(tokenizer.get_vocab().values())
    texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    found = frozenset(i for i, text in zip(ids, texts, strict=True) if "\n" in text)
    if not found:
        raise ValueError(f"{model_dir}: the tokenizer has no token that holds a newline; expected one, to end a line")
    return found


def line_of(tokenizer: Tokenizer, sampled: Sequence[int], end_ids: Collection[int]) -> str:
    """The line that sampled ids are played as: their text without end tokens, up to and including its first newline.

    What follows the newline in its token was sampled, and counts as such, but is not part of the line.
    """
    text = tokenizer.decode([i for i in sampled if i not in end_ids], skip_special_tokens=False)
    line, newline, _ = text.partition("\n")
    return line + newline


# ---- chats -----------------------------------------------------------------------------------------------------------


def prompt_ids(tokenizer: Tokenizer, model_dir: str | Path, text: str) -> list[int]:
    """Ids of an example to put before a text; the text's own ids are appended without the tokenizer's prefix.

    If `model_dir` has a chat template, the example is the user's message and the text the assistant's: with Mistral
    v0.2 <s> [INST] example [/INST] text. Without one, the plain example comes first: <s> example text. Raises
    ValueError as `chat_ids` does.
    """
    if chat_template(model_dir) is None:
        return tokenizer.encode(text).ids
    return chat_ids(tokenizer, model_dir, [{"role": "user", "content": text.strip()}])


def chat_ids(tokenizer: Tokenizer, model_dir: str | Path, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a chat up to where the assistant's next message begins.

    The folder's chat template renders the chat as in transformers' `apply_chat_template`, with the generation prompt
    and without thinking; only the date that a template prints is always 26 July 2024, so that ids do not change from
    day to day. Raises ValueError, with the folder's name, if there is no template, if it fails, refuses the messages (a
    system message, say) or leaves the last one out, and for a special token that it prints and the tokenizer lacks.
    """
    template = chat_template(model_dir)
    if template is None:
        raise ValueError(f"{model_dir} has no chat template; expected one in tokenizer_config.json")
    for name in SPECIAL:
        token = template.tokens.get(name, "")
        if token is not None and tokenizer.token_to_id(token) is None and re.search(rf"\b{name}\b", template.text):
            raise ValueError(
                f"{model_dir}: its chat template prints {name}, {token!r} in tokenizer_config.json; expected a token "
                "of the tokenizer: copy the tokenizer's files from the model again"
            )
    return tokenizer.encode(render(template, messages, model_dir), add_special_tokens=False).ids


def render(template: ChatTemplate, messages: Sequence[Mapping[str, str]], model_dir: str | Path) -> str:
    """The text of a chat (see `chat_ids`)."""
    from transformers.utils.chat_template_utils import render_jinja_template  # the import takes seconds

    tokens = {name: token for name, token in template.tokens.items() if token is not None}
    try:
        [text], _ = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=FIXED_DATE + template.text,
            add_generation_prompt=True,
            enable_thinking=False,
            **tokens,
        )
        if messages[-1]["content"].strip() not in text:
            raise ValueError("it leaves out the last message")
    except Exception as error:  # a blanket except: a template is a program, which raises anything
        roles = ", ".join(message["role"] for message in messages)
        why = " ".join(str(error).split())
        raise ValueError(
            f"{model_dir}: its chat template cannot render a chat of {roles} ({type(error).__name__}: {why}); send "
            "messages that it takes, or copy it from the model again"
        ) from error
    return text

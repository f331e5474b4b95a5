"""Tokenises text and chats: loads the tokenizer of a Hugging Face folder and applies Mistral's chat format.

    tokenizer = load_tokenizer("mistral-7b")
    ids = chat_ids(tokenizer, [{"role": "user", "content": "Hello"}])       # <s> [INST] Hello [/INST]

Left out: other models' chat templates, tools, images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from tokenizers import Tokenizer, normalizers

from artifacts.json_io import read_json
from lora.config import Config

# What a tokenizer.model is read with (from_sentencepiece).
SENTENCEPIECE = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class TokenizerModel(msgspec.Struct):
    dropout: float | None = None
    continuing_subword_prefix: str | None = None


class TokenizerFile(msgspec.Struct):
    """A tokenizer.json: what the library does not check, or would use without a word."""

    model: TokenizerModel


class TokenizerConfigFile(msgspec.Struct):
    """A tokenizer_config.json. Templates may be several, each with a name."""

    chat_template: str | list[dict[str, str]] | None = None


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
        raise ValueError(f"{path} is not a valid tokenizer ({error}); copy it from the model again") from error
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


def chat_template(model_dir: str | Path) -> str | None:
    """The chat template of a folder: all of them in JSON if it has several, None if it has none."""
    path = Path(model_dir) / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); copy it from the model again") from error
    config = path.with_name("tokenizer_config.json")
    template = read_json(config, TokenizerConfigFile).chat_template if config.exists() else None
    return json.dumps(template) if isinstance(template, list) else template


def from_sentencepiece(model_dir: str | Path) -> Tokenizer:
    """Mistral's tokenizer.model as converted by transformers, corrected to give SentencePiece's ids for runs of spaces.

    SentencePiece, like Mistral's tokenizer.json, merges runs of spaces last (their scores are lowest) and prepends a
    space to every text. The conversion merges them first and prepends none to a text that starts with a space.
    """
    from transformers import LlamaTokenizer  # imported here because the import takes a second

    chat_template(model_dir)  # raises, with the file's name, if what transformers is about to read is damaged
    fields = json.loads(LlamaTokenizer.from_pretrained(str(model_dir), add_bos_token=True).backend_tokenizer.to_str())
    fields["model"]["merges"].sort(key=lambda pair: set(pair[0] + pair[1]) == {"▁"})
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    return tokenizer


def encode_piece(tokenizer: Tokenizer, text: str, first: bool) -> list[int]:
    """Ids of one piece of a longer text that is encoded piece by piece.

    The `first` piece gets the tokenizer's prefix (Mistral: <s> and a space); later ones are encoded as if they followed
    a newline. Concatenated, the pieces have the ids of the full text if no token spans two of them. Raises ValueError
    for a tokenizer that joins a newline with the text after it.
    """
    if first:
        return tokenizer.encode(text).ids
    newline, ids = (tokenizer.encode(t, add_special_tokens=False).ids for t in ("\n", "\n" + text))
    if ids[: len(newline)] != newline:
        raise ValueError(f"the tokenizer joins a newline with {text[:20]!r}; expected every line to start a new token")
    return ids[len(newline) :]


def prompt_ids(tokenizer: Tokenizer, model_dir: str | Path, text: str) -> list[int]:
    """Ids of an example to put before a text; the text's own ids are appended without the tokenizer's prefix.

    For an instruction-tuned model in Mistral's format (the chat template in `model_dir` contains [INST]), the example
    is the user's message and the text the assistant's: <s> [INST] example [/INST] text. Other models get the plain
    example: <s> example text.
    """
    if "[INST]" in (chat_template(model_dir) or ""):
        return chat_ids(tokenizer, [{"role": "user", "content": text.strip()}])
    return tokenizer.encode(text).ids


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a chat in the format of Mistral-7B-Instruct v0.1 and v0.2: <s> [INST] user [/INST] assistant</s> ...

    Each message is encoded separately, as in mistral-common, so the ids of earlier messages never change. A system
    prompt is prepended to the first user message with an empty line between them. Raises ValueError unless user and
    assistant alternate, and for a tokenizer without <s> or </s>.
    """
    messages = list(messages)
    if messages and messages[0]["role"] == "system":
        system, first, *rest = messages if len(messages) > 1 else (*messages, {"role": "none", "content": ""})
        messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise ValueError(
            f"got messages with roles {roles}; expected an optional system, then user and assistant in turn."
        )
    start, end = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    if None in (start, end):
        raise ValueError("the tokenizer has no <s> or no </s>, but the chat template is Mistral's: copy both again.")
    ids = [start]
    for message in messages:
        text = f"[INST] {message['content']} [/INST]" if message["role"] == "user" else message["content"]
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        ids += [end] if message["role"] == "assistant" else []
    return ids

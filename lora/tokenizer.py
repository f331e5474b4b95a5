"""Tokenises text and chats: loads the tokenizer of a Hugging Face folder and applies Mistral's chat format.

    tokenizer = load_tokenizer("mistral-7b")
    ids = chat_ids(tokenizer, [{"role": "user", "content": "Hello"}])       # <s> [INST] Hello [/INST]

Left out: other models' chat templates, tools, images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, normalizers


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """Loads a folder's tokenizer.json, or converts its SentencePiece tokenizer.model (transformers, without torch).

    Raises FileNotFoundError if there is neither, and ValueError for an invalid file.
    """
    path = Path(model_dir) / "tokenizer.json"
    sentencepiece_path = path.with_name("tokenizer.model")
    if not path.exists() and not sentencepiece_path.exists():
        raise FileNotFoundError(f"no {path}; expected a Hugging Face folder with tokenizer.json or tokenizer.model")
    try:
        if path.exists():
            return Tokenizer.from_file(str(path))
        return from_sentencepiece(model_dir)
    except Exception as error:  # the libraries raise nothing narrower
        path = path if path.exists() else sentencepiece_path
        raise ValueError(f"{path} is not a valid tokenizer ({error}); copy it from the model again") from error


def from_sentencepiece(model_dir: str | Path) -> Tokenizer:
    """Mistral's tokenizer.model as converted by transformers, corrected to give SentencePiece's ids for runs of spaces.

    SentencePiece, like Mistral's tokenizer.json, merges runs of spaces last (their scores are lowest) and prepends a
    space to every text. The conversion merges them first and prepends none to a text that starts with a space.
    """
    from transformers import LlamaTokenizer  # imported here because the import takes a second

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
    path = Path(model_dir) / "tokenizer_config.json"
    template = json.loads(path.read_text()).get("chat_template") if path.exists() else None
    path = path.with_name("chat_template.jinja")
    template = path.read_text() if path.exists() else template
    if "[INST]" in str(template):
        return chat_ids(tokenizer, [{"role": "user", "content": text.strip()}])
    return tokenizer.encode(text).ids


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a chat in the format of Mistral-7B-Instruct v0.1 and v0.2: <s> [INST] user [/INST] assistant</s> ...

    Each message is encoded separately, as in mistral-common, so the ids of earlier messages never change. A system
    prompt is prepended to the first user message with an empty line between them. Raises ValueError unless user and
    assistant alternate.
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
    ids = [tokenizer.token_to_id("<s>")]
    for message in messages:
        text = f"[INST] {message['content']} [/INST]" if message["role"] == "user" else message["content"]
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        ids += [tokenizer.token_to_id("</s>")] if message["role"] == "assistant" else []
    return ids

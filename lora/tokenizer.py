"""Text to ids: the tokenizer of a Hugging Face folder, and Mistral's chat form.

Left out: other models' chat templates, tools, images.

    tokenizer = load_tokenizer("mistral-7b")
    ids = chat_ids(tokenizer, [{"role": "user", "content": "Hello"}])       # <s> [INST] Hello [/INST]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, normalizers


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer.json of a folder, or what transformers makes of its SentencePiece tokenizer.model (without torch).

    Raises FileNotFoundError, or ValueError if the file is none.
    """
    path = Path(model_dir) / "tokenizer.json"
    pieces = path.with_name("tokenizer.model")
    if not path.exists() and not pieces.exists():
        raise FileNotFoundError(f"no {path}; expected a Hugging Face folder with tokenizer.json or tokenizer.model")
    try:
        if path.exists():
            return Tokenizer.from_file(str(path))
        return from_sentencepiece(model_dir)
    except Exception as error:  # the libraries raise nothing narrower
        path = path if path.exists() else pieces
        raise ValueError(f"{path} is not a whole tokenizer ({error}); copy it from the model again") from error


def from_sentencepiece(model_dir: str | Path) -> Tokenizer:
    """Mistral's tokenizer.model as transformers converts it, with SentencePiece's own ids where spaces meet.

    SentencePiece merges runs of spaces last (their scores are lowest) and puts a space before every text, which is what
    Mistral's tokenizer.json does too; the conversion merges them first, and leaves the space out before another.
    """
    from transformers import LlamaTokenizer  # here, because it takes a second

    fields = json.loads(LlamaTokenizer.from_pretrained(str(model_dir), add_bos_token=True).backend_tokenizer.to_str())
    fields["model"]["merges"].sort(key=lambda pair: set(pair[0] + pair[1]) == {"▁"})
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    return tokenizer


def encode_piece(tokenizer: Tokenizer, text: str, first: bool) -> list[int]:
    """Ids of a piece of a longer text that is made piece by piece: those that it has there.

    The `first` one has what the tokenizer puts before a text (Mistral: <s> and a space); a later one has not, as if it
    came after a newline. Ids of all pieces are those of the whole text where no token spans two of them. Raises
    ValueError for a tokenizer that makes a newline and what follows one token.
    """
    if first:
        return tokenizer.encode(text).ids
    newline, ids = (tokenizer.encode(t, add_special_tokens=False).ids for t in ("\n", "\n" + text))
    if ids[: len(newline)] != newline:
        raise ValueError(f"the tokenizer joins a newline with {text[:20]!r}; expected lines that begin with own tokens")
    return ids[len(newline) :]


def prompt_ids(tokenizer: Tokenizer, model_dir: str | Path, text: str) -> list[int]:
    """Ids of an example that stands before a text whose own ids follow, without what the tokenizer puts before them.

    For a model of `model_dir` that is instructed in Mistral's form (its chat template says [INST]) the example is the
    user's message and the text is the assistant's: <s> [INST] example [/INST] text. Any other model has the example as
    it is: <s> example text.
    """
    path = Path(model_dir) / "tokenizer_config.json"
    template = json.loads(path.read_text()).get("chat_template") if path.exists() else None
    path = path.with_name("chat_template.jinja")
    template = path.read_text() if path.exists() else template
    if "[INST]" in str(template):
        return chat_ids(tokenizer, [{"role": "user", "content": text.strip()}])
    return tokenizer.encode(text).ids


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a chat in the form of Mistral-7B-Instruct v0.1 and v0.2: <s> [INST] user [/INST] assistant</s> [INST] ...

    Every piece is encoded by itself, as mistral-common does: ids of earlier messages never change. A system prompt is
    folded into the first user turn, an empty line between. Raises ValueError unless user and assistant alternate.
    """
    messages = list(messages)
    if messages and messages[0]["role"] == "system":
        system, first, *rest = messages if len(messages) > 1 else (*messages, {"role": "none", "content": ""})
        messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise ValueError(f"got messages of {roles}; expected an optional system, then user and assistant in turn.")
    ids = [tokenizer.token_to_id("<s>")]
    for message in messages:
        text = f"[INST] {message['content']} [/INST]" if message["role"] == "user" else message["content"]
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        ids += [tokenizer.token_to_id("</s>")] if message["role"] == "assistant" else []
    return ids

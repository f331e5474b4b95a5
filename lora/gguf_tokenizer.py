"""Tokenizers of GGUF files: the metadata as a tokenizer.json and a tokenizer_config.json.

    files = tokenizer_files(vocabulary, config, where="model.gguf")         # name -> content

A file holds tokens, their kinds, and merges or scores, but only the name of the pattern that cuts texts before they are
merged. The patterns are those of the models' own tokenizer.json; a name that is not in `SCHEMES` is refused, because
another pattern gives other ids without a word.

Left out: WordPiece, Unigram and RWKV, suffixes such as </s>.
"""

from __future__ import annotations

import json
from typing import Annotated, NamedTuple

import msgspec
from gguf import TokenType
from msgspec import Meta
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lora.config import Config, TokenId

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "▁"  # SentencePiece's spelling of a space


class Scheme(NamedTuple):
    """How texts become tokens, as far as a GGUF file only names it (`tokenizer.ggml.pre`)."""

    pattern: str | None  # None: every digit alone, then GPT-2's pattern
    add_bos: bool  # unless the file says otherwise
    whole_words: bool = False  # a word that is a token is that token, whatever the merges say
    nfc: bool = False  # texts are normalised to Unicode's NFC


SCHEMES = {
    "smollm": Scheme(pattern=None, add_bos=False),
    "llama-bpe": Scheme(pattern=LLAMA_3, add_bos=True, whole_words=True),
    "qwen2": Scheme(pattern=LLAMA_3.replace("{1,3}", ""), add_bos=False, nfc=True),
    "tekken": Scheme(pattern=TEKKEN, add_bos=True, whole_words=True),
}


class Vocabulary(
    msgspec.Struct,
    kw_only=True,
    rename=lambda name: name if name == "chat_template" else f"ggml.{name}",
):
    """The metadata under `tokenizer.`"""

    model: str
    pre: str | None = None
    tokens: Annotated[list[str], Meta(min_length=1)]
    token_type: list[int]
    merges: list[str] = []
    scores: list[float] = []
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None
    eot_token_id: TokenId | None = None
    eom_token_id: TokenId | None = None
    unknown_token_id: TokenId | None = None
    padding_token_id: TokenId | None = None
    add_bos_token: bool | None = None
    add_space_prefix: bool = True
    chat_template: str | None = None

    def of_kind(self, *kinds: TokenType) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.token_type, strict=True) if kind in kinds]

    def ids(self) -> dict[str, int]:
        """Token -> id, without those that only fill the vocabulary up."""
        kinds = zip(self.tokens, self.token_type, strict=True)
        return {token: i for i, (token, kind) in enumerate(kinds) if kind != TokenType.UNUSED}

    def token(self, i: int | None) -> str | None:
        return None if i is None else self.tokens[i]


def tokenizer_files(vocabulary: Vocabulary, config: Config, where: str) -> dict[str, bytes]:
    """Name -> content of a tokenizer's files. Raises ValueError, starting with `where`, for one that is contradictory
    or of a kind that is not implemented."""
    check(vocabulary, config, where)
    spm = vocabulary.model == "llama"
    tokenizer = from_scores(vocabulary) if spm else from_merges(vocabulary)
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t in vocabulary.of_kind(TokenType.UNKNOWN, TokenType.CONTROL)]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in vocabulary.of_kind(TokenType.USER_DEFINED)])
    bos, add_bos = vocabulary.token(vocabulary.bos_token_id), vocabulary.add_bos_token
    if add_bos is None:
        add_bos = spm or SCHEMES[vocabulary.pre].add_bos
    if add_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocabulary.bos_token_id)]
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # which reads tokenizer.json as it is
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "bos_token": bos,
        "eos_token": vocabulary.token(vocabulary.eos_token_id),
        "unk_token": vocabulary.token(vocabulary.unknown_token_id),
        "pad_token": vocabulary.token(vocabulary.padding_token_id),
        "chat_template": vocabulary.chat_template,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode(),
    }


def check(vocabulary: Vocabulary, config: Config, where: str) -> None:
    """Raises ValueError, starting with `where`, for a vocabulary that contradicts itself or is not implemented."""
    kind, pre, tokens = vocabulary.model, vocabulary.pre, len(vocabulary.tokens)
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{where} has a tokenizer of type {kind!r}; expected gpt2 (byte-level BPE) or llama (SentencePiece BPE)."
        )
    if kind == "gpt2" and pre not in SCHEMES:
        raise ValueError(
            f"{where}: tokenizer.ggml.pre, the rule that cuts texts into words, is {pre!r}; expected one of "
            f"{', '.join(SCHEMES)}: with another rule every text would get wrong ids."
        )
    counts = {"token_type": len(vocabulary.token_type), "scores": len(vocabulary.scores)}
    if kind == "gpt2":
        del counts["scores"]
    if wrong := {name: count for name, count in counts.items() if count != tokens}:
        raise ValueError(f"{where} has {tokens} tokens but {wrong}; expected one each: download the file again.")
    ids = (vocabulary.bos_token_id, vocabulary.eos_token_id, vocabulary.eot_token_id, vocabulary.eom_token_id)
    ids = [i for i in (*ids, vocabulary.unknown_token_id, vocabulary.padding_token_id) if i is not None]
    if tokens > config.vocab_size or max(ids, default=0) >= tokens:
        raise ValueError(
            f"{where}: there are {tokens} tokens, special tokens have the ids {ids}, and {config.vocab_size} tokens "
            "have an embedding; expected an embedding for each: download the file again."
        )
    known = vocabulary.ids()
    for merge in vocabulary.merges if kind == "gpt2" else ():
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= known.keys():
            raise ValueError(f"{where} merges {merge!r}, but its tokens lack a part; download the file again.")


def from_merges(vocabulary: Vocabulary) -> Tokenizer:
    """Byte-level BPE."""
    scheme = SCHEMES[vocabulary.pre]
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    tokenizer = Tokenizer(models.BPE(vocabulary.ids(), merges, ignore_merges=scheme.whole_words))
    if scheme.nfc:
        tokenizer.normalizer = normalizers.NFC()
    if scheme.pattern is None:
        cut = pre_tokenizers.Digits(individual_digits=True)
    else:
        cut = pre_tokenizers.Split(Regex(scheme.pattern), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=scheme.pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def from_scores(vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's BPE: of all neighbours, the two whose union has the highest score are merged first.

    Of equal scores (Mistral's runs of spaces) SentencePiece takes the leftmost: here the longest left part goes first.

    A text gets a leading space, and so does every text after a special token, as in llama.cpp and in the tokenizer.json
    of Llama 2 and Mistral v0.1 and v0.2. Mistral v0.3 and later, where [INST] is a special token, write that space in
    their chat template.
    """
    ids = vocabulary.ids()
    merges = [
        (-vocabulary.scores[ids[token]], -i, i - len(token), token[:i], token[i:])
        for token in vocabulary.of_kind(TokenType.NORMAL)
        for i in range(1, len(token))
        if token[:i] in ids and token[i:] in ids
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    unknown = vocabulary.token(vocabulary.unknown_token_id)
    tokenizer = Tokenizer(models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend(SPACE)] if vocabulary.add_space_prefix else []
    if prefix and "[INST]" in vocabulary.of_kind(TokenType.CONTROL):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer

"""Byte-level BPE tokenizers for tiny bases, trained on the texts they will read."""

from __future__ import annotations

import json
import re
from collections import Counter

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers


def empty_tokenizer(bpe: models.BPE, split: str) -> Tokenizer:
    """A byte-level BPE within the pieces of the pattern `split`; any text survives encoding and decoding."""
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: list[str], vocabulary: int, split: str) -> Tokenizer:
    """A byte-level BPE made from texts."""
    tokenizer = empty_tokenizer(models.BPE(), split)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer_blanks_last(texts: list[str], vocabulary: int, split: str) -> Tokenizer:
    """One where a word has the same tokens behind a blank and without it, but that the first has the blank in it: so an
    action's words are copied token by token from a text. A third of the vocabulary are tokens with a blank."""
    bare = train_tokenizer(texts, 2 * vocabulary // 3, split.replace(" ?", ""))
    bpe = json.loads(bare.to_str())["model"]
    words = Counter(piece for text in texts for piece in re.findall(split, text) if re.match(r" \S", piece))
    firsts: Counter[str] = Counter()
    for word, count in words.items():
        firsts[bare.encode(word[1:]).tokens[0]] += count
    blank = "Ġ"  # how a byte-level BPE spells it
    for first, _ in firsts.most_common(vocabulary - len(bpe["vocab"])):
        if blank + first not in bpe["vocab"]:
            bpe["vocab"][blank + first] = len(bpe["vocab"])
            bpe["merges"].append((blank, first))
    return empty_tokenizer(models.BPE(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]]), split)

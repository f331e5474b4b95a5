"""Byte-level BPE tokenizers for tiny bases, trained on the corpus that the base will read.

    tokenizer = train_tokenizer(texts, vocabulary=1536, split=alfworld.PRETOKENIZER)
    tokenizer.save("models/tiny-alfworld/tokenizer.json")

Left out: special tokens, normalisation.
"""

from __future__ import annotations

import json
import re
from collections import Counter

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers


def empty_tokenizer(bpe: models.BPE, split: str) -> Tokenizer:
    """A tokenizer that applies `bpe` to the bytes of the pieces cut by the pattern `split`; any text round-trips."""
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_tokenizer(size: int = 256) -> Tokenizer:
    """One token per byte, or per each of the first few, without training: for random models in tests and benchmarks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:size]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: list[str], vocabulary: int, split: str) -> Tokenizer:
    """Trains a byte-level BPE of at most `vocabulary` tokens on texts cut by the pattern `split`."""
    tokenizer = empty_tokenizer(models.BPE(), split)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer_blanks_last(texts: list[str], vocabulary: int, split: str) -> Tokenizer:
    """Like `train_tokenizer`, but a word has the same tokens with and without a leading space, except that the first
    includes the space. An action's words can thus be copied token by token from a text. A third of the vocabulary is
    reserved for tokens with a leading space."""
    bare = train_tokenizer(texts, 2 * vocabulary // 3, split.replace(" ?", ""))
    bpe = json.loads(bare.to_str())["model"]
    words = Counter(piece for text in texts for piece in re.findall(split, text) if re.match(r" \S", piece))
    firsts: Counter[str] = Counter()
    for word, count in words.items():
        firsts[bare.encode(word[1:]).tokens[0]] += count
    space = "Ġ"  # the byte-level spelling of a space
    for first, _ in firsts.most_common(vocabulary - len(bpe["vocab"])):
        if space + first not in bpe["vocab"]:
            bpe["vocab"][space + first] = len(bpe["vocab"])
            bpe["merges"].append((space, first))
    return empty_tokenizer(models.BPE(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]]), split)

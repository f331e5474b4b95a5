"""WebShop's search engine without Java: Lucene's BM25 ranking, as Pyserini 0.17 runs it by default.

Analysis follows Anserini's English analyzer (words at Unicode boundaries, possessives, lower case, Lucene's stop words,
Porter stemmer). Scores are Lucene's BM25 with k1 0.9, b 0.4 and document lengths quantised to a byte, in 32-bit floats;
ties are ordered by document id. An index is a folder of memory-mapped numpy files, so all processes of a machine share
one copy.
Left out: anything but bag-of-words queries; queries of more than 1,024 distinct terms, which Lucene rejects.

Source of the formulas: Lucene 9's BM25Similarity, SmallFloat and BooleanQuery.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex
from nltk.stem.porter import PorterStemmer
from scipy.sparse import csc_array, csr_array

K1, B = np.float32(0.9), np.float32(0.4)
MAX_CLAUSES = 1024
GROUP = 128  # documents per group in `_score_bound`
TOLERANCE = 1e-4  # exceeds the rounding error of a sum of 1,024 terms in float32
MAX_TOKEN_CHARS = 255  # UTF-16 characters, as in Java; longer words are split there
STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with".split()
)
# Extended_Pictographic of Unicode 12: newer tables dropped symbols that Lucene keeps, such as the black star.
EMOJI = """
    a9 ae 203c 2049 2122 2139 2194-2199 21a9-21aa 231a-231b 2328 2388 23cf 23e9-23f3 23f8-23fa 24c2 25aa-25ab
    25b6 25c0 25fb-25fe 2600-2605 2607-2612 2614-2685 2690-2705 2708-2712 2714 2716 271d 2721 2728 2733-2734
    2744 2747 274c 274e 2753-2755 2757 2763-2767 2795-2797 27a1 27b0 27bf 2934-2935 2b05-2b07 2b1b-2b1c 2b50
    2b55 3030 303d 3297 3299 1f000-1f0ff 1f10d-1f10f 1f12f 1f16c-1f171 1f17e-1f17f 1f18e 1f191-1f19a 1f1ad-1f1ff
    1f201-1f20f 1f21a 1f22f 1f232-1f23a 1f23c-1f23f 1f249-1f53d 1f546-1f64f 1f680-1f6ff 1f774-1f77f 1f7d5-1f7ff
    1f80c-1f80f 1f848-1f84f 1f85a-1f85f 1f888-1f88f 1f8ae-1f8ff 1f90c-1f93a 1f93c-1f945 1f947-1fffd
"""
_emoji = "".join("-".join(chr(int(end, 16)) for end in span.split("-")) for span in EMOJI.split())
_letters = r"\p{WB=ALetter}\p{WB=Hebrew_Letter}\p{WB=Numeric}\p{WB=Katakana}\p{Script=Hiragana}\p{Script=Han}\p{LB=SA}"
_WORDS = regex.compile(r"(?w)\b.+?\b", regex.DOTALL)
# Flags are pairs of letters, and each boundary is found by counting back to the first one: cut after 64.
_FLAGS = regex.compile(r"(?:\p{WB=RI}[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]*+){64}(?=\p{WB=RI})")
_KEPT = regex.compile(f"[{_letters}{_emoji}]")
_APOSTROPHES = "'\u2019\uff07"
_porter = PorterStemmer(mode=PorterStemmer.MARTIN_EXTENSIONS)


@lru_cache(maxsize=1 << 18)
def _term(word: str) -> str:
    """The term of a word, or "" if it has none."""
    if not _KEPT.search(word):
        return ""
    word = word.strip(_APOSTROPHES)
    if len(word) > 1 and word[-2] in _APOSTROPHES and word[-1] in "sS":
        word = word[:-2]
    word = word.lower()
    return "" if word in STOP_WORDS else _porter.stem(word, to_lowercase=False)


def analyze(text: str) -> list[str]:
    """The terms of a text, in order."""
    cuts = [0, *(flags.end() for flags in _FLAGS.finditer(text)), len(text)]
    words = [word for start, end in pairwise(cuts) for word in _WORDS.findall(text[start:end])]
    if len(text) > MAX_TOKEN_CHARS and max(map(len, words), default=0) > MAX_TOKEN_CHARS:
        words = [word[i : i + MAX_TOKEN_CHARS] for word in words for i in range(0, len(word), MAX_TOKEN_CHARS)]
    return [term for word in words if (term := _term(word))]


def quantise_lengths(lengths: np.ndarray) -> np.ndarray:
    """Lengths [D] as decoded from Lucene's one-byte norms: 40 exact values, then 3 bits of mantissa."""
    rest = np.maximum(lengths.astype(np.int64) - 24, 0)
    shift = np.maximum(np.floor(np.log2(np.maximum(rest, 1))).astype(np.int64) - 3, 0)
    return np.where(rest < 16, lengths, 24 + (rest >> shift << shift))


class IndexBuilder:
    """Collects documents one by one (terms as numbers, 6 bytes per posting), then writes the whole index."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # term -> its number, in order of first appearance
        self._terms, self._counts = array("i"), array("H")
        self._distinct, self._lengths = array("i"), array("i")

    def add(self, terms: Sequence[str]) -> None:
        """Adds the next document."""
        counts, numbers = Counter(terms), self._numbers
        self._terms.extend([numbers.setdefault(term, len(numbers)) for term in counts])
        self._counts.extend([min(count, 65535) for count in counts.values()])
        self._distinct.append(len(counts))
        self._lengths.append(len(terms))

    def write(self, folder: Path, order: np.ndarray) -> None:
        """Writes the index. `order` [D]: the documents in the order that breaks ties."""
        documents = len(self._lengths)
        ends = np.cumsum(np.frombuffer(self._distinct, np.int32), dtype=np.int64)
        rows = csr_array(
            (np.frombuffer(self._counts, np.uint16), np.frombuffer(self._terms, np.int32), np.append(0, ends)),
            shape=(documents, len(self._numbers)),
        )
        postings = rows[order].tocsc()  # a column is a term, its documents sorted
        words = np.array([term.encode("utf-8", "surrogatepass") for term in self._numbers], dtype=object)
        alphabetical = np.argsort(words, kind="stable")
        postings = postings[:, alphabetical]
        lengths = np.frombuffer(self._lengths, np.int32)[order]
        filled = np.count_nonzero(lengths)
        average = np.float32(max(lengths.sum(dtype=np.int64), 1) / max(filled, 1))
        inverse = 1 / (K1 * ((1 - B) + B * quantise_lengths(lengths).astype(np.float32) / average))
        x = postings.data.astype(np.float32) * inverse[postings.indices]
        starts = postings.indptr.astype(np.int64)
        frequency = np.diff(starts)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "words.bin").write_bytes(b"".join(words[alphabetical]))
        np.save(folder / "word_ends.npy", np.cumsum([len(word) for word in words[alphabetical]], dtype=np.int64))
        np.save(folder / "documents.npy", postings.indices.astype(np.int32))
        np.save(folder / "counts.npy", postings.data.astype(np.uint16))
        np.save(folder / "rough.npy", 1 - 1 / (1 + x))
        np.save(folder / "inverse.npy", inverse)
        np.save(folder / "starts.npy", starts)
        np.save(folder / "idf.npy", np.log(1 + (filled - frequency + 0.5) / (frequency + 0.5)).astype(np.float32))


class Index:
    """A written index, memory-mapped. Raises FileNotFoundError if one of its files is missing."""

    def __init__(self, folder: Path):
        def load(name: str) -> np.ndarray:
            return np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))  # a plain array slices faster

        self._documents, self._counts, self._rough = load("documents"), load("counts"), load("rough")
        self._starts, self._idf, self._inverse, self._word_ends = (
            load(name) for name in ("starts", "idf", "inverse", "word_ends")
        )
        file = folder / "words.bin"
        self._words = np.asarray(np.memmap(file, np.uint8, "r")) if file.stat().st_size else np.zeros(0, np.uint8)
        self._number = lru_cache(maxsize=1 << 16)(self._find)

    def _find(self, term: str) -> int | None:
        """The term's alphabetical position, by bisection, or None."""
        wanted, low, high = term.encode("utf-8", "surrogatepass"), 0, len(self._word_ends)
        while low < high:
            middle = (low + high) // 2
            start = self._word_ends[middle - 1] if middle else 0
            word = self._words[start : self._word_ends[middle]].tobytes()
            if word == wanted:
                return middle
            low, high = (middle + 1, high) if word < wanted else (low, middle)
        return None

    def search(self, query: str, k: int = 50) -> list[int]:
        """The ids of the k best documents. Raises ValueError for more than 1,024 distinct terms, as Lucene does."""
        return self.rank(analyze(query), k)[0].tolist()

    def rank(self, terms: Sequence[str], k: int = 50) -> tuple[np.ndarray, np.ndarray]:
        """(ids of the k best documents for a bag of terms, best first; their scores in float32)

        A sparse matrix-vector product with the term weights gives every document a rough score; all that may be among
        the k best, ties included, are then scored exactly as Lucene does.
        """
        counts = Counter(terms)
        if len(counts) > MAX_CLAUSES:
            raise ValueError(
                f"{len(counts)} different terms in a query: expected at most {MAX_CLAUSES}, as Lucene does"
            )
        known = [(number, count) for term, count in counts.items() if (number := self._number(term)) is not None]
        if not known:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        numbers, counts_T = np.array(known).T
        weights_T = counts_T.astype(np.float32) * self._idf[numbers]
        spans = [slice(*self._starts[number : number + 2]) for number in numbers]
        ends = np.cumsum([0, *(span.stop - span.start for span in spans)], dtype=np.int32)
        values, rows = (np.concatenate([source[span] for span in spans]) for source in (self._rough, self._documents))
        rough_D = csc_array((values, rows, ends), shape=(len(self._inverse), len(spans))) @ weights_T
        chosen = np.flatnonzero(rough_D > (1 - TOLERANCE) * _score_bound(rough_D, k)).astype(np.int32)
        scores = np.zeros(len(chosen))
        for weight, span in zip(weights_T, spans, strict=True):
            documents = self._documents[span]
            position = np.minimum(np.searchsorted(documents, chosen), len(documents) - 1)
            found = documents[position] == chosen
            x = self._counts[span][position[found]].astype(np.float32) * self._inverse[chosen[found]]
            scores[found] += weight - weight / (1 + x)
        scores = scores.astype(np.float32)
        best = np.lexsort((chosen, -scores))[:k]
        return chosen[best], scores[best]


def _score_bound(scores: np.ndarray, k: int) -> float:
    """A lower bound of the k-th best score, close to it: the k-th best group maximum. 0 if there are fewer scores."""
    maxima = scores[: len(scores) // GROUP * GROUP].reshape(GROUP, -1).max(axis=0)
    maxima = maxima if len(maxima) >= k else scores
    return float(np.partition(maxima, -k)[-k]) if len(maxima) >= k else 0.0


def build_index(folder: Path, texts: Iterable[str], order: np.ndarray) -> Index:
    """The index of `texts`, written to `folder`; `order` as in IndexBuilder.write."""
    builder = IndexBuilder()
    for text in texts:
        builder.add(analyze(text))
    builder.write(folder, order)
    return Index(folder)

"""The search engine: Lucene's own tokens, ids, order and scores; a plain sum over all documents beside ours."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from envs.webshop.catalogue import find_files, index_text, read_products
from envs.webshop.search import Index, IndexBuilder, _term, analyze, build_index, quantise_lengths

DATA = os.environ.get("WEBSHOP_DATA")
RECORDED = ("lucene_top50.jsonl.gz", "lucene_doc_tokens.jsonl.gz")
needs_lucene = pytest.mark.skipif(
    not DATA or not all((Path(DATA) / name).is_file() for name in RECORDED), reason="no recordings in $WEBSHOP_DATA"
)


def recorded(name: str) -> list[dict]:
    with gzip.open(Path(DATA) / name, "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def lucene(tmp_path_factory):
    """(asins in the index's order, the index, the text of each product by asin)."""
    texts = {product.asin: index_text(product) for product in read_products(find_files(DATA), {})}
    order = np.argsort(list(texts), kind="stable")
    index = build_index(tmp_path_factory.mktemp("index"), texts.values(), order)
    return [list(texts)[place] for place in order], index, texts


@pytest.mark.data
@needs_lucene
def test_top_50_and_scores_are_lucenes(lucene):
    asins, index, _ = lucene
    queries = recorded("lucene_top50.jsonl.gz")
    assert len(queries) == 1515
    for query in queries:
        documents, scores = index.rank(query["tokens"])
        assert [asins[document] for document in documents] == [asin for asin, _ in query["hits"]], query["query"]
        assert scores == pytest.approx([score for _, score in query["hits"]], abs=1e-4)
        assert index.search(query["query"]) == documents.tolist()  # from the raw text too


@pytest.mark.data
@needs_lucene
def test_tokens_of_every_document_and_query_are_lucenes(lucene):
    documents = recorded("lucene_doc_tokens.jsonl.gz")
    differing = [row["id"] for row in documents if analyze(lucene[2][row["id"]]) != row["tokens"]]
    differing += [row["query"] for row in recorded("lucene_top50.jsonl.gz") if analyze(row["query"]) != row["tokens"]]
    assert differing == []


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The Women's dresses, running-shoes & t-shirts!", ["women", "dress", "run", "shoe", "t", "shirt"]),
        ("1.5 fl.oz 3-pack 10,000", ["1.5", "fl.oz", "3", "pack", "10,000"]),
        ("\u2605 \U0001f600 \u00bd _ -- '", ["\u2605", "\U0001f600"]),
        ("'quoted' don't James\u2019", ["quot", "don't", "jame"]),
        ("", []),
        (" \t\n", []),
        ("the of and", []),
        ("caf\u00e9 \u00dcBER", ["caf\u00e9", "\u00fcber"]),
        ("\u4e2d\u6587", ["\u4e2d", "\u6587"]),
        ("x" * 300, ["x" * 255, "x" * 45]),
    ],
)
def test_analysis(text, terms):
    assert analyze(text) == terms


@pytest.mark.parametrize("text", ["\ud800", "a\x00b", "\u200d\ufe0f", "'" * 50, "\u0301" * 9, "a'S", "\U0010ffff"])
def test_odd_text_has_terms_of_words_or_none(text):
    assert all(isinstance(term, str) and term for term in analyze(text))


FLAGS = st.sampled_from(["\U0001f1e9", "\U0001f1e9\u200d", "\U0001f1ea\u0301"] * 40 + [*"a\u200d\U0001f600 "])


@given(st.lists(FLAGS, max_size=300).map("".join))
def test_long_rows_of_flags_have_the_words_of_the_whole_text(text):
    words = regex.findall(r"(?w)\b.+?\b", text, regex.DOTALL)
    assert analyze(text) == [term for word in words if (term := _term(word))]


def test_lengths_are_quantised_as_lucene_does():
    lengths = np.arange(200)
    seen = quantise_lengths(lengths)
    assert seen[:40].tolist() == list(range(40)) and (np.diff(seen) >= 0).all() and (seen <= lengths).all()
    assert seen[[41, 54, 55, 56, 59, 60, 87, 88, 95, 96, 199]].tolist() == [40, 54, 54, 56, 56, 60, 84, 88, 88, 96, 184]


def plain_ranking(documents: list[list[str]], query: list[str], k: int) -> list[tuple[int, float]]:
    """BM25 summed over all documents, in Python."""
    filled = sum(map(bool, documents))
    average = sum(map(len, documents)) / filled
    found = []
    for number, terms in enumerate(documents):
        score, f32 = 0.0, np.float32
        for term in set(query):
            frequency = sum(term in other for other in documents)
            weight = f32(query.count(term)) * f32(np.log(1 + (filled - frequency + 0.5) / (frequency + 0.5)))
            length = f32(quantise_lengths(np.array([len(terms)]))[0])
            x = f32(terms.count(term)) * (1 / (f32(0.9) * ((1 - f32(0.4)) + f32(0.4) * length / f32(average))))
            score += float(weight - weight / (1 + x))
        if score:
            found.append((number, float(f32(score))))
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:k]


@pytest.mark.parametrize("seed", range(6))
def test_pruning_changes_nothing(tmp_path, seed):
    """Words of very different frequency, many equal documents, more and fewer hits than asked for."""
    rng = np.random.default_rng(seed)
    documents = [[f"w{min(int(word), 40)}" for word in rng.zipf(1.3, rng.integers(0, 60))] for _ in range(150)]
    documents += documents[:20]
    builder = IndexBuilder()
    for terms in documents:
        builder.add(terms)
    builder.write(tmp_path, np.arange(len(documents)))
    index = Index(tmp_path)
    for _ in range(12):
        query = [f"w{min(int(word), 41)}" for word in rng.zipf(1.2, rng.integers(0, 9))]
        query += ["w1"] * int(rng.integers(0, 3))
        k = int(rng.choice([1, 5, 50]))
        ranked = [(int(d), float(s)) for d, s in zip(*index.rank(query, k), strict=True)]
        assert ranked == plain_ranking(documents, query, k)


def test_equal_scores_come_in_the_given_order(tmp_path):
    index = build_index(tmp_path, ["red chair"] * 4 + ["tea"], np.array([4, 2, 0, 3, 1]))
    assert index.search("chair") == [1, 2, 3, 4] and index.search("tea") == [0] and index.search("nothing") == []


def test_more_terms_than_lucene_takes_are_an_error(tmp_path):
    index = build_index(tmp_path, ["red chair"], np.arange(1))
    assert index.search(" ".join(f"w{i}" for i in range(1023)) + " red") == [0]
    with pytest.raises(ValueError, match="1025 different terms"):
        index.search(" ".join(f"w{i}" for i in range(1025)))


def test_an_index_of_empty_documents_finds_nothing(tmp_path):
    assert build_index(tmp_path, ["", "the"], np.arange(2)).search("the chair") == []


def test_a_missing_file_is_named(tmp_path):
    build_index(tmp_path, ["red chair"], np.arange(1))
    (tmp_path / "inverse.npy").unlink()
    with pytest.raises(FileNotFoundError, match="inverse.npy"):
        Index(tmp_path)

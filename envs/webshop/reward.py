"""The reward of a WebShop purchase, with every component, and the backends that find nouns.

    reward = r_type * (attributes found + options matched + [price within the limit]) / (attributes + options + 1)

`r_type` compares the product's type with the wanted one: search query, category path, and the share of the wanted
name's nouns that the purchased name has. The original takes nouns from spaCy, whose model no package index carries, so
there are several backends, and a score must name the one it used (`nouns_named`):

| name | nouns |
|---|---|
| `spacy:<model>-<version>` | those of the installed model, en_core_web_sm (the original's) before en_core_web_lg |
| `file:<hash>` | `nouns.json` in the data folder, {asin: [lower-case nouns]}, precomputed with spaCy |
| `heuristic` | words of letters only that are not function words; usually a few more than spaCy finds |
| `whitespace` | every whitespace token, as in recordings of the original without a model; never the default |

`auto` takes the first available of the first three. With each, the product that a goal was made from has r_type 1.
Left out: reward terms that never affect the score (the original's verbose weights).

Source: WebShop (arXiv 2207.01206), section 3 and appendix; quirks as measured on the original.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rapidfuzz import fuzz
from rapidfuzz.utils import default_process

from artifacts.json_io import parse_json
from envs.webshop.goals import Goal, Product

COLOURS = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo "
    "caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream "
    "crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather "
    "indigo ivory ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha "
    "multicolor mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal "
    "rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise "
    "violet walnut wheat white wine yellow"
).split()
FUNCTION_WORDS = frozenset(
    "a about above across after all along also an and any are around as at be because been before behind below between "
    "both but by can could do does each either else even ever every few for from had has have he her here him his how "
    "i if in inside into is it its just like many may me might more most much must my near neither no nor not of off "
    "on once one only onto or other our out outside over own per she should since so some such than that the their "
    "them then there these they this those through to too toward under until up upon us very via was we were what "
    "when where which while who whose why will with within without would you your".split()
)
SPACY_MODELS = ("en_core_web_sm", "en_core_web_lg")
SIMILAR = 85  # percent

Nouns = Callable[[str, str], tuple[str, ...]]  # (asin, name) -> lower-case nouns of the name


@dataclass(frozen=True, kw_only=True)
class Score:
    """A purchase's reward and its components. `attributes`, `options`: how many of the goal's were matched."""

    reward: float
    r_type: float
    title_score: float
    query_match: bool
    category_match: bool
    attributes: int
    options: int
    price: bool


def score_purchase(product: Product, goal: Goal, price: float, options: dict[str, str], nouns: Nouns) -> Score:
    """The score of buying `product` at `price` with the chosen `options` {name: value}."""
    query_match = product.query == goal.query
    category_match = len(_crumbs(product.product_category) & _crumbs(goal.product_category)) >= 2
    wanted = nouns(goal.asin, goal.name)
    shared = len(set(nouns(product.asin, product.name)) & set(wanted))
    title_score = shared / len(wanted) if wanted else 0.2
    r_type = 1.0 if query_match or category_match or title_score > 0.2 else 0.5
    if title_score < 0.1:  # whatever else matched
        r_type = 0.1 if title_score else 0.0
    attributes = sum(_has_attribute(product, attribute) for attribute in goal.attributes)
    asked = goal.goal_options.items() if isinstance(goal.goal_options, dict) else goal.goal_options
    chosen = [normal_colour(value) for value in options.values()]
    matched = sum(any(similar(value, normal_colour(option)) for value in chosen) for option in asked)
    cheap = price <= goal.price_upper
    total = (attributes + matched + cheap) / (len(goal.attributes) + len(goal.goal_options) + 1)
    return Score(
        reward=total * r_type,
        r_type=r_type,
        title_score=title_score,
        query_match=query_match,
        category_match=category_match,
        attributes=attributes,
        options=matched,
        price=cheap,
    )


def _crumbs(category: str) -> set[str]:
    return {crumb.strip() for crumb in category.split("›")}


def _has_attribute(product: Product, wanted: str) -> bool:
    return (
        any(similar(attribute, wanted) for attribute in product.attributes)
        or wanted in product.name.lower()
        or wanted in " ".join(product.bullets).lower()
        or wanted in product.description.lower()
    )


def normal_colour(option: str | tuple[str, str]) -> str | tuple[str, str]:
    """The first of COLOURS in the option, or the option itself if it has none. A colour matches anywhere in a value
    ("red" in "tailored" too), but only as the whole name or value in a synthetic goal's (name, value)."""
    return next((colour for colour in COLOURS if colour in option), option)


def similar(one: str | tuple[str, str], other: str | tuple[str, str]) -> bool:
    """Whether thefuzz's token_set_ratio, a rounded percentage, exceeds 85."""
    return round(fuzz.token_set_ratio(_plain(str(one)), _plain(str(other)))) > SIMILAR


@lru_cache(maxsize=1 << 16)
def _plain(text: str) -> str:
    """A text as thefuzz sees it: no Latin-1 letters beyond ASCII, no punctuation, lower case."""
    return default_process(re.sub("[\x80-\xff]", "", text))


# ---- nouns -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 16)
def heuristic_nouns(name: str) -> tuple[str, ...]:
    """Words of at least two letters that are not function words, in lower case."""
    return tuple(word for word in re.findall(r"[^\W\d_]{2,}", name.lower()) if word not in FUNCTION_WORDS)


@lru_cache(maxsize=1 << 16)
def _tokens(name: str) -> tuple[str, ...]:
    return tuple(name.lower().split())


@lru_cache
def _spacy_nouns(model: str) -> tuple[str, Nouns]:
    import spacy  # imported here because it takes seconds

    tagger = spacy.load(model, disable=["parser", "ner"])

    @lru_cache(maxsize=1 << 16)
    def find_nouns(name: str) -> tuple[str, ...]:
        return tuple(token.text.lower() for token in tagger(name) if token.pos_ in ("NOUN", "PROPN"))

    return f"spacy:{model}-{tagger.meta['version']}", lambda asin, name: find_nouns(name)


@lru_cache
def _file_nouns(file: Path) -> tuple[str, Nouns]:
    content = file.read_bytes()
    table = parse_json(content, dict[str, tuple[str, ...]], str(file))
    return f"file:{hashlib.sha256(content).hexdigest()[:12]}", lambda asin, name: table[asin]


@lru_cache
def nouns_named(backend: str, data: Path, asins: Iterable[str]) -> tuple[str, Nouns]:
    """(full name of the backend, its function); `auto` chooses one.

    `data`: the folder that may hold nouns.json. `asins`: the products that it must cover. Raises ValueError for an
    unknown backend or an incomplete file, ImportError if no model is installed.
    """
    models = [model for model in SPACY_MODELS if importlib.util.find_spec("spacy") and importlib.util.find_spec(model)]
    file = data / "nouns.json"
    if backend == "auto":
        backend = "spacy" if models else "file" if file.is_file() else "heuristic"
    if backend == "heuristic":
        return backend, lambda asin, name: heuristic_nouns(name)
    if backend == "whitespace":
        return backend, lambda asin, name: _tokens(name)
    if backend == "spacy":
        if not models:
            raise ImportError(f"no spaCy model is installed: expected one of {', '.join(SPACY_MODELS)}, or other nouns")
        return _spacy_nouns(models[0])
    if backend == "file":
        if not file.is_file():
            raise ValueError(f"no {file}: expected {{asin: [nouns in lower case]}} for every product")
        name, nouns = _file_nouns(file)
        for asin in asins:
            try:
                nouns(asin, "")
            except KeyError:
                raise ValueError(f"{file} has no nouns for {asin}: expected a list for every product") from None
        return name, nouns
    raise ValueError(f"unknown nouns {backend!r}: expected auto, spacy, file, heuristic or whitespace")

"""WebShop's goals: what a customer wants, made from products, and which split each belongs to.

Human goals come from written instructions. Synthetic ones are an instruction made of attributes, times every
combination of the product's options. Both name a price limit: the larger of two of the next four multiples of ten
above the price. The original draws prices and limits from the global generator before it seeds it, so they differ
from run to run; here every draw is addressed by (SEED, product), and the goals are frozen to a file
(`envs/webshop/catalogue.py`).

| split | what |
|---|---|
| `test`, `eval`, `train` | where the human goals are all 12,087: the official splits |
| `small_train`, `_demo`, `_valid`, `_test` | synthetic goals of any other catalogue |
| `gen_train`, `gen_demo`, `gen_valid`, `gen_test` | the same for a generated catalogue |
| `human` | the human goals of any catalogue without the official splits |

The official splits are the first 500, the next 1,000 and the rest of the original's shuffle, and their ids the split
and the number in that order: `test/00007`. Elsewhere the original has no splits; here 40, 20, 20 and 20 % of the
products are in train, demo, valid and test, so that no product is wanted in two of them. Ids but the official ones
are `<split>/<asin>-<hash of what is wanted>`, so that an id names one goal only. `number` is the goal's place in the
order that the original gives the same list.
Left out: synthetic goals where the official ones are (millions), the original's weights of random sampling.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import zlib
from collections.abc import Sequence

import msgspec
import numpy as np

SEED = 20220704  # of prices and price limits
SHUFFLE_SEED = 233  # the original's
OFFICIAL_GOALS = 12_087
OFFICIAL = (("test", 0, 500), ("eval", 500, 1500), ("train", 1500, OFFICIAL_GOALS))
PARTS = ("train", "train", "train", "train", "demo", "demo", "valid", "valid", "test", "test")
NO_LIMIT = 1_000_000.0


class Product(msgspec.Struct, frozen=True, array_like=True):
    """A product as its pages and the reward need it; `price` is what it costs, `price_tag` what its page says."""

    asin: str
    name: str
    description: str
    bullets: list[str]
    price_tag: str
    price: float
    options: dict[str, list[str]]
    attributes: list[str]
    category: str
    query: str
    product_category: str


class Goal(msgspec.Struct, frozen=True):
    """What is wanted. `goal_options`: {name: value} of a synthetic goal, [value, ...] of a human one."""

    asin: str
    instruction_text: str
    attributes: list[str]
    price_upper: float
    goal_options: dict[str, str] | list[str]
    category: str
    query: str
    name: str
    product_category: str
    number: int = -1


class Instruction(msgspec.Struct, frozen=True):
    """One entry of items_human_ins; its other fields are not read."""

    instruction: str
    instruction_attributes: list[str]
    instruction_options: list[str]


def draw_price(asin: str, prices: Sequence[float]) -> float:
    """What a product costs: its price, or a uniform draw where it has a range (low, high)."""
    if len(prices) == 1:
        return prices[0]
    share = np.random.default_rng([SEED, zlib.crc32(asin.encode())]).random()
    return float(prices[0] + (prices[1] - prices[0]) * share)  # a range may come the wrong way round


def price_limit(asin: str, number: int, price: float) -> tuple[float, str]:
    """The limit of a product's instruction `number`, and how the instruction states it."""
    above = [10.0 * i for i in range(1, 100) if 10.0 * i > price][:4]
    if len(above) < 2:
        return NO_LIMIT, ""
    rng = np.random.default_rng([SEED, zlib.crc32(asin.encode()), 1 + number])
    limit = above[rng.choice(len(above), 2, replace=False).max()]
    return limit, f", and price lower than {limit:.2f} dollars"


def human_goals(product: Product, instructions: Sequence[Instruction]) -> list[Goal]:
    """The goals of a product's written instructions; those without attributes are skipped, as in the original."""
    goals = []
    for number, one in enumerate(instructions):
        if one.instruction_attributes:
            limit, words = price_limit(product.asin, number, product.price)
            text = one.instruction.strip(".") + words
            goals.append(_goal(product, text, one.instruction_attributes, limit, one.instruction_options))
    return goals


def synthetic_goals(product: Product, instruction: str, attributes: list[str]) -> list[Goal]:
    """One goal for every combination of the product's options."""
    limit, words = price_limit(product.asin, 0, product.price)
    goals, names = [], sorted(product.options)
    for values in itertools.product(*(product.options[name] for name in names)):
        options = dict(zip(names, values, strict=True))
        asked = ", and ".join(f"{name}: {value}" for name, value in options.items())
        text = f"{instruction}{' with ' if asked else ''}{asked}{words}"
        goals.append(_goal(product, text, attributes, limit, options))
    return goals


def _goal(product: Product, text: str, attributes: list[str], limit: float, options: dict | list) -> Goal:
    return Goal(
        asin=product.asin,
        instruction_text=text,
        attributes=attributes,
        price_upper=limit,
        goal_options=options,
        category=product.category,
        query=product.query,
        name=product.name,
        product_category=product.product_category,
    )


def are_official(goals: int, instructions: int, missing: int) -> bool:
    """Whether human goals are the official ones: there are 12,087 of them, or of the instructions that they are made of
    (those without attributes are skipped) with no product of theirs missing."""
    return goals == OFFICIAL_GOALS or (instructions == OFFICIAL_GOALS and missing == 0)


def name_goals(human: list[Goal], synthetic: list[Goal], official: bool, prefix: str) -> dict[str, Goal]:
    """{id: goal}, sorted, of goals in the order of the product file. The same goal twice has one id, the first's."""
    if official:
        goals = _numbered(human)
        named = {f"{split}/{goal.number:05d}": goal for split, low, high in OFFICIAL for goal in goals[low:high]}
    else:
        named = {}
        for goal in _numbered(synthetic):
            split = f"{prefix}_{PARTS[zlib.crc32(goal.asin.encode()) % len(PARTS)]}"
            named.setdefault(f"{split}/{_stable_name(goal)}", goal)
        for goal in _numbered(human):
            named.setdefault(f"human/{_stable_name(goal)}", goal)
    return dict(sorted(named.items()))


def _numbered(goals: list[Goal]) -> list[Goal]:
    """The goals in the original's shuffled order, each knowing its place in it."""
    order = list(range(len(goals)))
    random.Random(SHUFFLE_SEED).shuffle(order)
    return [msgspec.structs.replace(goals[place], number=number) for number, place in enumerate(order)]


def _stable_name(goal: Goal) -> str:
    wanted = msgspec.json.encode([goal.instruction_text, goal.attributes, goal.price_upper, goal.goal_options])
    return f"{goal.asin}-{hashlib.sha256(wanted).hexdigest()[:8]}"

"""WebShop's goals: what a customer wants, made from products, and the split of each goal.

Human goals come from human-written instructions. Synthetic goals combine an instruction made of attributes with every
combination of the product's options, or with MOST of them, drawn, if there are more (558 is the most in the original's
1,000 products). Both state a price limit: the larger of two draws from the next four multiples of
ten above the price. The original draws prices and limits from the global generator before seeding it, so they differ
between runs; here every draw is addressed by (SEED, product), and the goals are frozen to a file (`catalogue.py`).

| split | goals |
|---|---|
| `test`, `eval`, `train` | the official splits, for a catalogue with all 12,087 human goals |
| `small_train`, `_demo`, `_valid`, `_test` | synthetic goals of any other catalogue |
| `gen_train`, `gen_demo`, `gen_valid`, `gen_test` | synthetic goals of a generated catalogue |
| `human` | human goals of any catalogue without the official splits |

The official splits are the first 500, the next 1,000 and the rest of the original's shuffle; an id is the split and the
position in the shuffle: `test/00007`. The original has no splits for other catalogues; here 40, 20, 20 and 20 % of the
products belong to train, demo, valid and test, so no product is wanted in two splits. Ids other than the official ones
are `<split>/<asin>-<hash of what is wanted>`, so an id always stands for the same goal. `number` is the goal's position
in the original's order of the same list.
Left out: synthetic goals of a catalogue with official splits (millions), the original's sampling weights.
"""

from __future__ import annotations

import hashlib
import math
import random
import zlib
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

SEED = 20220704  # of prices and price limits
SHUFFLE_SEED = 233  # the original's
MOST = 1000  # synthetic goals of a product
OFFICIAL_GOALS = 12_087
OFFICIAL = (("test", 0, 500), ("eval", 500, 1500), ("train", 1500, OFFICIAL_GOALS))
PARTS = ("train", "train", "train", "train", "demo", "demo", "valid", "valid", "test", "test")
NO_LIMIT = 1_000_000.0


class Product(msgspec.Struct, frozen=True, array_like=True):
    """A product as pages and reward need it; `price` is what it costs, `price_tag` what its page shows."""

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
    """What a customer wants. `goal_options`: {name: value} of a synthetic goal, [value, ...] of a human one."""

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
    """One entry of items_human_ins; other fields are ignored."""

    instruction: str
    instruction_attributes: list[str]
    instruction_options: list[str]


def draw_price(asin: str, prices: Sequence[float]) -> float:
    """What a product costs: its price, or a uniform draw from its range (low, high)."""
    if len(prices) == 1:
        return prices[0]
    share = np.random.default_rng([SEED, zlib.crc32(asin.encode())]).random()
    return float(prices[0] + (prices[1] - prices[0]) * share)  # the range may be reversed


def price_limit(asin: str, index: int, price: float) -> tuple[float, str]:
    """(price limit of a product's instruction number `index`, phrase that states it)"""
    above = [10.0 * i for i in range(1, 100) if 10.0 * i > price][:4]
    if len(above) < 2:
        return NO_LIMIT, ""
    rng = np.random.default_rng([SEED, zlib.crc32(asin.encode()), 1 + index])
    limit = above[rng.choice(len(above), 2, replace=False).max()]
    return limit, f", and price lower than {limit:.2f} dollars"


def human_goals(product: Product, instructions: Sequence[Instruction]) -> list[Goal]:
    """The goals of a product's human-written instructions; as in the original, those without attributes have none."""
    goals = []
    for index, entry in enumerate(instructions):
        if entry.instruction_attributes:
            limit, words = price_limit(product.asin, index, product.price)
            text = entry.instruction.strip(".") + words
            goals.append(_make_goal(product, text, entry.instruction_attributes, limit, entry.instruction_options))
    return goals


def synthetic_goals(product: Product, instruction: str, attributes: list[str]) -> list[Goal]:
    """One goal for every combination of the product's options, or for MOST of them, in order of names and values."""
    limit, words = price_limit(product.asin, 0, product.price)
    goals = []
    for options in combinations(product.options, product.asin):
        asked = ", and ".join(f"{name}: {value}" for name, value in options.items())
        text = f"{instruction}{' with ' if asked else ''}{asked}{words}"
        goals.append(_make_goal(product, text, attributes, limit, options))
    return goals


def combinations(choices: dict[str, list[str]], asin: str) -> Iterator[dict[str, str]]:
    """{name: value} of every combination of values, the last name's value changing first; of more than MOST
    combinations, as many, drawn by the asin. Builds no others."""
    names = sorted(choices)
    total = math.prod(len(choices[name]) for name in names)
    numbers = range(total)
    if total > MOST:
        numbers, rng = set(), random.Random(f"{SEED} {asin}")
        while len(numbers) < MOST:
            numbers.add(rng.randrange(total))
    for number in sorted(numbers):
        chosen = {}
        for name in reversed(names):
            number, index = divmod(number, len(choices[name]))
            chosen[name] = choices[name][index]
        yield {name: chosen[name] for name in names}


def _make_goal(product: Product, text: str, attributes: list[str], limit: float, options: dict | list) -> Goal:
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
    """Whether human goals are the official ones: 12,087 goals, or 12,087 instructions (those without attributes give no
    goal) whose products are all in the catalogue. `missing`: the number of products that are not."""
    return goals == OFFICIAL_GOALS or (instructions == OFFICIAL_GOALS and missing == 0)


def name_goals(human: list[Goal], synthetic: list[Goal], official: bool, prefix: str) -> dict[str, Goal]:
    """{id: goal}, sorted by id, of goals in the order of the product file. Of equal goals, the first is kept."""
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
    """The goals in the original's shuffled order, each with its position there as `number`."""
    order = list(range(len(goals)))
    random.Random(SHUFFLE_SEED).shuffle(order)
    return [msgspec.structs.replace(goals[index], number=number) for number, index in enumerate(order)]


def _stable_name(goal: Goal) -> str:
    wanted = msgspec.json.encode([goal.instruction_text, goal.attributes, goal.price_upper, goal.goal_options])
    return f"{goal.asin}-{hashlib.sha256(wanted).hexdigest()[:8]}"

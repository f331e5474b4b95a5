"""A generated web shop for machines without WebShop's data: invented products and goals, in the original file formats.

    python -m envs.webshop.generate --folder data/generated_webshop
    python -m envs.play --env webshop --data data/generated_webshop --tasks --split gen_valid

By default 1,000 products of 50 kinds in WebShop's five departments. A product has a made-up brand, attributes (some in
its name, all in its features), options and a price. Three in five have an instruction, from which `goals.py` makes a
goal for every combination of options; one in ten also has a human-style instruction. Products of one kind share words,
so a search returns many near misses. A product is a function of (seed, index).
Left out: images, and the misspellings and keyword stuffing of real listings.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import capwords
from typing import Annotated, NamedTuple

import numpy as np

from artifacts.cli import Range, run_main
from envs.base import check_stamp

SEED = 20220704  # the panels in envs/panels belong to it
PRODUCTS = 1000
FOLDER = Path(__file__).parents[2] / "data/generated_webshop"
STAMP = "generated.json"
FILES = ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json")

# Department -> attributes that go before the noun, after "with" and after "for".
ATTRIBUTES = {
    "beauty": (
        "cruelty free, alcohol free, paraben free, sulfate free, fragrance free, oil free, long lasting, easy use, "
        "travel size, high quality, water resistant, leak proof",
        "tea tree, coconut oil, argan oil, hyaluronic acid, shea butter, aloe vera, natural ingredients, rose gold, "
        "green tea",
        "dry skin, sensitive skin, dead skin, fine lines, dark circles, dry hair, damaged hair, hair growth, nail art",
    ),
    "electronics": (
        "high speed, easy install, easy carry, heavy duty, plug play, fast charging, noise cancelling, hands free, "
        "water resistant, high definition, ultra hd, non slip",
        "usb port, gold plated, aluminum alloy, carbon fiber, wireless bluetooth, stereo sound, batteries included, "
        "optical zoom, tempered glass",
        "home theater, motion detection, wall mount, car audio, video calls, live streaming, night vision, desk work",
    ),
    "garden": (
        "easy clean, easy assemble, eco friendly, machine washable, space saving, fully assembled, heavy duty, double "
        "sided, super soft, non slip, high density, hand painted",
        "solid wood, memory foam, stainless steel, faux leather, metal legs, storage space, bronze finish, printing "
        "technology",
        "living room, dining room, home office, guest room, small spaces, outdoor patio, kids room",
    ),
    "fashion": (
        "machine wash, hand wash, slim fit, loose fit, regular fit, quick drying, moisture wicking, non slip, tummy "
        "control, officially licensed, wash cold, light weight",
        "long sleeve, short sleeve, elastic waist, button closure, rubber sole, polyester spandex, high waist, cotton "
        "lining, arch support",
        "daily wear, gym workout, evening party, office work, winter days, beach holidays, school days",
    ),
    "grocery": (
        "gluten free, non gmo, sugar free, dairy free, low carb, plant based, ready eat, freeze dried, certified "
        "organic, low sodium, nut free, hand crafted",
        "natural ingredients, high protein, dietary fiber, resealable bag, sea salt, real fruit, whole grain",
        "baby shower, birthday party, perfect gift, school lunch, long hikes, movie night",
    ),
}

# Query | department | category path within it | noun in the product name | options | lowest and highest price
KINDS = """
face serums | beauty | Skin Care | Face Serum | size:volume scent | 8 60
body lotions | beauty | Skin Care | Body Lotion | scent size:volume | 6 35
eye creams | beauty | Skin Care | Eye Cream | size:volume | 9 70
lip balms | beauty | Makeup | Lip Balm | flavor size:pack | 3 20
nail polish | beauty | Nail Care | Nail Polish | color | 4 18
hair masks | beauty | Hair Care | Hair Mask | scent size:volume | 7 45
wigs | beauty | Hair Care | Wave Wig | color size:inch | 19 140
makeup brushes | beauty | Tools & Accessories | Makeup Brush Set | color | 6 48
refillable containers | beauty | Tools & Accessories | Refillable Bottle | color size:pack | 5 26
shower caps | beauty | Bath | Shower Cap | color size:pack | 4 17
headphones | electronics | Audio | Headphones | color | 15 280
bluetooth speakers | electronics | Audio | Bluetooth Speaker | color style | 17 190
phone cases | electronics | Phone Accessories | Phone Case | color size:phone | 7 40
tripods | electronics | Camera & Photo | Tripod | size:inch color | 14 120
security cameras | electronics | Video | Security Camera | size:pack style | 25 210
hdmi cables | electronics | Cables | Hdmi Cable | size:feet | 6 34
tablet stands | electronics | Accessories | Tablet Stand | color | 9 46
memory cards | electronics | Storage | Memory Card | size:storage | 8 95
projectors | electronics | Video | Mini Projector | color | 55 420
smart watches | electronics | Wearable | Smart Watch | color size:watch | 29 260
sofas | garden | Furniture | Sofa | color | 190 890
coffee tables | garden | Furniture | Coffee Table | color size:table | 60 420
bar stools | garden | Furniture | Bar Stool | color size:pack | 45 320
floor lamps | garden | Lighting | Floor Lamp | color | 28 230
throw pillows | garden | Bedding | Throw Pillow | color size:pillow | 8 44
throw blankets | garden | Bedding | Throw Blanket | color size:bed | 14 70
area rugs | garden | Rugs | Area Rug | color size:rug | 24 360
window curtains | garden | Window Treatments | Window Curtain | color size:curtain | 16 85
bookcases | garden | Furniture | Bookcase | color size:shelf | 49 310
storage baskets | garden | Storage | Storage Basket | color size:pack | 9 58
men's t-shirts | fashion | Men › Clothing › Shirts | T-Shirt for Men | color size:wear | 9 42
men's jeans | fashion | Men › Clothing › Jeans | Jeans for Men | color size:waist | 22 95
men's loafers | fashion | Men › Shoes | Loafers for Men | color size:shoe | 26 130
men's hoodies | fashion | Men › Clothing › Hoodies | Hoodie for Men | color size:wear | 18 80
women's dresses | fashion | Women › Clothing › Dresses | Dress for Women | color size:wear | 17 110
women's sandals | fashion | Women › Shoes | Sandals for Women | color size:shoe | 16 90
women's sweaters | fashion | Women › Clothing › Sweaters | Sweater for Women | color size:wear | 19 85
women's leggings | fashion | Women › Clothing › Leggings | Leggings for Women | color size:wear | 11 50
women's coats | fashion | Women › Clothing › Coats | Coat for Women | color size:wear | 34 210
women's swimsuits | fashion | Women › Clothing › Swimsuits | Swimsuit for Women | color size:wear | 15 65
green teas | grocery | Beverages | Green Tea | flavor size:pack | 5 38
ground coffees | grocery | Beverages | Ground Coffee | flavor size:ounce | 7 42
protein bars | grocery | Snacks | Protein Bar | flavor size:pack | 9 48
potato chips | grocery | Snacks | Potato Chips | flavor size:ounce | 4 30
dried fruits | grocery | Snacks | Dried Fruit | flavor size:ounce | 6 36
granolas | grocery | Breakfast | Granola | flavor size:ounce | 5 29
pasta sauces | grocery | Pantry | Pasta Sauce | flavor size:pack | 6 33
nut butters | grocery | Pantry | Nut Butter | flavor size:ounce | 7 31
chocolates | grocery | Candy | Chocolate | flavor size:pack | 5 45
seasonings | grocery | Herbs & Spices | Seasoning Blend | flavor size:ounce | 4 24
"""
DEPARTMENTS = {
    "beauty": "Beauty & Personal Care",
    "electronics": "Electronics",
    "garden": "Home & Kitchen",
    "fashion": "Clothing, Shoes & Jewelry",
    "grocery": "Grocery & Gourmet Food",
}
VALUES = {  # none contains a colour inside a word: the reward would match "tan" in "stand"
    "color": "black, white, navy, grey, red, pink, dark green, light blue, beige, brown, purple, yellow, orange, "
    "burgundy, khaki, silver, gold, teal, ivory, coral, black/white, navy/red, a1-pink, z2-black, heather "
    "grey",
    "scent": "lavender, rose water, unscented, citrus, vanilla, ocean breeze, jasmine, cedar",
    "flavor": "vanilla, dark chocolate, peanut butter, honey, lemon, mixed berry, salted caramel, cinnamon, original, "
    "mango, garlic, smoky paprika",
    "style": "single, with remote, with clip, with carry bag",
    "size:volume": "1 ounce, 1.7 fl oz, 3.4 fl oz, 8 ounce, 16 ounce, 120ml",
    "size:ounce": "4 ounce (pack of 1), 8 ounce (pack of 1), 8 ounce (pack of 3), 12 ounce (pack of 6), 2 pound",
    "size:pack": "1 pack, 2 pack, 3 pack, 6 pack, 12 count, 24 count",
    "size:inch": "10 inch, 12 inch, 14 inch, 16 inch, 18 inch, 22 inch",
    "size:feet": "3 feet, 6 feet, 10 feet, 15 feet, 25 feet",
    "size:phone": "phone 11, phone 12, phone 12 pro max, phone 13, phone 13 mini",
    "size:storage": "32gb, 64gb, 128gb, 256gb, 512gb",
    "size:watch": "38mm, 40mm, 42mm, 44mm",
    "size:table": '36 inch, 42 inch, 48 inch, 47" x 24"',
    "size:pillow": '16" x 16", 18" x 18", 20" x 20", 28" x 28"',
    "size:bed": "throw, twin, full, queen, king",
    "size:rug": "2 x 3 ft, 3 x 5 ft, 4 x 6 ft, 5 x 8 ft, 8 x 10 ft, 2 x 8 ft runner",
    "size:curtain": '42"w x 63"l, 52"w x 84"l, 52"w x 96"l',
    "size:shelf": "3 tier, 4 tier, 5 tier, 6 tier",
    "size:wear": "x-small, small, medium, large, x-large, xx-large, 3x-large",
    "size:waist": "30w x 30l, 32w x 30l, 32w x 32l, 34w x 32l, 36w x 34l",
    "size:shoe": "6, 7, 7.5, 8, 8.5, 9, 10, 11, 12 wide",
}
SYLLABLES = "al ba bel cor da den el fa gro ha il jor ka lin lo mar mi nor o pa quin ra sol ta ul ve wil yo zan".split()
FILLERS = (
    "Made to last, and checked by hand before it leaves our workshop.",
    "A thoughtful present for family and friends.",
    "If anything is not as expected, write to us and we will make it right.",
    "Looks good wherever it is put to use.",
    "Our customers come back for it year after year.",
    "Colours may differ a little from what your screen shows.",
    "Designed by a small team that uses it every day.",
    "Comes in a plain box that can be recycled.",
)


class Kind(NamedTuple):
    query: str
    department: str
    path: str
    thing: str
    options: tuple[str, ...]
    low: float
    high: float


class Listing(NamedTuple):
    """One product in the original formats: record, attributes, human-style instructions."""

    record: dict
    attributes: dict
    written: list[dict]


def parse_kinds() -> list[Kind]:
    rows = [[cell.strip() for cell in line.split("|")] for line in KINDS.strip().splitlines()]
    return [
        Kind(
            query=query,
            department=department,
            path=path,
            thing=thing,
            options=tuple(options.split()),
            low=float(prices.split()[0]),
            high=float(prices.split()[1]),
        )
        for query, department, path, thing, options, prices in rows
    ]


ALL_KINDS = parse_kinds()
POOLS = {department: [pool.split(", ") for pool in pools] for department, pools in ATTRIBUTES.items()}
CHOICES = {name: values.split(", ") for name, values in VALUES.items()}


def draw(rng: np.random.Generator, options: Sequence[str], count: int) -> list[str]:
    """`count` different options (all, if there are fewer), in their original order."""
    return [options[i] for i in sorted(rng.choice(len(options), min(count, len(options)), replace=False))]


def generate_listing(seed: int, index: int) -> Listing:
    """The product at `index` in the shop of that seed."""
    rng = np.random.default_rng([seed, index])
    kind = ALL_KINDS[rng.integers(len(ALL_KINDS))]
    counts = rng.integers((2, 1, 1), (5, 3, 3))
    before, having, use = (draw(rng, pool, n) for pool, n in zip(POOLS[kind.department], counts, strict=True))
    options = {spec.split(":")[0]: draw(rng, CHOICES[spec], rng.integers(2, 7)) for spec in kind.options}
    brand = "".join(rng.choice(SYLLABLES, rng.integers(2, 4))).capitalize()
    named = [before[0], having[0]] if rng.random() < 0.7 else [before[-1], use[0]]
    word = "with" if named[1] in having else "for"
    name = f"{brand} {named[0].title()} {kind.thing}, {word} {named[1].title()}"
    asin = f"G{hashlib.sha256(f'{seed} {index}'.encode()).hexdigest()[:9]}".upper()
    price = round(float(np.exp(rng.uniform(np.log(kind.low), np.log(kind.high)))), 2)
    chance = rng.random()
    pricing = None if chance < 0.02 else f"${price}${round(price * 1.4, 2)}" if chance < 0.1 else f"${price}"
    fillers = draw(rng, FILLERS, 3)
    record = {
        "name": name,
        "images": [],
        "average_rating": "",
        "full_description": f"{brand} makes {kind.query} that are {' and '.join(before[:2])}. {fillers[0]}",
        "asin": asin,
        "category": kind.department,
        "query": kind.query,
        "page": 1,
        "product_category": f"{DEPARTMENTS[kind.department]} › {kind.path} › {capwords(kind.query)}",
        "pricing": pricing,
        "small_description": [
            f"{kind.thing}: {', '.join(before)}",
            f"With {' and '.join(having)}",
            f"Good for {' and '.join(use)}",
            *fillers[1:],
        ],
        "customization_options": {
            option: [{"value": value, "is_selected": False} for value in values] for option, values in options.items()
        },
    }
    attributes = {"attributes": [*before, *having, *use]}
    written = []
    if rng.random() < 0.6:
        counts = rng.integers((1, 0, 0), (3, 2, 2))
        asked = [draw(rng, pool, n) for pool, n in zip((before, having, use), counts, strict=True)]
        attributes["instruction"] = make_instruction(kind.query, *asked)
        attributes["instruction_attributes"] = sum(asked, [])
        if rng.random() < 1 / 6:
            written.append(write_instruction(rng, asin, kind, asked, options, attributes["attributes"]))
    return Listing(record=record, attributes={asin: attributes}, written=written)


def make_instruction(query: str, before: list[str], having: list[str], use: list[str]) -> str:
    """The original's sentence for attributes: Find me soft, light blankets with fringes for living room."""
    words = f"Find me {', '.join(before)} {query}"
    words += f" with {', '.join(having)}" if having else ""
    return words + (f" for {', '.join(use)}" if use else "")


def write_instruction(
    rng: np.random.Generator,
    asin: str,
    kind: Kind,
    asked: list[list[str]],
    options: dict[str, list[str]],
    attributes: list[str],
) -> dict:
    """An instruction as a customer would write it, in the format of the human-written ones."""
    before, having, use = asked
    chosen = {option: values[rng.integers(len(values))] for option, values in options.items()}
    opening = ("i am looking for", "i need", "show me", "i would like to buy")[rng.integers(4)]
    words = f"{opening} {' and '.join(before)} {kind.query}{f' with {having[0]}' if having else ''}"
    words += f" for {use[0]}" if use else ""
    words += "".join(f", in {option} {value.lower()}" for option, value in chosen.items())
    values = [value.replace("/", " | ").lower() for value in chosen.values()]
    return {
        "asin": asin,
        "instruction": f"{words}.",
        "attributes": attributes,
        "instruction_attributes": sum(asked, []),
        "options": [f"{option}: {value}" for option, value in zip(chosen, values, strict=True)],
        "instruction_options": values,
    }


def generate_listings(seed: int, count: int, start: int = 0) -> Iterator[Listing]:
    """Products start .. start + count - 1, one at a time; writes nothing."""
    return (generate_listing(seed, index) for index in range(start, start + count))


# ---- the catalogue in files ------------------------------------------------------------------------------------------


def make_stamp(seed: int, products: int) -> dict:
    """What a folder must have been made from. The hash of the first 50 products identifies the generator."""
    first = json.dumps(list(generate_listings(seed, 50))).encode()
    return {"seed": seed, "products": products, "first": hashlib.sha256(first).hexdigest()[:16]}


def write_catalogue(folder: Path, seed: int, products: int) -> None:
    """Writes the folder atomically: it is built under another name and then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix="building-", dir=folder.parent)
    building = Path(temporary, folder.name)
    building.mkdir()
    try:
        listings = list(generate_listings(seed, products))
        table = {asin: entry for listing in listings for asin, entry in listing.attributes.items()}
        written = {listing.record["asin"]: listing.written for listing in listings if listing.written}
        for name, content in zip(FILES, ([listing.record for listing in listings], table, written), strict=True):
            (building / name).write_text(json.dumps(content))
        (building / STAMP).write_text(json.dumps(make_stamp(seed, products)))
        os.replace(building, folder)
    except OSError:
        if not (folder / STAMP).is_file():  # otherwise another process has just written it
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def ensure_catalogue(folder: Path = FOLDER, seed: int = SEED, products: int = PRODUCTS) -> Path:
    """The catalogue's folder, written now if it does not exist. Raises ValueError if it holds another catalogue."""
    folder, wanted = Path(folder), make_stamp(seed, products)
    if not folder.exists():
        write_catalogue(folder, seed, products)
    check_stamp(folder, STAMP, wanted)
    return folder


@dataclass(frozen=True, kw_only=True)
class Args:
    folder: Path = FOLDER
    """Output folder; pass it to a world as --data."""
    seed: Annotated[int, Range(0)] = SEED
    """Every product is a function of the seed and its index. The panels in envs/panels belong to the default seed."""
    products: Annotated[int, Range(1, 1_000_000)] = PRODUCTS
    """Number of products."""


def main(args: Args) -> None:
    folder = ensure_catalogue(args.folder, args.seed, args.products)
    print(f"{folder}: {args.products} products, {', '.join(FILES)}")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

"""A web shop of four products in the original file formats, small enough that its pages can be read here."""

from __future__ import annotations

import json
from pathlib import Path


def options(**values: list[str]) -> dict:
    return {name: [{"value": value, "is_selected": False} for value in chosen] for name, chosen in values.items()}


def product(asin: str, name: str, **changes) -> dict:
    """A record of the product file."""
    fields = {
        "asin": asin,
        "name": name,
        "full_description": "Stands on its own feet.",
        "images": ["a.jpg"],
        "page": 1,
        "small_description": ["Easy clean ", "Solid wood"],
        "product_category": "Home › Furniture › Chairs",
        "category": "garden",
        "query": " Chairs",
        "pricing": "$19.99",
        "average_rating": "",
        "customization_options": options(Color=["Red", "Navy/White"]),
    }
    return fields | changes


PRODUCTS = [
    product("B000000003", "Red Oak Chair"),
    product("B000000001", "Blue Oak Chair", pricing="$15.00$25.00"),
    product(
        "B000000002",
        "Bench for Two",
        customization_options="",
        pricing=None,
        query="benches",
        product_category="Home › Garden › Benches",
        small_description="One long bench",
    ),
    product(
        "B000000004",
        "Tea",
        category="grocery",
        query="teas",
        product_category="Food › Drinks › Teas",
        full_description="Black tea.",
        small_description=[],
        customization_options={},
        pricing="$4",
    ),
]
ATTRIBUTES = {
    "B000000003": {
        "attributes": ["easy clean", "solid wood"],
        "instruction": "Find me easy clean chairs with solid wood",
        "instruction_attributes": ["easy clean", "solid wood"],
    },
    "B000000001": {"attributes": ["easy clean"]},
    "B000000002": {
        "attributes": ["easy clean"],
        "instruction": "Find me easy clean benches",
        "instruction_attributes": ["easy clean"],
    },
    "B000000004": {"attributes": []},
}
WRITTEN = {
    "B000000003": [
        {
            "asin": "B000000003",
            "instruction": "i want a red chair that is easy to clean.",
            "attributes": ["easy clean"],
            "options": ["color: red"],
            "instruction_attributes": ["easy clean"],
            "instruction_options": ["red"],
        },
        {
            "asin": "B000000003",
            "instruction": "a chair",
            "attributes": [],
            "options": [""],
            "instruction_attributes": [],
            "instruction_options": [],
        },
    ],
}


def write_shop(
    folder: Path, products: object = PRODUCTS, attributes: object = ATTRIBUTES, written: object = WRITTEN
) -> dict[str, str]:
    """Writes the three files and returns make_world's arguments for them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json")
    for name, content in zip(names, (products, attributes, written), strict=True):
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return {"data": str(folder)}

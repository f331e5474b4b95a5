"""WebShop's products, goals and search index, prepared once in a folder that all processes memory-map.

The source folder has files in the original formats:

| file | contents |
|---|---|
| `items_shuffle.json` or `items_shuffle_1000.json` | the products: a list of records |
| `items_ins_v2.json` or `items_ins_v2_1000.json` | {asin: attributes, in part with an instruction and its attributes} |
| `items_human_ins.json` | optional: {asin: [human-written instructions]} |

The first use writes records, goals and index to `.a3t_webshop-*` in that folder or, if it is read-only, below
~/.cache/a3t. It streams the products, so memory stays at a few GB for 1.2 million of them. Later uses map the result.
If the source files change, they are prepared again; old prepared folders can be deleted at any time.
Left out: images, reviews and ratings, which the text never shows.

Run: python -m envs.webshop.catalogue [--data DIR]     prepares a catalogue and prints its size and splits
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import msgspec
import numpy as np
from tqdm import tqdm

from artifacts.cli import run_main
from artifacts.json_io import read_json
from envs.webshop.generate import STAMP, ensure_catalogue
from envs.webshop.goals import (
    Goal,
    Instruction,
    Product,
    are_official,
    draw_price,
    human_goals,
    name_goals,
    synthetic_goals,
)
from envs.webshop.search import Index, IndexBuilder, analyze

VERSION = 2  # of the prepared folder; other versions are ignored
CHUNK = 1 << 24  # characters of the product file read at a time
MAX_RECORD = 1 << 26  # characters; no product is that long, so the JSON must be broken
MAX_ASIN = 10  # longer asins are skipped, as in the original
DEFAULT_TAG, DEFAULT_PRICES = "$100.0", (100.0,)


class RawOption(msgspec.Struct):
    value: str


class RawProduct(msgspec.Struct):
    """A record of the product file; other fields are ignored."""

    asin: str
    name: str
    full_description: str
    small_description: list[str] | str
    product_category: str
    category: str
    query: str
    pricing: str | None = None
    customization_options: dict[str, list[RawOption] | None] | str | None = None


class RawAttributes(msgspec.Struct):
    attributes: list[str] = msgspec.field(default_factory=lambda: ["DUMMY_ATTR"])  # the original's
    instruction: str | None = None
    instruction_attributes: list[str] | None = None


NO_ATTRIBUTES = RawAttributes()


@dataclass(frozen=True)
class Files:
    """The source files of one catalogue, all in one folder."""

    products: Path
    attributes: Path
    human: Path

    @property
    def folder(self) -> Path:
        return self.products.parent


def find_files(data: str | Path) -> Files:
    """The files of a folder, or those that belong to a product file. Raises FileNotFoundError for a missing one."""
    given = Path(data).expanduser().resolve()
    names = [given] if given.is_file() else [given / "items_shuffle.json", given / "items_shuffle_1000.json"]
    products = next((name for name in names if name.is_file()), None)
    if products is None:
        raise FileNotFoundError(
            f"{data} holds neither items_shuffle.json nor items_shuffle_1000.json: expected WebShop's data folder or "
            "one of these files"
        )
    attributes = products.with_name(products.name.replace("items_shuffle", "items_ins_v2"))
    if attributes == products or not attributes.is_file():
        raise FileNotFoundError(f"no {attributes} next to {products.name}: expected the products' attributes in it")
    return Files(products=products, attributes=attributes, human=products.with_name("items_human_ins.json"))


# ---- reading the original formats ------------------------------------------------------------------------------------


def stream_array(file: Path) -> Iterator[object]:
    """The objects of a JSON array, read in chunks. Raises ValueError, naming file and record, if it cannot be read."""
    decode, separator, index = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*"), 0
    with open(file, encoding="utf-8") as stream:
        buffer = _read_chunk(stream)
        position = separator.match(buffer).end()
        if buffer[position : position + 1] != "[":
            raise ValueError(f"{file} begins with {buffer[:20]!r}: expected a JSON list of products")
        position += 1
        while True:
            position = separator.match(buffer, position).end()
            if buffer[position : position + 1] == "]":
                return
            try:
                item, position = decode(buffer, position)
            except RecursionError as error:
                raise ValueError(f"{file}: record {index} is nested too deeply; download the file again") from error
            except ValueError as error:
                more = _read_chunk(stream)
                if not more or len(buffer) - position > MAX_RECORD:
                    raise ValueError(
                        f"{file} breaks off in record {index} ({error}): expected a JSON list of products; "
                        "download the file again"
                    ) from error
                buffer, position = buffer[position:] + more, 0
                continue
            yield item
            index += 1


def _read_chunk(stream: TextIO) -> str:
    try:
        return stream.read(CHUNK)
    except UnicodeDecodeError as error:
        raise ValueError(f"{stream.name} is not UTF-8 ({error}); download the file again") from error


def read_products(files: Files, table: dict[str, RawAttributes]) -> Iterator[Product]:
    """The products in file order; long and repeated asins are skipped, as in the original. Raises ValueError, naming
    file, record and asin, for a record that is not in WebShop's format."""
    seen = set()
    for index, record in enumerate(stream_array(files.products)):
        try:
            raw = msgspec.convert(record, RawProduct)
            if raw.asin != "nan" and len(raw.asin.encode()) <= MAX_ASIN and raw.asin not in seen:
                seen.add(raw.asin)
                yield make_product(raw, table.get(raw.asin, NO_ATTRIBUTES).attributes)
        except ValueError as error:
            name = record.get("asin", "no asin") if isinstance(record, dict) else "not an object"
            raise ValueError(f"{files.products}, record {index} ({name}): {error}") from error


def make_product(raw: RawProduct, attributes: list[str]) -> Product:
    """A product as its pages show it. Raises ValueError for an invalid asin or price."""
    if not (raw.asin.isascii() and raw.asin.isprintable()):
        raise ValueError(f"the asin is {raw.asin!r}: expected printable ASCII, such as B07HRFSNL4")
    bullets = raw.small_description if isinstance(raw.small_description, list) else [raw.small_description]
    options = {}
    if isinstance(raw.customization_options, dict):
        for name, contents in raw.customization_options.items():
            if contents is not None:
                options[name.lower()] = [option.value.strip().replace("/", " | ").lower() for option in contents]
    tag, prices = parse_pricing(raw.pricing)
    return Product(
        asin=raw.asin,
        name=raw.name,
        description=raw.full_description,
        bullets=bullets,
        price_tag=tag,
        price=draw_price(raw.asin, prices),
        options=options,
        attributes=attributes,
        category=raw.category,
        query=raw.query.lower().strip(),
        product_category=raw.product_category,
    )


def parse_pricing(pricing: str | None) -> tuple[str, Sequence[float]]:
    """(price tag, the price or both ends of its range) of "$a" or "$a$b"; 100 dollars if there is no price."""
    if not pricing:
        return DEFAULT_TAG, DEFAULT_PRICES
    try:
        prices = [float(re.sub(r"[^\d.]", "", price)) for price in pricing.split("$")[1:]]
        if not all(map(math.isfinite, prices)):
            raise ValueError("too large")
        return (f"${prices[0]}", prices) if len(prices) == 1 else (f"${prices[0]} to ${prices[1]}", prices[:2])
    except (ValueError, IndexError) as error:
        raise ValueError(f"pricing is {pricing!r}: expected $a or $a$b") from error


def index_text(product: Product) -> str:
    """The text that the search engine indexes for a product."""
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product.options.items())
    first = product.bullets[0] if product.bullets else ""
    return " ".join([product.name, product.description, first, options]).lower()


# ---- preparing -------------------------------------------------------------------------------------------------------


def prepare(data: str | Path) -> Path:
    """The prepared folder of a catalogue, built now if it does not exist.

    Raises FileNotFoundError for a missing file, ValueError for an unreadable one or one without products.
    """
    files = find_files(data)
    # Not st_mtime, which unpacking an archive resets.
    versions = [(file.name, file.stat().st_size, file.stat().st_ctime_ns) for file in _present(files)]
    key = hashlib.sha256(repr((VERSION, str(files.folder), versions)).encode()).hexdigest()[:16]
    local, cached = files.folder / f".a3t_webshop-{key}", Path.home() / ".cache" / "a3t" / f"webshop-{key}"
    for folder in (local, cached):
        if (folder / "catalogue.json").is_file():
            return folder
    writable = files.folder.stat().st_mode & 0o222  # os.access alone lets root write to a read-only folder
    target = local if writable and os.access(files.folder, os.W_OK) else cached
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f".building-{key}-", dir=target.parent)
    building = Path(temporary, target.name)  # a subfolder, since mkdtemp's own folder is closed to other users
    building.mkdir()
    try:
        _write(files, building)
        os.replace(building, target)
    except OSError:
        if not (target / "catalogue.json").is_file():  # otherwise another process has just written it
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _present(files: Files) -> list[Path]:
    return [file for file in (files.products, files.attributes, files.human, files.folder / STAMP) if file.is_file()]


def _write(files: Files, folder: Path) -> None:
    """Writes all files of the prepared folder; catalogue.json comes last and marks it as complete."""
    table = read_json(files.attributes, dict[str, RawAttributes])
    written = read_json(files.human, dict[str, list[Instruction]]) if files.human.is_file() else {}
    builder, asins, ends, human = IndexBuilder(), [], [], []
    digest, encode = hashlib.sha256(), msgspec.json.encode
    with open(folder / "products.bin", "wb") as stream:
        bar = tqdm(read_products(files, table), desc=f"preparing {files.products.name}", unit="product", delay=2)
        for product in bar:
            try:
                record = encode(product)
            except UnicodeEncodeError as error:
                raise ValueError(f"{files.products}, {product.asin}: {error}; expected text that is UTF-8") from error
            stream.write(record)
            digest.update(record)
            asins.append(product.asin)
            ends.append(stream.tell())
            builder.add(analyze(index_text(product)))
            human += human_goals(product, written.get(product.asin, ()))
    if not asins:
        raise ValueError(f"{files.products} holds no product")
    order = np.argsort(np.array(asins, dtype=bytes), kind="stable")
    spans = np.array([[0, *ends[:-1]], ends]).T
    np.save(folder / "asins.npy", np.array(asins, dtype=f"S{MAX_ASIN}")[order])
    np.save(folder / "spans.npy", spans[order])
    builder.write(folder / "index", order)
    official = are_official(len(human), sum(map(len, written.values())), len(written.keys() - set(asins)))
    synthetic = [] if official else list(_synthetic(files, folder, table, zip(asins, spans, strict=True)))
    goals = name_goals(human, synthetic, official, "gen" if (files.folder / STAMP).is_file() else "small")
    lines = [encode(goal) + b"\n" for goal in goals.values()]
    (folder / "goals.jsonl").write_bytes(b"".join(lines))
    np.save(folder / "goal_ends.npy", np.cumsum([len(line) for line in lines], dtype=np.int64))
    (folder / "goal_ids.txt").write_text("".join(f"{task_id}\n" for task_id in goals))
    facts = {
        "data": str(files.folder),
        "products": len(asins),
        "products_sha256": digest.hexdigest(),
        "goals": len(goals),
        "goals_sha256": hashlib.sha256(b"".join(lines)).hexdigest(),
    }
    (folder / "catalogue.json").write_text(json.dumps(facts))


def _synthetic(
    files: Files, folder: Path, table: dict[str, RawAttributes], spans: Iterable[tuple[str, np.ndarray]]
) -> Iterator[Goal]:
    """The synthetic goals of the products just written, in file order. `spans`: (asin, [start, end]) of each record."""
    with open(folder / "products.bin", "rb") as stream:
        for asin, (start, end) in spans:
            entry = table.get(asin, NO_ATTRIBUTES)
            if entry.instruction is not None:
                if not entry.instruction_attributes:
                    raise ValueError(f"{files.attributes}: {asin} has an instruction without attributes")
                stream.seek(start)
                product = msgspec.json.decode(stream.read(end - start), type=Product)
                yield from synthetic_goals(product, entry.instruction, entry.instruction_attributes)


class Catalogue:
    """A prepared folder. Products are numbered in the order of their asins, in which the search index breaks ties.

    `facts`: products, products_sha256, goals, goals_sha256, data (the source folder).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts = read_json(folder / "catalogue.json", dict[str, Any])
        self.index = Index(folder / "index")
        self._asins = np.asarray(np.load(folder / "asins.npy", mmap_mode="r"))
        self._spans = np.asarray(np.load(folder / "spans.npy", mmap_mode="r"))
        self._records = np.asarray(np.memmap(folder / "products.bin", np.uint8, "r"))
        self._goals = (folder / "goals.jsonl").read_bytes() if self.facts["goals"] else b""
        self._goal_ends = np.load(folder / "goal_ends.npy")
        self._goal_ids = (folder / "goal_ids.txt").read_text().splitlines()
        by_split = groupby(self._goal_ids, lambda task_id: task_id.split("/")[0])
        self.splits = {split: tuple(ids) for split, ids in by_split}
        self._decode_product = msgspec.json.Decoder(Product).decode
        self.product = lru_cache(maxsize=4096)(self._read_product)

    def __reduce__(self) -> tuple:
        return open_catalogue, (self.folder,)  # a copy in another process memory-maps the same files

    def __len__(self) -> int:
        return len(self._asins)

    def __iter__(self) -> Iterator[str]:
        """The asins, sorted."""
        return (asin.decode() for asin in self._asins)

    def find(self, asin: str) -> int | None:
        """The number of the product with that asin, or None."""
        try:
            wanted = np.bytes_(asin.encode())
        except UnicodeEncodeError:
            return None
        number = int(np.searchsorted(self._asins, wanted))
        return number if number < len(self) and self._asins[number] == wanted else None

    def _read_product(self, number: int) -> Product:
        start, end = self._spans[number]
        return self._decode_product(self._records[start:end])

    def goal(self, task_id: str) -> Goal | None:
        """The goal with that id, or None."""
        index = bisect_left(self._goal_ids, task_id)
        if index == len(self._goal_ids) or self._goal_ids[index] != task_id:
            return None
        start = self._goal_ends[index - 1] if index else 0
        return msgspec.json.decode(self._goals[start : self._goal_ends[index]], type=Goal)


@lru_cache
def open_catalogue(folder: Path) -> Catalogue:
    """The catalogue of a prepared folder, one instance per process."""
    return Catalogue(folder)


def data_folder(data: str | None) -> Path:
    """The folder or file to read: `data`, else $WEBSHOP_DATA, else the generated catalogue."""
    given = data or os.environ.get("WEBSHOP_DATA")
    return Path(given) if given else ensure_catalogue()


@dataclass(frozen=True, kw_only=True)
class Args:
    data: str | None = None
    """WebShop's data folder or product file (default: $WEBSHOP_DATA, else the generated catalogue)."""


def main(args: Args) -> None:
    catalogue = open_catalogue(prepare(data_folder(args.data)))
    splits = ", ".join(f"{split} {len(ids)}" for split, ids in catalogue.splits.items())
    print(f"{catalogue.folder}: {len(catalogue)} products, goals by split: {splits}")
    print(json.dumps(catalogue.facts))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

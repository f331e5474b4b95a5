"""Claims: our WebShop steps at 30 times the original's speed or more, and searches 1.2 million products in 10 ms.

At 1,000 products (the generated catalogue) and at many (mixtures of generated products with a tail of rare words, about
110 terms each): seconds to prepare the files, to build the index from ready terms, to start a world; steps a second of
random walks; milliseconds a query of an instruction's words; resident memory, and what of it a second process that maps
the same files has to itself. Beside it, in the same run and on the same terms, bm25s with Lucene's formula and the same
k1 and b (it orders ties otherwise and does not quantise lengths, so its ranking is not Lucene's).
The original needs Java and is not run here: 28 to 50 steps a second were measured on a machine with 2 cores.

Run: python -m bench.webshop [--sizes 1000 1200000]       (some 8 minutes and 5 GB of memory)
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csc_array
from tqdm import tqdm

from artifacts.cli import parse
from envs.webshop.catalogue import prepare
from envs.webshop.generate import FILES, SEED, generate_listings
from envs.webshop.search import IndexBuilder, analyze
from envs.webshop.world import WebShop

ORIGINAL_STEPS = (28, 50)  # a second
MODELS = 1000  # generated products that the mixtures are made from
TAIL = 70  # rare words in a mixture's description
SPLIT = "small_train"


@dataclass(frozen=True, kw_only=True)
class Args:
    sizes: tuple[int, ...] = (1000, 1_200_000)
    """Numbers of products."""
    queries: int = 300
    """Queries of each engine."""
    steps: int = 5000
    """Steps of random walks."""
    peer: bool = True
    """Measure bm25s too."""


# ---- the shop --------------------------------------------------------------------------------------------------------


def write_files(folder: Path, size: int) -> None:
    """The generated products, and after these mixtures: the name of one, the features of another, the options of a
    third, rare words in the description, no instruction."""
    models = list(generate_listings(SEED, min(size, MODELS)))
    rng = np.random.default_rng(SEED)
    with open(folder / FILES[0], "w") as stream:
        for number in tqdm(range(size), desc="writing", unit="product", delay=2):
            record = models[number % len(models)].record
            if size > MODELS:
                one, other = (models[place].record for place in rng.integers(len(models), size=2))
                words = " ".join(f"w{word}" for word in np.minimum(rng.zipf(1.3, TAIL), 5_000_000).tolist())
                record = record | {"full_description": f"{record['full_description']} {words}"}
                if number >= MODELS:
                    record["asin"] = f"S{number:09d}"
                    record["small_description"] = one["small_description"]
                    record["customization_options"] = other["customization_options"]
            stream.write(("[" if number == 0 else ",\n") + json.dumps(record))
        stream.write("]")
    table = {asin: entry for model in models for asin, entry in model.attributes.items()}
    (folder / FILES[1]).write_text(json.dumps(table))


def write_terms(data: str, folder: str) -> dict:
    """Every product's terms as numbers, one product after the other, read back from the index of the prepared folder:
    terms.npy, ends.npy, words.json."""
    index = prepare(data) / "index"
    counts, documents, starts, ends = (
        np.load(index / f"{name}.npy") for name in ("counts", "documents", "starts", "word_ends")
    )
    size = len(np.load(index / "inverse.npy"))
    rows = csc_array((counts, documents, starts), shape=(size, len(ends))).tocsr()
    terms = np.repeat(rows.indices, rows.data)
    np.save(Path(folder, "terms.npy"), terms.astype(np.int32))
    np.save(Path(folder, "ends.npy"), np.append(0, np.cumsum(rows.data, dtype=np.int64))[rows.indptr[1:]])
    letters, places = (index / "words.bin").read_bytes(), [0, *ends.tolist()]
    words = [letters[start:end].decode() for start, end in zip(places, places[1:], strict=False)]
    Path(folder, "words.json").write_text(json.dumps(words))
    return {"terms_per_product": len(terms) / size, "different_terms": len(words)}


def read_terms(folder: str) -> tuple[list[str], Iterator[list[int]]]:
    """The words, and the numbers of one product after the other."""
    words, terms = json.loads(Path(folder, "words.json").read_text()), np.load(Path(folder, "terms.npy"))
    ends = [0, *np.load(Path(folder, "ends.npy")).tolist()]
    return words, (terms[start:end].tolist() for start, end in zip(ends, ends[1:], strict=False))


# ---- measuring -------------------------------------------------------------------------------------------------------


def apart(function: Callable[..., dict], *args: object) -> dict:
    """What the function returns in a fresh process, and that process's largest memory in GB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (function, args))


def _measured(function: Callable[..., dict], args: tuple) -> dict:
    result = function(*args)
    return result | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def timed(function: Callable, *args: object) -> tuple[float, object]:
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def memory() -> dict:
    """Resident memory in MB, and what of it no other process shares."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    sizes = {name.rstrip(":"): int(value) / 1e3 for name, value, _ in lines}
    return {"rss_mb": sizes["Rss"], "private_mb": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def make_queries(world: WebShop, count: int) -> list[str]:
    """Instructions without their price, as agents search for them."""
    rng, task_ids = random.Random(SEED), world.tasks(SPLIT)
    return [world.reset(rng.choice(task_ids)).task.split(", and price")[0] for _ in range(count)]


def milliseconds(search: Callable, queries: list[str]) -> dict:
    """Mean and 95th percentile, each query asked once before the clock starts."""
    for query in queries:
        search(query)
    times = [1e3 * timed(search, query)[0] for query in queries]
    return {"mean_ms": float(np.mean(times)), "p95_ms": float(np.percentile(times, 95))}


def preparation(data: str) -> dict:
    return {"prepare_s": timed(prepare, data)[0]}


def index_measured(folder: str) -> dict:
    """Building the index from ready terms."""
    words, products = read_terms(folder)
    builder, seconds, count = IndexBuilder(), 0.0, 0
    for numbers in products:
        terms = [words[number] for number in numbers]
        seconds += timed(builder.add, terms)[0]
        count += 1
    index = Path(folder, "index")
    seconds += timed(builder.write, index, np.arange(count))[0]
    return {"build_s": seconds, "index_mb": sum(file.stat().st_size for file in index.iterdir()) / 1e6}


def peer_measured(folder: str, queries: list[str]) -> dict:
    """bm25s with Lucene's formula on the same terms."""
    import bm25s  # here alone: what it imports is no memory of ours

    words, products = read_terms(folder)
    same = list(range(len(words)))  # one object a number, however often it comes
    ids = [[same[number] for number in numbers] for numbers in products]
    engine = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    vocabulary = {word: number for number, word in enumerate(words)}
    seconds, _ = timed(lambda: engine.index((ids, vocabulary), show_progress=False))
    ids.clear()
    found = milliseconds(lambda query: engine.retrieve([analyze(query)], k=50, show_progress=False), queries)
    return {"build_s": seconds} | found | memory()


def world_measured(data: str, args: Args) -> dict:
    """Start, queries, memory after them, random walks."""
    before = memory()["rss_mb"]
    start, world = timed(WebShop, data)
    start += timed(world.reset, world.tasks(SPLIT)[0])[0]
    started = memory()["rss_mb"] - before
    found = milliseconds(world._shop.index.search, make_queries(world, args.queries)) | memory()
    return found | {"start_s": start, "start_mb": started, "python_mb": before, "steps_per_s": walk(world, args.steps)}


def walk(world: WebShop, steps: int) -> float:
    """Steps a second, the list of available actions and the resets included."""
    rng, task_ids, done, begin = random.Random(SEED), world.tasks(SPLIT), True, time.perf_counter()
    for _ in range(steps):
        if done:
            words = world.reset(rng.choice(task_ids)).task.split()
        action = rng.choice(world.actions())
        done = world.step(f"{action}{' '.join(rng.sample(words, 4))}]" if action.endswith("[") else action).done
    return steps / (time.perf_counter() - begin)


def hold(data: str, ready: object, release: object) -> None:
    """Maps a catalogue, searches in it, and waits."""
    world = WebShop(data)
    for query in make_queries(world, 100):
        world._shop.index.search(query)
    ready.set()
    release.wait()


def beside_another(data: str, args: Args) -> dict:
    """world_measured while another process maps the same files."""
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(data, ready, release))
    other.start()
    ready.wait()
    try:
        return apart(world_measured, data, args)
    finally:
        release.set()
        other.join()


def measure(size: int, args: Args) -> dict:
    with tempfile.TemporaryDirectory() as data, tempfile.TemporaryDirectory() as folder:
        write_files(Path(data), size)
        found = {"products": size} | apart(preparation, data)
        found["terms"] = apart(write_terms, data, folder)
        found["index"] = apart(index_measured, folder)
        found["world"] = beside_another(data, args)
        if args.peer:
            found["bm25s"] = apart(peer_measured, folder, make_queries(WebShop(data), args.queries))
    return found


def report(one: dict) -> None:
    world, index, peer = one["world"], one["index"], one.get("bm25s")
    slow, fast = (world["steps_per_s"] / original for original in reversed(ORIGINAL_STEPS))
    print(f"\n{one['products']} products, {one['terms']['terms_per_product']:.0f} terms each")
    print(f"prepare the files        {one['prepare_s']:9.1f} s, at most {one['peak_gb']:.1f} GB")
    start = f"{world['start_s']:9.3f} s, {world['start_mb']:.0f} MB beside {world['python_mb']:.0f}"
    print(f"start a world            {start}")
    print(f"resident after queries   {world['rss_mb']:9.0f} MB, {world['private_mb']:.0f} of them not shared")
    print(f"steps/s                  {world['steps_per_s']:9.0f}, {slow:.0f} to {fast:.0f} times the original's record")
    print("                              ours |     bm25s |  ratio")
    rows = [("build the index, s", index, "build_s"), ("query, mean ms", world, "mean_ms")]
    rows += [("query, p95 ms", world, "p95_ms"), ("resident, MB", world, "rss_mb")]
    for label, ours, key in rows:
        beside = f"{peer[key]:9.2f} | {peer[key] / ours[key]:6.2f}" if peer else ""
        print(f"{label:22s} {ours[key]:11.2f} | {beside}")


def main(args: Args) -> None:
    """Print a table for each size and, last, one JSON object."""
    results = []
    for size in args.sizes:
        results.append(measure(size, args))
        report(results[-1])
    print(json.dumps({"bench": "webshop", "sizes": results}))


if __name__ == "__main__":
    main(parse(Args, __doc__))

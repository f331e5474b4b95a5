"""Claims: our WebShop steps at least 30 times as fast as the original, and searches 1.2 million products in 10 ms.

At 1,000 products (the generated catalogue) and at many (mixtures of generated products with a tail of rare words, about
110 terms each): seconds to prepare the files, to build the index from tokenised products and to start a world; steps/s
of random walks; milliseconds per query of an instruction's words; resident memory, and how much of it is private while
a second process maps the same files. The peer, in the same run and on the same terms, is bm25s with Lucene's formula
and the same k1 and b (it breaks ties differently and does not quantise lengths, so its ranking is not Lucene's).
The original needs Java and is not run here: 28 to 50 steps/s were measured on a machine with 2 cores.

Run: python -m bench.webshop [--sizes 1000 1200000]       (about 8 minutes and 5 GB of memory)
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

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

from artifacts.cli import run_main
from envs.webshop.catalogue import prepare
from envs.webshop.generate import FILES, SEED, generate_listings
from envs.webshop.search import IndexBuilder, analyze
from envs.webshop.world import WebShop

ORIGINAL_STEPS = (28, 50)  # per second
MODELS = 1000  # generated products that mixtures are made from
TAIL = 70  # rare words in a mixture's description
SPLIT = "small_train"


@dataclass(frozen=True, kw_only=True)
class Args:
    sizes: tuple[int, ...] = (1000, 1_200_000)
    """Numbers of products to measure at."""
    queries: int = 300
    """Queries per engine."""
    steps: int = 5000
    """Steps of the random walks."""
    peer: bool = True
    """Also measure bm25s."""


# ---- the shop --------------------------------------------------------------------------------------------------------


def write_files(folder: Path, size: int) -> None:
    """Writes the generated products, followed by mixtures: the name of one, the features of another, the options of a
    third, rare words in the description, no instruction."""
    models = list(generate_listings(SEED, min(size, MODELS)))
    rng = np.random.default_rng(SEED)
    with open(folder / FILES[0], "w") as stream:
        for index in tqdm(range(size), desc="writing", unit="product", delay=2):
            record = models[index % len(models)].record
            if size > MODELS:
                one, other = (models[choice].record for choice in rng.integers(len(models), size=2))
                words = " ".join(f"w{word}" for word in np.minimum(rng.zipf(1.3, TAIL), 5_000_000).tolist())
                record = record | {"full_description": f"{record['full_description']} {words}"}
                if index >= MODELS:
                    record["asin"] = f"S{index:09d}"
                    record["small_description"] = one["small_description"]
                    record["customization_options"] = other["customization_options"]
            stream.write(("[" if index == 0 else ",\n") + json.dumps(record))
        stream.write("]")
    table = {asin: entry for model in models for asin, entry in model.attributes.items()}
    (folder / FILES[1]).write_text(json.dumps(table))


def write_terms(data: str, folder: str) -> dict:
    """Writes the term ids of every product in order, recovered from the index of the prepared folder, as terms.npy,
    ends.npy and words.json."""
    index = prepare(data) / "index"
    counts, documents, starts, ends = (
        np.load(index / f"{name}.npy") for name in ("counts", "documents", "starts", "word_ends")
    )
    size = len(np.load(index / "inverse.npy"))
    rows = csc_array((counts, documents, starts), shape=(size, len(ends))).tocsr()
    terms = np.repeat(rows.indices, rows.data)
    np.save(Path(folder, "terms.npy"), terms.astype(np.int32))
    np.save(Path(folder, "ends.npy"), np.append(0, np.cumsum(rows.data, dtype=np.int64))[rows.indptr[1:]])
    letters, bounds = (index / "words.bin").read_bytes(), [0, *ends.tolist()]
    words = [letters[start:end].decode() for start, end in zip(bounds, bounds[1:], strict=False)]
    Path(folder, "words.json").write_text(json.dumps(words))
    return {"terms_per_product": len(terms) / size, "different_terms": len(words)}


def read_terms(folder: str) -> tuple[list[str], Iterator[list[int]]]:
    """The words, and an iterator over the term ids of each product."""
    words, terms = json.loads(Path(folder, "words.json").read_text()), np.load(Path(folder, "terms.npy"))
    ends = [0, *np.load(Path(folder, "ends.npy")).tolist()]
    return words, (terms[start:end].tolist() for start, end in zip(ends, ends[1:], strict=False))


# ---- measuring -------------------------------------------------------------------------------------------------------


def in_subprocess(function: Callable[..., dict], *args: object) -> dict:
    """The function's result from a fresh subprocess, with the subprocess's peak memory in GB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_with_peak_memory, (function, args))


def _with_peak_memory(function: Callable[..., dict], args: tuple) -> dict:
    result = function(*args)
    return result | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def timed(function: Callable, *args: object) -> tuple[float, object]:
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def memory() -> dict:
    """Resident and private memory of this process, in MB."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    sizes = {name.rstrip(":"): int(value) / 1e3 for name, value, _ in lines}
    return {"rss_mb": sizes["Rss"], "private_mb": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def make_queries(world: WebShop, count: int) -> list[str]:
    """Instructions without their price, as agents use them for searching."""
    rng, task_ids = random.Random(SEED), world.tasks(SPLIT)
    return [world.reset(rng.choice(task_ids)).task.split(", and price")[0] for _ in range(count)]


def milliseconds(search: Callable, queries: list[str]) -> dict:
    """Mean and 95th percentile over the queries, after running each once as a warm-up."""
    for query in queries:
        search(query)
    times = [1e3 * timed(search, query)[0] for query in queries]
    return {"mean_ms": float(np.mean(times)), "p95_ms": float(np.percentile(times, 95))}


def measure_preparation(data: str) -> dict:
    return {"prepare_s": timed(prepare, data)[0]}


def measure_index(folder: str) -> dict:
    """Time to build the index from tokenised products, and its size."""
    words, products = read_terms(folder)
    builder, seconds, count = IndexBuilder(), 0.0, 0
    for term_ids in products:
        terms = [words[term_id] for term_id in term_ids]
        seconds += timed(builder.add, terms)[0]
        count += 1
    index = Path(folder, "index")
    seconds += timed(builder.write, index, np.arange(count))[0]
    return {"build_s": seconds, "index_mb": sum(file.stat().st_size for file in index.iterdir()) / 1e6}


def measure_peer(folder: str, queries: list[str]) -> dict:
    """bm25s with Lucene's formula on the same terms."""
    import bm25s  # imported here to keep its memory out of our figures

    words, products = read_terms(folder)
    shared = list(range(len(words)))  # one int object per term id, however often it occurs
    ids = [[shared[term_id] for term_id in term_ids] for term_ids in products]
    engine = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    vocabulary = {word: index for index, word in enumerate(words)}
    seconds, _ = timed(lambda: engine.index((ids, vocabulary), show_progress=False))
    ids.clear()
    latency = milliseconds(lambda query: engine.retrieve([analyze(query)], k=50, show_progress=False), queries)
    return {"build_s": seconds} | latency | memory()


def measure_world(data: str, args: Args) -> dict:
    """Start-up, queries, memory after them, random walks."""
    before = memory()["rss_mb"]
    start, world = timed(WebShop, data)
    start += timed(world.reset, world.tasks(SPLIT)[0])[0]
    started = memory()["rss_mb"] - before
    result = milliseconds(world._shop.index.search, make_queries(world, args.queries)) | memory()
    return result | {"start_s": start, "start_mb": started, "python_mb": before, "steps_per_s": walk(world, args.steps)}


def walk(world: WebShop, steps: int) -> float:
    """Steps/s of a random walk, including listing the available actions and resets."""
    rng, task_ids, done, begin = random.Random(SEED), world.tasks(SPLIT), True, time.perf_counter()
    for _ in range(steps):
        if done:
            words = world.reset(rng.choice(task_ids)).task.split()
        action = rng.choice(world.actions())
        done = world.step(f"{action}{' '.join(rng.sample(words, 4))}]" if action.endswith("[") else action).done
    return steps / (time.perf_counter() - begin)


def hold(data: str, ready: object, release: object) -> None:
    """Maps a catalogue, searches it, and waits for `release`."""
    world = WebShop(data)
    for query in make_queries(world, 100):
        world._shop.index.search(query)
    ready.set()
    release.wait()


def measure_shared_world(data: str, args: Args) -> dict:
    """`measure_world` while another process maps the same files."""
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(data, ready, release))
    other.start()
    ready.wait()
    try:
        return in_subprocess(measure_world, data, args)
    finally:
        release.set()
        other.join()


def measure(size: int, args: Args) -> dict:
    with tempfile.TemporaryDirectory() as data, tempfile.TemporaryDirectory() as folder:
        write_files(Path(data), size)
        result = {"products": size} | in_subprocess(measure_preparation, data)
        result["terms"] = in_subprocess(write_terms, data, folder)
        result["index"] = in_subprocess(measure_index, folder)
        result["world"] = measure_shared_world(data, args)
        if args.peer:
            result["bm25s"] = in_subprocess(measure_peer, folder, make_queries(WebShop(data), args.queries))
    return result


def report(result: dict) -> None:
    world, index, peer = result["world"], result["index"], result.get("bm25s")
    slow, fast = (world["steps_per_s"] / original for original in reversed(ORIGINAL_STEPS))
    print(f"\n{result['products']} products, {result['terms']['terms_per_product']:.0f} terms each")
    print(f"prepare the files        {result['prepare_s']:9.1f} s, peak {result['peak_gb']:.1f} GB")
    start = f"{world['start_s']:9.3f} s, {world['start_mb']:.0f} MB on top of {world['python_mb']:.0f}"
    print(f"start a world            {start}")
    print(f"resident after queries   {world['rss_mb']:9.0f} MB, {world['private_mb']:.0f} of them private")
    print(f"steps/s                  {world['steps_per_s']:9.0f}, {slow:.0f} to {fast:.0f} times the original")
    print("                              ours |     bm25s |  ratio")
    rows = [("build the index, s", index, "build_s"), ("query, mean ms", world, "mean_ms")]
    rows += [("query, p95 ms", world, "p95_ms"), ("resident, MB", world, "rss_mb")]
    for label, ours, key in rows:
        comparison = f"{peer[key]:9.2f} | {peer[key] / ours[key]:6.2f}" if peer else ""
        print(f"{label:22s} {ours[key]:11.2f} | {comparison}")


def main(args: Args) -> None:
    """Prints a table for each size and, on the last line, one JSON object."""
    results = []
    for size in args.sizes:
        results.append(measure(size, args))
        report(results[-1])
    print(json.dumps({"bench": "webshop", "sizes": results}))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

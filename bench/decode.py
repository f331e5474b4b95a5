"""What does a decoding step of the local sampler cost on a CPU, and how much of it is attention to the cache?

    python -m bench.decode                           # SmolLM2-135M's shape, random weights

Processor milliseconds of a step, of all threads together, for a few numbers of rows: with an almost empty cache and
with --length positions in it, without drafts and with the engine's own. A step with drafts pays where the ids that it
keeps per row (`tokens_per_step` in the rates of a stage) outweigh what it costs more.
Left out: prefill, worlds, groups that run at the same time.

Shapes: R rows, X ids of text.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import time
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import numpy as np
from flax import nnx

from artifacts.cli import Range, run_main
from bench.shapes import SHAPES
from lora.decoder import Decoder, make_decoder
from lora.decoding import SamplingParams, decode, empty_cache
from lora.engine import CPU_DRAFTS, SEEN, TILE
from lora.group import cache_sizes, prefill_prefix
from lora.model import CausalLM


@dataclass(frozen=True, kw_only=True)
class Args:
    shape: Literal[tuple(SHAPES)] = "smollm2-135m"
    """Shape of the model."""
    rows: tuple[Annotated[int, Range(1, 1024)], ...] = (8, 16, 32)
    """Rows of a group."""
    length: Annotated[int, Range(1, 10**5)] = 900
    """Positions of every row in the cache."""
    steps: Annotated[int, Range(1, 1024)] = 8
    """Steps of a chunk."""
    repeats: Annotated[int, Range(1, 1000)] = 3
    """Chunks, of which the fastest counts."""


def measure(decoder: Decoder, rows: int, length: int, drafts: int, args: Args) -> float:
    """Processor milliseconds of a step."""
    config, sizes = decoder.config, cache_sizes(length, TILE.positions)
    past = empty_cache(config, rows, sizes, TILE, decoder.weights.embed.dtype)
    weights = decoder.weights._replace(prefix=prefill_prefix(decoder, ()))
    ints_R, floats_R = np.zeros(rows, np.int32), np.ones(rows, np.float32)
    params = SamplingParams(
        limit=ints_R + args.steps,
        drawn=ints_R,
        temperature=floats_R - 1,
        top_p=floats_R,
        seed=np.arange(rows, dtype=np.uint32),
    )
    text = SEEN + length + args.steps + 1 + drafts
    text_RX = np.random.default_rng(0).integers(0, config.vocab_size, (rows, text)).astype(np.int32)
    where = past, ints_R + length, params, text_RX, ints_R + SEEN + length - 1
    how = {"chunk": args.steps, "drafts": drafts, "early": False}
    best = float("inf")
    for _ in range(args.repeats + 1):  # the first compiles
        start = time.process_time()
        sampled, _ = jax.block_until_ready(decode(decoder.graph, config, weights, *where, **how))
        best = min(best, (time.process_time() - start) / int(sampled.steps_R.max()))
    return 1e3 * best


def main(args: Args) -> None:
    decoder = make_decoder(CausalLM(SHAPES[args.shape], rngs=nnx.Rngs(0)))
    print("rows  ids of a step  ms, empty cache  ms, full cache  attention to it")
    for rows in args.rows:
        for drafts in (0, CPU_DRAFTS):
            empty, full = (measure(decoder, rows, length, drafts, args) for length in (1, args.length))
            share = (full - empty) / full
            print(f"{rows:4}  {rows * (1 + drafts):13}  {empty:15.0f}  {full:14.0f}  {share:15.0%}", flush=True)


if __name__ == "__main__":
    run_main(main, Args, __doc__)

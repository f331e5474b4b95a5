"""Do 7B training and decoding fit an NVIDIA GPU, and what do they launch? Answered by XLA's compiler, without a GPU.

Compiles, for Mistral-7B's shape and from abstract arrays only, the step of train_pg.py and what the sampler runs: a
chunk of decoding with drafts after a shared prefix, one layer of a prefill batch, and `append`. Prints the memory that
the compiler assigns and the number of operations on a device: instructions of the scheduled program, outside fusions,
that move or compute something, each of them a kernel, a call of a library or a copy. Bodies of loops count as often as
they run, the loop of `decode` once (so this is about a step), and of branches the longest counts.

Needs no GPU and no driver, but the CUDA plugin, in an environment of its own (6 GB):
pip install -r requirements.txt "jax[cuda12]==0.10.2".
Left out: autotuning and cuDNN's plans, which need the device (so cuDNN's workspaces count as 0), and any time.

    python -m bench.gpu_compile
    python -m bench.gpu_compile --only train/3090 decode/3090/nf4
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import functools
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax._src import xla_bridge
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from artifacts.cli import run_main
from bench.shapes import MISTRAL_7B, decode_arguments, described
from lora.attention import SegmentBounds
from lora.decoder import RolloutWeights
from lora.decoding import PrefillBatch, append, decode, empty_buffer, prefill_layer
from lora.engine import ACCELERATOR_TILE as TILE
from lora.engine import DRAFTS, SEEN
from lora.group import SIZES, WIDTHS, cache_sizes
from lora.linear import LoRAConfig, LoRAParam
from lora.sharding import ROWS, make_mesh
from lora.train_step import Batch, make_update, optimizer_shardings
from train_pg import objective

GIB = 2**30
LORA = LoRAConfig(rank=16, alpha=32.0, targets=("q", "v"))
CONTEXT, PREFIX, CHUNK = 1920, 512, 32  # of `run.sh paper`


@dataclass(frozen=True, kw_only=True)
class Card:
    """What XLA's compiler asks about a GPU, in bytes; `lanes`: float32 units of a multiprocessor."""

    name: str
    capability: str
    memory: int
    bandwidth: int
    l2: int
    multiprocessors: int
    lanes: int
    threads: int  # of a multiprocessor
    shared: int  # of a multiprocessor; a block may have all but 1 KiB
    ghz: float

    def target(self) -> str:
        """The text form of XLA's GpuTargetConfigProto; limits that all these cards share are written out."""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared - 1024}
              shared_memory_per_core: {self.shared}
              threads_per_core_limit: {self.threads}
              core_count: {self.multiprocessors}
              fpus_per_core: {self.lanes}
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2}
              clock_rate_ghz: {self.ghz}
              device_memory_size: {self.memory}
              cuda_compute_capability {{ {self.capability} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 28 }}
            runtime_version {{ major: 12 minor: 9 patch: 0 }}
            device_description_str: "{self.name}"
        """

    def mesh(self, shape: tuple[int, int, int]) -> Mesh:
        """A mesh of such cards in one machine, which can be compiled for but not run on."""
        known = xla_bridge.canonicalize_platform  # it wants a live GPU
        xla_bridge.canonicalize_platform = lambda platform: platform if platform == "cuda" else known(platform)
        try:
            described = topologies.get_topology_desc(
                platform="cuda",
                topology_name=self.name,
                target_config=self.target(),
                topology=f"1x1x{math.prod(shape)}",
            )
        finally:
            xla_bridge.canonicalize_platform = known
        return make_mesh(shape, described.devices)


HOPPER = {
    "capability": "major: 9 feature_extension: ACCELERATED_FEATURES",
    "l2": 52_428_800,
    "multiprocessors": 132,
    "lanes": 128,
    "threads": 2048,
    "shared": 233_472,
    "ghz": 1.98,
}
CARDS = {
    "3090": Card(
        name="NVIDIA GeForce RTX 3090",
        capability="major: 8 minor: 6",
        memory=25_438_126_080,
        bandwidth=936_096_000_000,
        l2=6_291_456,
        multiprocessors=82,
        lanes=128,
        threads=1536,
        shared=102_400,
        ghz=1.695,
    ),
    "a100": Card(
        name="NVIDIA A100-SXM4-80GB",
        capability="major: 8",
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        l2=41_943_040,
        multiprocessors=108,
        lanes=64,
        threads=2048,
        shared=167_936,
        ghz=1.41,
    ),
    "h100": Card(name="NVIDIA H100 80GB HBM3", memory=84_942_979_072, bandwidth=3_352_320_000_000, **HOPPER),
    "h200": Card(name="NVIDIA H200", memory=151_397_597_184, bandwidth=4_800_000_000_000, **HOPPER),
}


def abstract(mesh: Mesh, *shape: int, dtype=jnp.int32, spec: P | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec or P()))


def train(mesh: Mesh, *, bounds: SegmentBounds | None, remat: str = "full", tokens: int = 2048):
    """The optimizer step of train_pg.py on a row of `tokens` of each data shard, with cuDNN's attention."""
    graph, adapter, frozen = nnx.split(described(MISTRAL_7B, LORA, mesh), LoRAParam, ...)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    weighted = functools.partial(objective, implementation="cudnn", bounds=bounds, remat=remat)
    update = make_update(weighted, graph, optimizer, mesh, adapter, frozen)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(optimizer.init, adapter),
        optimizer_shardings(optimizer, adapter, mesh),
    )
    shape = (1, mesh.shape["data"] * mesh.shape["fsdp"], tokens)
    ids, weights = (abstract(mesh, *shape, dtype=dtype, spec=P(None, *ROWS)) for dtype in (jnp.int32, jnp.float32))
    one = abstract(mesh, dtype=jnp.float32)
    return update.lower(adapter, state, frozen, one, Batch(ids=ids, segments=ids, weights=weights), one, None)


def sampler(mesh: Mesh, weights: RolloutWeights, slots: int):
    """The graph of a layer and what `decode` takes, as the engine calls it with run.sh paper's context."""
    graph, arrays = decode_arguments(
        described(MISTRAL_7B, LORA, mesh),
        weights=weights,
        slots=slots,
        prefix=PREFIX,
        sizes=cache_sizes(CONTEXT, TILE.positions),
        tile=TILE,
        text=PREFIX + SEEN + CONTEXT + 1 + DRAFTS,
    )
    return graph, jax.tree.map(lambda x: abstract(mesh, *x.shape, dtype=x.dtype), arrays)


def decoding(mesh: Mesh, *, weights: RolloutWeights, slots: int):
    """A chunk of decoding in which every row reads its whole context."""
    graph, arrays = sampler(mesh, weights, slots)
    how = {"chunk": CHUNK, "drafts": DRAFTS, "early": True}
    return decode.lower(graph, MISTRAL_7B, *arrays, **how)


def prefill(mesh: Mesh, *, weights: RolloutWeights, slots: int):
    """One layer of the largest prefill batch, whose rows read their whole context."""
    graph, (decoder, past, *_) = sampler(mesh, weights, slots)
    width, ids = WIDTHS[0], SIZES[-1]
    x_FD = abstract(mesh, ids, MISTRAL_7B.hidden_size, dtype=decoder.embed.dtype)
    rows_B, ids_F = abstract(mesh, 2 * ids // width), abstract(mesh, ids)
    batch = PrefillBatch(rows_B=rows_B, lengths_B=rows_B, counts_B=rows_B, row_F=ids_F, index_F=ids_F)
    layer = decoder.layers[0], x_FD, batch, decoder.prefix[0], past[0]
    return prefill_layer.lower(graph, MISTRAL_7B, *layer, width=width)


def appending(mesh: Mesh, *, slots: int):
    """What a chunk of decoding appends to the largest block of one layer's cache."""
    _, (decoder, past, *_) = sampler(mesh, "bf16", slots)
    buffer = jax.eval_shape(lambda: empty_buffer(MISTRAL_7B, slots, CHUNK + 1 + DRAFTS, decoder.embed.dtype))
    buffer = jax.tree.map(lambda x: abstract(mesh, *x.shape, dtype=x.dtype), buffer)
    rows_B = abstract(mesh, slots)
    return append.lower(max(past[0], key=lambda block: block[0].size), buffer, abstract(mesh), rows_B, rows_B, rows_B)


TWO = SegmentBounds(segments=2, positions=1408)  # failures have up to 1,390 tokens in Mistral's tokenizer
CASES: dict[str, tuple[str, Callable]] = {}
for card, weights, slots in (("3090", "nf4", 32), ("a100", "bf16", 64), ("h100", "bf16", 64), ("h200", "bf16", 64)):
    CASES[f"train/{card}"] = card, functools.partial(train, bounds=TWO)
    CASES[f"decode/{card}/{weights}"] = card, functools.partial(decoding, weights=weights, slots=slots)
    CASES[f"prefill/{card}/{weights}"] = card, functools.partial(prefill, weights=weights, slots=slots)
    CASES[f"append/{card}"] = card, functools.partial(appending, slots=slots)
FOUR = TWO._replace(segments=4)
CASES["train/3090/mask"] = "3090", functools.partial(train, bounds=None)
for name, bounds in (("", TWO), ("/mask", None)):
    CASES[f"train/h100/no-remat{name}"] = "h100", functools.partial(train, bounds=bounds, remat="none")
for name, bounds in (("", FOUR), ("/mask", None)):
    CASES[f"train/3090/4096{name}"] = "3090", functools.partial(train, bounds=bounds, tokens=4096)
CASES["train/3090/fsdp4"] = CASES["train/3090"]
SEVERAL = {"train/3090/fsdp4": (1, 4, 1)}  # data, fsdp, tensor; the others have one card


@dataclass(frozen=True, kw_only=True)
class Args:
    only: tuple[str, ...] = tuple(CASES)
    """Programs to compile."""


def compile_case(name: str) -> dict:
    """Compiles a program; returns a card's memory in bytes and operations, cuDNN's calls, arrays of [tokens, tokens],
    and those of all-gathers."""
    card, lower = CASES[name]
    start = time.time()
    compiled = lower(CARDS[card].mesh(SEVERAL.get(name, (1, 1, 1)))).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "operations": operations(text),
        "cudnn": sorted(set(re.findall(r'custom_call_target="(__cudnn[^"]*)"', text))),
        "masks": sorted(set(re.findall(r'"mask_type": ?"(\w+)"', text))),
        "squares": sorted(set(re.findall(r"\w+\[(?:\d+,)*(?:2048,2048|1408,1408|4096,4096)\]", text))),
        "all_gathers": sorted(set(re.findall(r"= \(?(\w+\[[\d,]*\]).{0,200}? all-gather(?:-start)?\(", text))),
        "memory": CARDS[card].memory,
        "seconds": round(time.time() - start),
    }


# Instructions that cost nothing on the device.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}


def operations(text: str) -> int:
    """Operations on the device of a compiled program, see above."""
    computations: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        if opening := re.match(r"(ENTRY )?(%[\w.-]+) .*\{$", line):
            body = computations.setdefault("ENTRY" if opening[1] else opening[2], [])
        elif instruction := re.match(r"\s+(?:ROOT )?%[\w.-]+ = .*? ([a-z][a-z0-9-]*)\(", line):
            body.append((instruction[1], line))

    @functools.cache
    def count(computation: str) -> int:
        return sum(cost(*instruction) for instruction in computations[computation])

    def cost(opcode: str, line: str) -> int:
        called = {key: count(name) for key, name in re.findall(r"(body|condition|to_apply)=(%[\w.-]+)", line)}
        if opcode == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            return (int(trips[1]) if trips else 1) * (called["body"] + called["condition"])
        if opcode == "conditional":
            [branches] = re.findall(r"branch_computations=\{(.*?)\}", line) or [
                ", ".join(re.findall(r"(?:true|false)_computation=(%[\w.-]+)", line))
            ]
            return max(count(name) for name in branches.split(", "))
        if opcode == "call":
            return called["to_apply"]
        return 0 if opcode in FREE or opcode.endswith("-done") else 1

    return count("ENTRY")


def main(args: Args) -> None:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        print('bench.gpu_compile was skipped: it needs JAX\'s CUDA plugin; pip install "jax[cuda12]==0.10.2" (6 GB).')
        return
    rows = {}
    print(f"{'program':20} {'arguments':>9} {'temporary':>9} {'total GiB':>9} {'card':>6} {'operations':>10} {'s':>4}")
    for name in args.only:
        found = compile_case(name)
        total = found["arguments"] + found["temporaries"] + found["outputs"]
        rows[name] = found | {"total": total}
        gib = [f"{x / GIB:9.3f}" for x in (found["arguments"], found["temporaries"], total)]
        print(
            f"{name:20} {' '.join(gib)} {found['memory'] / GIB:6.2f} {found['operations']:10,} {found['seconds']:4}",
            flush=True,
        )
        cudnn, gathers = (
            ", ".join(names) or "none" for names in (found["cudnn"] + found["masks"], found["all_gathers"])
        )
        print(f"  cuDNN: {cudnn}; all-gathers: {gathers}")
    print(json.dumps(rows))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

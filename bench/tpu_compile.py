"""Do 7B training and decoding fit on a TPU, and what crosses its chips? Answered by the TPU compiler, without a TPU.

Compiles, for Mistral-7B's shape and those of other families (bench/shapes.py), from abstract arrays only, the step of
train_pg.py and a chunk of the sampler's decoding (with a shared prefix). Prints the memory that the compiler assigns, a
lower bound (the base, 16-bit embeddings and head, the adapter; Adam's moments, or the keys and values of the cache),
every kind of all-gather, and whether a decoded weight is ever materialised. Needs libtpu (requirements/test.txt) but no
TPU; libtpu allows one process at a time.

    python -m bench.tpu_compile
    python -m bench.tpu_compile --only v5e/2048
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import functools
import json
import os
import re
import time
from dataclasses import dataclass

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # do not look for a TPU

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from artifacts.cli import run_main
from bench.shapes import MISTRAL_7B, SHAPES, decode_arguments, described
from lora import nf4
from lora.config import Config
from lora.decoder import RolloutWeights
from lora.decoding import decode
from lora.engine import ACCELERATOR_TILE as TILE
from lora.engine import DRAFTS, SEEN
from lora.footprint import adapter_bytes, base_bytes, cache_bytes, nf4_bits
from lora.group import cache_sizes
from lora.linear import LoRAConfig, LoRAParam
from lora.sharding import ROWS, make_mesh
from lora.train_step import Batch, make_update, optimizer_shardings
from train_pg import objective

GIB = 2**30
CHIP = 16e9 / GIB  # of a v5e chip
LORA = LoRAConfig(rank=16, alpha=32.0, targets=("q", "v"))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration of the training step."""

    topology: str
    mesh: tuple[int, int, int]
    tokens: int
    remat: str
    limit: float  # GiB claimed to suffice
    double: bool = False
    config: Config = MISTRAL_7B


# With a tensor axis of 2, a row of 2,048 tokens would have the shape of half a weight and be mistaken for one.
CASES = {
    "v5e/2048": Case(topology="v5e:2x2", mesh=(1, 1, 1), tokens=2048, remat="full", limit=7.0),
    "v5e/2048/nf4-dq": Case(topology="v5e:2x2", mesh=(1, 1, 1), tokens=2048, remat="full", double=True, limit=7.0),
    "v6e/1024/no-remat": Case(topology="v6e:2x2", mesh=(1, 1, 1), tokens=1024, remat="none", limit=31.25),
    "v5e:2x4/fsdp8": Case(topology="v5e:2x4", mesh=(1, 8, 1), tokens=2048, remat="full", limit=15.75),
    "v5e:2x4/fsdp4-tensor2": Case(topology="v5e:2x4", mesh=(1, 4, 2), tokens=2560, remat="full", limit=15.75),
    "v4:2x2x1/fsdp4": Case(topology="v4:2x2x1", mesh=(1, 4, 1), tokens=2048, remat="full", limit=31.25),
    "v6e:2x2/fsdp2-tensor2": Case(topology="v6e:2x2", mesh=(1, 2, 2), tokens=2560, remat="full", limit=31.25),
}
OTHERS = {name: config for name, config in SHAPES.items() if config is not MISTRAL_7B}
CASES |= {
    f"v5e/2048/{name}": Case(topology="v5e:2x2", mesh=(1, 1, 1), tokens=2048, remat="full", limit=CHIP, config=config)
    for name, config in OTHERS.items()
}


@dataclass(frozen=True, kw_only=True)
class Decode:
    """A configuration of one chunk of decoding on one chip."""

    topology: str
    weights: RolloutWeights
    context: int
    limit: float
    slots: int = 64
    prefix: int = 512
    chunk: int = 32
    mesh: tuple[int, int, int] = (1, 1, 1)
    config: Config = MISTRAL_7B

    def cache_bytes(self) -> int:
        """Keys and values of all slots and of the prefix, in bfloat16."""
        return cache_bytes(self.config, self.slots * self.context + self.prefix)


DECODES = {
    "decode/v5e/nf4": Decode(topology="v5e:2x2", weights="nf4", context=1024, limit=15.75),
    "decode/v6e/bf16": Decode(topology="v6e:2x2", weights="bf16", context=1024, limit=31.25),
    # The compiler treats half a v4 chip as a device, with half of its memory.
    "decode/v4/bf16": Decode(topology="v4:2x2x1", weights="bf16", context=128, limit=15.25),
}
DECODES |= {
    f"decode/v5e/{name}": Decode(topology="v5e:2x2", weights="nf4", context=1024, slots=48, limit=CHIP, config=config)
    for name, config in OTHERS.items()
}


@dataclass(frozen=True, kw_only=True)
class Args:
    only: tuple[str, ...] = (*CASES, *DECODES)
    """Configurations to compile."""


def compile_case(case: Case) -> dict:
    """Compiles the training step; returns memory in bytes, all-gathers and materialised decoded weights."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices
    mesh = make_mesh(case.mesh, devices)
    model = described(case.config, LORA, mesh, double=case.double)
    graph, adapter, frozen = nnx.split(model, LoRAParam, ...)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    weighted = functools.partial(objective, implementation="splash", remat=case.remat)
    update = make_update(weighted, graph, optimizer, mesh, adapter, frozen)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(optimizer.init, adapter),
        optimizer_shardings(optimizer, adapter, mesh),
    )
    shape = (1, case.mesh[0] * case.mesh[1], case.tokens)
    rows = NamedSharding(mesh, P(None, *ROWS))
    ids, weights = (jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(ids=ids, segments=ids, weights=weights)
    one = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    start = time.time()
    compiled = update.lower(adapter, state, frozen, one, batch, one, None).compile()
    return describe(compiled, case) | {"seconds": round(time.time() - start)}


def compile_decode(case: Decode) -> dict:
    """Like `compile_case`, for a chunk of decoding in which every row reads its whole context."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices
    mesh = make_mesh(case.mesh, devices[:1])
    graph, arrays = decode_arguments(
        described(case.config, LORA, mesh),
        weights=case.weights,
        slots=case.slots,
        prefix=case.prefix,
        sizes=cache_sizes(case.context, TILE.positions),
        tile=TILE,
        text=SEEN + case.context,
    )
    on_chip = NamedSharding(mesh, P())
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_chip), arrays)
    start = time.time()
    how = {"chunk": case.chunk, "drafts": DRAFTS, "early": True}
    compiled = decode.lower(graph, case.config, *arrays, **how).compile()
    return describe(compiled, case) | {"seconds": round(time.time() - start), "cache": case.cache_bytes()}


def describe(compiled, case: Case | Decode) -> dict:
    """Memory in bytes, all-gathers and decoded weights of a compiled program; a dense base has no weights to decode."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "all_gathers": sorted(set(re.findall(r"= \(?(\w+\[[\d,]*\]).{0,200}? all-gather(?:-start)?\(", text))),
        "decoded": decoded_weights(text, case) if getattr(case, "weights", "nf4") == "nf4" else [],
    }


def decoded_weights(text: str, case: Case | Decode) -> list[str]:
    """Arrays of the compiled program, outside fusions, with the shape of a device's whole decoded weight."""
    config, tensor = case.config, case.mesh[2]
    D, F = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, 2 * config.num_key_value_heads * config.head_dim
    weights = {((q + kv) // tensor, D), (D, q // tensor), (2 * F // tensor, D), (D, F // tensor)}
    shapes = {tuple(sorted(shape)) for o, i in weights for shape in ((o, i), (o, i // nf4.BLOCK, nf4.BLOCK))}
    fused = set(re.findall(r"fusion\(.*calls=(%[\w.-]+)", text))
    found, computation = set(), ""
    for line in text.splitlines():
        if opening := re.match(r"(?:ENTRY )?(%[\w.-]+) .*\{$", line):
            computation = opening[1]
        array = re.search(r"= (bf16|f32)\[([\d,]+)\]", line)
        if array and computation not in fused:
            if tuple(sorted(int(n) for n in array[2].split(",") if n != "1")) in shapes:
                found.add(f"{array[1]}[{array[2]}]")
    return sorted(found)


def floor_bytes(case: Case | Decode) -> int:
    """The minimum that a device must hold between steps or chunks."""
    config, adapter = case.config, adapter_bytes(case.config, LORA)
    if isinstance(case, Decode):
        return base_bytes(config, {"nf4": nf4_bits(), "bf16": 16}[case.weights]) + adapter + case.cache_bytes()
    dense = base_bytes(config, 0)
    linear = base_bytes(config, nf4_bits(case.double)) - dense
    return linear // (case.mesh[1] * case.mesh[2]) + dense + 3 * adapter


def main(args: Args) -> None:
    rows = {}
    print(f"{'configuration':24} {'arguments':>9} {'temporary':>9} {'total GiB':>9} {'floor':>6} {'limit':>6} {'s':>4}")
    for name in args.only:
        case = (CASES | DECODES)[name]
        found = compile_case(case) if name in CASES else compile_decode(case)
        total = found["arguments"] + found["temporaries"] + found["outputs"]
        rows[name] = found | {"total": total, "floor": floor_bytes(case), "limit": case.limit}
        gib = [f"{x / GIB:9.2f}" for x in (found["arguments"], found["temporaries"], total)]
        print(f"{name:24} {' '.join(gib)} {floor_bytes(case) / GIB:6.2f} {case.limit:6.2f} {found['seconds']:4}")
        gathers, decoded = (", ".join(found[key]) or "none" for key in ("all_gathers", "decoded"))
        print(f"  all-gathers: {gathers}; decoded weights in memory: {decoded}")
    print(json.dumps(rows))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

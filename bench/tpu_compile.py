"""Does the 7B training step fit a TPU, and what crosses its chips? Asked of the TPU compiler, without a TPU.

Compiles the step of train_pg.py on Mistral-7B's shape for each configuration, from descriptions of the arrays alone,
and prints the memory that the compiler assigns, the floor that physics sets (NF4 codes and scales, 16-bit embeddings
and head, the adapter and Adam's moments), every kind of all-gather, and whether a decoded weight ever lies in memory.
Needs libtpu (requirements-test.txt), no TPU; one process at a time.

    python -m bench.tpu_compile
    python -m bench.tpu_compile --only v5e/2048
"""

import json
import os
import re
import time
from dataclasses import dataclass

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # no TPU is looked for

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench.shapes import MISTRAL_7B, described
from lora import nf4
from lora.linear import LoRAConfig, LoRAParam
from lora.sharding import ROWS, make_mesh
from train_pg import Batch, make_update, state_places

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Case:
    """One compilation."""

    topology: str
    mesh: tuple[int, int, int]
    tokens: int
    remat: str
    double: bool = False
    limit: float | None = None  # GiB that are claimed to be enough


# With a tensor axis of 2 a row of 2,048 tokens would have the shape of half a weight, and be taken for one.
CASES = {
    "v5e/2048": Case(topology="v5e:2x2", mesh=(1, 1, 1), tokens=2048, remat="full", limit=7.0),
    "v5e/2048/nf4-dq": Case(topology="v5e:2x2", mesh=(1, 1, 1), tokens=2048, remat="full", double=True, limit=7.0),
    "v6e/1024/no-remat": Case(topology="v6e:2x2", mesh=(1, 1, 1), tokens=1024, remat="none", limit=31.25),
    "v5e:2x4/fsdp8": Case(topology="v5e:2x4", mesh=(1, 8, 1), tokens=2048, remat="full", limit=15.75),
    "v5e:2x4/fsdp4-tensor2": Case(topology="v5e:2x4", mesh=(1, 4, 2), tokens=2560, remat="full", limit=15.75),
    "v4:2x2x1/fsdp4": Case(topology="v4:2x2x1", mesh=(1, 4, 1), tokens=2048, remat="full", limit=31.25),
    "v6e:2x2/fsdp2-tensor2": Case(topology="v6e:2x2", mesh=(1, 2, 2), tokens=2560, remat="full", limit=31.25),
}


@dataclass(frozen=True, kw_only=True)
class Args:
    only: tuple[str, ...] = tuple(CASES)
    """Which configurations."""


def compile_case(case: Case) -> dict:
    """Compiles the training step; returns bytes, all-gathers and the decoded weights that lie in memory."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices
    mesh = make_mesh(case.mesh, devices)
    model = described(MISTRAL_7B, LoRAConfig(rank=16, alpha=32.0, targets=("q", "v")), mesh, double=case.double)
    graph, adapter, frozen = nnx.split(model, LoRAParam, ...)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    update = make_update(graph, optimizer, mesh, adapter, frozen, implementation="splash", remat=case.remat)
    places = state_places(optimizer, adapter, mesh)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(optimizer.init, adapter), places,
    )  # fmt: skip
    shape = (1, case.mesh[0] * case.mesh[1], case.tokens)
    rows = NamedSharding(mesh, P(None, *ROWS))
    batch = Batch(*(jax.ShapeDtypeStruct(shape, d, sharding=rows) for d in (jnp.int32, jnp.int32, jnp.float32)))
    one = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    start = time.time()
    compiled = update.lower(adapter, state, frozen, one, batch, one, None).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "all_gathers": sorted(set(re.findall(r"= \(?(\w+\[[\d,]*\]).{0,200}? all-gather(?:-start)?\(", text))),
        "decoded": decoded_weights(text, case), "seconds": round(time.time() - start),
    }  # fmt: skip


def decoded_weights(text: str, case: Case) -> list[str]:
    """Arrays of the compiled program, outside of fusions, that are a whole decoded weight of a device."""
    config, tensor = MISTRAL_7B, case.mesh[2]
    D, F = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, 2 * config.num_key_value_heads * config.head_dim
    weights = {((q + kv) // tensor, D), (D, q // tensor), (2 * F // tensor, D), (D, F // tensor)}
    shapes = {tuple(sorted(shape)) for o, i in weights for shape in ((o, i), (o, i // nf4.BLOCK, nf4.BLOCK))}
    fused = set(re.findall(r"fusion\(.*calls=(%[\w.-]+)", text))
    found, inside = set(), ""
    for line in text.splitlines():
        if opening := re.match(r"(?:ENTRY )?(%[\w.-]+) .*\{$", line):
            inside = opening[1]
        made = re.search(r"= (bf16|f32)\[([\d,]+)\]", line)
        if made and inside not in fused and tuple(sorted(int(n) for n in made[2].split(",") if n != "1")) in shapes:
            found.add(f"{made[1]}[{made[2]}]")
    return sorted(found)


def floor_bytes(case: Case) -> int:
    """The least that a device must hold between steps."""
    linear = 6_979_321_856
    bits = 4 + (8 / 64 + 32 / (64 * 256) if case.double else 32 / 64)
    dense = 2 * (2 * MISTRAL_7B.vocab_size * MISTRAL_7B.hidden_size)
    return int(linear * bits / 8 / (case.mesh[1] * case.mesh[2]) + dense + 6_815_744 * 4 * 3)


def main(args: Args) -> None:
    rows = {}
    print(f"{'configuration':24} {'arguments':>9} {'temporary':>9} {'total GiB':>9} {'floor':>6} {'limit':>6} {'s':>4}")
    for name in args.only:
        case = CASES[name]
        found = compile_case(case)
        total = found["arguments"] + found["temporaries"] + found["outputs"]
        rows[name] = found | {"total": total, "floor": floor_bytes(case), "limit": case.limit}
        gib = [f"{x / GIB:9.2f}" for x in (found["arguments"], found["temporaries"], total)]
        print(f"{name:24} {' '.join(gib)} {floor_bytes(case) / GIB:6.2f} {case.limit or 0:6.2f} {found['seconds']:4}")
        gathers, decoded = (", ".join(found[key]) or "none" for key in ("all_gathers", "decoded"))
        print(f"  all-gathers: {gathers}; decoded weights in memory: {decoded}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""Ten training steps of a small model on some meshes; prints the losses as JSON. Run by tests/test_sharding.py.

    python -m tests.support.sharded_losses FOLDER WEIGHTS DEVICES MESH...      # MESH: data,fsdp,tensor

DEVICES are this process's; with COORDINATOR, PROCESSES and PROCESS in the environment there are several processes.
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import optax
from flax import nnx

from lora import model as decoder
from lora.linear import TARGETS, LoRAConfig, LoRAParam
from lora.load import load_model
from lora.sharding import join_processes, make_mesh, to_host
from lora.train_step import Batch, initial_state, make_update, shard_rows
from train_pg import objective

B, L = 8, 48


def losses(folder: str, weights: str, shape: tuple[int, int, int]) -> list[float]:
    """The loss a token of ten steps on the same eight packed rows."""
    mesh = make_mesh(shape)
    lora = LoRAConfig(rank=4, alpha=12.0, targets=TARGETS)
    model = load_model(folder, weights=weights, lora=lora, seed=1, mesh=mesh)
    graph, adapter, frozen = nnx.split(model, LoRAParam, ...)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    update = make_update(objective, graph, optimizer, mesh, adapter, frozen)
    state = initial_state(optimizer, adapter, mesh)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (B, L)).astype(np.int32)
    segments = np.broadcast_to(1 + 2 * np.arange(L) // L, (B, L)).astype(np.int32)
    weights_BL = np.where(segments == 2, -0.5, 1.0).astype(np.float32)
    batch = shard_rows(Batch(ids=ids, segments=segments, weights=weights_BL), mesh, device_rows=1)
    found = []
    for _ in range(10):
        adapter, state, values = update(adapter, state, frozen, 3e-3, batch, np.float32(B * L), None)
        found.append(float(values[0]))
    assert all(np.isfinite(to_host(x)).all() for x in jax.tree.leaves(adapter))
    return found


if __name__ == "__main__":
    folder, weights, devices, *meshes = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(devices))
    join_processes()
    decoder.UNROLLED_LAYERS = 0  # a scan, as large models have it, compiles faster too
    print(json.dumps([losses(folder, weights, tuple(map(int, mesh.split(",")))) for mesh in meshes]))

"""The jitted optimizer step on a mesh: gradients are accumulated over microbatches and summed over devices.

    mesh = training_mesh((-1, 1, 1), batch_rows=8, device_rows=1)
    update = make_update(objective, graph, optimizer, mesh, adapter, frozen)
    state = initial_state(optimizer, adapter, mesh)
    adapter, state, metrics = update(adapter, state, frozen, rate, shard_rows(rows, mesh, 1), trajectories, key)

Left out: the loop and its checkpoints (trainer.py); the objective, rows, weights and learning rate (train_pg.py).
Shapes: S microbatches of B rows, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora.sharding import AXES, ROWS, make_mesh, partition_specs, require_shape


class Batch(NamedTuple):
    """Packed rows, [B, L] each: token ids, segments (0 = padding), weights."""

    ids: jax.Array
    segments: jax.Array
    weights: jax.Array


def shard_rows(rows: Batch, mesh: Mesh, device_rows: int) -> Batch:
    """Shards a step's rows [S * B, L] as microbatches [S, B, L], where each data shard holds `device_rows` of the B."""
    microbatch_rows = mesh.shape["data"] * mesh.shape["fsdp"] * device_rows
    sharding = NamedSharding(mesh, P(None, *ROWS))

    def shard(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, microbatch_rows, x.shape[-1])
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return Batch(ids=shard(rows.ids), segments=shard(rows.segments), weights=shard(rows.weights))


def training_mesh(shape: tuple[int, int, int], batch_rows: int, device_rows: int) -> Mesh:
    """A mesh of (data, fsdp, tensor) devices; a data axis of -1 becomes the largest that divides rows and devices.

    Raises ValueError if the mesh does not divide a step's rows or does not fit the devices.
    """
    require_shape(shape)
    data, fsdp, tensor = shape
    if data == -1:
        rows, devices = batch_rows // (device_rows * fsdp), jax.device_count() // (fsdp * tensor)
        data = max(1, math.gcd(rows, devices))
    microbatch_rows = data * fsdp * device_rows
    if batch_rows % microbatch_rows:
        raise ValueError(
            f"--batch-rows {batch_rows} is not a multiple of data x fsdp x --device-rows = {data} x {fsdp} x "
            f"{device_rows}: give a multiple of {microbatch_rows}."
        )
    return make_mesh((data, fsdp, tensor))


def make_update(
    objective: Callable, graph, optimizer: optax.GradientTransformation, mesh: Mesh, adapter, frozen
) -> Callable:
    """Builds the jitted step (adapter, state, frozen, rate, batch, trajectories, key) -> (adapter, state, metrics).

    `objective(model, batch, trajectories, key=...)` returns a value to maximise and two further sums; metrics are the
    loss, those sums and the norm of the gradient. `batch` is [S, B, L]: every device processes its share of the B rows
    for each microbatch in turn, and gradients are summed. Shardings are taken from `adapter` and `frozen`. The rate is
    an argument rather than part of the optimizer, since a schedule that differs by round would recompile the step.
    `key` is the random key of LoRA dropout, or None.
    """
    adapter_specs = partition_specs(adapter)

    def device_step(adapter, frozen, batch, trajectories, key):
        def loss(adapter, rows, index):
            if key is not None:
                index = index * jax.lax.axis_size(("data", "fsdp")) + jax.lax.axis_index(("data", "fsdp"))
            row_key = None if key is None else jax.random.fold_in(key, index)
            model = nnx.merge(graph, adapter, frozen)
            value, sums = objective(model, rows, trajectories, key=row_key)
            return -value, sums

        def add(total, rows_and_index):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss, has_aux=True)(adapter, *rows_and_index)), None

        zeros = ((0.0, (0.0, 0.0)), jax.tree.map(jnp.zeros_like, adapter))
        indices = jnp.arange(len(batch.ids))
        (sums, gradient), _ = jax.lax.scan(add, jax.tree.map(jnp.asarray, zeros), (batch, indices))

        def sum_replicas(gradient, spec):
            """Sums over the devices that hold the same shard of an adapter and a part of its gradient each."""
            return jax.lax.psum(gradient, tuple(axis for axis in AXES if axis not in spec))

        return jax.lax.psum(sums, ("data", "fsdp")), jax.tree.map(sum_replicas, gradient, adapter_specs)

    # check_vma would insert further psums into the gradient of replicated arrays; ours are explicit.
    batch_step = jax.shard_map(
        device_step,
        mesh=mesh,
        in_specs=(adapter_specs, partition_specs(frozen), P(None, *ROWS), P(), P()),
        out_specs=(P(), adapter_specs),
        check_vma=False,
    )

    @jax.jit
    def update(adapter, state, frozen, rate, batch, trajectories, key):
        (value, sums), gradient = batch_step(adapter, frozen, batch, trajectories, key)
        updates, state = optimizer.update(gradient, state, adapter)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return optax.apply_updates(adapter, updates), state, (value, *sums, optax.tree.norm(gradient))

    return update


def optimizer_shardings(optimizer: optax.GradientTransformation, adapter, mesh: Mesh):
    """Shardings of the optimizer state: each moment is sharded like its parameter."""
    shardings = jax.tree.map(lambda x: x.sharding, adapter)
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, adapter),
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )


def initial_state(optimizer: optax.GradientTransformation, adapter, mesh: Mesh):
    """The sharded optimizer state before the first step."""
    return jax.jit(optimizer.init, out_shardings=optimizer_shardings(optimizer, adapter, mesh))(adapter)

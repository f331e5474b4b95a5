"""The jitted optimizer step on a mesh: gradients are accumulated over microbatches and summed over devices.

    update = make_update(objective, graph, optimizer, mesh, adapter, frozen)
    adapter, state, metrics = update(adapter, state, frozen, rate, shard_rows(rows, mesh, 1), trajectories, key)

Left out: which rows, which weights, the schedule (train_pg.py).
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

from lora.sharding import AXES, ROWS, make_mesh, partition_specs


class Batch(NamedTuple):
    """Packed rows, [B, L] each: token ids, segments (0 = padding), weights."""

    ids: jax.Array
    segments: jax.Array
    weights: jax.Array


def shard_rows(rows: Batch, mesh: Mesh, device_rows: int) -> Batch:
    """Rows [S * B, L] of a step as microbatches [S, B, L] on the mesh; B is `device_rows` on every data shard."""
    at_once = mesh.shape["data"] * mesh.shape["fsdp"] * device_rows
    sharding = NamedSharding(mesh, P(None, *ROWS))
    microbatches = (x.reshape(-1, at_once, x.shape[-1]) for x in rows)
    return Batch(*(jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index]) for x in microbatches))


def training_mesh(shape: tuple[int, int, int], batch_rows: int, device_rows: int) -> Mesh:
    """A mesh of (data, fsdp, tensor) devices; a data axis of -1 becomes as many as divide the rows of a step.

    Raises ValueError if the devices, or the rows of a step, cannot be divided so.
    """
    data, fsdp, tensor = shape
    if data == -1:
        rows, devices = batch_rows // (device_rows * fsdp), jax.device_count() // (fsdp * tensor)
        data = max(1, math.gcd(rows, devices))
    at_once = data * fsdp * device_rows
    if batch_rows % at_once:
        raise ValueError(
            f"--batch-rows {batch_rows} is no multiple of data x fsdp x --device-rows = {data} x {fsdp} x "
            f"{device_rows}: give a multiple of {at_once}."
        )
    return make_mesh((data, fsdp, tensor))


def make_update(
    objective: Callable, graph, optimizer: optax.GradientTransformation, mesh: Mesh, adapter, frozen
) -> Callable:
    """The jitted step: (adapter, state, frozen, rate, batch, trajectories, key) -> (adapter, state, metrics).

    `objective(model, batch, trajectories, key=...)` returns a value to maximise and two further sums; metrics are the
    loss, those sums and the norm of the gradient. `batch` is [S, B, L]: every device takes its share of the B rows, one
    S after the other, and the gradients are summed. `adapter` and `frozen` tell their shardings. The rate is an
    argument, not part of the optimizer: the schedule differs from round to round and would recompile the step. `key`
    is that of LoRA dropout, or None.
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

        nothing = ((0.0, (0.0, 0.0)), jax.tree.map(jnp.zeros_like, adapter))
        indices = jnp.arange(len(batch.ids))
        (sums, gradient), _ = jax.lax.scan(add, jax.tree.map(jnp.asarray, nothing), (batch, indices))

        def over_devices(gradient, spec):
            """Devices that hold the same shard of an adapter each have a part of its gradient."""
            return jax.lax.psum(gradient, tuple(axis for axis in AXES if axis not in spec))

        return jax.lax.psum(sums, ("data", "fsdp")), jax.tree.map(over_devices, gradient, adapter_specs)

    # check_vma would add psums of its own to the gradient of shared arrays; here they are explicit.
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
    """The optimizer state before the first step."""
    return jax.jit(optimizer.init, out_shardings=optimizer_shardings(optimizer, adapter, mesh))(adapter)

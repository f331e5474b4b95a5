"""The training mesh: batch rows are sharded over `data` and `fsdp`, the base over `fsdp` and `tensor`.

The training step is one program that every device runs on its own shards (`jax.shard_map`). Along `fsdp` a device holds
a shard of each linear layer's out-features and gathers the rest just before use, as 4-bit codes rather than decoded
weights. Along `tensor` it computes its share of each layer (its heads, its feed-forward units), and the results are
summed (Megatron-LM, arXiv 1909.08053). Outside a mesh the same functions are no-ops.
Left out: sharding of the embeddings and the head, which every device holds in full; expert, sequence and pipeline axes.

    mesh = make_mesh((1, 4, 2))                       # data, fsdp, tensor: 8 devices
    model = load_model(folder, weights="nf4", mesh=mesh)

Shapes: N layers, O out-features, I in-features, G NF4 blocks in a weight row, M blocks of absmax, R LoRA rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))  # sharding of batch rows
CPU_DEVICES = 64  # at most; more would only wait for each other
FAILED, FOREVER = "failed", 2**31 - 1  # directory of the errors that end all processes; milliseconds


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of (data, fsdp, tensor) devices; one axis may be -1, which takes all remaining devices.

    Raises ValueError if the shape needs more devices than exist, or would leave a process without one.
    """
    require_shape(shape)
    devices = jax.devices() if devices is None else devices
    known = math.prod(size for size in shape if size != -1)
    sizes = [max(1, len(devices) // known) if size == -1 else size for size in shape]
    count = math.prod(sizes)
    if count > len(devices):
        raise ValueError(
            f"a mesh of {' x '.join(map(str, shape))} ({' x '.join(AXES)}) needs {count} devices, found "
            f"{len(devices)}. Give three numbers whose product is at most that."
        )
    idle = {device.process_index for device in devices} - {device.process_index for device in devices[:count]}
    if idle:
        raise ValueError(
            f"a mesh of {' x '.join(map(str, sizes))} uses {count} of {len(devices)} devices and leaves processes "
            f"{sorted(idle)} without one. Make the mesh larger (--batch-rows limits the data axis), or start fewer."
        )
    return Mesh(np.array(devices[:count]).reshape(sizes), AXES)


def require_shape(shape: Sequence[int]) -> None:
    """Raises ValueError unless these are three numbers of devices, of which one may be -1."""
    if len(shape) != len(AXES) or list(shape).count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ValueError(
            f"--mesh {' '.join(map(str, shape))}: expected the devices along {', '.join(AXES)}, each at least 1, or "
            "one of them -1 for all that remain."
        )


def join_processes() -> int:
    """Joins the processes that the environment names, so that several hosts form one mesh. Call before using JAX.

    COORDINATOR is host:port of the first process, PROCESSES the number of processes and PROCESS this one's index, from
    0; or COORDINATOR=auto where JAX discovers them (TPU pods, Slurm). Without COORDINATOR, runs as a single process.
    Returns PROCESSES, or 1 if COORDINATOR is unset or auto.
    """
    coordinator = os.environ.get("COORDINATOR")
    if coordinator == "auto":
        jax.distributed.initialize()
    elif coordinator:
        missing = [name for name in ("PROCESSES", "PROCESS") if not os.environ.get(name, "").isdigit()]
        if missing:
            raise ValueError(f"COORDINATOR={coordinator} needs {' and '.join(missing)} too, as numbers.")
        jax.distributed.initialize(coordinator, int(os.environ["PROCESSES"]), int(os.environ["PROCESS"]))
        return int(os.environ["PROCESSES"])
    return 1


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """If this process fails, ends the others, which would wait for it, with its error and exit status 1."""
    client = distributed.global_state.client  # private, but what multihost_utils itself uses; JAX has no other way
    if client is None:
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_end_with_others, args=[client, ended], daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        ended.set()
        watch.join()  # it would find this error
        with contextlib.suppress(RuntimeError):  # the coordinator may be gone; the error itself matters more
            client.key_value_set(f"{FAILED}/{distributed.global_state.process_id}", str(error))
        raise
    finally:
        ended.set()
        watch.join()


def _end_with_others(client, ended: threading.Event) -> None:
    """Looks every second, in a thread, for the error of another process, until this one has ended."""
    while not ended.wait(1):
        if errors := client.key_value_dir_get(FAILED):
            print(f"another process failed, so this one ends: {errors[0][1]}", file=sys.stderr, flush=True)
            client.shutdown()  # which the failed process waits for
            os._exit(1)


def play_together(main: Callable[[Any], Any], args: Any) -> None:
    """main(args), as a shard (artifacts/shards.py) where the environment names several processes: each plays its share
    on its own devices, and waits until the last has joined them all."""
    join_processes()
    client = distributed.global_state.client
    with ending_together():
        if client is None:
            main(args)
        elif args.shard:
            raise ValueError(f"--shard is {args.shard}, but each process of COORDINATOR takes its own; leave one out")
        else:
            main(dataclasses.replace(args, shard=f"{jax.process_index() + 1}/{jax.process_count()}"))
            client.wait_at_barrier("joined", FOREVER)


def start_devices(rows: int, fitting: int) -> None:
    """Joins the other processes, if any, and splits a CPU into one device for each of so many rows, as far as its
    memory goes: `fitting` devices have room for a copy of the base each."""
    jax.config.update("jax_num_cpu_devices", max(1, min(CPU_DEVICES, rows // join_processes(), fitting)))


def is_first_process() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


# ---- inside the step -------------------------------------------------------------------------------------------------


def axis_size(axis: str) -> int:
    """The size of a mesh axis in the program being traced; 1 outside a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def gather(x: jax.Array) -> jax.Array:
    """All-gathers an array whose first axis is sharded over `fsdp`."""
    return x if axis_size("fsdp") == 1 else jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)


def local_shard(x: jax.Array, size: int, axis: int) -> jax.Array:
    """This device's slice, of length `size`, of an axis to be split over `tensor`; all of it if it is no longer."""
    if x.shape[axis] == size:
        return x
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("tensor") * size, size, axis)


@jax.custom_vjp
def copy_to_tensor_parallel(x: jax.Array) -> jax.Array:
    """x, replicated along `tensor`, as input to sharded computation: identity forward, gradients summed backward."""
    return x


@jax.custom_vjp
def reduce_from_tensor_parallel(x: jax.Array) -> jax.Array:
    """The sum over `tensor` of each device's partial result: all-reduce forward, identity backward."""
    return _sum(x)


def _sum(x: jax.Array) -> jax.Array:
    return x if axis_size("tensor") == 1 else jax.lax.psum(x, "tensor")


copy_to_tensor_parallel.defvjp(lambda x: (x, None), lambda _, dy: (_sum(dy),))
reduce_from_tensor_parallel.defvjp(lambda x: (_sum(x), None), lambda _, dy: (dy,))


# ---- shardings of arrays ---------------------------------------------------------------------------------------------

# Layers that shard out-features over `tensor`; the others shard in-features and sum the partial results.
COLUMN = ("qkv", "gate_up")
# Field of a linear layer (linear.py) -> its axis of out-features (or their blocks), its axis of in-features.
FIELDS = {
    "weight": (1, 2),
    "bias": (1, None),
    "codes": (1, 2),
    "absmax": (1, 2),
    "absmax_codes": (1, None),
    "nested": (1, None),
    "offset": (1, None),
    "a": (None, 2),
    "b": (1, None),
}


def partition_spec(layer: str, field: str) -> P:
    """The PartitionSpec of a field [N, ...] of a linear layer ("qkv", "o", "gate_up", "down").

    Biases and adapters, which are small, are not sharded along `fsdp`. Double-quantisation statistics span whole weight
    rows, so layers that shard in-features hold all of them and slice what they need.
    """
    out_axis, in_axis = FIELDS[field]
    axes: list = [None, None, None]
    if field in ("b", "bias"):
        axes[1] = "tensor" if layer in COLUMN else None
    elif out_axis is not None:
        axes[out_axis] = ("tensor", "fsdp") if layer in COLUMN else "fsdp"
    if in_axis is not None and layer not in COLUMN:
        axes[in_axis] = "tensor"
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def fused_order(rows: Sequence[int], devices: int) -> np.ndarray:
    """The order of the rows of fused weights (q|k|v) that gives each of `devices` shards its part of every weight."""
    starts = np.cumsum([0, *rows[:-1]])
    return np.concatenate(
        [
            np.arange(start + device * count // devices, start + (device + 1) * count // devices)
            for device in range(devices)
            for start, count in zip(starts, rows, strict=True)
        ]
    )


def put(array: np.ndarray, mesh: Mesh | None, spec: P, name: str) -> jax.Array:
    """Puts a host array on a mesh, one shard per device, or without a mesh unsharded on the default device.

    Raises ValueError, naming the array, if an axis is not divisible.
    """
    if mesh is None:
        return jax.numpy.asarray(array)
    check_divisible(name, array.shape, spec, mesh.shape)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def partition_specs(tree):
    """The PartitionSpec of every array in a tree that is on a mesh."""
    return jax.tree.map(lambda x: x.sharding.spec, tree)


def to_host(array: jax.Array) -> np.ndarray:
    """Collects an array from all devices and processes. Every process must call it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def check_divisible(name: str, shape: Sequence[int], spec: P, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless every axis of the array divides evenly over its mesh axes."""
    for size, axes in zip(shape, spec, strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        parts = int(np.prod([sizes[axis] for axis in axes]))
        if size % parts:
            raise ValueError(
                f"{name} of shape {tuple(shape)} cannot be sharded over {' x '.join(f'{a}={sizes[a]}' for a in axes)}: "
                f"{size} is not a multiple of {parts}. Choose mesh axes that divide it."
            )

"""One mesh for training: rows of the batch over `data` and `fsdp`, the base over `fsdp` and `tensor`.

The training step is one program that every device runs on its own shards (`jax.shard_map`). Along `fsdp` a device holds
a part of each linear layer's out-features and gathers the others just before it needs them: 4-bit codes, not decoded
weights. Along `tensor` it computes its own part of each layer (its heads, its feed-forward units) and adds what it gets
to the others' (Megatron-LM, arXiv 1909.08053). Outside of a mesh the same functions do nothing.
Left out: embeddings and head are held whole by every device; expert, sequence and pipeline axes.

    mesh = make_mesh((1, 4, 2))                       # data, fsdp, tensor: 8 devices
    model = load_model(folder, weights="nf4", mesh=mesh)

Shapes: N layers, O out-features, I in-features, G NF4 blocks of an in-row, M blocks of absmax, R LoRA rank.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))  # of a batch


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of (data, fsdp, tensor) devices; one number may be -1: as many as there are left.

    Raises ValueError if there are not as many devices as the shape says, or if a process would have none of them.
    """
    devices = jax.devices() if devices is None else devices
    known = int(np.prod([size for size in shape if size != -1]))
    filled = [max(1, len(devices) // known) if size == -1 else size for size in shape]
    count = int(np.prod(filled))
    if len(filled) != len(AXES) or min(filled) < 1 or count > len(devices):
        raise ValueError(
            f"a mesh of {' x '.join(map(str, shape))} ({' x '.join(AXES)}) needs {count} devices, found "
            f"{len(devices)}: give three numbers whose product is at most that."
        )
    idle = {device.process_index for device in devices} - {device.process_index for device in devices[:count]}
    if idle:
        raise ValueError(
            f"a mesh of {' x '.join(map(str, filled))} takes {count} of {len(devices)} devices and leaves processes "
            f"{sorted(idle)} without one: make the mesh larger (--batch-rows sets how far data can go), or start fewer."
        )
    return Mesh(np.array(devices[:count]).reshape(filled), AXES)


def join_processes() -> int:
    """Joins the processes that the environment names, before JAX is used: several hosts then are one mesh.

    COORDINATOR=host:port of the first process, PROCESSES their number, PROCESS this one's, from 0; or COORDINATOR=auto
    where JAX finds them by itself (TPU pods, Slurm). Without COORDINATOR there is one process. Returns PROCESSES, or 1
    where that is not given.
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


def is_first_process() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


# ---- inside the step -------------------------------------------------------------------------------------------------


def axis_size(axis: str) -> int:
    """The size of a mesh axis in the program that is being traced; 1 outside of a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def gather(x: jax.Array) -> jax.Array:
    """All of an array whose first axis is spread over `fsdp`."""
    return x if axis_size("fsdp") == 1 else jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)


def local_shard(x: jax.Array, size: int, axis: int) -> jax.Array:
    """This device's `size` places of an axis that is spread over `tensor`; all of it if it has no more."""
    if x.shape[axis] == size:
        return x
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("tensor") * size, size, axis)


@jax.custom_vjp
def copy_to_tensor_parallel(x: jax.Array) -> jax.Array:
    """x, which every device along `tensor` has, before each computes something else of it: gradients are summed."""
    return x


@jax.custom_vjp
def reduce_from_tensor_parallel(x: jax.Array) -> jax.Array:
    """The sum over `tensor` of what each device has computed; the gradient of each is that of the sum."""
    return _sum(x)


def _sum(x: jax.Array) -> jax.Array:
    return x if axis_size("tensor") == 1 else jax.lax.psum(x, "tensor")


copy_to_tensor_parallel.defvjp(lambda x: (x, None), lambda _, dy: (_sum(dy),))
reduce_from_tensor_parallel.defvjp(lambda x: (_sum(x), None), lambda _, dy: (dy,))


# ---- where arrays lie ------------------------------------------------------------------------------------------------

# Layers that split their out-features over `tensor`; the others split their in-features and add up.
COLUMN = ("qkv", "gate_up")
# The fields of a linear layer (lora/linear.py) -> the axis of out-features (or blocks of them), that of in-features.
FIELDS = {
    "weight": (1, 2),
    "codes": (1, 2),
    "absmax": (1, 2),
    "absmax_codes": (1, None),
    "nested": (1, None),
    "offset": (1, None),
    "a": (None, 2),
    "b": (1, None),
}


def partition_spec(layer: str, field: str) -> P:
    """How a field [N, ...] of a linear layer ("qkv", "o", "gate_up", "down") lies on the mesh.

    Adapters are whole along `fsdp`, as their gradients and optimizer state are small. The statistics of double
    quantisation run over whole in-rows, so layers that split in-features have all of them and take their part.
    """
    out_axis, in_axis = FIELDS[field]
    axes: list = [None, None, None]
    if out_axis is not None and field != "b":
        axes[out_axis] = ("tensor", "fsdp") if layer in COLUMN else "fsdp"
    if field == "b" and layer in COLUMN:
        axes[1] = "tensor"
    if in_axis is not None and layer not in COLUMN:
        axes[in_axis] = "tensor"
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def fused_order(rows: Sequence[int], devices: int) -> np.ndarray:
    """The order of the rows of fused weights in which each of so many devices has its part of every weight: q|k|v."""
    starts = np.cumsum([0, *rows[:-1]])
    return np.concatenate(
        [
            np.arange(start + device * count // devices, start + (device + 1) * count // devices)
            for device in range(devices)
            for start, count in zip(starts, rows, strict=True)
        ]
    )


def put(array: np.ndarray, mesh: Mesh | None, spec: P, name: str) -> jax.Array:
    """A host array on the devices of a mesh, each its shard, or whole on the first device without a mesh.

    Raises ValueError, naming the array, if an axis cannot be divided.
    """
    if mesh is None:
        return jax.numpy.asarray(array)
    check_divisible(name, array.shape, spec, mesh.shape)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def partition_specs(tree):
    """The PartitionSpec of every array of a tree that lies on a mesh."""
    return jax.tree.map(lambda x: x.sharding.spec, tree)


def to_host(array: jax.Array) -> np.ndarray:
    """All of an array, whichever devices and processes hold its parts. All processes must call it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def check_divisible(name: str, shape: Sequence[int], spec: P, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless every axis of the array can be cut into as many equal parts as its mesh axes have."""
    for size, axes in zip(shape, spec, strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        parts = int(np.prod([sizes[axis] for axis in axes]))
        if size % parts:
            raise ValueError(
                f"{name} of shape {tuple(shape)} cannot be spread over {' x '.join(f'{a}={sizes[a]}' for a in axes)}: "
                f"{size} is no multiple of {parts}. Choose mesh axes that divide it."
            )

"""Loads base models into JAX and saves dense ones.

Tensors are read one at a time, quantised on the host if NF4 is wanted, and sharded over the mesh if there is one.

    model = load_model("models/tiny-alfworld", weights="nf4", lora=LoRAConfig(rank=16, alpha=32.0, targets=("q", "v")))
    model = load_adapter("models/tiny-alfworld", "runs/a3t/round_0/train_pg/adapter", weights="nf4")
    save_model(model, "models/mine")                # dense weights without an adapter only

Left out: saving adapters (adapter.py), writing NF4 or merged folders (convert.py).
Shapes: N layers, O out-features, G NF4 blocks of an in-row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lora import nf4
from lora.adapter import add_adapters, fresh_adapter, read_adapter, require_rank
from lora.checkpoint import EMBEDDINGS, HEAD, Checkpoint, layer_tensor, write_checkpoint
from lora.linear import FUSED, NF4, LoRAConfig
from lora.model import CausalLM
from lora.sharding import COLUMN, fused_order, partition_spec, put

Weights = Literal["nf4", "nf4-dq", "bf16", "fp32"]

DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}


def load_model(
    base: str | Path | Checkpoint,
    *,
    weights: Weights = "nf4",
    lora: LoRAConfig | None = None,
    seed: int = 0,
    dtype=None,
    mesh: Mesh | None = None,
) -> CausalLM:
    """Loads a model from a folder or an open Checkpoint; embeddings, head, biases and norms are never quantised.

    `weights`: form of the linear layers, "nf4" (blocks of 64), "nf4-dq" (double-quantised), "bf16" or "fp32". `dtype`:
    dtype of activations and unquantised weights; None means bfloat16 for "bf16", else float32. `lora` adds new adapters
    drawn from `seed`. On a `mesh` each device gets its shard. Raises ValueError for missing, unexpected or misshapen
    tensors and values that are not finite, for a layer whose width is not a multiple of NF4's block of 64 or that the
    mesh cannot divide, and for adapters of a rank beyond all sense.
    """
    if weights not in ("nf4", "nf4-dq", "bf16", "fp32"):
        raise ValueError(f"load_model got weights={weights!r}, expected 'nf4', 'nf4-dq', 'bf16' or 'fp32'.")
    dense_dtype = {"bf16": jnp.bfloat16, "fp32": jnp.float32}.get(weights)
    dtype = np.dtype(dtype or dense_dtype or jnp.float32)
    if dense_dtype not in (None, dtype):
        raise ValueError(f"load_model got weights={weights!r} with dtype {dtype}; give only one of them.")
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint(base)
    config = checkpoint.config
    if lora is not None:
        require_rank(config, lora)
    model = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))

    def replicated(name: str) -> nnx.Param:
        return nnx.Param(put(checkpoint.dense(name, dtype), mesh, P(), name))

    def stacked(ours: str, kind: str = "weight") -> np.ndarray:
        names = (layer_tensor(layer, ours, kind) for layer in range(config.num_hidden_layers))
        return np.stack([checkpoint.dense(name, dtype) for name in names])

    model.embed, model.norm = replicated(EMBEDDINGS), replicated("model.norm.weight")
    if not config.tie_word_embeddings:
        model.head = replicated(HEAD)
    for ours in config.norms:
        setattr(model.layers, ours, nnx.Param(put(stacked(ours), mesh, P(), ours)))
    for name, parts in FUSED.items():
        linear = getattr(model.layers, name)
        for part in linear.bias:
            array = put(stacked(part, "bias"), mesh, partition_spec(name, "bias"), f"{part}.bias")
            linear.bias[part] = nnx.Param(array)
        if weights.startswith("nf4"):
            check_width(checkpoint.folder, name, linear.inputs)
            linear.quantize(read_nf4(checkpoint, name, weights == "nf4-dq", mesh))
        else:
            for part in parts:
                array = put(stacked(part), mesh, partition_spec(name, "weight"), part)
                linear.weight[part] = nnx.Param(array)
    if lora is not None:
        add_adapters(model, lora, fresh_adapter(config, lora, seed), mesh)
    return model


def load_adapter(
    base: str | Path | Checkpoint,
    adapter_dir: str | Path,
    weights: Weights = "nf4",
    *,
    dtype=None,
    mesh: Mesh | None = None,
) -> CausalLM:
    """Loads a base (see `load_model`) with an adapter in PEFT's layout (see `read_adapter`)."""
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint(base)
    lora, adapter = read_adapter(checkpoint, adapter_dir)
    model = load_model(checkpoint, weights=weights, dtype=dtype, mesh=mesh)
    add_adapters(model, lora, adapter, mesh)
    return model


def check_width(model_dir: str | Path, name: str, inputs: int) -> None:
    if inputs % nf4.BLOCK:
        raise ValueError(
            f"{model_dir}: layer {name!r} has {inputs} inputs, but NF4 needs a multiple of {nf4.BLOCK}: change the "
            "model's sizes, or load it with weights='fp32'."
        )


def read_nf4(checkpoint: Checkpoint, name: str, double: bool, mesh: Mesh | None) -> NF4:
    """The NF4 weights of one fused linear layer for all decoder layers, on the device or sharded over the mesh.

    Host memory: the layer's packed codes, plus the largest tensor while it is being quantised.
    """
    parts, layers = FUSED[name], checkpoint.config.num_hidden_layers
    rows = [checkpoint.shapes[layer_tensor(0, part)][0] for part in parts]
    arrays: list[np.ndarray] = []
    for layer in range(layers):
        stored = [checkpoint.nf4(layer_tensor(layer, part), double) for part in parts]
        if double:  # fused tensors have different means, so every absmax block stores its own
            stored = [s._replace(offset=np.full(len(s.nested), s.offset, np.float32)) for s in stored]
        fused = [np.concatenate(field) for field in zip(*stored, strict=True) if field[0] is not None]
        arrays = arrays or [np.empty((layers, *array.shape), array.dtype) for array in fused]
        for array, part in zip(arrays, fused, strict=True):
            array[layer] = part
    devices = mesh.shape["tensor"] if mesh is not None and name in COLUMN else 1
    if devices > 1:  # reorder so that each device's rows of all parts, and their absmax blocks, are contiguous
        orders = [fused_order(rows, devices)] * 2
        if double:
            groups = arrays[0].shape[2]
            if any(count * groups % (devices * nf4.NESTED_BLOCK) for count in rows):
                raise ValueError(
                    f"{name}: {' and '.join(map(str, rows))} rows of {groups} blocks cannot be double-quantised on "
                    f"tensor={devices}: its blocks of {nf4.NESTED_BLOCK} absmax would be cut. Use weights='nf4'."
                )
            orders = orders[:1] + [fused_order([n * groups // nf4.NESTED_BLOCK for n in rows], devices)] * 3
        arrays = [array[:, order] for array, order in zip(arrays, orders, strict=True)]
    packed, *statistics = arrays
    fields = ("absmax_codes", "nested", "offset") if double else ("absmax",)
    codes = to_uint4(put(packed, mesh, partition_spec(name, "codes"), f"{name}.codes"))
    sharded = zip(fields, statistics, strict=True)
    sharded = {field: put(array, mesh, partition_spec(name, field), f"{name}.{field}") for field, array in sharded}
    return NF4(codes=codes, absmax=sharded.pop("absmax", None), **sharded)


@jax.jit
def to_uint4(packed: jax.Array) -> jax.Array:
    """Unpacks uint8 [N, O, G, 32] into uint4 codes [N, O, G, 64]."""
    halves = packed[..., None] >> jnp.array([4, 0], jnp.uint8) & 15
    return halves.astype(jnp.uint4).reshape(*packed.shape[:-1], -1)


def save_model(model: CausalLM, model_dir: str | Path) -> None:
    """Writes `config.json` and float32 `model.safetensors` for `AutoModelForCausalLM.from_pretrained`.

    Raises ValueError for a model with NF4 weights or an adapter, which would be lost.
    """
    for name in FUSED:
        linear = getattr(model.layers, name)
        if linear.quantized or linear.a:
            raise ValueError(f"save_model got a quantised or adapted {name!r}, expected dense weights only.")
    tensors = {EMBEDDINGS: model.embed, "model.norm.weight": model.norm}
    tensors |= {} if model.head is None else {HEAD: model.head}
    layers = [(name, getattr(model.layers, name)) for name in FUSED]
    stacks = {(part, "weight"): x for _, linear in layers for part, x in linear.weight.items()}
    stacks |= {(part, "bias"): x for _, linear in layers for part, x in linear.bias.items()}
    stacks |= {(norm, "weight"): getattr(model.layers, norm) for norm in model.config.norms}
    tensors |= {layer_tensor(i, *ours): x[i] for ours, x in stacks.items() for i in range(len(x))}
    arrays = ((name, np.asarray(array[...], np.float32)) for name, array in tensors.items())
    write_checkpoint(model_dir, arrays, model.config.to_json())

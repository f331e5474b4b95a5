"""Linear layers, dense or NF4, with LoRA adapters: y = x W^T + bias + alpha/r (x A^T) B^T.

Projections that share an input are fused (q|k|v, gate|up); fusing leaves the quantised bits unchanged, and each part
keeps its own adapter. Weights use the [out, in] layout of Hugging Face files, A [r, in] and B [out, r] that of PEFT. An
NF4 base (`Quantized`) is always frozen; a dense base is frozen by giving the optimizer only `LoRAParam`.
Left out: scales that differ between layers (adapter.py folds them into B).

Shapes: N layers, O out-features, I in-features, R LoRA rank, G NF4 blocks in a weight row, M blocks of absmax; "..." is
rows of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora import nf4
from lora.sharding import gather, local_shard

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# The linear layers of a decoder layer and the parts fused into each.
FUSED = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Rank and alpha of the adapters, and the projections that get one (A3T: r 16, alpha 32 on q and v).

    `dropout` is the dropout rate of the adapters' inputs, applied in training only (when a key is given).
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0

    def __post_init__(self):
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets or self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"LoRAConfig got rank {self.rank}, targets {self.targets} and dropout {self.dropout}; expected a rank "
                f"of at least 1, at least one target among {TARGETS} and a dropout from 0 to below 1."
            )


class LoRAParam(nnx.Param):
    """A or B of an adapter: the trainable parameters when the base is frozen."""


class Quantized(nnx.Variable):
    """Codes or absmax of a frozen NF4 weight."""


class NF4(NamedTuple):
    """A weight in NF4: codes uint4 [O, G, 64] and absmax float32 [O, G].

    Double-quantised, absmax is None, absmax_codes is uint8 [M, 256], nested and offset are float32 [M]. Arrays stacked
    over layers have a leading N.
    """

    codes: jax.Array
    absmax: jax.Array | None
    absmax_codes: jax.Array | None = None
    nested: jax.Array | None = None
    offset: jax.Array | None = None


@jax.custom_vjp
def dense_matmul(x, weight):
    """x W^T for x [..., I] and W [O, I]."""
    return x @ weight.T


def _dense_forward(x, weight):
    return dense_matmul(x, weight), (x, weight)


def _dense_backward(residuals, dy):
    x, weight = residuals
    # Without the barrier XLA:CPU fuses the transpose of dy into the producer of dy and runs a third slower.
    dy = jax.lax.optimization_barrier(dy)
    return dy @ weight, jnp.einsum("...o,...i->oi", dy, x)


dense_matmul.defvjp(_dense_forward, _dense_backward)


def all_gather_base(base: NF4, rows: tuple[int, ...], groups: int) -> tuple[jax.Array, jax.Array]:
    """Codes [O, G, 64] and absmax [O, G] of an NF4 base whose parts have `rows` out-features of `groups` blocks each.

    On a mesh, `base` is this device's shard: the codes, not the decoded weight, are gathered along `fsdp`, and the
    result stays sharded along `tensor`.
    """
    base = jax.tree.map(gather, base)
    absmax = base.absmax
    if absmax is None:
        share = sum(rows) // len(base.codes)  # devices along `tensor`, if out-features are sharded
        local = [count // share for count in rows]
        absmax = nf4.decode_absmax(base.absmax_codes, base.nested, base.offset, local, groups)
        absmax = local_shard(absmax, base.codes.shape[1], axis=1)
    return base.codes, absmax


def decode_weight(codes: jax.Array, absmax: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Materialises the weight [O, I]: on a CPU faster than decoding into the layout that the matmul would choose."""
    return jax.lax.optimization_barrier(nf4.dequantize(codes, absmax, dtype).reshape(len(codes), -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def nf4_matmul(x, base, rows, groups):
    """x W^T for x [..., I] and a frozen W in NF4 (see `all_gather_base`).

    The backward pass decodes W again: decoded weights as residuals would keep the whole base in full precision. On a
    TPU W is never materialised: the matmul keeps the block axis, the only form into which XLA fuses the decoding.
    """

    def by_block(x, codes, absmax):
        x_GK = x.reshape(*x.shape[:-1], *codes.shape[1:])
        return jnp.einsum("...gk,ogk->...o", x_GK, nf4.dequantize(codes, absmax, x.dtype))

    def plain(x, codes, absmax):
        return x @ decode_weight(codes, absmax, x.dtype).T

    return jax.lax.platform_dependent(x, *all_gather_base(base, rows, groups), tpu=by_block, default=plain)


def _nf4_forward(x, base, rows, groups):
    return nf4_matmul(x, base, rows, groups), base


def _nf4_backward(rows, groups, base, dy):
    # Remat recomputes the forward matmul here: without the barrier XLA would decode once for both and keep the weight.
    base, dy = jax.lax.optimization_barrier((base, dy))

    def by_block(dy, codes, absmax):
        weight_OGK = nf4.dequantize(codes, absmax, dy.dtype)
        dx_GTK = jnp.einsum("to,ogk->gtk", dy.reshape(-1, dy.shape[-1]), weight_OGK)
        return jax.lax.optimization_barrier(dx_GTK).swapaxes(0, 1).reshape(*dy.shape[:-1], -1)

    def plain(dy, codes, absmax):
        return dy @ decode_weight(codes, absmax, dy.dtype)

    return jax.lax.platform_dependent(dy, *all_gather_base(base, rows, groups), tpu=by_block, default=plain), None


nf4_matmul.defvjp(_nf4_forward, _nf4_backward)


def adapter_matmul(x, a, b, scale):
    """scale (x A^T) B^T [..., O] in the dtype of x."""
    return (x @ a.T.astype(x.dtype)) @ (scale * b).T.astype(x.dtype)


class Linear(nnx.Module):
    """One (fused) linear layer of all decoder layers: arrays are [N, ...], or without N inside the scan over layers.

    Starts dense and trainable, with one weight per part ({"q": O, "k": O, ...}). `quantize` replaces the weights by
    NF4; `add_adapter` adds A and B to a part. The parts in `biased` have a bias [N, O], which is never quantised.
    """

    def __init__(
        self,
        layers: int,
        parts: dict[str, int],
        inputs: int,
        *,
        std: float,
        biased: Sequence[str] = (),
        rngs: nnx.Rngs,
    ):
        self.parts, self.rows, self.inputs = tuple(parts), tuple(parts.values()), inputs
        self.weight = nnx.Dict(
            {
                part: nnx.Param(std * rngs.params.normal((layers, rows, inputs), jnp.float32))
                for part, rows in parts.items()
            }
        )
        self.bias = nnx.Dict({part: nnx.Param(jnp.zeros((layers, parts[part]))) for part in biased})
        self.codes, self.absmax = nnx.data(None), nnx.data(None)
        self.absmax_codes, self.nested, self.offset = nnx.data(None), nnx.data(None), nnx.data(None)
        self.a, self.b = nnx.Dict(), nnx.Dict()
        self.scale = self.dropout = 0.0

    @property
    def quantized(self) -> bool:
        return self.codes is not None

    def quantize(self, base: NF4) -> None:
        """Replaces the weights by an NF4 base [N, ...], the parts concatenated."""
        self.weight = nnx.Dict()
        for field, array in base._asdict().items():
            setattr(self, field, nnx.data(None) if array is None else Quantized(array))

    def base(self) -> NF4:
        """The NF4 base."""
        fields = ((field, getattr(self, field)) for field in NF4._fields)
        return NF4(**{field: None if variable is None else variable[...] for field, variable in fields})

    def add_adapter(self, part: str, a: jax.Array, b: jax.Array, lora: LoRAConfig) -> None:
        """Adds A [N, R, I] and B [N, O, R] to a part."""
        self.a[part], self.b[part] = LoRAParam(a), LoRAParam(b)
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout

    def dense(self, dtype: jnp.dtype, *, merge: bool) -> Dense:
        """A copy for sampling of a single layer (arrays without N), with a dense base in `dtype`.

        With `merge` the adapters are merged into the base, else they stay separate.
        """
        holders = (self.weight, self.bias, self.a, self.b)
        weight, bias, a, b = ({part: x[...] for part, x in holder.items()} for holder in holders)
        base = self.base() if self.quantized else weight
        layer = Dense(merged_weight(base, a if merge else {}, b, self.scale, self.parts, self.rows, dtype), self)
        layer.bias = nnx.Dict({part: nnx.Param(array.astype(dtype)) for part, array in bias.items()})
        if not merge:
            layer.a, layer.b = self.a, self.b
        return layer

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> list[jax.Array]:
        """The output of each part for x [..., I]; with a key, the adapters see x after dropout."""
        if self.quantized:
            y = nf4_matmul(x, self.base(), self.rows, self.inputs // nf4.BLOCK)
            share = sum(self.rows) // y.shape[-1]
            out = split(y, [count // share for count in self.rows])
        else:
            out = [dense_matmul(x, gather(self.weight[part][...])) for part in self.parts]
        return add_bias_and_adapters(out, x, self, key)


def add_bias_and_adapters(out: list[jax.Array], x: jax.Array, layer: Linear | Dense, key: jax.Array | None = None):
    """Adds biases and the outputs of the adapters to `out`, x W^T for each part."""
    for index, part in enumerate(layer.parts):
        if part in layer.bias:
            out[index] += layer.bias[part][...]
        if part in layer.a:
            dropped = x if key is None else drop(x, layer.dropout, jax.random.fold_in(key, index))
            out[index] += adapter_matmul(dropped, layer.a[part][...], layer.b[part][...], layer.scale)
    return out


def split(x: jax.Array, sizes: Sequence[int], axis: int = -1) -> list[jax.Array]:
    """Splits an axis into parts of the given sizes."""
    return jnp.split(x, np.cumsum(sizes)[:-1], axis)


def drop(x: jax.Array, share: float, key: jax.Array) -> jax.Array:
    """Inverted dropout: zeroes a share of x at random and scales the rest to keep the mean."""
    return jnp.where(jax.random.bernoulli(key, 1 - share, x.shape), x / (1 - share), 0).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("parts", "rows", "dtype"))
def merged_weight(base, a, b, scale, parts, rows, dtype: jnp.dtype) -> jax.Array:
    """The fused weight for `tiled_matmul`, from an NF4 base or dense parts [O, I], with the given adapters merged."""
    if isinstance(base, NF4):
        weight_OGK = nf4.dequantize(*all_gather_base(base, rows, base.codes.shape[1]))
        weights = split(weight_OGK.reshape(len(weight_OGK), -1), rows, axis=0)
    else:
        weights = [base[part] for part in parts]
    weights = [w + scale * (b[part] @ a[part]) if part in a else w for part, w in zip(parts, weights, strict=True)]
    return tile_for_cpu(jnp.concatenate(weights).astype(dtype))


LARGE = 2**18  # elements of a weight from which tiling pays


@functools.cache
def tile_width() -> int:
    """Out-features per tile: two of the vector registers that XLA uses on this CPU.

    With AVX2, tiles twice as wide take nearly twice as long.
    """
    cpu = Path("/proc/cpuinfo")
    return 32 if cpu.exists() and "avx512f" in cpu.read_text() else 16


def tile_for_cpu(weight_OI: jax.Array) -> jax.Array:
    """Lays out a dense weight for `tiled_matmul`: W^T [I, O], or, if large and float32 on a CPU, tiles [T, I, O / T].

    XLA:CPU re-lays out W or W^T for every product with few rows, which takes longer than the product. It reads tiles in
    place, in one thread, and a row's bits do not depend on the number of rows (up to 128, the minimum of out-features
    here).
    """
    outputs, inputs = weight_OI.shape
    tiled = jax.default_backend() == "cpu" and weight_OI.dtype == jnp.float32 and weight_OI.size >= LARGE
    if not tiled or outputs % tile_width() or outputs < 128:
        return weight_OI.T
    return weight_OI.reshape(-1, tile_width(), inputs).swapaxes(1, 2)


def tiled_matmul(x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """x W^T [..., O] for x [..., I] and a weight from `tile_for_cpu`; accumulated and returned in `dtype`."""
    if weight.ndim == 2:
        return jnp.dot(x, weight, preferred_element_type=dtype)
    rows_RI = x.reshape(-1, x.shape[-1])
    rows_RI = jnp.pad(rows_RI, ((0, len(rows_RI) == 1), (0, 0)))  # XLA uses a slower kernel for a single row
    rows_RI = jax.lax.optimization_barrier(rows_RI)  # else the producer of x is recomputed for every tile
    out_RTC = (rows_RI[:, None, :, None] * weight).sum(axis=2)  # XLA turns this into a matmul
    return out_RTC.reshape(len(rows_RI), -1)[: math.prod(x.shape[:-1])].reshape(*x.shape[:-1], -1)


class Dense(nnx.Module):
    """A layer for sampling, built by `Linear.dense`; its base is laid out for matmuls with few rows."""

    def __init__(self, weight: jax.Array, source: Linear):
        self.weight, self.parts, self.rows = nnx.Variable(weight), source.parts, source.rows
        self.bias, self.a, self.b, self.scale = nnx.Dict(), nnx.Dict(), nnx.Dict(), source.scale

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> list[jax.Array]:
        """The output of each part; sampling applies no dropout, so `key` is ignored."""
        return add_bias_and_adapters(split(tiled_matmul(x, self.weight[...]), self.rows), x, self)

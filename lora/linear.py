"""Linear layers without bias, their NF4 form, and the LoRA adapter beside either: y = x W^T + alpha/r (x A^T) B^T.

Weights keep the [out, in] layout of Hugging Face files, A [r, in] and B [out, r] that of PEFT. The base is frozen when
it is NF4 (`Quantized`), and by choosing `LoRAParam` for the optimizer when it is dense.
Left out: LoRA dropout, rank-stabilised scaling.

Shapes: N layers, I in-features, O out-features, R LoRA rank, G NF4 blocks of an in-row; "..." is rows of tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lora import nf4

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Rank and alpha of the adapters, and the linear layers that get one (A3T: r 16, alpha 32 on q and v)."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q", "v")

    def __post_init__(self):
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets or self.rank < 1:
            raise ValueError(
                f"LoRAConfig got rank {self.rank} and targets {self.targets}; expected a rank of at least 1 and at "
                f"least one target among {TARGETS}."
            )


class LoRAParam(nnx.Param):
    """A or B of an adapter: what is trained when the base is frozen."""


class Quantized(nnx.Variable):
    """Codes or absmax of a frozen NF4 weight."""


@jax.custom_vjp
def dense_matmul(x, weight):
    """x W^T for x [..., I] and W [O, I]."""
    return x @ weight.T


def _dense_forward(x, weight):
    return dense_matmul(x, weight), (x, weight)


def _dense_backward(residuals, dy):
    x, weight = residuals
    # Without the barrier XLA:CPU fuses the transpose of dy into whatever made dy and runs a third slower.
    dy = jax.lax.optimization_barrier(dy)
    return dy @ weight, jnp.einsum("...o,...i->oi", dy, x)


dense_matmul.defvjp(_dense_forward, _dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def qlora_matmul(x, codes, absmax, a, b, scale):
    """x W^T + scale (x A^T) B^T for x [..., I], W in NF4 (codes [O, G, 64], absmax [O, G]), A [R, I], B [O, R].

    Without an adapter a and b are None. W is decoded again in the backward pass: decoded weights as residuals would
    keep the whole base in full precision.
    """
    weight_OGK = nf4.dequantize(codes, absmax, x.dtype)
    y = jnp.einsum("...gk,ogk->...o", x.reshape(*x.shape[:-1], *codes.shape[-2:]), weight_OGK)
    return y if a is None else y + adapter_matmul(x, a, b, scale)


def adapter_matmul(x, a, b, scale):
    """scale (x A^T) B^T [..., O] in the dtype of x."""
    return (x @ a.T.astype(x.dtype)) @ (scale * b).T.astype(x.dtype)


def _qlora_forward(x, codes, absmax, a, b, scale):
    return qlora_matmul(x, codes, absmax, a, b, scale), (x, codes, absmax, a, b)


def _qlora_backward(scale, residuals, dy):
    x, codes, absmax, a, b = residuals
    weight_OGK = nf4.dequantize(codes, absmax, dy.dtype)
    dx = jnp.einsum("...o,ogk->...gk", dy, weight_OGK).reshape(x.shape)
    if a is None:
        return dx, None, None, None, None
    _, adapter_vjp = jax.vjp(lambda x, a, b: adapter_matmul(x, a, b, scale), x, a, b)
    dx_adapter, da, db = adapter_vjp(dy)
    return dx + dx_adapter, None, None, da, db


qlora_matmul.defvjp(_qlora_forward, _qlora_backward)


class Linear(nnx.Module):
    """One linear layer of every decoder layer: arrays are [N, ...], or without N inside the scan over layers.

    Made dense and trainable. `quantize` swaps the weight for NF4; `add_adapter` adds A and B.
    """

    def __init__(self, shape: tuple[int, int, int], *, std: float, rngs: nnx.Rngs):
        self.weight = nnx.Param(std * rngs.params.normal(shape, jnp.float32))
        self.codes = nnx.data(None)
        self.absmax = nnx.data(None)
        self.a = nnx.data(None)
        self.b = nnx.data(None)
        self.scale = 0.0

    def quantize(self, codes: jax.Array, absmax: jax.Array) -> None:
        """Replaces the weight by NF4 codes uint4 [N, O, G, 64] and absmax float32 [N, O, G]."""
        self.codes, self.absmax, self.weight = Quantized(codes), Quantized(absmax), nnx.data(None)

    def add_adapter(self, shape: tuple[int, int, int], lora: LoRAConfig, rngs: nnx.Rngs) -> None:
        """Adds A, uniform within 1/sqrt(in) as PEFT draws it, and B = 0 for a weight of shape [N, O, I]."""
        layers, out_features, in_features = shape
        bound = in_features**-0.5
        a = rngs.params.uniform((layers, lora.rank, in_features), jnp.float32, minval=-bound, maxval=bound)
        self.a, self.b = LoRAParam(a), LoRAParam(jnp.zeros((layers, out_features, lora.rank)))
        self.scale = lora.alpha / lora.rank

    def merged(self, dtype: jnp.dtype) -> "Merged":
        """Base and adapter as one dense frozen layer in `dtype`; this layer stays as it is."""
        arrays = (None if x is None else x[...] for x in (self.weight, self.codes, self.absmax, self.a, self.b))
        return Merged(merge(*arrays, self.scale, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.codes is not None:
            a, b = (None, None) if self.a is None else (self.a[...], self.b[...])
            return qlora_matmul(x, self.codes[...], self.absmax[...], a, b, self.scale)
        y = dense_matmul(x, self.weight[...])
        return y if self.a is None else y + adapter_matmul(x, self.a[...], self.b[...], self.scale)


@functools.partial(jax.jit, static_argnames="dtype")
def merge(weight, codes, absmax, a, b, scale: float, dtype: jnp.dtype) -> jax.Array:
    """W^T [N, I, O] of a weight [N, O, I] or its NF4 codes and absmax, and of an adapter, if there is one."""
    if codes is not None:
        weight = nf4.dequantize(codes, absmax)
        weight = weight.reshape(*weight.shape[:-2], -1)
    if a is not None:
        weight = weight + scale * (b @ a)
    return weight.swapaxes(-1, -2).astype(dtype)


class Merged(nnx.Module):
    """A dense layer for sampling, kept as W^T [N, I, O]: a CPU multiplies few rows with it up to four times faster."""

    def __init__(self, weight_NIO: jax.Array):
        self.weight = nnx.Variable(weight_NIO)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight[...]

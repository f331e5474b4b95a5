"""NF4, the 4-bit number format of QLoRA (arXiv 2305.14314), bit for bit as bitsandbytes 0.50 writes it.

A weight is cut into blocks of 64 along its last axis. A block keeps its largest magnitude (`absmax`, float32) and, for
each number, the nearest of 16 values as a code. Quantising runs in numpy on the host, because XLA flushes the
denormals that bitsandbytes keeps; decoding runs in JAX, inside whatever is jitted.
Left out: double quantisation of `absmax`, packing two codes into a byte on disk.

    codes, absmax = quantize(weight)            # uint8 [..., G, 64], float32 [..., G]
    weight = dequantize(jnp.asarray(codes, jnp.uint4), jnp.asarray(absmax))

Shapes: G blocks of 64.
"""

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64

# Quantiles of a normal distribution with an exact zero, from bitsandbytes (`create_normal_map`), as float32.
VALUES = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 (0..15) [..., G, 64] and absmax float32 [..., G] of a float weight [..., G * 64].

    A number on the border between two values takes the lower one; bitsandbytes multiplies by the reciprocal, which is
    not the same float as dividing. Raises ValueError if the last axis is not a multiple of 64.
    """
    if weight.shape[-1] % BLOCK:
        raise ValueError(
            f"NF4 cuts rows into blocks of {BLOCK}, got a weight of shape {weight.shape} whose last axis is not a "
            f"multiple of {BLOCK}: make it one, or load the model with weights='fp32'."
        )
    blocks = weight.astype(np.float32).reshape(*weight.shape[:-1], -1, BLOCK)
    absmax = np.abs(blocks).max(axis=-1)
    reciprocal = np.float32(1.0) / np.maximum(absmax, np.float32(1e-38))
    scaled = np.clip(blocks * reciprocal[..., None], -1.0, 1.0)
    borders = (VALUES[:-1] + VALUES[1:]) * np.float32(0.5)
    codes = np.zeros(scaled.shape, np.uint8)
    for border in borders:  # 15 comparisons of a whole array are several times faster than searchsorted
        codes += scaled > border
    return codes, absmax


def lut(codes: jax.Array) -> jax.Array:
    """The 16 values at those codes, float32, same shape.

    A tree of selects and no gather: XLA fuses it into the matmul on a TPU, where a gather costs a thousand times more.
    """
    bits = [(codes >> i & 1).astype(bool) for i in range(4)]
    level = [jnp.float32(value) for value in VALUES]
    for bit in bits:
        level = [jnp.where(bit, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def dequantize(codes: jax.Array, absmax: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """The weight [..., G, 64] of codes [..., G, 64] and absmax [..., G]: a float32 product, rounded once to `dtype`."""
    return (lut(codes) * absmax[..., None]).astype(dtype)

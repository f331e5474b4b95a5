"""NF4, the 4-bit number format of QLoRA (arXiv 2305.14314), bit for bit as bitsandbytes 0.50 writes it on a CPU.

A weight is cut into blocks of 64 along its last axis. A block keeps its largest magnitude (`absmax`, float32) and, for
each number, the nearest of 16 values as a code. Double quantisation keeps `absmax` in turn as 8-bit codes, in blocks of
256 with a scale each, less their mean: 4.13 bits a number instead of 4.5. Quantising runs in numpy on the host, because
XLA flushes the denormals that bitsandbytes keeps; decoding runs in JAX, inside whatever is jitted.

    codes, absmax = quantize(weight)                            # uint8 0..15 [..., O, G, 64], float32 [..., O, G]
    absmax_codes, nested, offset = double_quantize(absmax)      # uint8 [M, 256], float32 [M], float32
    packed = pack(codes)                                        # uint8 [..., O, G, 32], as files have them
    weight = dequantize(jnp.asarray(codes, jnp.uint4), jnp.asarray(absmax))

Shapes: O rows of a weight, G blocks of 64 of a row, M blocks of 256 of absmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

BLOCK, NESTED_BLOCK = 64, 256

# Quantiles of a normal distribution with an exact zero, from bitsandbytes (`create_normal_map`), as float32.
VALUES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def dynamic_map() -> np.ndarray:
    """The 256 values of the signed dynamic 8-bit type (arXiv 1511.04561; bitsandbytes `create_dynamic_map`), float32.

    Seven decades up to 1, each with twice the values of the one below: the middles of equal parts of [0.1, 1].
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade  # their ends as torch.linspace gives them: from both sides, one rounding each
        step, index = np.float64(np.float32(0.9) / np.float32(parts)), np.arange(parts + 1)
        ends = np.where(index <= (parts - 1) // 2, np.float32(0.1) + step * index, 1 - step * (parts - index))
        ends = ends.astype(np.float32)
        middles = (ends[:-1] + ends[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))


NESTED_VALUES = dynamic_map()


def borders(values: np.ndarray) -> np.ndarray:
    """The middles between sorted values, float32; a number on one takes the lower value."""
    return (values[:-1] + values[1:]) * np.float32(0.5)


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 (0..15) [..., G, 64] and absmax float32 [..., G] of a float weight [..., G * 64].

    Like bitsandbytes it multiplies by the reciprocal of absmax, which is not the same float as dividing. Works on a few
    thousand blocks at a time, so that it needs little beside its result. Raises ValueError if the last axis is not a
    multiple of 64.
    """
    if weight.shape[-1] % BLOCK:
        raise ValueError(
            f"NF4 cuts rows into blocks of {BLOCK}, got a weight of shape {weight.shape} whose last axis is not a "
            f"multiple of {BLOCK}: make it one, or load the model with weights='fp32'."
        )
    flat = weight.reshape(-1, BLOCK)
    codes, absmax = np.empty(flat.shape, np.uint8), np.empty(len(flat), np.float32)

    def work(start: int) -> None:
        part = slice(start, start + 2**11)
        blocks = flat[part].astype(np.float32)
        absmax[part] = np.abs(blocks).max(axis=-1)
        blocks *= (np.float32(1.0) / np.maximum(absmax[part], np.float32(1e-38)))[:, None]
        codes[part] = 0  # numbers beyond -1 or 1, which rounding makes, are beyond the last border too
        for border in borders(VALUES):  # 15 comparisons of a whole array are several times faster than searchsorted
            codes[part] += blocks > border

    with ThreadPoolExecutor() as pool:  # numpy lets other threads run while it computes
        list(pool.map(work, range(0, len(flat), 2**11)))
    return codes.reshape(*weight.shape[:-1], -1, BLOCK), absmax.reshape(*weight.shape[:-1], -1)


def double_quantize(absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Codes uint8 [M, 256], their scales float32 [M] and the mean float32 of one weight's absmax, taken in order.

    The last block is filled up with code 0. bitsandbytes looks the nearest value up in a table of 65,536 places, which
    is what is done here: near a border its choice is not always the nearest.
    """
    flat = absmax.astype(np.float32).ravel()
    offset = torch_sum(flat) / np.float32(flat.size)
    blocks = np.zeros((-(-flat.size // NESTED_BLOCK), NESTED_BLOCK), np.float32)
    blocks.reshape(-1)[: flat.size] = flat - offset
    nested = np.abs(blocks).max(axis=1)
    grid = (np.arange(2**16) / 32767.5 - 1).astype(np.float32)
    table = np.searchsorted(borders(NESTED_VALUES), grid).astype(np.uint8)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = np.clip(blocks * (np.float32(1.0) / nested)[:, None], -1, 1)
        place = (scaled + np.float32(1)) * np.float32(32767.5) + np.float32(0.5)
    codes = table[np.nan_to_num(place, nan=0.0).astype(np.int32)]  # a block of zeros has scale 0 and codes 0
    codes.reshape(-1)[flat.size :] = 0
    return codes, nested, offset


def torch_sum(flat: np.ndarray) -> np.float32:
    """The sum of a float32 vector in the order of one thread of torch on a CPU, so that its mean has the same bits.

    32 sums run side by side (4 of each of 8 lanes), in four levels: 16 or more sums of a level make one of the next.
    """
    lanes = 8 if len(flat) >= 8 else 1
    rows = len(flat) // (4 * lanes)
    step = 1 << max(4, (rows - 1).bit_length() // 4 if rows else 0)
    level, sums = flat[: rows * 4 * lanes].reshape(rows, 4 * lanes), []
    for _ in range(3):
        whole = len(level) // step * step
        sums.append(in_order(level[whole:]))
        level = in_order(level[:whole].reshape(-1, step, 4 * lanes).swapaxes(0, 1))
    sums.append(in_order(level))
    parts = in_order(sums).reshape(4, lanes)
    rest = flat[rows * 4 * lanes :]
    vectors = len(rest) // lanes * lanes
    parts[0] = in_order([parts[0], *rest[:vectors].reshape(-1, lanes)])
    return in_order([np.float32(0), *rest[vectors:], *in_order(parts)])


def in_order(terms: Sequence[np.ndarray]) -> np.ndarray:
    """The sum over the first axis, one term after the other, as numpy's own `sum` does not."""
    total = np.zeros(np.shape(terms)[1:], np.float32)
    with np.errstate(over="ignore"):  # to infinity, where torch's goes too
        for term in terms:
            total = total + term
    return total


def pack(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the first in the high half: uint8 [..., 64] -> [..., 32], the order of bitsandbytes' files."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


def unpack(packed: np.ndarray) -> np.ndarray:
    """The codes uint8 [..., 64] of packed bytes [..., 32]."""
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(*packed.shape[:-1], -1)


def lut(codes: jax.Array, values: np.ndarray = VALUES) -> jax.Array:
    """The values (a power of two of them) at those codes, float32, same shape.

    On a TPU a tree of selects, which XLA fuses into the matmul, where a gather costs a thousand times more; elsewhere a
    gather: of the selects' constants XLA:CPU makes arrays, which it then reads.
    """

    def tree(codes):
        bits = [(codes >> i & 1).astype(bool) for i in range(len(values).bit_length() - 1)]
        level = [jnp.float32(value) for value in values]
        for bit in bits:
            level = [jnp.where(bit, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
        return level[0]

    def gather(codes):
        return jnp.asarray(values)[codes.astype(jnp.uint8)]

    return jax.lax.platform_dependent(codes, tpu=tree, default=gather)


def decode_absmax(codes: jax.Array, nested: jax.Array, offset: jax.Array, rows: Sequence[int], groups: int):
    """absmax float32 [O, G] from codes uint8 [M, 256], their scales [M] and the mean of their weight [M].

    `rows` are those of each weight that begins with a block of its own: O = sum(rows). A product and a sum with a
    rounding each, as in bitsandbytes: the barrier keeps XLA from making one operation of them.
    """
    product = jax.lax.optimization_barrier(lut(codes, NESTED_VALUES) * nested[:, None])
    absmax, pieces, start = product + offset[:, None], [], 0
    for count in rows:
        blocks = math.ceil(count * groups / NESTED_BLOCK)
        pieces.append(absmax[start : start + blocks].reshape(-1)[: count * groups].reshape(count, groups))
        start += blocks
    return jax.lax.optimization_barrier(jnp.concatenate(pieces))  # decoded once, not again for each number of a block


def dequantize(codes: jax.Array, absmax: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """The weight [..., G, 64] of codes [..., G, 64] and absmax [..., G]: a float32 product, rounded once to `dtype`."""
    return (lut(codes) * absmax[..., None]).astype(dtype)

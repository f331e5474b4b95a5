"""NF4, the 4-bit data type of QLoRA (arXiv 2305.14314), bit-identical to bitsandbytes 0.50 on a CPU.

A weight is split into blocks of 64 along its last axis. Each block stores its largest magnitude (`absmax`, float32)
and, for each weight, the code of the nearest of 16 values. Double quantisation subtracts the mean of `absmax` and
stores the rest as 8-bit codes, in blocks of 256 with one scale each: 4.13 bits per weight instead of 4.5. Quantisation
runs in numpy on the host, because XLA flushes the denormals that bitsandbytes keeps; decoding runs in JAX, under jit.

    codes, absmax = quantize(weight)                            # uint8 0..15 [..., O, G, 64], float32 [..., O, G]
    absmax_codes, nested, offset = double_quantize(absmax)      # uint8 [M, 256], float32 [M], float32
    packed = pack(codes)                                        # uint8 [..., O, G, 32], as in files
    weight = dequantize(jnp.asarray(codes, jnp.uint4), jnp.asarray(absmax))

Shapes: O rows of a weight, G blocks of 64 in a row, M blocks of 256 of absmax.
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

    Seven decades up to 1, each with twice as many values as the one below: the midpoints of equal parts of [0.1, 1].
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade  # ends computed as torch.linspace does: from both sides, one rounding each
        step, index = np.float64(np.float32(0.9) / np.float32(parts)), np.arange(parts + 1)
        ends = np.where(index <= (parts - 1) // 2, np.float32(0.1) + step * index, 1 - step * (parts - index))
        ends = ends.astype(np.float32)
        centers = (ends[:-1] + ends[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [*centers, *-centers]
    return np.sort(np.array(values, np.float32))


NESTED_VALUES = dynamic_map()


def midpoints(values: np.ndarray) -> np.ndarray:
    """Midpoints between neighbouring sorted values, float32; a number on a midpoint rounds down."""
    return (values[:-1] + values[1:]) * np.float32(0.5)


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantises a float weight [..., G * 64]: codes uint8 (0..15) [..., G, 64] and absmax float32 [..., G].

    Like bitsandbytes, multiplies by the reciprocal of absmax, which rounds differently from a division. Processes a few
    thousand blocks at a time, so temporaries stay small. Raises ValueError if the last axis is not a multiple of 64.
    """
    if weight.shape[-1] % BLOCK:
        raise ValueError(
            f"NF4 got a weight of shape {weight.shape}; expected a last axis that is a multiple of {BLOCK}. "
            "Change that width, or load the model with weights='fp32'."
        )
    flat = weight.reshape(-1, BLOCK)
    codes, absmax = np.empty(flat.shape, np.uint8), np.empty(len(flat), np.float32)

    def work(start: int) -> None:
        part = slice(start, start + 2**11)
        blocks = flat[part].astype(np.float32)
        absmax[part] = np.abs(blocks).max(axis=-1)
        blocks *= (np.float32(1.0) / np.maximum(absmax[part], np.float32(1e-38)))[:, None]
        codes[part] = 0  # rounding can exceed [-1, 1]; such numbers still get the first or last code
        for midpoint in midpoints(VALUES):  # 15 comparisons of a whole array are several times faster than searchsorted
            codes[part] += blocks > midpoint

    with ThreadPoolExecutor() as pool:  # numpy releases the GIL
        list(pool.map(work, range(0, len(flat), 2**11)))
    return codes.reshape(*weight.shape[:-1], -1, BLOCK), absmax.reshape(*weight.shape[:-1], -1)


def double_quantize(absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Quantises the absmax of one weight in order: codes uint8 [M, 256], scales float32 [M] and its mean, float32.

    The last block is padded with code 0. Like bitsandbytes, looks up codes in a table of 65,536 entries, which near a
    midpoint does not always give the nearest value.
    """
    flat = absmax.astype(np.float32).ravel()
    offset = torch_sum(flat) / np.float32(flat.size)
    blocks = np.zeros((-(-flat.size // NESTED_BLOCK), NESTED_BLOCK), np.float32)
    blocks.reshape(-1)[: flat.size] = flat - offset
    nested = np.abs(blocks).max(axis=1)
    grid = (np.arange(2**16) / 32767.5 - 1).astype(np.float32)
    table = np.searchsorted(midpoints(NESTED_VALUES), grid).astype(np.uint8)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = np.clip(blocks * (np.float32(1.0) / nested)[:, None], -1, 1)
        index = (scaled + np.float32(1)) * np.float32(32767.5) + np.float32(0.5)
    codes = table[np.nan_to_num(index, nan=0.0).astype(np.int32)]  # an all-zero block has scale 0 and codes 0
    codes.reshape(-1)[flat.size :] = 0
    return codes, nested, offset


def torch_sum(flat: np.ndarray) -> np.float32:
    """Sums a float32 vector in the order of single-threaded torch on a CPU, so that the mean is bit-identical.

    Keeps 32 parallel sums (4 for each of 8 lanes) in four levels: 16 or more sums of a level add up to one of the next.
    """
    lanes = 8 if len(flat) >= 8 else 1
    rows = len(flat) // (4 * lanes)
    step = 1 << max(4, (rows - 1).bit_length() // 4 if rows else 0)
    level, sums = flat[: rows * 4 * lanes].reshape(rows, 4 * lanes), []
    for _ in range(3):
        full = len(level) // step * step
        sums.append(sequential_sum(level[full:]))
        level = sequential_sum(level[:full].reshape(-1, step, 4 * lanes).swapaxes(0, 1))
    sums.append(sequential_sum(level))
    parts = sequential_sum(sums).reshape(4, lanes)
    rest = flat[rows * 4 * lanes :]
    vectors = len(rest) // lanes * lanes
    parts[0] = sequential_sum([parts[0], *rest[:vectors].reshape(-1, lanes)])
    return sequential_sum([np.float32(0), *rest[vectors:], *sequential_sum(parts)])


def sequential_sum(terms: Sequence[np.ndarray]) -> np.ndarray:
    """The sum over the first axis, strictly left to right (numpy's `sum` adds pairwise)."""
    total = np.zeros(np.shape(terms)[1:], np.float32)
    with np.errstate(over="ignore"):  # overflows to infinity, as torch does
        for term in terms:
            total = total + term
    return total


def pack(codes: np.ndarray) -> np.ndarray:
    """Packs two codes per byte, the first in the high half, like bitsandbytes: uint8 [..., 64] -> [..., 32]."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


def unpack(packed: np.ndarray) -> np.ndarray:
    """Unpacks bytes [..., 32] into codes uint8 [..., 64]."""
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(*packed.shape[:-1], -1)


def lut(codes: jax.Array, values: np.ndarray = VALUES) -> jax.Array:
    """Looks up codes in `values` (a power of two of them): float32, same shape.

    On a TPU, a tree of selects, which XLA fuses into the matmul: there a gather costs a thousand times more. Elsewhere
    a gather, because XLA:CPU materialises the constants of the selects as arrays and reads them.
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
    """Decodes absmax float32 [O, G] from codes uint8 [M, 256], their scales [M] and the mean of their weight [M].

    `rows` counts the rows of each fused weight, which starts at a new block: O = sum(rows). The product and the sum
    round separately, as in bitsandbytes: the barrier keeps XLA from fusing them into a multiply-add.
    """
    product = jax.lax.optimization_barrier(lut(codes, NESTED_VALUES) * nested[:, None])
    absmax, parts, start = product + offset[:, None], [], 0
    for count in rows:
        blocks = math.ceil(count * groups / NESTED_BLOCK)
        parts.append(absmax[start : start + blocks].reshape(-1)[: count * groups].reshape(count, groups))
        start += blocks
    return jax.lax.optimization_barrier(jnp.concatenate(parts))  # decoded once per block, not once per weight


def dequantize(codes: jax.Array, absmax: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Decodes codes [..., G, 64] and absmax [..., G] to [..., G, 64]: a float32 product rounded once to `dtype`."""
    return (lut(codes) * absmax[..., None]).astype(dtype)

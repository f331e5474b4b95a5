"""Causal attention over packed rows: `attention`, with an implementation for each device.

A row packs several sequences: `segments` numbers them from 1, 0 is padding. A query attends only to its own segment, up
to itself and, with a sliding window, no further back than the window. Outputs at padding are meaningless.

    blocks   one pair of blocks at a time, without the full scores (FlashAttention-2, arXiv 2307.08691): for a CPU
    splash   JAX's Pallas kernel for TPUs
    cudnn    cuDNN's fused kernel, for 16-bit activations on a GPU: on each segment alone, if `bounds` are given that
             need little padding; else on whole rows, with a mask of [L, L]
    xla      all scores at once: any device, memory quadratic in the row length

Shapes: B rows, L tokens, M keys, N blocks of T tokens, H heads, K kv heads, Q queries of a block per kv head, C head
dim; with `bounds`, S segments of P positions.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

Implementation = Literal["blocks", "splash", "cudnn", "xla"]
# Queries and keys per block of `blocks`: the scores of a pair of blocks fit in a CPU's cache.
ATTENTION_BLOCK = 64
# Largest and smallest tile of `splash`; rows are padded to a multiple of the smallest.
SPLASH_TILE, SPLASH_STEP = 512, 128
# Segments are padded to a multiple of this many positions, and separated if they then take at most so many times a row.
SEGMENT_STEP, MOST_PADDED = 64, 4


class SegmentBounds(NamedTuple):
    """How many segments the rows of a batch have at most, and the positions that hold the longest."""

    segments: int
    positions: int


def segment_bounds(segments_NL: np.ndarray) -> SegmentBounds:
    """The bounds of packed rows."""
    longest = max((int(np.bincount(row)[1:].max(initial=0)) for row in segments_NL), default=0)
    return SegmentBounds(
        segments=max(1, int(segments_NL.max(initial=0))),
        positions=max(1, -(-longest // SEGMENT_STEP)) * SEGMENT_STEP,
    )


def best_implementation(platform: str, dtype: jnp.dtype) -> Implementation:
    """The fastest implementation for "cpu", "tpu" or "gpu" and the dtype of the activations."""
    if platform == "gpu":
        return "cudnn" if dtype in (jnp.bfloat16, jnp.float16) else "xla"
    return "splash" if platform == "tpu" else "blocks"


def require_supported(implementation: Implementation | None, platform: str, dtype: jnp.dtype) -> None:
    """Raises ValueError if an implementation cannot run on "cpu", "tpu" or "gpu" with activations of this dtype."""
    best = best_implementation(platform, dtype)
    needs = {"splash": "a TPU", "cudnn": "a GPU and 16-bit activations (--dtype bfloat16)"}
    if implementation in needs and implementation != best:
        raise ValueError(
            f"--attention {implementation} needs {needs[implementation]}, but this is a {platform} with "
            f"{jnp.dtype(dtype)}: leave the flag out, which gives {best} here."
        )


def attention(
    q_BLHC: jax.Array,
    k_BLKC: jax.Array,
    v_BLKC: jax.Array,
    segments_BL: jax.Array,
    window: int | None,
    implementation: Implementation | None = None,
    bounds: SegmentBounds | None = None,
) -> jax.Array:
    """Causal attention within segments, H/K query heads per kv head, softmax in float32. Returns [B, L, H * C].

    `implementation`: None picks the best for JAX's default device, or "xla" where cuDNN cannot compute these shapes.
    """
    if implementation is None:
        implementation = best_implementation(jax.default_backend(), q_BLHC.dtype)
        if implementation == "cudnn" and not cudnn_compiles(q_BLHC.shape, k_BLKC.shape, q_BLHC.dtype, window, bounds):
            implementation = "xla"
    if implementation == "blocks":
        return attend_in_blocks(q_BLHC, k_BLKC, v_BLKC, segments_BL, window)
    if implementation == "splash":
        return attend_splash(q_BLHC, k_BLKC, v_BLKC, segments_BL, window)
    if implementation == "cudnn" and bounds and math.prod(bounds) <= MOST_PADDED * q_BLHC.shape[1]:
        return attend_segments(q_BLHC, k_BLKC, v_BLKC, segments_BL, window, bounds)
    out_BLHC = jax.nn.dot_product_attention(
        q_BLHC,
        k_BLKC,
        v_BLKC,
        mask=visible(segments_BL, segments_BL, 0, window)[:, None],
        implementation=implementation,
    )
    return out_BLHC.reshape(*out_BLHC.shape[:2], -1)


def positions_in(segments_BL: jax.Array) -> jax.Array:
    """Position of each token within its segment [B, L] int32: restarts at 0 where the segment number changes."""
    index_L = jnp.arange(segments_BL.shape[1], dtype=jnp.int32)
    new_BL = jnp.diff(segments_BL, axis=1, prepend=segments_BL[:, :1] - 1) != 0
    return index_L - jax.lax.cummax(jnp.where(new_BL, index_L, 0), axis=1)


def visible(queries_BL: jax.Array, keys_BM: jax.Array, offset: int, window: int | None) -> jax.Array:
    """The attention mask [B, L, M] bool: keys of the same segment, not later than the query, inside the window.

    `offset` is the position of the first query among the keys. Padding sees padding, so no row of scores is empty.
    """
    distance_LM = jnp.arange(queries_BL.shape[1])[:, None] + offset - jnp.arange(keys_BM.shape[1])
    near_LM = distance_LM >= 0 if window is None else (distance_LM >= 0) & (distance_LM < window)
    return near_LM & (queries_BL[:, :, None] == keys_BM[:, None, :])


# ---- cudnn -----------------------------------------------------------------------------------------------------------


@functools.cache
def cudnn_compiles(queries, keys, dtype, window, bounds) -> bool:
    """Whether `cudnn` can be compiled for these shapes, forward and backward; if not, says why once."""

    def total(q_BLHC, k_BLKC, v_BLKC, segments_BL):
        return attention(q_BLHC, k_BLKC, v_BLKC, segments_BL, window, "cudnn", bounds).sum()

    q_BLHC, k_BLKC = (jax.ShapeDtypeStruct(shape, dtype) for shape in (queries, keys))
    segments_BL = jax.ShapeDtypeStruct(queries[:2], jnp.int32)
    try:
        jax.jit(jax.grad(total, (0, 1, 2))).lower(q_BLHC, k_BLKC, k_BLKC, segments_BL).compile()
    except (RuntimeError, ValueError) as error:  # JAX's checks and XLA's
        why = str(error).partition("\n")[0]
        print(f"cuDNN cannot attend to {keys} keys from {queries} queries here ({why}): computing as --attention xla")
        return False
    return True


def attend_segments(q_BLHC, k_BLKC, v_BLKC, segments_BL, window, bounds, implementation="cudnn") -> jax.Array:
    """`attention` with each segment as a row of its own, causal and padded, so that no mask [L, L] is needed.

    `implementation`: "xla" lets tests run it on a CPU.
    """
    B, L, H, C = q_BLHC.shape
    S, P = bounds
    # Where each token goes among its row's S * P positions, and which token each of them gets. Indices beyond the end
    # stand for nothing; they are distinct, so that gradients can be scattered without atomic additions.
    there_BL = (segments_BL - 1) * P + positions_in(segments_BL)
    there_BL = jnp.where(segments_BL > 0, there_BL, S * P + jnp.arange(L))
    nothing_BM = jnp.broadcast_to(L + jnp.arange(S * P, dtype=jnp.int32), (B, S * P))
    index_L = jnp.arange(L, dtype=jnp.int32)
    here_BM = jax.vmap(lambda to, at: to.at[at].set(index_L, mode="drop", unique_indices=True))(nothing_BM, there_BL)

    def take(x_BLHC, index_BM):
        pick = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0, unique_indices=True)
        return jax.vmap(pick)(x_BLHC, index_BM)

    lengths_BS = (segments_BL[:, None] == jnp.arange(1, S + 1)[:, None]).sum(axis=2, dtype=jnp.int32)
    lengths = jnp.maximum(lengths_BS, 1).reshape(-1)  # a segment that is not there is one position of zeros
    attended = jax.nn.dot_product_attention(
        *(take(x, here_BM).reshape(B * S, P, *x.shape[2:]) for x in (q_BLHC, k_BLKC, v_BLKC)),
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None or window >= P else (window - 1, 0),
        implementation=implementation,
    )
    return take(attended.reshape(B, S * P, H * C), there_BL)


# ---- splash ----------------------------------------------------------------------------------------------------------


def attend_splash(q_BLHC, k_BLKC, v_BLKC, segments_BL, window, *, interpret: bool = False) -> jax.Array:
    """`attention` with the TPU kernel; `interpret` runs it on a CPU, for tests."""
    B, L, H, C = q_BLHC.shape
    padded = -(-L // SPLASH_STEP) * SPLASH_STEP
    tile = next(size for size in range(min(SPLASH_TILE, padded), 0, -SPLASH_STEP) if padded % size == 0)
    shape = (padded, padded)
    mask = splash_mask.CausalMask(shape) if window is None else splash_mask.LocalMask(shape, (window - 1, 0), 0)
    sizes = splash_kernel.BlockSizes(
        block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile
    )
    kernel = splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * H), head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret
    )

    def attend(q_LHC, k_LKC, v_LKC, segments_L):
        q, k, v = (jnp.pad(x, ((0, padded - L), (0, 0), (0, 0))).swapaxes(0, 1) for x in (q_LHC, k_LKC, v_LKC))
        segments = jnp.pad(segments_L, (0, padded - L))
        out_HLC = kernel(q * C**-0.5, k, v, segment_ids=splash_kernel.SegmentIds(segments, segments))
        return out_HLC.swapaxes(0, 1)[:L].reshape(L, H * C)

    return jax.vmap(attend)(q_BLHC, k_BLKC, v_BLKC, segments_BL)


# ---- blocks ----------------------------------------------------------------------------------------------------------


def attend_in_blocks(q_BLHC, k_BLKC, v_BLKC, segments_BL, window) -> jax.Array:
    """`attention` one row at a time, in blocks of T tokens (`attend_row`). Padding sees nothing outside its block."""
    L, H, C = q_BLHC.shape[1:]
    K, T = k_BLKC.shape[2], min(ATTENTION_BLOCK, L)
    N = -(-L // T)

    def attend(row):
        q_LHC, k_LKC, v_LKC, segments_L = (jnp.pad(x, [(0, N * T - L)] + [(0, 0)] * (x.ndim - 1)) for x in row)
        q_NKQC = (q_LHC * C**-0.5).reshape(N, T, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(N, K, -1, C)
        k_NKTC, v_NKTC = (x.reshape(N, T, K, C).swapaxes(1, 2) for x in (k_LKC, v_LKC))
        start_L = jnp.arange(N * T) - positions_in(segments_L[None])[0]
        first_N = jnp.where(segments_L[::T] == 0, jnp.arange(N), start_L[::T] // T)
        out_NKQC = attend_row(q_NKQC, k_NKTC, v_NKTC, segments_L.reshape(N, T), first_N, window)
        return out_NKQC.reshape(N, H, T, C).swapaxes(1, 2).reshape(N * T, H * C)[:L]

    return jax.lax.map(attend, (q_BLHC, k_BLKC, v_BLKC, segments_BL))


def block_scores(q_KQC, k_KTC, segments_T, segments_M, offset, window):
    """Scores [K, Q, T] float32 of a query block on the key block `offset` positions earlier; masked ones are lowest."""
    K, Q, T = *q_KQC.shape[:2], len(segments_M)
    scores_KXTM = jnp.einsum("kqc,kmc->kqm", q_KQC, k_KTC, preferred_element_type=jnp.float32).reshape(K, -1, T, T)
    seen_TM = visible(segments_T[None], segments_M[None], offset, window)[0]
    return jnp.where(seen_TM, scores_KXTM, jnp.finfo(jnp.float32).min).reshape(K, Q, T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_row(q_NKQC, k_NKTC, v_NKTC, segments_NT, first_N, window):
    """Attention of one row, whose query block n reads key blocks first_N[n] to n. Returns [N, K, Q, C].

    Holds the scores of one pair of blocks at a time; the backward pass recomputes them from each query's log-sum-exp.
    Source: FlashAttention-2 (arXiv 2307.08691), as loops for a CPU.
    """
    return attend_row_forward(q_NKQC, k_NKTC, v_NKTC, segments_NT, first_N, window)[0]


def attend_row_forward(q_NKQC, k_NKTC, v_NKTC, segments_NT, first_N, window):
    N, K, Q, C = q_NKQC.shape
    T = segments_NT.shape[1]

    def query_block(n):
        def key_block(m, state):
            top_KQ1, total_KQ1, out_KQC = state
            scores_KQT = block_scores(q_NKQC[n], k_NKTC[m], segments_NT[n], segments_NT[m], (n - m) * T, window)
            higher_KQ1 = jnp.maximum(top_KQ1, scores_KQT.max(axis=-1, keepdims=True))
            weights_KQT, shrink_KQ1 = jnp.exp(scores_KQT - higher_KQ1), jnp.exp(top_KQ1 - higher_KQ1)
            read = jnp.einsum("kqt,ktc->kqc", weights_KQT.astype(v_NKTC.dtype), v_NKTC[m])
            total_KQ1 = total_KQ1 * shrink_KQ1 + weights_KQT.sum(axis=-1, keepdims=True)
            return higher_KQ1, total_KQ1, out_KQC * shrink_KQ1 + read

        # A query that is fully masked in a block weights its keys equally; the first visible key rescales that to 0.
        start = jnp.full((K, Q, 1), -jnp.inf), jnp.zeros((K, Q, 1)), jnp.zeros((K, Q, C))
        top_KQ1, total_KQ1, out_KQC = jax.lax.fori_loop(first_N[n], n + 1, key_block, start)
        return (out_KQC / total_KQ1).astype(q_NKQC.dtype), top_KQ1 + jnp.log(total_KQ1)

    out_NKQC, logsum_NKQ1 = jax.lax.map(query_block, jnp.arange(N))
    return out_NKQC, (q_NKQC, k_NKTC, v_NKTC, segments_NT, first_N, out_NKQC, logsum_NKQ1)


def attend_row_backward(window, saved, d_out_NKQC):
    q_NKQC, k_NKTC, v_NKTC, segments_NT, first_N, out_NKQC, logsum_NKQ1 = saved
    N, T = segments_NT.shape

    def query_block(d_keys, n):
        q_KQC, d_out_KQC = q_NKQC[n], d_out_NKQC[n]
        common_KQ1 = (d_out_KQC * out_NKQC[n]).sum(axis=-1, keepdims=True)

        def key_block(m, state):
            d_q_KQC, d_k_NKTC, d_v_NKTC = state
            scores_KQT = block_scores(q_KQC, k_NKTC[m], segments_NT[n], segments_NT[m], (n - m) * T, window)
            weights_KQT = jnp.exp(scores_KQT - logsum_NKQ1[n])
            d_weights_KQT = jnp.einsum("kqc,ktc->kqt", d_out_KQC, v_NKTC[m])
            d_scores_KQT = weights_KQT * (d_weights_KQT - common_KQ1)
            d_k_NKTC = d_k_NKTC.at[m].add(jnp.einsum("kqt,kqc->ktc", d_scores_KQT, q_KQC))
            d_v_NKTC = d_v_NKTC.at[m].add(jnp.einsum("kqt,kqc->ktc", weights_KQT, d_out_KQC))
            return d_q_KQC + jnp.einsum("kqt,ktc->kqc", d_scores_KQT, k_NKTC[m]), d_k_NKTC, d_v_NKTC

        d_q_KQC, *d_keys = jax.lax.fori_loop(first_N[n], n + 1, key_block, (jnp.zeros(q_KQC.shape), *d_keys))
        return tuple(d_keys), d_q_KQC

    empty = jnp.zeros(k_NKTC.shape), jnp.zeros(v_NKTC.shape)
    (d_k_NKTC, d_v_NKTC), d_q_NKQC = jax.lax.scan(query_block, empty, jnp.arange(N))
    gradients = zip((d_q_NKQC, d_k_NKTC, d_v_NKTC), (q_NKQC, k_NKTC, v_NKTC), strict=True)
    return *(d.astype(x.dtype) for d, x in gradients), None, None


attend_row.defvjp(attend_row_forward, attend_row_backward)

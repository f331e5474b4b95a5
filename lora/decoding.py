"""The computations of the engine: attention over a blocked KV cache, prefill, decoding a chunk, and sampling.

Pure functions on arrays; engine.py assigns sessions to slots.

Shapes: R rows of a group, B of them prefilling, T tokens of a row, F tokens of several rows, P positions of the buffer,
S positions of a block of the cache = N tiles of W positions, D model, H heads, K kv heads, X queries per kv head, C
head dim, A = H * C, V vocabulary in G groups of I ids. A block is keys [slots, K, N, C, W] and values
[slots, K, N, W, C]: both matmuls of attention then read it in memory order, a few KiB at a time, which is up to eight
times faster on a CPU than other layouts.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora.decoder import DecoderWeights
from lora.linear import tiled_matmul
from lora.model import rms_norm, rope_angles
from lora.speculation import Places, accepted, every_place, look_up_drafts


class Tile(NamedTuple):
    """How a cache is laid out."""

    positions: int  # per tile
    channels: int  # of values, per part; 0: all of a head


class SamplingParams(NamedTuple):
    """Per-row state and sampling parameters of a chunk, [R] each."""

    limit: np.ndarray  # ids that the row may sample in this chunk; 0 for a padding row
    drawn: np.ndarray  # ids that it sampled in earlier chunks
    temperature: np.ndarray
    top_p: np.ndarray
    seed: np.ndarray


def attend(q_RTHC, prefix, past, lengths_R, k_RKCP, v_RKPC, at_R, window):
    """Attention of T new tokens over the prefix, the cache (up to the row's length) and the buffer (causally).

    `past` is a list of blocks; a row's tokens start at position `at_R` of the buffer, and its positions follow the
    prefix. One softmax spans all parts: each is weighted relative to the largest score of all, and the sums are added.
    Returns [R, T, H * C].
    """
    R, T, H, C = q_RTHC.shape
    K, P = k_RKCP.shape[1], k_RKCP.shape[3]
    q_RKXC = (q_RTHC * C**-0.5).reshape(R, T, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(R, K, -1, C)
    query_RT = at_R[:, None] + jnp.arange(T)

    def hide(scores_RKXS, seen_RTS, distance_RTS):
        if window is not None:
            seen_RTS = seen_RTS & (distance_RTS < window)
        scores = scores_RKXS.reshape(R, K, H // K, T, -1)
        return jnp.where(seen_RTS[:, None, None], scores, jnp.finfo(jnp.float32).min).reshape(scores_RKXS.shape)

    distance_RTP = query_RT[:, :, None] - jnp.arange(P)
    scores = jnp.einsum("rkxc,rkcp->rkxp", q_RKXC, k_RKCP, preferred_element_type=jnp.float32)
    parts, values, offset = [hide(scores, distance_RTP >= 0, distance_RTP)], [v_RKPC[:, :, None]], 0
    for k_RKNCW, v_RKJNWY in past:
        scores = cache_scores(q_RKXC, k_RKNCW)
        position_S = offset + jnp.arange(scores.shape[-1])
        before_R1S = (position_S < lengths_R[:, None])[:, None]
        parts.append(hide(scores, before_R1S, lengths_R[:, None, None] + query_RT[:, :, None] - position_S))
        values.append(v_RKJNWY.reshape(*v_RKJNWY.shape[:3], -1, v_RKJNWY.shape[-1]))
        offset += scores.shape[-1]
    k_KCS, v_KSC = prefix
    if size := k_KCS.shape[-1]:
        scores = jnp.einsum("rkxc,kcs->rkxs", q_RKXC, k_KCS, preferred_element_type=jnp.float32)
        distance_RTS = lengths_R[:, None, None] + query_RT[:, :, None] + size - jnp.arange(size)
        parts.append(hide(scores, jnp.ones((1, 1, size), bool), distance_RTS))
    top = functools.reduce(jnp.maximum, (part.max(axis=-1, keepdims=True) for part in parts))
    weights = [jnp.exp(part - top) for part in parts]
    total = sum(part.sum(axis=-1, keepdims=True) for part in weights)
    weights = [part.astype(q_RTHC.dtype) for part in weights]
    read = sum(weighted_values(w, v) for w, v in zip(weights, values, strict=False))
    if size:
        read += jnp.einsum("rkxs,ksc->rkxc", weights[-1], v_KSC)
    read = (read / total).astype(q_RTHC.dtype).reshape(R, K, H // K, T, C)
    return read.transpose(0, 3, 1, 2, 4).reshape(R, T, H * C)


def cache_scores(q_RKXC, k_RKNCW):
    """Scores [R, K, X, S] float32 of the queries on the keys of a block."""
    R, K, X, C = q_RKXC.shape
    # One matmul per tile, each with a copy of the queries: otherwise XLA:CPU transposes the keys at every step.
    q_RKNXC = jnp.broadcast_to(q_RKXC[:, :, None], (R, K, k_RKNCW.shape[2], X, C))
    scores_RKNXW = jnp.einsum("rknxc,rkncw->rknxw", q_RKNXC, k_RKNCW, preferred_element_type=jnp.float32)
    return scores_RKNXW.swapaxes(2, 3).reshape(R, K, X, -1)


def weighted_values(weights_RKXS, v_RKJSY):
    """Sums [R, K, X, C] of the values of a block, weighted."""
    R, K, X, S = weights_RKXS.shape
    # One matmul per part of the channels, as in `cache_scores`.
    weights_RKJXS = jnp.broadcast_to(weights_RKXS[:, :, None], (R, K, v_RKJSY.shape[2], X, S))
    read_RKJXY = jnp.einsum("rkjxs,rkjsy->rkjxy", weights_RKJXS, v_RKJSY)
    return read_RKJXY.swapaxes(2, 3).reshape(R, K, X, -1)


def run_layer(layer, config, x_FD, rope, places: Places, prefix, past, lengths_R, buffer, at_R):
    """Runs a layer on the tokens of `places` [F, D].

    Returns its output and the buffer with their keys and values, from position `at_R` of each row on. Linear layers see
    only the tokens; attention sees rows.
    """
    q, k, v = (x[0] for x in layer.queries_keys_values(x_FD[None], rope))
    at_F = at_R[places.row_F] + places.index_F
    k_RKCP = buffer[0].at[places.row_F, :, :, at_F].set(k, mode="drop")
    v_RKPC = buffer[1].at[places.row_F, :, at_F].set(v, mode="drop")
    attended_RTA = attend(places.by_row(q), prefix, past, lengths_R, k_RKCP, v_RKPC, at_R, config.sliding_window)
    return layer.attention_output_and_mlp(x_FD[None], places.flat(attended_RTA)[None])[0], (k_RKCP, v_RKPC)


@functools.partial(jax.jit, donate_argnames="block")
def append(block, buffer, offset, rows_B, lengths_B, counts_B):
    """Appends the first `counts_B` positions of a layer's buffer to some rows of a block, where they fall inside it.

    `block` is the keys and values from position `offset` on, updated in place; other positions keep their contents.
    """
    k_BKCP, v_BKPC = buffer
    v_BPKC = v_BKPC.transpose(0, 2, 1, 3)
    fresh = k_BKCP.transpose(0, 3, 1, 2), v_BPKC.reshape(*v_BPKC.shape[:3], block[1].shape[2], -1)
    where = offset, rows_B, lengths_B, counts_B
    return jax.lax.platform_dependent(block, fresh, *where, cuda=append_at_once, default=append_by_row)


def append_at_once(block, fresh, offset, rows_B, lengths_B, counts_B):
    """`append` as a scatter: two kernels on a GPU, where a loop over rows launches hundreds."""
    (k_BPKC, v_BPKJY), tile = fresh, block[0].shape[4]
    index_P = jnp.arange(k_BPKC.shape[1])
    at_BP = lengths_B[:, None] + index_P - offset
    tile_BP = jnp.where((index_P < counts_B[:, None]) & (at_BP >= 0), at_BP // tile, block[0].shape[2])  # else dropped
    row_B1 = rows_B[:, None]
    return (
        block[0].at[row_B1, :, tile_BP, :, at_BP % tile].set(k_BPKC, mode="drop"),
        block[1].at[row_B1, :, :, tile_BP, at_BP % tile].set(v_BPKJY, mode="drop"),
    )


def append_by_row(block, fresh, offset, rows_B, lengths_B, counts_B):
    """`append` as a loop: each row reads, updates and writes back the tiles that the buffer can touch."""
    tile = block[0].shape[4]
    tiles = min(-(-fresh[0].shape[1] // tile) + 1, block[0].shape[2])
    margin = tiles * tile  # on both sides of the buffer, so that no slice is clamped
    padded = [jnp.pad(x, ((0, 0), (margin, margin), *[(0, 0)] * (x.ndim - 2))) for x in fresh]
    start_B = jnp.clip((lengths_B - offset) // tile, 0, block[0].shape[2] - tiles)
    first_B = offset + start_B * tile - lengths_B  # position in the buffer of the first tile's start

    def write(index, old, padded, order, corner):
        new = jax.lax.dynamic_slice_in_dim(padded[index], first_B[index] + margin, margin)
        position_M = first_B[index] + jnp.arange(margin)
        counted = (position_M >= 0) & (position_M < counts_B[index])
        counted = counted.reshape(margin, *[1] * (new.ndim - 1))
        new, counted = (x.reshape(tiles, tile, *x.shape[1:]).transpose(order)[None] for x in (new, counted))
        corner = rows_B[index], *corner
        kept = jax.lax.dynamic_slice(old, corner, new.shape)
        return jax.lax.dynamic_update_slice(old, jnp.where(counted, new, kept), corner)

    def write_both(index, block):
        start = start_B[index]
        return (
            write(index, block[0], padded[0], (2, 0, 3, 1), (0, start, 0, 0)),
            write(index, block[1], padded[1], (2, 3, 0, 1, 4), (0, 0, start, 0, 0)),
        )

    return jax.lax.fori_loop(0, len(lengths_B), write_both, block)


def empty_buffer(config, rows: int, length: int, dtype):
    """A zeroed buffer for the keys and values that a layer computes in one call."""
    K, C = config.num_key_value_heads, config.head_dim
    return jnp.zeros((rows, K, C, length), dtype), jnp.zeros((rows, K, length, C), dtype)


@jax.jit
def look_up(embed, ids_F):
    """Embeddings [F, D] in one compiled call, where indexing outside jit takes several."""
    return embed[ids_F]


@functools.partial(jax.jit, static_argnames=("config", "rows", "sizes", "tile", "dtype"))
def empty_cache(config, rows: int, sizes: tuple[int, ...], tile: Tile, dtype):
    """A zeroed KV cache for a group: per layer, one block per entry of `sizes` (in tiles)."""
    K, C, (W, _) = config.num_key_value_heads, config.head_dim, tile
    Y = math.gcd(C, tile.channels)
    shapes = [((rows, K, size, C, W), (rows, K, C // Y, size, W, Y)) for size in sizes]
    return [
        [(jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for keys, values in shapes]
        for _ in range(config.num_hidden_layers)
    ]


class PrefillBatch(NamedTuple):
    """New ids of B rows of a group, row after row."""

    rows_B: np.ndarray  # row of the group
    lengths_B: np.ndarray  # ids already in the cache
    counts_B: np.ndarray  # new ids
    row_F: np.ndarray  # the row (0..B-1) of each id; B for padding
    index_F: np.ndarray  # index of each id among the row's new ids


@functools.partial(jax.jit, static_argnames=("graph", "config", "width"), donate_argnames="x_FD")
def prefill_layer(graph, config, weights, x_FD, batch: PrefillBatch, prefix, past, *, width: int):
    """Runs a layer on a prefill batch [F, D] of at most `width` ids per row, which follow the prefix and `past`.

    Returns its output and the rows' buffer. One layer per call, so that all layers share one compiled program.
    """
    rows_B, lengths_B = batch.rows_B, batch.lengths_B
    places = Places(batch.row_F, batch.index_F, rows=len(rows_B), width=width)
    positions_F = prefix[0].shape[-1] + lengths_B[batch.row_F] + batch.index_F
    rope, past = rope_angles(positions_F[None], config), jax.tree.map(lambda x: x[rows_B], past)
    buffer, start_B = empty_buffer(config, len(rows_B), width, x_FD.dtype), jnp.zeros_like(lengths_B)
    layer = graph.merge(weights)
    return run_layer(layer, config, x_FD, rope, places, prefix, past, lengths_B, buffer, start_B)


def codes_after(weights, x):
    """Weights and x, where XLA:CPU cannot decode NF4 codes before x is known.

    Otherwise it would decode all layers at once, or once for all steps, and hold the whole base in float32. The barrier
    that serves elsewhere is gone from a CPU's program before it is scheduled.
    """
    first = x.reshape(-1)[0]
    zero = (first != first).astype(jnp.uint4)  # 1 only if x is not a number, when nothing matters any more
    return jax.tree.map(lambda leaf: leaf ^ zero if leaf.dtype == jnp.uint4 else leaf, weights), x


class Sampled(NamedTuple):
    """What a chunk sampled, and what it took."""

    ids_RP: jax.Array
    logprobs_RP: jax.Array
    counts_R: jax.Array  # how many of the ids count
    steps_R: jax.Array  # steps that the row took part in


def run_layers(graph, config, decoder: DecoderWeights, ids_RT, places: Places, past, lengths_R, buffer, at_R):
    """Runs all layers on ids from position `at_R` of the buffer on. Returns hidden states [F, D] and the buffer."""
    positions_F = decoder.prefix[0][0].shape[-1] + (lengths_R + at_R)[places.row_F] + places.index_F
    rope, x_FD, filled = rope_angles(positions_F[None], config), decoder.embed[places.flat(ids_RT)], []
    for weights, prefix, blocks, fresh in zip(decoder.layers, decoder.prefix, past, buffer, strict=True):
        weights, x_FD = jax.lax.platform_dependent(
            weights, x_FD, cpu=codes_after, default=lambda *both: jax.lax.optimization_barrier(both)
        )
        layer = graph.merge(weights)
        x_FD, fresh = run_layer(layer, config, x_FD, rope, places, prefix, blocks, lengths_R, fresh, at_R)
        filled.append(fresh)
    return x_FD, filled


def draw(config, decoder: DecoderWeights, x_FD, params: SamplingParams, places: Places, counts_R):
    """The id drawn after each place and its log-probability, both [R, T]."""
    hidden_FD = rms_norm(x_FD, decoder.norm, config.rms_norm_eps)
    logits_FV = tiled_matmul(hidden_FD, decoder.head, jnp.float32)
    temperature_F, top_p_F, seed_F, drawn_F = (
        x_R[places.row_F] for x_R in (params.temperature, params.top_p, params.seed, params.drawn + counts_R)
    )
    ids_F = sample(logits_FV, temperature_F, top_p_F, seed_F, drawn_F + places.index_F)
    logprobs_F = jnp.take_along_axis(logits_FV, ids_F[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits_FV, axis=1)
    return places.by_row(ids_F), places.by_row(logprobs_F)


@functools.partial(jax.jit, static_argnames=("graph", "config", "chunk", "drafts", "early"))
def decode(
    graph,
    config,
    decoder: DecoderWeights,
    past,
    lengths_R,
    params: SamplingParams,
    text_RX,
    end_R,
    rows_R=None,
    *,
    chunk: int,
    drafts: int,
    early: bool,
) -> tuple[Sampled, list]:
    """Samples up to `params.limit` ids per row, at most `chunk`. Returns `Sampled` and the buffer.

    `past` holds, per layer, the blocks that the rows reach into; it is only read, in the rows `rows_R` (None: all,
    without a copy). Draw t of a request uses fold_in(PRNGKey(seed), t). The last sampled id of a row is in neither the
    cache nor the buffer. A step computes it and `drafts` more, looked up in `text_RX` [R, X], which ends with the row's
    last id at `end_R`, and with room for what is sampled. With `early`, the chunk ends as soon as half of its rows are
    done.
    """
    R, T = len(lengths_R), 1 + drafts
    past = past if rows_R is None else jax.tree.map(lambda x: x[rows_R], past)
    places = every_place(R, T)
    room = chunk + T  # positions after those that count hold what was computed in vain

    def step(state):
        text_RX, active_R, sampled, buffer = state
        counts_R = sampled.counts_R
        last_R1 = jnp.take_along_axis(text_RX, (end_R + counts_R)[:, None], axis=1)
        drafts_RD, usable_R = look_up_drafts(text_RX, end_R + counts_R, decoder.stops_V, T - 1)
        ids_RT = jnp.concatenate([last_R1, drafts_RD], axis=1)
        wanted_R = jnp.where(active_R, jnp.minimum(1 + usable_R, params.limit - counts_R), 0)
        x_FD, buffer = run_layers(graph, config, decoder, ids_RT, places, past, lengths_R, buffer, counts_R)
        drawn_RT, logprobs_RT = draw(config, decoder, x_FD, params, places, counts_R)
        new_R = jnp.where(active_R, accepted(ids_RT, drawn_RT, wanted_R), 0)
        text_RX = write_rows(text_RX, drawn_RT, end_R + 1 + counts_R)
        sampled = Sampled(
            ids_RP=write_rows(sampled.ids_RP, drawn_RT, counts_R),
            logprobs_RP=write_rows(sampled.logprobs_RP, logprobs_RT, counts_R),
            counts_R=counts_R + new_R,
            steps_R=sampled.steps_R + active_R,
        )
        last_R = jnp.take_along_axis(drawn_RT, jnp.maximum(new_R - 1, 0)[:, None], axis=1)[:, 0]
        active_R &= ~decoder.stops_V[last_R] & (sampled.counts_R < params.limit)
        return text_RX, active_R, sampled, buffer

    nothing_R, asked_R = jnp.zeros(R, jnp.int32), params.limit > 0
    sampled = Sampled(jnp.zeros((R, room), jnp.int32), jnp.zeros((R, room), jnp.float32), nothing_R, nothing_R)
    buffer = [empty_buffer(config, R, room, decoder.embed.dtype) for _ in decoder.layers]
    spared = asked_R.sum() // 2 if early else 0
    state = (text_RX, asked_R, sampled, buffer)
    *_, sampled, buffer = jax.lax.while_loop(lambda state: state[1].sum() > spared, step, state)
    return sampled, buffer


def write_rows(array_RX, part_RT, at_R):
    """The array with a part of each row replaced from position `at_R` on."""
    return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(array_RX, part_RT, at_R, 0)


def sample(logits_RV, temperature_R, top_p_R, seed_R, t_R):
    """Draw t of each row [R] int32 from softmax(logits / temperature); at temperature 0, the first largest logit.

    With top_p < 1, draws only from the smallest set of likeliest ids whose probability reaches top_p (and ids tied with
    the last of them). Takes one uniform number per row and looks it up in the cumulative weights of groups of ids, then
    within the group: noise per id and sums over the whole vocabulary take longer than a layer on a CPU.
    """
    R, V = logits_RV.shape
    keys = jax.vmap(lambda seed, t: jax.random.fold_in(jax.random.PRNGKey(seed), t))(seed_R, t_R)
    uniform_R = jax.vmap(jax.random.uniform)(keys)
    top_R1 = logits_RV.max(axis=1, keepdims=True)
    greedy_R = jnp.where(logits_RV == top_R1, jnp.arange(V), V).min(axis=1)
    weights_RV = jnp.exp((logits_RV - top_R1) / jnp.where(temperature_R > 0, temperature_R, 1.0)[:, None])
    # Only if some row needs it: it takes longer than everything else here.
    weights_RV = jax.lax.cond((top_p_R < 1).any(), nucleus, lambda weights_RV, _: weights_RV, weights_RV, top_p_R)
    size = math.isqrt(V - 1) + 1
    weights_RGI = jnp.pad(weights_RV, ((0, 0), (0, size**2 - V))).reshape(R, size, size)
    sums_RG = weights_RGI.sum(axis=2)
    group_R, rest_R = pick(sums_RG, uniform_R * sums_RG.sum(axis=1))
    inside_R, _ = pick(jnp.take_along_axis(weights_RGI, group_R[:, None, None], axis=1)[:, 0], rest_R)
    return jnp.where(temperature_R > 0, group_R * size + inside_R, greedy_R).astype(jnp.int32)


def nucleus(weights_RV, top_p_R):
    """Zeroes the weights outside the top-p nucleus (Holtzman et al. 2020); the largest, which is 1, always stays.

    The smallest weight inside is found by bisecting its bits, which are ordered like the floats from 0 on: a sort of a
    vocabulary of 150,000 takes longer to run, and a TPU's compiler does not come to its end within 20 minutes.
    """
    target_R = top_p_R * weights_RV.sum(axis=1)

    def halve(_, bounds):
        low_R, high_R = bounds
        middle_R = (low_R + high_R) // 2
        least_R = jax.lax.bitcast_convert_type(middle_R, jnp.float32)
        enough_R = jnp.where(weights_RV >= least_R[:, None], weights_RV, 0.0).sum(axis=1) >= target_R
        return jnp.where(enough_R, middle_R, low_R), jnp.where(enough_R, high_R, middle_R)

    ends = np.float32([0, 1]).view(np.int32) + [0, 1]
    low_R, _ = jax.lax.fori_loop(0, 30, halve, tuple(jnp.full(len(top_p_R), end, jnp.int32) for end in ends))
    least_R = jax.lax.bitcast_convert_type(low_R, jnp.float32)
    return jnp.where((weights_RV < least_R[:, None]) & (top_p_R[:, None] < 1), 0.0, weights_RV)


def pick(weights_RX, target_R):
    """The first index whose cumulative weight exceeds the target [R], and the target minus the weight before it.

    A target that rounding raised to the total is lowered, so that no index of weight 0 is ever picked.
    """
    cumulative_RX = jnp.cumsum(weights_RX, axis=1)
    target_R = jnp.minimum(target_R, cumulative_RX[:, -1] * (1 - 2**-23))
    before_RX = cumulative_RX <= target_R[:, None]
    return before_RX.sum(axis=1), target_R - jnp.where(before_RX, cumulative_RX, 0.0).max(axis=1)

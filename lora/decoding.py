"""What a sampler computes: attention over a cache that lies in blocks, a chunk of prefill, a chunk of decoding, draws.

Pure functions on arrays; which session lies where is `lora/engine.py`'s.

Shapes: R rows of a group, B of them that prefill, T tokens of a row, F tokens of several rows, P places of the buffer,
S places of a block of the cache = N tiles of W places, D model, H heads, K kv heads, X queries of a kv head, C head
dim, A = H * C, V vocabulary in G groups of I ids. A block is keys [slots, K, N, C, W] and values [slots, K, N, W, C]:
both products of attention then read it in the order it lies in, a few KiB at a time, which is up to eight times faster
on a CPU than other orders.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora.linear import FUSED, tiled_matmul
from lora.model import Layer, rms_norm, rope_angles

# How the base lies while it samples: dense in float32 with the adapter added, dense in bfloat16 with the adapter beside
# it (a sum in bfloat16 would round most of it away), or as the model has it, NF4, decoded at every step.
RolloutWeights = Literal["fp32", "bf16", "nf4"]
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


class DecoderWeights(NamedTuple):
    """A model as decoding wants it: one set of arrays per layer, so that no step slices stacked weights."""

    embed: jax.Array
    norm: jax.Array
    head: jax.Array  # as `tiled_matmul` reads it
    stops_V: jax.Array  # which ids end a reply
    layers: list
    prefix: list  # of each layer, keys [K, C, S] and values [K, S, C] of what all sessions begin with; S may be 0


class SamplingParams(NamedTuple):
    """What decoding needs to know of each row, [R] each."""

    first_id: np.ndarray
    limit: np.ndarray  # how many ids it may sample now; 0 for a row that fills up the batch
    drawn: np.ndarray  # how many it sampled in earlier chunks
    temperature: np.ndarray
    top_p: np.ndarray
    seed: np.ndarray


class Graph:
    """A layer's nnx graph as a static argument of jit: hashed once, as hashing it at every call takes 0.3 ms."""

    def __init__(self, graph: nnx.GraphDef):
        self._graph, self._hash = graph, hash(graph)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return isinstance(other, Graph) and self._graph == other._graph

    def merge(self, weights: nnx.State):
        return nnx.merge(self._graph, weights)


def attend(q_RTHC, prefix, past, lengths_R, k_RKCP, v_RKPC, at, window):
    """Attention of T new tokens over the prefix, the cache (places before the row's length) and the buffer (up to
    themselves).

    `past` is a list of blocks; the tokens are at places `at`.. of the buffer, and a row's first place comes after the
    prefix. The softmax is one over all pieces: each is weighted relative to the largest score of all, and sums are
    added. Returns [R, T, H * C].
    """
    R, T, H, C = q_RTHC.shape
    K, P = k_RKCP.shape[1], k_RKCP.shape[3]
    q_RKXC = (q_RTHC * C**-0.5).reshape(R, T, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(R, K, -1, C)
    query_T = at + jnp.arange(T)

    def hide(scores_RKXS, seen_RTS, distance_RTS):
        if window is not None:
            seen_RTS = seen_RTS & (distance_RTS < window)
        scores = scores_RKXS.reshape(R, K, H // K, T, -1)
        return jnp.where(seen_RTS[:, None, None], scores, jnp.finfo(jnp.float32).min).reshape(scores_RKXS.shape)

    distance_1TP = (query_T[:, None] - jnp.arange(P))[None]
    scores = jnp.einsum("rkxc,rkcp->rkxp", q_RKXC, k_RKCP, preferred_element_type=jnp.float32)
    pieces, values, offset = [hide(scores, distance_1TP >= 0, distance_1TP)], [v_RKPC], 0
    for k_RKNCW, v_RKNWC in past:
        scores = cache_scores(q_RKXC, k_RKNCW)
        place_S = offset + jnp.arange(scores.shape[-1])
        before_R1S = (place_S < lengths_R[:, None])[:, None]
        pieces.append(hide(scores, before_R1S, lengths_R[:, None, None] + query_T[:, None] - place_S))
        values.append(v_RKNWC.reshape(R, K, -1, C))
        offset += scores.shape[-1]
    k_KCS, v_KSC = prefix
    if size := k_KCS.shape[-1]:
        scores = jnp.einsum("rkxc,kcs->rkxs", q_RKXC, k_KCS, preferred_element_type=jnp.float32)
        distance_RTS = lengths_R[:, None, None] + query_T[:, None] + size - jnp.arange(size)
        pieces.append(hide(scores, jnp.ones((1, 1, size), bool), distance_RTS))
    top = functools.reduce(jnp.maximum, (piece.max(axis=-1, keepdims=True) for piece in pieces))
    weights = [jnp.exp(piece - top) for piece in pieces]
    total = sum(piece.sum(axis=-1, keepdims=True) for piece in weights)
    weights = [piece.astype(q_RTHC.dtype) for piece in weights]
    read = sum(jnp.einsum("rkxs,rksc->rkxc", w, v) for w, v in zip(weights, values, strict=False))
    if size:
        read += jnp.einsum("rkxs,ksc->rkxc", weights[-1], v_KSC)
    read = (read / total).astype(q_RTHC.dtype).reshape(R, K, H // K, T, C)
    return read.transpose(0, 3, 1, 2, 4).reshape(R, T, H * C)


def cache_scores(q_RKXC, k_RKNCW):
    """Products of the queries with the keys of a block [R, K, X, S] float32."""
    R, K, X, C = q_RKXC.shape
    # One product a tile, with its own copy of the queries: left to itself XLA:CPU transposes the keys at every step.
    q_RKNXC = jnp.broadcast_to(q_RKXC[:, :, None], (R, K, k_RKNCW.shape[2], X, C))
    scores_RKNXW = jnp.einsum("rknxc,rkncw->rknxw", q_RKNXC, k_RKNCW, preferred_element_type=jnp.float32)
    return scores_RKNXW.swapaxes(2, 3).reshape(R, K, X, -1)


def run_layer(layer, config, x_RTD, rope, prefix, past, lengths_R, buffer, at):
    """One layer over T tokens of each row. Returns its output and the buffer with their keys and values at `at`..."""
    q, k, v = layer.queries_keys_values(x_RTD, rope)
    k_RKCP = jax.lax.dynamic_update_slice_in_dim(buffer[0], k.transpose(0, 2, 3, 1), at, axis=3)
    v_RKPC = jax.lax.dynamic_update_slice_in_dim(buffer[1], v.transpose(0, 2, 1, 3), at, axis=2)
    attended = attend(q, prefix, past, lengths_R, k_RKCP, v_RKPC, at, config.sliding_window)
    return layer.attention_output_and_mlp(x_RTD, attended), (k_RKCP, v_RKPC)


@functools.partial(jax.jit, donate_argnames="block")
def append(block, buffer, offset, rows_B, lengths_B, counts_B):
    """Appends the first `counts_B` places of a layer's buffer to some rows of a block, as far as they lie in it.

    `block` is keys and values from place `offset` on, changed in place. A row reads, changes and writes back as many
    tiles as the buffer can touch; places that are not its new ones keep what they have.
    """
    tile = block[0].shape[4]
    tiles = min(-(-buffer[0].shape[3] // tile) + 1, block[0].shape[2])
    margin = tiles * tile  # on both sides of the buffer, so that no slice of it is moved to fit
    start_B = jnp.clip((lengths_B - offset) // tile, 0, block[0].shape[2] - tiles)
    first_B = offset + start_B * tile - lengths_B  # place of the buffer at the first tile's first place

    def write(index, old, fresh, axis):
        first, corner = first_B[index], (rows_B[index], 0, start_B[index], 0, 0)
        padded = jnp.pad(fresh[index], [(margin, margin) if i == axis else (0, 0) for i in range(3)])
        new = jax.lax.dynamic_slice_in_dim(padded, first + margin, margin, axis)
        new = new.reshape(*new.shape[:axis], tiles, tile, *new.shape[axis + 1 :])
        new = new.swapaxes(1, axis)[None]
        place_NW = first + jnp.arange(margin).reshape(tiles, tile)
        counted = (place_NW >= 0) & (place_NW < counts_B[index])
        kept = jax.lax.dynamic_slice(old, corner, new.shape)
        new = jnp.where(counted[:, None] if axis == 2 else counted[:, :, None], new, kept)
        return jax.lax.dynamic_update_slice(old, new, corner)

    def write_both(index, block):
        return tuple(write(index, *each) for each in zip(block, buffer, (2, 1), strict=True))

    return jax.lax.fori_loop(0, len(lengths_B), write_both, block)


def empty_buffer(config, rows: int, places: int, dtype):
    """Zeros for the keys and values that a layer makes in one call."""
    K, C = config.num_key_value_heads, config.head_dim
    return jnp.zeros((rows, K, C, places), dtype), jnp.zeros((rows, K, places, C), dtype)


@jax.jit
def look_up(embed, ids_F):
    """Embeddings [F, D]; one call of a compiled program, where indexing outside of jit makes several."""
    return embed[ids_F]


@jax.jit
def take_layer(stacked, number):
    """The arrays of one layer."""
    return jax.tree.map(lambda x: x[number], stacked)


def decoding_layers(layers: Layer, weights: RolloutWeights) -> tuple[Graph, list]:
    """What decoding reads of each layer, made a layer at a time, and their common graph. The model stays as it is.

    Raises ValueError where NF4 is asked of a model that has none.
    """
    if weights == "nf4" and not layers.qkv.quantized:
        raise ValueError("the rollout weights were to be nf4, but the model's are dense: load it in NF4, or say fp32.")
    graph, stacked = nnx.split(layers)
    found = []
    for number in range(layers.config.num_hidden_layers):
        layer = nnx.merge(graph, take_layer(stacked, number))
        if weights != "nf4":
            dtype = DTYPES[weights]
            for name in FUSED:
                setattr(layer, name, getattr(layer, name).dense(dtype, merge=weights == "fp32"))
            for name in ("attention_norm", "mlp_norm"):
                setattr(layer, name, nnx.Param(getattr(layer, name)[...].astype(dtype)))
        one, arrays = nnx.split(layer)
        found.append(arrays)
    return Graph(one), found


@functools.partial(jax.jit, static_argnames=("config", "rows", "sizes", "tile", "dtype"))
def empty_cache(config, rows: int, sizes: tuple[int, ...], tile: int, dtype):
    """Zeros for the keys and values of a group: of each layer, of each block with its number of tiles."""
    K, C = config.num_key_value_heads, config.head_dim
    shapes = [((rows, K, size, C, tile), (rows, K, size, tile, C)) for size in sizes]
    return [
        [(jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for keys, values in shapes]
        for _ in range(config.num_hidden_layers)
    ]


class PrefillBatch(NamedTuple):
    """New ids of B rows of a group, those of a row one after the other: which row (0..B-1) each is of, and its place
    among the row's. What fills the F up has row B."""

    rows_B: np.ndarray
    lengths_B: np.ndarray
    counts_B: np.ndarray
    row_F: np.ndarray
    place_F: np.ndarray


@functools.partial(jax.jit, static_argnames=("graph", "config", "width"), donate_argnames="x_FD")
def prefill_layer(graph, config, weights, x_FD, pieces: PrefillBatch, prefix, past, *, width: int):
    """A layer over pieces [F, D], at most `width` ids a row, that follow the prefix and what the rows of `past` hold.

    Returns its output and the rows' buffer. Linear layers see the ids alone; attention sees rows filled up to `width`.
    One layer a call: all layers are compiled alike, so that there is one to compile.
    """
    rows_B, lengths_B, _, *where = pieces
    layer, B = graph.merge(weights), len(rows_B)
    positions_F = prefix[0].shape[-1] + lengths_B[pieces.row_F] + pieces.place_F
    q, k, v = layer.queries_keys_values(x_FD[None], rope_angles(positions_F[None], config))
    q_BTHC, k_BTKC, v_BTKC = (
        jnp.zeros((B, width, *x.shape[2:]), x.dtype).at[*where].set(x[0], mode="drop") for x in (q, k, v)
    )
    buffer = k_BTKC.transpose(0, 2, 3, 1), v_BTKC.transpose(0, 2, 1, 3)
    past = jax.tree.map(lambda x: x[rows_B], past)
    attended_BTA = attend(q_BTHC, prefix, past, lengths_B, *buffer, 0, config.sliding_window)
    return layer.attention_output_and_mlp(x_FD[None], attended_BTA[*where][None])[0], buffer


@functools.partial(jax.jit, static_argnames=("graph", "config", "places"))
def decode(graph, config, view: DecoderWeights, past, lengths_R, asked: SamplingParams, *, places: int):
    """Samples up to `asked.limit` ids a row. Returns ids [R, P], log-probabilities [R, P], counts [R] and the buffer.

    `past` holds, for each layer, the blocks that the rows reach into; it is read and not changed. Draw t of an ask is
    made from fold_in(PRNGKey(seed), t). The last sampled id of a row is in neither the cache nor the buffer.
    """
    R = len(lengths_R)

    def step(state):
        t, last_R, counts_R, active_R, ids_RP, logprobs_RP, buffer = state
        rope = rope_angles((view.prefix[0][0].shape[-1] + lengths_R + t)[:, None], config)
        x_RTD, filled = view.embed[last_R[:, None]], []
        for weights, prefix, blocks, fresh in zip(view.layers, view.prefix, past, buffer, strict=True):
            # Weights that wait for the layer's input cannot be decoded from NF4 before the loop and all be held there.
            weights, x_RTD = jax.lax.optimization_barrier((weights, x_RTD))
            x_RTD, fresh = run_layer(graph.merge(weights), config, x_RTD, rope, prefix, blocks, lengths_R, fresh, t)
            filled.append(fresh)
        hidden_RD = rms_norm(x_RTD[:, 0], view.norm, config.rms_norm_eps)
        logits_RV = tiled_matmul(hidden_RD, view.head, jnp.float32)
        ids_R = sample(logits_RV, asked.temperature, asked.top_p, asked.seed, asked.drawn + t)
        chosen_R = jnp.take_along_axis(logits_RV, ids_R[:, None], axis=1)[:, 0]
        logprobs_R = chosen_R - jax.nn.logsumexp(logits_RV, axis=1)
        ids_RP = jax.lax.dynamic_update_slice_in_dim(ids_RP, ids_R[:, None], t, axis=1)
        logprobs_RP = jax.lax.dynamic_update_slice_in_dim(logprobs_RP, logprobs_R[:, None], t, axis=1)
        counts_R = counts_R + active_R
        active_R = active_R & ~view.stops_V[ids_R] & (t + 1 < asked.limit)
        return t + 1, ids_R, counts_R, active_R, ids_RP, logprobs_RP, filled

    state = (
        jnp.int32(0),
        asked.first_id,
        jnp.zeros(R, jnp.int32),
        asked.limit > 0,
        jnp.zeros((R, places), jnp.int32),
        jnp.zeros((R, places), jnp.float32),
        [empty_buffer(config, R, places, view.embed.dtype) for _ in view.layers],
    )
    _, _, counts_R, _, ids_RP, logprobs_RP, buffer = jax.lax.while_loop(lambda state: state[3].any(), step, state)
    return ids_RP, logprobs_RP, counts_R, buffer


def sample(logits_RV, temperature_R, top_p_R, seed_R, t_R):
    """Draw t of each row [R] int32, from softmax(logits / temperature); at temperature 0 the first largest logit.

    Below a top_p of 1 only the likeliest ids are drawn from, as few as have that share of the weight together (and what
    is as likely as the last of them). One uniform number a row, looked up in the cumulated weights of groups of ids and
    then inside its group: noise for every id and sums over the whole vocabulary take longer than a layer on a CPU.
    """
    R, V = logits_RV.shape
    keys = jax.vmap(lambda seed, t: jax.random.fold_in(jax.random.PRNGKey(seed), t))(seed_R, t_R)
    uniform_R = jax.vmap(jax.random.uniform)(keys)
    top_R1 = logits_RV.max(axis=1, keepdims=True)
    greedy_R = jnp.where(logits_RV == top_R1, jnp.arange(V), V).min(axis=1)
    weights_RV = jnp.exp((logits_RV - top_R1) / jnp.where(temperature_R > 0, temperature_R, 1.0)[:, None])
    # Only where some row wants it: sorting the vocabulary takes longer than all else here.
    weights_RV = jax.lax.cond((top_p_R < 1).any(), nucleus, lambda weights_RV, _: weights_RV, weights_RV, top_p_R)
    size = math.isqrt(V - 1) + 1
    weights_RGI = jnp.pad(weights_RV, ((0, 0), (0, size**2 - V))).reshape(R, size, size)
    sums_RG = weights_RGI.sum(axis=2)
    group_R, rest_R = pick(sums_RG, uniform_R * sums_RG.sum(axis=1))
    inside_R, _ = pick(jnp.take_along_axis(weights_RGI, group_R[:, None, None], axis=1)[:, 0], rest_R)
    return jnp.where(temperature_R > 0, group_R * size + inside_R, greedy_R).astype(jnp.int32)


def nucleus(weights_RV, top_p_R):
    """The weights, with 0 for what top-p leaves out (Holtzman et al. 2020); at least the largest stays."""
    sorted_RV = jnp.sort(weights_RV, axis=1, descending=True)
    before_RV = jnp.cumsum(sorted_RV, axis=1) - sorted_RV
    inside_RV = before_RV < top_p_R[:, None] * sorted_RV.sum(axis=1, keepdims=True)
    least_R = jnp.where(inside_RV, sorted_RV, jnp.inf).min(axis=1)
    return jnp.where((weights_RV < least_R[:, None]) & (top_p_R[:, None] < 1), 0.0, weights_RV)


def pick(weights_RX, target_R):
    """The first place whose cumulated weight exceeds the target [R], and what the target exceeds the ones before by.

    A target that rounding brought up to the sum is lowered, so that no place of weight 0 is ever picked.
    """
    cumulated_RX = jnp.cumsum(weights_RX, axis=1)
    target_R = jnp.minimum(target_R, cumulated_RX[:, -1] * (1 - 2**-23))
    before_RX = cumulated_RX <= target_R[:, None]
    return before_RX.sum(axis=1), target_R - jnp.where(before_RX, cumulated_RX, 0.0).max(axis=1)

"""Samples from a Mistral in many sessions at once; a session's KV cache lives in a slot over all of its turns.

`extend` only queues ids and `ask` only says that a session may sample. A group of slots then prefills, in chunks of a
fixed width, all queued ids but the last of its asked sessions, and decodes in one jitted `while_loop` until every asked
row has sampled a stop id, reached its limit, filled its context or made a chunk of ids; `replies` gives what ended, the
other rows go on in their group's next chunk beside newly asked ones, and no group waits for another. Keys and values
made inside a call stay in a small buffer beside the cache, which is only read, and are written into it once at the end.
A `prefix` that all sessions begin with is computed and held once: attention reads it for all rows together. There may
be more sessions than slots: the one asked longest ago gives its slot up, and is computed anew when it is asked again.

What a row samples depends on its own ids, temperature, top_p and seed alone, to the last bit: chunks are cut by a row's
own length, blocks of the cache beyond it add exact zeros, and every call has the same number of rows, a group of slots.
(A session that lost its slot is prefilled where it was decoded before, which may change last bits.)
Left out: stop strings that are no set of ids.

    engine = Engine(model, slots=64, context=1024, max_new_tokens=64, stop_ids=[13])
    session = engine.open()
    engine.extend(session, prompt_ids)
    [reply] = engine.sample([(session, 0.7, 1234)])

Shapes: R rows of a call, T tokens of a chunk, P places of the buffer, S places of a block of the cache = N tiles of W
places, D model, H heads, K kv heads, X queries of a kv head, C head dim, V vocabulary in G groups of I ids. A block is
keys [slots, K, N, C, W] and values [slots, K, N, W, C]: both products of attention then read it in the order it lies
in, a few KiB at a time, which is up to eight times faster on a CPU than other orders.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora.linear import FUSED
from lora.mistral import Layer, Mistral, rms_norm, rotation

# Places of the first block of the cache; later ones end at 1.5, 2, 3, 4, 6, ... times as many, so that attention reads
# at most half more than its longest row needs, in few compiled shapes.
FIRST_BLOCK = 256
# Places of a tile of the cache: on a CPU, and on accelerators, whose registers are 128 wide.
TILE, ACCELERATOR_TILE = 64, 128
# Widths of prefill chunks; one is used while more than twice the next narrower one is left.
WIDTHS = (128, 32, 8)
# How the base lies while it samples: dense in float32 with the adapter added, dense in bfloat16 with the adapter beside
# it (a sum in bfloat16 would round most of it away), or as the model has it, NF4, decoded at every step.
RolloutWeights = Literal["fp32", "bf16", "nf4"]
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


class Reply(NamedTuple):
    """Ids that a row sampled, the stop id included, and their log-probabilities at temperature 1 among all ids."""

    ids: list[int]
    logprobs: list[float]


class View(NamedTuple):
    """A model as decoding wants it: one set of arrays per layer, so that no step slices stacked weights."""

    embed: jax.Array
    norm: jax.Array
    head_DV: jax.Array
    stops_V: jax.Array  # which ids end a reply
    layers: list
    prefix: list  # of each layer, keys [K, C, S] and values [K, S, C] of what all sessions begin with; S may be 0


class Asked(NamedTuple):
    """What decoding needs to know of each row, [R] each."""

    first_id: np.ndarray
    limit: np.ndarray  # how many ids it may sample now; 0 for a row that fills up the batch
    drawn: np.ndarray  # how many it sampled in earlier chunks
    temperature: np.ndarray
    top_p: np.ndarray
    seed: np.ndarray


@dataclasses.dataclass
class Row:
    """An ask under way: what was asked, and what has been sampled for it."""

    session: int
    temperature: float
    seed: int
    top_p: float
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)


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


def run_layer(layer, config, x_RTD, turn, prefix, past, lengths_R, buffer, at):
    """One layer over T tokens of each row. Returns its output and the buffer with their keys and values at `at`..."""
    q, k, v = layer.queries_keys_values(x_RTD, turn)
    k_RKCP = jax.lax.dynamic_update_slice_in_dim(buffer[0], k.transpose(0, 2, 3, 1), at, axis=3)
    v_RKPC = jax.lax.dynamic_update_slice_in_dim(buffer[1], v.transpose(0, 2, 1, 3), at, axis=2)
    attended = attend(q, prefix, past, lengths_R, k_RKCP, v_RKPC, at, config.sliding_window)
    return layer.finish(x_RTD, attended), (k_RKCP, v_RKPC)


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

    return jax.lax.fori_loop(0, len(rows_B), write_both, block)


def empty_buffer(config, rows: int, places: int, dtype):
    """Zeros for the keys and values that a layer makes in one call."""
    K, C = config.num_key_value_heads, config.head_dim
    return jnp.zeros((rows, K, C, places), dtype), jnp.zeros((rows, K, places, C), dtype)


@jax.jit
def look_up(embed, ids_BT):
    """Embeddings [B, T, D]; one call of a compiled program, where indexing outside of jit makes several."""
    return embed[ids_BT]


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


@functools.partial(jax.jit, static_argnames=("graph", "config"), donate_argnames="x_BTD")
def prefill_layer(graph, config, weights, x_BTD, prefix, past, rows_B, lengths_B):
    """A layer over chunks [B, T, D] that follow the prefix and what rows of `past` hold: its output and their buffer.

    One layer a call: all layers are compiled alike, so that there is one to compile.
    """
    B, T = x_BTD.shape[:2]
    turn = rotation(prefix[0].shape[-1] + lengths_B[:, None] + jnp.arange(T), config)
    past = jax.tree.map(lambda x: x[rows_B], past)
    buffer = empty_buffer(config, B, T, x_BTD.dtype)
    return run_layer(graph.merge(weights), config, x_BTD, turn, prefix, past, lengths_B, buffer, 0)


@functools.partial(jax.jit, static_argnames=("graph", "config", "places"))
def decode(graph, config, view: View, past, lengths_R, asked: Asked, *, places: int):
    """Samples up to `asked.limit` ids a row. Returns ids [R, P], log-probabilities [R, P], counts [R] and the buffer.

    `past` holds, for each layer, the blocks that the rows reach into; it is read and not changed. Draw t of an ask is
    made from fold_in(PRNGKey(seed), t). The last sampled id of a row is in neither the cache nor the buffer.
    """
    R = len(lengths_R)

    def step(state):
        t, last_R, counts_R, active_R, ids_RP, logprobs_RP, buffer = state
        turn = rotation((view.prefix[0][0].shape[-1] + lengths_R + t)[:, None], config)
        x_RTD, filled = view.embed[last_R[:, None]], []
        for weights, prefix, blocks, fresh in zip(view.layers, view.prefix, past, buffer, strict=True):
            # Weights that wait for the layer's input cannot be decoded from NF4 before the loop and all be held there.
            weights, x_RTD = jax.lax.optimization_barrier((weights, x_RTD))
            x_RTD, fresh = run_layer(graph.merge(weights), config, x_RTD, turn, prefix, blocks, lengths_R, fresh, t)
            filled.append(fresh)
        hidden_RD = rms_norm(x_RTD[:, 0], view.norm, config.rms_norm_eps)
        logits_RV = jnp.dot(hidden_RD, view.head_DV, preferred_element_type=jnp.float32)
        ids_R = sample(logits_RV, asked.temperature, asked.top_p, asked.seed, asked.drawn + t)
        chosen_R = jnp.take_along_axis(logits_RV, ids_R[:, None], axis=1)[:, 0]
        logprobs_R = chosen_R - jax.nn.logsumexp(logits_RV, axis=1)
        ids_RP = jax.lax.dynamic_update_slice_in_dim(ids_RP, ids_R[:, None], t, axis=1)
        logprobs_RP = jax.lax.dynamic_update_slice_in_dim(logprobs_RP, logprobs_R[:, None], t, axis=1)
        counts_R = counts_R + active_R
        active_R = active_R & ~view.stops_V[ids_R] & (t + 1 < asked.limit)
        return t + 1, ids_R, counts_R, active_R, ids_RP, logprobs_RP, filled

    state = (
        jnp.int32(0), asked.first_id, jnp.zeros(R, jnp.int32), asked.limit > 0, jnp.zeros((R, places), jnp.int32),
        jnp.zeros((R, places), jnp.float32), [empty_buffer(config, R, places, view.embed.dtype) for _ in view.layers],
    )  # fmt: skip
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


class Engine:
    """Sessions over one model, whose base lies as `weights` says; both dense forms are copies, made once here.

    `rows` is how many slots make a group: all of a group's rows decode even if one is asked, and groups run beside each
    other. `prefill_rows` is how many of a group's rows prefill together. `chunk` is after how many ids a group's rows
    that have not ended let others in. By default 8, 1 and never on a CPU; all slots, at most 8 and 32 on accelerators.
    Sessions begin with the ids of `prefix`, which count neither as theirs nor into `context`.
    """

    def __init__(
        self, model: Mistral, *, slots: int = 64, context: int = 1024, max_new_tokens: int = 64,
        stop_ids: Sequence[int], prefix: Sequence[int] = (), weights: RolloutWeights = "fp32", rows: int | None = None,
        prefill_rows: int | None = None, chunk: int | None = None,
    ):  # fmt: skip
        config, on_cpu = model.config, jax.default_backend() == "cpu"
        longest = config.max_position_embeddings - len(prefix)
        rows = (8 if on_cpu else slots) if rows is None else rows
        prefill_rows = (1 if on_cpu else 8) if prefill_rows is None else prefill_rows
        chunk = min((max_new_tokens if on_cpu else 32) if chunk is None else chunk, max_new_tokens)
        if not 1 <= context <= longest or min(slots, max_new_tokens, rows, prefill_rows, chunk) < 1:
            raise ValueError(
                f"Engine got slots={slots}, context={context}, max_new_tokens={max_new_tokens}, rows={rows}, "
                f"prefill_rows={prefill_rows}, chunk={chunk}; expected at least 1 of each, and a context of at most "
                f"the model's max_position_embeddings less the prefix's {len(prefix)} ids, {longest}."
            )
        self.slots, self.context, self.max_new_tokens = slots, context, max_new_tokens
        self.prefilled = 0  # ids whose keys and values were computed; those of sampled ids come on top
        self._chunk, self._stops = chunk, frozenset(stop_ids)
        self._config = config
        self._graph, layers = decoding_layers(model.layers, weights)
        stops_V = np.isin(np.arange(config.vocab_size), list(self._stops))
        dtype = DTYPES.get(weights, model.embed.dtype)
        embed, norm, head = (x.astype(dtype) for x in (model.embed[...], model.norm[...], model.unembed()))
        self._view = View(embed, norm, head.T, stops_V, layers, [])
        self._view = self._view._replace(prefix=self._prefix(prefix))

        self._tile = TILE if on_cpu else ACCELERATOR_TILE
        tiles = -(-context // self._tile)
        self._ends = [min(FIRST_BLOCK // self._tile, tiles)]  # where each block of the cache ends, in tiles
        while (end := self._ends[-1]) < tiles:
            self._ends.append(min(-(-3 * end // 2) if end & (end - 1) == 0 else 4 * end // 3, tiles))
        self._rows, self._prefill_rows = min(rows, slots), min(prefill_rows, rows, slots)
        sizes = tuple(np.diff([0, *self._ends]).tolist())
        groups = -(-slots // self._rows)
        self._cache = [empty_cache(config, self._rows, sizes, self._tile, dtype) for _ in range(groups)]
        # XLA:CPU runs what one thread dispatches in order; groups run beside each other from threads of their own.
        self._pool = ThreadPoolExecutor(min(len(self._cache), os.cpu_count() or 1))
        self._ids: dict[int, list[int]] = {}  # of each open session
        self._lengths: dict[int, int] = {}  # how many of them are in the cache
        self._slot: dict[int, int] = {}  # of the sessions that have one; the one asked longest ago comes first
        self._asked: dict[int, dict[int, Row]] = {}  # by group and session, ready for their (next) chunk
        self._unseated: list[Row] = []  # asked while all slots were busy
        self._running: dict[Future, int] = {}  # the groups that are decoding
        self._busy: set[int] = set()  # sessions whose reply is still to come

    def _prefix(self, ids: Sequence[int]) -> list:
        """Keys [K, C, S] and values [K, S, C] of each layer for what all sessions begin with."""
        C, dtype = self._config.head_dim, self._view.embed.dtype
        nothing = (jnp.zeros((self._config.num_key_value_heads, C, 0), dtype),) * 2
        nothing = nothing[0], nothing[1].swapaxes(1, 2)
        if not len(ids):
            return [nothing for _ in self._view.layers]
        x_BTD, found, zero = look_up(self._view.embed, np.array([ids], np.int32)), [], np.zeros(1, np.int32)
        for weights in self._view.layers:
            x_BTD, fresh = prefill_layer(self._graph, self._config, weights, x_BTD, nothing, [], zero, zero)
            found.append((fresh[0][0], fresh[1][0]))
        return found

    def open(self) -> int:
        """A new session: the lowest free number. It has the lowest free slot, or takes one when it is asked."""
        session = next(number for number in itertools.count() if number not in self._ids)
        self._ids[session], self._lengths[session] = [], 0
        if (slot := self._free_slot()) is not None:
            self._slot[session] = slot
        return session

    def extend(self, session: int, ids: Sequence[int]) -> None:
        """Appends ids; nothing is computed until it is asked, and answered None once more than `room` were appended."""
        self._ids[session].extend(ids)

    def close(self, session: int) -> None:
        """Ends the session. Raises ValueError while its reply is still to come."""
        if session in self._busy:
            raise ValueError(f"session {session} cannot be closed: its reply is still to come; take `replies` first.")
        del self._ids[session], self._lengths[session]
        self._slot.pop(session, None)

    def length(self, session: int) -> int:
        """How many ids the session holds, queued and sampled ones included."""
        return len(self._ids[session])

    def room(self, session: int) -> int:
        """How many more ids fit; negative if more were queued than fit."""
        return self.context - self.length(session)

    def ask(self, session: int, temperature: float, seed: int, top_p: float = 1.0) -> None:
        """Wants the session to sample until a stop id; temperature 0 is greedy, `seed` is a uint32 (see `sample`).

        Raises ValueError for a session that is asked already, not open, or has nothing queued, and for a top_p outside
        (0, 1].
        """
        if not 0 < top_p <= 1:
            raise ValueError(f"session {session} was asked with top_p={top_p}; expected more than 0 and at most 1.")
        if session in self._busy or len(self._ids.get(session, ())) == self._lengths.get(session, 0):
            raise ValueError(f"session {session} was asked: it must be open, extended and not be asked already.")
        self._busy.add(session)
        row = Row(session, temperature, seed, top_p)
        if session in self._slot:
            self._start(row, self._slot.pop(session))
        else:
            self._unseated.append(row)
            self._seat()

    def _start(self, row: Row, slot: int) -> None:
        """Lets a session sample in that slot, as the one asked last."""
        self._slot[row.session] = slot
        self._asked.setdefault(slot // self._rows, {})[row.session] = row

    def _free_slot(self) -> int | None:
        return min(set(range(self.slots)).difference(self._slot.values()), default=None)

    def _seat(self) -> None:
        """Gives asked sessions free slots, or those of the sessions that are not busy and were asked longest ago."""
        while self._unseated:
            slot = self._free_slot()
            if slot is None:
                loser = next((session for session in self._slot if session not in self._busy), None)
                if loser is None:
                    return
                slot, self._lengths[loser] = self._slot.pop(loser), 0
            self._start(self._unseated.pop(0), slot)

    def replies(self, wait: bool = True) -> dict[int, Reply | None]:
        """What asked sessions have sampled since, as soon as one group of slots has made a chunk.

        A group starts when all of its sessions are asked or not done yet; one where some are not starts if `wait` is
        true and no other runs. A reply without a stop id ended at max_new_tokens or at the end of the context; None
        says that the context had no room left for a single id (nothing was computed for that session). Sampled ids
        belong to the session. There may be none.
        """
        seated = Counter(slot // self._rows for slot in self._slot.values())
        idle = [group for group, rows in self._asked.items() if rows and group not in self._running.values()]
        whole = [group for group in idle if len(self._asked[group]) == seated[group]]
        for group in whole or (idle if wait and not self._running else []):
            self._running[self._pool.submit(self._sample_group, group, [*self._asked.pop(group).values()])] = group
        done, _ = wait_for(self._running, timeout=None if wait else 0, return_when=FIRST_COMPLETED)
        replies = {}
        for future in done:
            group, (ended, others, computed) = self._running.pop(future), future.result()
            replies |= ended
            self.prefilled += computed
            self._asked.setdefault(group, {}).update((row.session, row) for row in others)
        self._busy -= replies.keys()
        self._seat()
        return replies

    def sample(self, asks: Sequence[tuple]) -> list[Reply | None]:
        """The replies to all asks (session, temperature, seed), or with top_p after them, in their order."""
        replies = {}
        for ask in asks:
            self.ask(*ask)
        while len(replies) < len(asks):
            replies |= self.replies()
        return [replies[ask[0]] for ask in asks]

    def _sample_group(self, group: int, members: list[Row]) -> tuple[dict[int, Reply | None], list[Row], int]:
        """One chunk for the asks of one group, whose cache and asked sessions no other thread touches.

        Returns the replies that ended, the rows that did not, and how many ids were prefilled.
        """
        replies: dict[int, Reply | None] = {row.session: None for row in members if self.room(row.session) <= 0}
        members, others = [row for row in members if row.session not in replies], []
        if not members:
            return replies, others, 0
        computed = self._prefill(group, [row.session for row in members])
        ids_RP, logprobs_RP, counts_R = (np.asarray(x) for x in self._decode(group, members))
        for row in members:
            index, session = self._slot[row.session] % self._rows, row.session
            count = int(counts_R[index])
            fresh = ids_RP[index, :count].tolist()
            row.ids += fresh
            row.logprobs += logprobs_RP[index, :count].tolist()
            self._ids[session] += fresh
            self._lengths[session] += count  # all but the last, and the one before the first
            if row.ids[-1] in self._stops or len(row.ids) == self.max_new_tokens or self.room(session) == 0:
                replies[session] = Reply(row.ids, row.logprobs)
            else:
                others.append(row)
        return replies, others, computed

    def _prefill(self, group: int, sessions: list[int]) -> int:
        """Puts all ids but the last into the cache, in chunks that are cut by a session's own ids alone.

        Returns how many were computed.
        """
        computed = 0

        def left(session: int) -> int:
            return len(self._ids[session]) - 1 - self._lengths[session]

        for width, narrower in zip(WIDTHS, (*WIDTHS[1:], 0), strict=True):
            while members := [session for session in sessions if left(session) > 2 * narrower]:
                members = members[: self._prefill_rows]
                rows_B, lengths_B, counts_B = np.zeros((3, self._prefill_rows), np.int32)
                ids_BT = np.zeros((self._prefill_rows, width), np.int32)
                for index, session in enumerate(members):
                    start, count = self._lengths[session], min(width, left(session))
                    ids_BT[index, :count] = self._ids[session][start : start + count]
                    rows_B[index], lengths_B[index], counts_B[index] = self._slot[session] % self._rows, start, count
                # Every other reach, so that there are half as many shapes to compile: a chunk reads few rows.
                reached, touched = self._reach(members) | 1, self._touched(lengths_B, counts_B)
                x_BTD = look_up(self._view.embed, ids_BT)
                for layer, weights in enumerate(self._view.layers):
                    past = self._cache[group][layer][:reached]
                    x_BTD, fresh = prefill_layer(
                        self._graph, self._config, weights, x_BTD, self._view.prefix[layer], past, rows_B, lengths_B
                    )
                    self._append(group, layer, touched, fresh, rows_B, lengths_B, counts_B)
                computed += int(counts_B.sum())
                for session, count in zip(members, counts_B.tolist(), strict=False):
                    self._lengths[session] += count
        return computed

    def _decode(self, group: int, members: list[Row]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Decodes a chunk of a group's asks; returns ids [R, P], log-probabilities [R, P] and counts [R]."""
        i, f, u = np.int32, np.float32, np.uint32
        asked = Asked(*(np.zeros(self._rows, dtype) for dtype in (i, i, i, f, f, u)))
        asked.top_p[:] = 1
        lengths_R = np.zeros(self._rows, np.int32)
        for member in members:
            row, drawn = self._slot[member.session] % self._rows, len(member.ids)
            lengths_R[row] = self._lengths[member.session]
            asked.first_id[row], asked.drawn[row] = self._ids[member.session][-1], drawn
            asked.limit[row] = min(self._chunk, self.max_new_tokens - drawn, self.room(member.session))
            asked.temperature[row], asked.top_p[row], asked.seed[row] = member.temperature, member.top_p, member.seed
        reached = self._reach([member.session for member in members])
        past = [blocks[:reached] for blocks in self._cache[group]]
        ids_RP, logprobs_RP, counts_R, buffer = decode(
            self._graph, self._config, self._view, past, lengths_R, asked, places=self._chunk
        )
        touched, rows_R = self._touched(lengths_R, asked.limit), np.arange(self._rows, dtype=np.int32)
        for layer, fresh in enumerate(buffer):
            self._append(group, layer, touched, fresh, rows_R, lengths_R, counts_R)
        return ids_RP, logprobs_RP, counts_R

    def _reach(self, sessions: list[int]) -> int:
        """How many blocks of the cache the longest of some sessions reaches into."""
        longest = max(self._lengths[session] for session in sessions)
        return int(np.searchsorted([0, *self._ends], -(-longest // self._tile)))

    def _touched(self, lengths_B, limit_B) -> list[tuple[int, int]]:
        """The blocks, with their first places, that at most `limit_B` new places of some rows can lie in."""
        first, last = lengths_B[limit_B > 0].min(), (lengths_B + limit_B)[limit_B > 0].max()
        spans = enumerate(itertools.pairwise(end * self._tile for end in [0, *self._ends]))
        return [(index, start) for index, (start, end) in spans if first < end and last > start]

    def _append(self, group: int, layer: int, touched: list[tuple[int, int]], buffer, rows_B, lengths_B, counts_B):
        """Writes the first `counts_B` places of a layer's buffer into the blocks that they can lie in."""
        blocks = self._cache[group][layer]
        for index, start in touched:
            blocks[index] = append(blocks[index], buffer, start, rows_B, lengths_B, counts_B)

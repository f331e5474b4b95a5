"""A group of slots on one device: their KV cache, and the prefill and decoding of a chunk for all of its sessions.

    group = Group(how, weights, device)
    outcome = group.run([Member(row, session, request), ...], seen)

A group prefills all queued ids but the last of its sessions, several sessions per batch, and decodes in one jitted
`while_loop`. Keys and values computed in a call stay in a small buffer; the cache is only read, and the buffer is
written into it once at the end.
Left out: which session has which slot (engine.py), the computations (decoding.py).

Shapes: R rows of a group, F tokens of several rows, P positions of the buffer, D model, K kv heads, C head dim, S
positions of the prefix, X ids of the text in which drafts are looked up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora.config import Config
from lora.decoder import Decoder, DecoderWeights, Graph
from lora.decoding import (
    PrefillBatch,
    Sampled,
    SamplingParams,
    Tile,
    append,
    decode,
    empty_cache,
    look_up,
    prefill_layer,
)
from lora.flops import matmul_weights
from lora.speculation import NOTHING

# Positions in the first block of the cache; later blocks end at 1.5, 2, 3, 4, 6, ... times that, so that attention
# reads at most 50 % more than its longest row needs, with few compiled shapes.
FIRST_BLOCK = 256
# Maximum ids per row in a prefill batch: a width is used while more ids are left than the next narrower one.
WIDTHS = (128, 32, 8)
# Ids of all rows in a prefill batch: the smallest size that holds them, or the largest that they fill. From 64 rows on,
# a row of a matmul has the same bits whatever the number of rows; with tiled weights (linear.py), up to 128.
SIZES, TILED_SIZES = (64, 96, 128, 192, 256, 1024), (16, 32, 64, 96, 128)
# Rows of a chunk that a part of a group decodes at least: fewer are hardly faster, and more to compile.
FEWEST = 4
# What a step of a chunk takes on a CPU, in the time that a row without a cache adds (bench.decode): rows that it takes
# anyway, and positions in the cache that take a row's time again. And what a prefill batch takes anyway, in ids.
STEP, POSITIONS, BATCH = 4, 1500, 8


class Reply(NamedTuple):
    """Sampled ids, including the stop id, and their log-probabilities at temperature 1 over the whole vocabulary."""

    ids: list[int]
    logprobs: list[float]


@dataclass
class Session:
    """The ids of a session, queued and sampled, and how many of them are in the cache of its slot."""

    ids: list[int] = field(default_factory=list)
    cached: int = 0


@dataclass
class Request:
    """A pending request: its sampling parameters, and what has been sampled so far."""

    session: int
    temperature: float
    seed: int
    top_p: float
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Member(NamedTuple):
    """A session with a request, in a row of the group."""

    row: int
    session: Session
    request: Request


def decoded_rows(members: int, rows: int) -> int:
    """The rows of a chunk for so many members: all of the group, or half of it or a quarter if these have room, but at
    least `FEWEST`."""
    while rows % 2 == 0 and rows // 2 >= max(members, FEWEST):
        rows //= 2
    return rows


def cheapest_cuts(count: int, cost: Callable[[int, int], float]) -> list[slice]:
    """Cuts a sequence of `count` into the parts whose costs, of (start, end), have the smallest sum."""
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, count + 1):
        best.append(min((best[start][0] + cost(start, end), start) for start in range(end)))
    cuts, end = [], count
    while end:
        cuts.append(slice(best[end][1], end))
        end = best[end][1]
    return cuts[::-1]


def parts(reaches: Sequence[int], rows: int) -> list[slice]:
    """Cuts the members of a group of so many rows, which reach into so many positions, ascending, into the parts that
    decode fastest one after the other: a row reads as far as the longest of its part."""

    def cost(start: int, end: int) -> float:
        return STEP + decoded_rows(end - start, rows) * (1 + reaches[end - 1] / POSITIONS)

    return cheapest_cuts(len(reaches), cost)


class Outcome(NamedTuple):
    """What a chunk did: replies by session (None: no room for an id), unfinished requests, and counts of ids."""

    replies: dict[int, Reply | None]
    unfinished: list[Request]
    prefilled: int = 0  # ids computed by prefill
    sampled: int = 0
    steps: int = 0  # steps of all rows

    def plus(self, other: Outcome) -> Outcome:
        """Both together, of different sessions."""
        return Outcome(self.replies | other.replies, *(a + b for a, b in zip(self[1:], other[1:], strict=True)))


@dataclass(frozen=True, kw_only=True)
class How:
    """What all groups of an engine have in common."""

    config: Config
    graph: Graph
    rows: int
    tile: Tile
    context: int
    max_new_tokens: int
    chunk: int
    stops: frozenset[int]
    drafts: int
    early: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """The blocks of the cache, in tiles."""
        return cache_sizes(self.context, self.tile.positions)


def cache_sizes(context: int, tile: int) -> tuple[int, ...]:
    """The number of tiles in each block of a cache for `context` positions."""
    tiles = -(-context // tile)
    ends = [min(FIRST_BLOCK // tile, tiles)]
    while (end := ends[-1]) < tiles:
        ends.append(min(-(-3 * end // 2) if end & (end - 1) == 0 else 4 * end // 3, tiles))
    return tuple(np.diff([0, *ends]).tolist())


def prefill_size(ids: int, sizes: Sequence[int]) -> int:
    """The size of the next prefill batch for `ids` queued ids.

    The smallest of `sizes` that holds them all, unless it is more than twice the largest that they fill; then the
    latter.
    """
    filled = max((size for size in sizes if size <= ids), default=sizes[0])
    return next((size for size in sizes if ids <= size <= 2 * filled), filled)


def prefill_prefix(decoder: Decoder, ids: Sequence[int]) -> list:
    """Keys [K, C, S] and values [K, S, C] of a prefix that all sessions share, per layer."""
    weights, K, C = decoder.weights, decoder.config.num_key_value_heads, decoder.config.head_dim
    empty = jnp.zeros((K, C, 0), weights.embed.dtype), jnp.zeros((K, 0, C), weights.embed.dtype)
    if not len(ids):
        return [empty for _ in weights.layers]
    x_FD, prefix, zero = look_up(weights.embed, np.array(ids, np.int32)), [], np.zeros(1, np.int32)
    row_F, index_F = np.zeros(len(ids), np.int32), np.arange(len(ids), dtype=np.int32)
    batch = PrefillBatch(rows_B=zero, lengths_B=zero, counts_B=zero, row_F=row_F, index_F=index_F)
    for layer in weights.layers:
        x_FD, fresh = prefill_layer(decoder.graph, decoder.config, layer, x_FD, batch, empty, [], width=len(ids))
        prefix.append((fresh[0][0], fresh[1][0]))
    return prefix


class Group:
    """The slots of a group. One thread at a time may use it, and the sessions of its rows."""

    def __init__(self, how: How, weights: DecoderWeights, device: jax.Device):
        self._how, self.weights = how, weights
        with jax.default_device(device):
            cache = empty_cache(how.config, how.rows, how.sizes, how.tile, weights.embed.dtype)
        self._cache = jax.device_put(cache, device)  # committed, as the weights are
        self._ends = (np.cumsum(how.sizes) * how.tile.positions).tolist()  # of each block, in positions
        # W^T, codes and adapters have two axes.
        self.tiled = all(array.ndim != 2 for array in jax.tree.leaves(weights.layers[0]))

    def run(self, members: list[Member], seen: np.ndarray) -> Outcome:
        """Runs a chunk for the requests of members. Drafts are looked up in the ids `seen` and in their own.

        Raises ValueError for a model whose log-probabilities are not finite.
        """
        how = self._how
        full = {each.request.session: None for each in members if len(each.session.ids) >= how.context}
        members = [each for each in members if each.request.session not in full]
        members.sort(key=lambda each: len(each.session.ids))  # those that compute together reach about as far
        outcome = Outcome(full, [], prefilled=self._prefill(members) if members else 0)
        cuts = [slice(None)] if members else []
        if self.tiled:  # whose bits do not depend on how many rows there are
            cuts = parts([[0, *self._ends][self._reach([each.session])] for each in members], how.rows)
        for cut in cuts:
            outcome = outcome.plus(self._decode_part(members[cut], seen))
        return outcome

    def _decode_part(self, members: list[Member], seen: np.ndarray) -> Outcome:
        """Decodes a chunk for some members: in as few rows as they need, if the weights are tiled."""
        how, outcome = self._how, Outcome({}, [])
        rows = decoded_rows(len(members), how.rows) if self.tiled else how.rows
        rows_R = np.arange(rows, dtype=np.int32)
        if rows < how.rows:
            rows_R[: len(members)] = [each.row for each in members]
            members = [each._replace(row=index) for index, each in enumerate(members)]
        sampled = Sampled(*(np.asarray(x) for x in self._decode(rows_R, members, seen)))
        for row, session, request in members:
            count = int(sampled.counts_R[row])
            if not np.isfinite(sampled.logprobs_RP[row, :count]).all():
                raise ValueError("the model's log-probabilities are not finite: its base or its adapter is damaged.")
            fresh = sampled.ids_RP[row, :count].tolist()
            request.ids += fresh
            request.logprobs += sampled.logprobs_RP[row, :count].tolist()
            session.ids += fresh
            session.cached += count  # the last queued id and all sampled ids but the last
            ended = request.ids[-1] in how.stops or len(request.ids) == how.max_new_tokens
            if ended or len(session.ids) == how.context:
                outcome.replies[request.session] = Reply(request.ids, request.logprobs)
            else:
                outcome.unfinished.append(request)
        return outcome._replace(sampled=int(sampled.counts_R.sum()), steps=int(sampled.steps_R.sum()))

    def _prefill(self, members: list[Member]) -> int:
        """Prefills all ids but the last, split by each session's own length only. Returns how many were computed."""
        computed = 0
        for width, narrower in zip(WIDTHS, (*WIDTHS[1:], 0), strict=True):
            while True:
                left = [(each, len(each.session.ids) - 1 - each.session.cached) for each in members]
                counts = [(each, min(width, ids)) for each, ids in left if ids > narrower]
                if not counts:
                    break
                for cut in self._batches(counts, width):
                    self._prefill_batch(counts[cut], width)
                computed += sum(count for _, count in counts)
        return computed

    def _batches(self, counts: list[tuple[Member, int]], width: int) -> list[slice]:
        """Cuts members and the numbers of their next ids, at most `width` each, into the batches that take least."""
        config = self._how.config
        ids = np.cumsum([0, *(count for _, count in counts)]).tolist()
        reaches = [[0, *self._ends][self._reach([each.session])] for each, _ in counts]
        heads = 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        position = (
            (width + 8) * heads / matmul_weights(config)
        )  # in the time of an id; 8: taking a row out of the cache

        def cost(start: int, end: int) -> float:
            size, rows = self._batch_shape(ids[end] - ids[start], width)
            fits = end - start <= rows and ids[end] - ids[start] <= size
            return BATCH + size + rows * reaches[end - 1] * position if fits else math.inf

        return cheapest_cuts(len(counts), cost)

    def _batch_shape(self, ids: int, width: int) -> tuple[int, int]:
        """Ids and rows of a prefill batch for so many ids; fewer if it cannot hold them."""
        size = prefill_size(ids, TILED_SIZES if self.tiled else SIZES)
        return size, min(self._how.rows, max(1, 2 * size // width))  # attention sees at most twice the ids

    def _prefill_batch(self, counts: list[tuple[Member, int]], width: int) -> None:
        """Prefills the next ids of some members, at most `width` each."""
        size, rows = self._batch_shape(sum(count for _, count in counts), width)
        rows_B, lengths_B, counts_B = np.zeros((3, rows), np.int32)
        row_F, index_F = np.full(size, rows, np.int32), np.zeros(size, np.int32)
        batch = PrefillBatch(rows_B=rows_B, lengths_B=lengths_B, counts_B=counts_B, row_F=row_F, index_F=index_F)
        ids_F, filled = np.zeros(size, np.int32), 0
        for index, ((row, session, _), count) in enumerate(counts):
            start, part = session.cached, slice(filled, filled + count)
            ids_F[part] = session.ids[start : start + count]
            rows_B[index], lengths_B[index], counts_B[index] = row, start, count
            row_F[part], index_F[part] = index, np.arange(count)
            filled += count
        # Rounding the reach up to an odd number halves the shapes to compile; it costs little, as a batch has few rows.
        reach = self._reach(member.session for member, _ in counts)
        reach |= reach > 0
        x_FD = look_up(self.weights.embed, ids_F)
        for layer, weights in enumerate(self.weights.layers):
            past, prefix = self._cache[layer][:reach], self.weights.prefix[layer]
            x_FD, fresh = prefill_layer(
                self._how.graph, self._how.config, weights, x_FD, batch, prefix, past, width=width
            )
            self._append(layer, fresh, rows_B, lengths_B, counts_B)
        for (_, session, _), count in counts:
            session.cached += count

    def _decode(self, rows_R: np.ndarray, members: list[Member], seen: np.ndarray) -> Sampled:
        """Decodes a chunk in the group's rows `rows_R`; the members' rows are indices of these."""
        how, rows = self._how, len(rows_R)
        params = SamplingParams(
            limit=np.zeros(rows, np.int32),
            drawn=np.zeros(rows, np.int32),
            temperature=np.zeros(rows, np.float32),
            top_p=np.ones(rows, np.float32),
            seed=np.zeros(rows, np.uint32),
        )
        lengths_R = np.zeros(rows, np.int32)
        for row, session, request in members:
            lengths_R[row], drawn = session.cached, len(request.ids)
            params.drawn[row] = drawn
            params.limit[row] = min(how.chunk, how.max_new_tokens - drawn, how.context - len(session.ids))
            params.temperature[row], params.top_p[row] = request.temperature, request.top_p
            params.seed[row] = request.seed
        reach = self._reach(each.session for each in members)
        past, text = [blocks[:reach] for blocks in self._cache], self._texts(rows, members, seen)
        taken_R = rows_R if rows < how.rows else None
        static = {"chunk": how.chunk, "drafts": how.drafts, "early": how.early}
        sampled, buffer = decode(how.graph, how.config, self.weights, past, lengths_R, params, *text, taken_R, **static)
        for layer, fresh in enumerate(buffer):
            self._append(layer, fresh, rows_R, lengths_R, sampled.counts_R, params.limit)
        return sampled

    def _texts(self, rows: int, members: list[Member], seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What drafts are looked up in, [R, X], and where each row's last id is in it."""
        how, drafts = self._how, self._how.drafts
        seen, own = (seen, how.context) if drafts else (seen[:0], 1 + how.chunk)
        end_R = np.zeros(rows, np.int32)
        text_RX = np.full((rows, len(seen) + own + 1 + drafts), NOTHING, np.int32)
        text_RX[:, : len(seen)] = seen
        for row, session, _ in members:
            ids = session.ids[-own if drafts else -1 :]
            end_R[row] = len(seen) + len(ids) - 1
            text_RX[row, len(seen) : len(seen) + len(ids)] = ids
        return text_RX, end_R

    def _reach(self, sessions: Iterable[Session]) -> int:
        """The number of cache blocks that the longest of the sessions reaches into."""
        longest = max(session.cached for session in sessions)
        return int(np.searchsorted([0, *self._ends], longest))

    def _append(self, layer: int, buffer, rows_B, lengths_B, counts_B, limit_B=None) -> None:
        """Writes the first `counts_B` positions of a layer's buffer into the cache blocks that they can fall into.

        `limit_B` is an upper bound on `counts_B`, for counts that are still being computed on the device.
        """
        limit_B = counts_B if limit_B is None else limit_B
        first, last = lengths_B[limit_B > 0].min(), (lengths_B + limit_B)[limit_B > 0].max()
        blocks = self._cache[layer]
        for index, (start, end) in enumerate(itertools.pairwise([0, *self._ends])):
            if first < end and last > start:
                blocks[index] = append(blocks[index], buffer, start, rows_B, lengths_B, counts_B)

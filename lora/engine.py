"""Samples from a Mistral in many sessions at once; a session's KV cache lives in a slot over all of its turns.

`extend` only queues ids and `submit` only says that a session may sample. A group of slots then prefills all queued ids
but the last of its asked sessions, those of several together, and decodes in one jitted `while_loop` until every asked
row has sampled a stop id, reached its limit, filled its context or made a chunk of ids; `poll` gives what ended, the
other rows go on in their group's next chunk beside newly asked ones, and no group waits for another. Keys and values
made inside a call stay in a small buffer beside the cache, which is only read, and are written into it once at the end.
A `prefix` that all sessions begin with is computed and held once: attention reads it for all rows together. There may
be more sessions than slots: the one asked longest ago gives its slot up, and is computed anew when it is asked again.

What a row samples depends on its own ids, temperature, top_p and seed alone, to the last bit: its ids are cut into
pieces by its own length, blocks of the cache beyond it add exact zeros, and attention and decoding always see a whole
group of slots.
(A session that lost its slot is prefilled where it was decoded before, which may change last bits.)
Left out: stop strings that are no set of ids.

    engine = Engine(model, slots=64, context=1024, max_new_tokens=64, stop_ids=[13])
    session = engine.open()
    engine.extend(session, prompt_ids)
    [reply] = engine.sample([(session, 0.7, 1234)])

What is computed is in `lora/decoding.py`.

Shapes: R rows of a group, F tokens of several rows, P places of the buffer, D model, K kv heads, C head dim, S places
of the prefix.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora.decoding import (
    DTYPES,
    DecoderWeights,
    PrefillBatch,
    RolloutWeights,
    SamplingParams,
    append,
    decode,
    decoding_layers,
    empty_cache,
    look_up,
    prefill_layer,
)
from lora.linear import tile_for_cpu
from lora.model import Mistral

# Places of the first block of the cache; later ones end at 1.5, 2, 3, 4, 6, ... times as many, so that attention reads
# at most half more than its longest row needs, in few compiled shapes.
FIRST_BLOCK = 256
# Places of a tile of the cache: on a CPU, and on accelerators, whose registers are 128 wide.
TILE, ACCELERATOR_TILE = 64, 128
# Ids of a row that are prefilled at once, at most: a width is used while more than the next narrower one is left.
WIDTHS = (128, 32, 8)
# Ids of all rows that are prefilled at once: the least that hold them, or the most that they fill. From 64 on a row of
# a product has the same bits however many there are; with weights in tiles (lora/linear.py) up to 128.
SIZES, TILED_SIZES = (64, 96, 128, 192, 256, 1024), (16, 32, 64, 96, 128)


class Reply(NamedTuple):
    """Ids that a row sampled, the stop id included, and their log-probabilities at temperature 1 among all ids."""

    ids: list[int]
    logprobs: list[float]


@dataclasses.dataclass
class Request:
    """An ask under way: what was asked, and what has been sampled for it."""

    session: int
    temperature: float
    seed: int
    top_p: float
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)


def cache_sizes(context: int, tile: int) -> tuple[int, ...]:
    """Tiles of each block of a cache for that many places."""
    tiles = -(-context // tile)
    ends = [min(FIRST_BLOCK // tile, tiles)]
    while (end := ends[-1]) < tiles:
        ends.append(min(-(-3 * end // 2) if end & (end - 1) == 0 else 4 * end // 3, tiles))
    return tuple(np.diff([0, *ends]).tolist())


def prefill_size(ids: int, sizes: Sequence[int]) -> int:
    """How many ids to prefill at once where so many wait: the least of `sizes` that holds them all, unless that is more
    than twice as many as they can fill; then the most that they fill."""
    filled = max((size for size in sizes if size <= ids), default=sizes[0])
    return next((size for size in sizes if ids <= size <= 2 * filled), filled)


class Engine:
    """Sessions over one model, whose base lies as `weights` says; both dense forms are copies, made once here.

    `rows` is how many slots make a group: all of a group's rows decode even if one is asked, and groups run beside each
    other. `chunk` is after how many ids a group's rows that have not ended let others in. By default 8 (half of fewer
    than 16 slots) and never on a CPU, all slots and 32 on accelerators. Sessions begin with the ids of `prefix`, which
    count neither as theirs nor into `context`.
    """

    def __init__(
        self,
        model: Mistral,
        *,
        slots: int = 64,
        context: int = 1024,
        max_new_tokens: int = 64,
        stop_ids: Sequence[int],
        prefix: Sequence[int] = (),
        weights: RolloutWeights = "fp32",
        rows: int | None = None,
        chunk: int | None = None,
    ):
        config, on_cpu = model.config, jax.default_backend() == "cpu"
        longest = config.max_position_embeddings - len(prefix)
        rows = (min(8, -(-slots // 2)) if on_cpu else slots) if rows is None else rows
        chunk = min((max_new_tokens if on_cpu else 32) if chunk is None else chunk, max_new_tokens)
        if not 1 <= context <= longest or min(slots, max_new_tokens, rows, chunk) < 1:
            raise ValueError(
                f"Engine got slots={slots}, context={context}, max_new_tokens={max_new_tokens}, rows={rows}, "
                f"chunk={chunk}; expected at least 1 of each, and a context of at most the model's "
                f"max_position_embeddings less the prefix's {len(prefix)} ids, {longest}."
            )
        self.slots, self.context, self.max_new_tokens = slots, context, max_new_tokens
        self.prefilled = 0  # ids whose keys and values were computed; those of sampled ids come on top
        self._chunk, self._stops = chunk, frozenset(stop_ids)
        self._config = config
        self._graph, layers = decoding_layers(model.layers, weights)
        stops_V = np.isin(np.arange(config.vocab_size), list(self._stops))
        dtype = DTYPES.get(weights, model.embed.dtype)
        embed, norm, head = (x.astype(dtype) for x in (model.embed[...], model.norm[...], model.unembed()))
        self._view = DecoderWeights(embed, norm, tile_for_cpu(head), stops_V, layers, [])
        self._view = self._view._replace(prefix=self._prefix(prefix))

        self._tile = TILE if on_cpu else ACCELERATOR_TILE
        tiled = all(array.ndim != 2 for array in jax.tree.leaves(layers[0]))  # W^T, codes and adapters have two
        self._sizes = TILED_SIZES if tiled else SIZES
        self._rows = min(rows, slots)
        sizes = cache_sizes(context, self._tile)
        self._ends = np.cumsum(sizes).tolist()  # where each block of the cache ends, in tiles
        groups = -(-slots // self._rows)
        self._cache = [empty_cache(config, self._rows, sizes, self._tile, dtype) for _ in range(groups)]
        # XLA:CPU runs what one thread dispatches in order; groups run beside each other from threads of their own.
        self._pool = ThreadPoolExecutor(min(len(self._cache), os.cpu_count() or 1))
        self._ids: dict[int, list[int]] = {}  # of each open session
        self._lengths: dict[int, int] = {}  # how many of them are in the cache
        self._slot: dict[int, int] = {}  # of the sessions that have one; the one asked longest ago comes first
        self._asked: dict[int, dict[int, Request]] = {}  # by group and session, ready for their (next) chunk
        self._unseated: list[Request] = []  # asked while all slots were busy
        self._running: dict[Future, int] = {}  # the groups that are decoding
        self._busy: set[int] = set()  # sessions whose reply is still to come

    def _prefix(self, ids: Sequence[int]) -> list:
        """Keys [K, C, S] and values [K, S, C] of each layer for what all sessions begin with."""
        C, dtype = self._config.head_dim, self._view.embed.dtype
        nothing = (jnp.zeros((self._config.num_key_value_heads, C, 0), dtype),) * 2
        nothing = nothing[0], nothing[1].swapaxes(1, 2)
        if not len(ids):
            return [nothing for _ in self._view.layers]
        x_FD, found, zero = look_up(self._view.embed, np.array(ids, np.int32)), [], np.zeros(1, np.int32)
        pieces = PrefillBatch(zero, zero, zero, np.zeros(len(ids), np.int32), np.arange(len(ids), dtype=np.int32))
        for weights in self._view.layers:
            x_FD, fresh = prefill_layer(self._graph, self._config, weights, x_FD, pieces, nothing, [], width=len(ids))
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
            raise ValueError(f"session {session} cannot be closed: its reply is still to come; take `poll` first.")
        del self._ids[session], self._lengths[session]
        self._slot.pop(session, None)

    def length(self, session: int) -> int:
        """How many ids the session holds, queued and sampled ones included."""
        return len(self._ids[session])

    def room(self, session: int) -> int:
        """How many more ids fit; negative if more were queued than fit."""
        return self.context - self.length(session)

    def submit(self, session: int, temperature: float, seed: int, top_p: float = 1.0) -> None:
        """Wants the session to sample until a stop id; temperature 0 is greedy, `seed` is a uint32 (see `sample`).

        Raises ValueError for a session that is asked already, not open, or has nothing queued, and for a top_p outside
        (0, 1].
        """
        if not 0 < top_p <= 1:
            raise ValueError(f"session {session} was asked with top_p={top_p}; expected more than 0 and at most 1.")
        if session in self._busy or len(self._ids.get(session, ())) == self._lengths.get(session, 0):
            raise ValueError(f"session {session} was asked: it must be open, extended and not be asked already.")
        self._busy.add(session)
        request = Request(session, temperature, seed, top_p)
        if session in self._slot:
            self._start(request, self._slot.pop(session))
        else:
            self._unseated.append(request)
            self._seat()

    def _start(self, request: Request, slot: int) -> None:
        """Lets a session sample in that slot, as the one asked last."""
        self._slot[request.session] = slot
        self._asked.setdefault(slot // self._rows, {})[request.session] = request

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

    def poll(self, wait: bool = True) -> dict[int, Reply | None]:
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
            self._asked.setdefault(group, {}).update((request.session, request) for request in others)
        self._busy -= replies.keys()
        self._seat()
        return replies

    def sample(self, asks: Sequence[tuple]) -> list[Reply | None]:
        """The replies to all asks (session, temperature, seed), or with top_p after them, in their order."""
        replies = {}
        for ask in asks:
            self.submit(*ask)
        while len(replies) < len(asks):
            replies |= self.poll()
        return [replies[ask[0]] for ask in asks]

    def _sample_group(self, group: int, members: list[Request]) -> tuple[dict[int, Reply | None], list[Request], int]:
        """One chunk for the asks of one group, whose cache and asked sessions no other thread touches.

        Returns the replies that ended, the rows that did not, and how many ids were prefilled.
        """
        replies: dict[int, Reply | None] = {
            request.session: None for request in members if self.room(request.session) <= 0
        }
        members, others = [request for request in members if request.session not in replies], []
        if not members:
            return replies, others, 0
        computed = self._prefill(group, [request.session for request in members])
        ids_RP, logprobs_RP, counts_R = (np.asarray(x) for x in self._decode(group, members))
        for request in members:
            index, session = self._slot[request.session] % self._rows, request.session
            count = int(counts_R[index])
            fresh = ids_RP[index, :count].tolist()
            request.ids += fresh
            request.logprobs += logprobs_RP[index, :count].tolist()
            self._ids[session] += fresh
            self._lengths[session] += count  # all but the last, and the one before the first
            if request.ids[-1] in self._stops or len(request.ids) == self.max_new_tokens or self.room(session) == 0:
                replies[session] = Reply(request.ids, request.logprobs)
            else:
                others.append(request)
        return replies, others, computed

    def _prefill(self, group: int, sessions: list[int]) -> int:
        """Puts all ids but the last into the cache, in pieces that are cut by a session's own ids alone.

        Returns how many were computed.
        """
        computed = 0

        def left(session: int) -> int:
            return len(self._ids[session]) - 1 - self._lengths[session]

        for width, narrower in zip(WIDTHS, (*WIDTHS[1:], 0), strict=True):
            while counts := {session: min(width, left(session)) for session in sessions if left(session) > narrower}:
                size = prefill_size(sum(counts.values()), self._sizes)
                totals = itertools.accumulate(counts.values())
                taken = [each for each, total in zip(counts.items(), totals, strict=True) if total <= size]
                rows = min(self._rows, max(1, 2 * size // width))  # so attention sees no more than twice what is filled
                self._prefill_together(group, dict(taken[:rows]), rows, width, size)
                computed += sum(count for _, count in taken[:rows])
        return computed

    def _prefill_together(self, group: int, counts: dict[int, int], rows: int, width: int, size: int) -> None:
        """Computes the next so many ids of at most `rows` sessions, at most `width` each and `size` together."""
        pieces = PrefillBatch(*np.zeros((3, rows), np.int32), np.full(size, rows, np.int32), np.zeros(size, np.int32))
        ids_F, filled = np.zeros(size, np.int32), 0
        for index, (session, count) in enumerate(counts.items()):
            start, part = self._lengths[session], slice(filled, filled + count)
            ids_F[part] = self._ids[session][start : start + count]
            pieces.rows_B[index] = self._slot[session] % self._rows
            pieces.lengths_B[index], pieces.counts_B[index] = start, count
            pieces.row_F[part], pieces.place_F[part] = index, np.arange(count)
            filled += count
        # Every other reach, so that there are half as many shapes to compile: a piece reads few rows.
        reached = self._reach(counts)
        reached |= reached > 0
        x_FD, appended = look_up(self._view.embed, ids_F), pieces[:3]
        for layer, weights in enumerate(self._view.layers):
            x_FD, fresh = prefill_layer(
                self._graph,
                self._config,
                weights,
                x_FD,
                pieces,
                self._view.prefix[layer],
                self._cache[group][layer][:reached],
                width=width,
            )
            self._append(group, layer, fresh, *appended)
        for session, count in counts.items():
            self._lengths[session] += count

    def _decode(self, group: int, members: list[Request]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Decodes a chunk of a group's asks; returns ids [R, P], log-probabilities [R, P] and counts [R]."""
        i, f, u = np.int32, np.float32, np.uint32
        asked = SamplingParams(*(np.zeros(self._rows, dtype) for dtype in (i, i, i, f, f, u)))
        asked.top_p[:] = 1
        lengths_R = np.zeros(self._rows, np.int32)
        for member in members:
            row, drawn = self._slot[member.session] % self._rows, len(member.ids)
            lengths_R[row] = self._lengths[member.session]
            asked.first_id[row], asked.drawn[row] = self._ids[member.session][-1], drawn
            asked.limit[row] = min(self._chunk, self.max_new_tokens - drawn, self.room(member.session))
            asked.temperature[row], asked.top_p[row], asked.seed[row] = (
                member.temperature,
                member.top_p,
                member.seed,
            )
        reached = self._reach([member.session for member in members])
        past = [blocks[:reached] for blocks in self._cache[group]]
        ids_RP, logprobs_RP, counts_R, buffer = decode(
            self._graph, self._config, self._view, past, lengths_R, asked, places=self._chunk
        )
        rows_R = np.arange(self._rows, dtype=np.int32)
        for layer, fresh in enumerate(buffer):
            self._append(group, layer, fresh, rows_R, lengths_R, counts_R, asked.limit)
        return ids_RP, logprobs_RP, counts_R

    def _reach(self, sessions: Iterable[int]) -> int:
        """How many blocks of the cache the longest of some sessions reaches into."""
        longest = max(self._lengths[session] for session in sessions)
        return int(np.searchsorted([0, *self._ends], -(-longest // self._tile)))

    def _append(self, group: int, layer: int, buffer, rows_B, lengths_B, counts_B, limit_B=None) -> None:
        """Writes the first `counts_B` places of a layer's buffer into the blocks that they can lie in.

        `limit_B` is as many or more, for counts that the device still computes.
        """
        limit_B = counts_B if limit_B is None else limit_B
        first, last = lengths_B[limit_B > 0].min(), (lengths_B + limit_B)[limit_B > 0].max()
        blocks = self._cache[group][layer]
        for index, (start, end) in enumerate(itertools.pairwise(end * self._tile for end in [0, *self._ends])):
            if first < end and last > start:
                blocks[index] = append(blocks[index], buffer, start, rows_B, lengths_B, counts_B)

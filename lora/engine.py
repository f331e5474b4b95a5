"""Batched sampling for many concurrent sessions; each session's KV cache stays in a slot across its turns.

`extend` only queues ids and `submit` only queues a request. A group of slots then prefills all queued ids but the last
of its requests, several sessions per batch, and decodes in one jitted `while_loop` until every row has sampled a stop
id, reached its limit, filled its context or sampled a chunk of ids. `poll` returns the finished replies; the other rows
resume in their group's next chunk together with new requests. Groups run independently. Keys and values computed in a
call stay in a small buffer; the cache is only read, and the buffer is written into it once at the end. A `prefix`
shared by all sessions is computed and cached once: attention reads it for all rows together. There may be more sessions
than slots: the least recently used one is evicted, and is prefilled again at its next request.

A row's samples depend only on its own ids, temperature, top_p and seed, on a CPU to the last bit: its prefill is split
by its own length, cache blocks beyond its length add exact zeros, and attention and decoding always run on a whole
group of slots. (An evicted session is prefilled where it was once decoded, which may change the last bits.)
Left out: stop strings that are not a set of ids.

    engine = Engine(make_decoder(model), slots=64, context=1024, max_new_tokens=64, stop_ids=[13])
    session = engine.open()
    engine.extend(session, prompt_ids)
    [reply] = engine.sample([(session, 0.7, 1234)])

The computations are in decoding.py.

Shapes: R rows of a group, F tokens of several rows, P positions of the buffer, D model, K kv heads, C head dim, S
positions of the prefix.
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

from lora.decoder import Decoder
from lora.decoding import (
    PrefillBatch,
    Sampled,
    SamplingParams,
    Speculation,
    append,
    decode,
    empty_cache,
    look_up,
    prefill_layer,
)
from lora.flops import matmul_weights, require_memory
from lora.speculation import NOTHING

# Positions in the first block of the cache; later blocks end at 1.5, 2, 3, 4, 6, ... times that, so that attention
# reads at most 50 % more than its longest row needs, with few compiled shapes.
FIRST_BLOCK = 256
# Positions per tile of the cache: on a CPU, and on accelerators, whose registers are 128 wide.
TILE, ACCELERATOR_TILE = 64, 128
# Maximum ids per row in a prefill batch: a width is used while more ids are left than the next narrower one.
WIDTHS = (128, 32, 8)
# Weights that a CPU's caches hold. A step of a larger model takes as long as reading them, almost whatever it computes:
# its groups are wider, it verifies drafts, and a chunk ends when half of its rows are done.
CACHED = 2**23
# Drafts of a row in a step, where they are verified at all.
DRAFTS = 3
# Ids of sessions that were closed, the latest, in which drafts are looked up.
SEEN = 4096
# Ids of all rows in a prefill batch: the smallest size that holds them, or the largest that they fill. From 64 rows on,
# a row of a matmul has the same bits whatever the number of rows; with tiled weights (linear.py), up to 128.
SIZES, TILED_SIZES = (64, 96, 128, 192, 256, 1024), (16, 32, 64, 96, 128)


class Reply(NamedTuple):
    """Sampled ids, including the stop id, and their log-probabilities at temperature 1 over the whole vocabulary."""

    ids: list[int]
    logprobs: list[float]


@dataclasses.dataclass
class Request:
    """A pending request: its sampling parameters, and what has been sampled so far."""

    session: int
    temperature: float
    seed: int
    top_p: float
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)


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


class Engine:
    """Sessions over one model, as laid out by `make_decoder`.

    A group has `rows` slots: all its rows decode even for a single request, and groups run concurrently. After `chunk`
    ids, or with `early` when half of its rows are done, a group's unfinished rows let new requests join. On a CPU the
    defaults are 8 rows, 16 for a large model (half the slots if those are fewer), and no chunking; on accelerators all
    slots and 32 ids. Up to `drafts` ids of a row are guessed at each step, and kept if they are the ones drawn
    (speculation.py): a CPU has places for as many drafts as rows, an accelerator for all.

    Every session begins with the ids of `prefix`, which count neither as its own nor towards `context`. Raises
    ValueError for a cache larger than the device's memory, and, from `poll`, for a model whose log-probabilities are
    not finite.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        slots: int = 64,
        context: int = 1024,
        max_new_tokens: int = 64,
        stop_ids: Sequence[int],
        prefix: Sequence[int] = (),
        rows: int | None = None,
        chunk: int | None = None,
        drafts: int | None = None,
        early: bool | None = None,
    ):
        config, on_cpu = decoder.config, jax.default_backend() == "cpu"
        longest, large = config.max_position_embeddings - len(prefix), not on_cpu or matmul_weights(config) > CACHED
        rows = (min(16 if large else 8, -(-slots // 2)) if on_cpu else slots) if rows is None else rows
        chunk = min((max_new_tokens if on_cpu else 32) if chunk is None else chunk, max_new_tokens)
        drafts = (DRAFTS if large else 0) if drafts is None else drafts
        if not 1 <= context <= longest or min(slots, max_new_tokens, rows, chunk, drafts + 1) < 1:
            raise ValueError(
                f"Engine got slots={slots}, context={context}, max_new_tokens={max_new_tokens}, rows={rows}, "
                f"chunk={chunk}, drafts={drafts}; expected each to be at least 1 (drafts: 0), and a context of at most "
                f"the model's max_position_embeddings less the prefix's {len(prefix)} ids, {longest}."
            )
        dtype, self._tile = decoder.weights.embed.dtype, TILE if on_cpu else ACCELERATOR_TILE
        self._rows, sizes = min(rows, slots), cache_sizes(context, self._tile)
        groups, cache = -(-slots // self._rows), (config, self._rows, sizes, self._tile, dtype)
        arrays = jax.tree.leaves(jax.eval_shape(lambda: empty_cache(*cache)))
        needed = groups * sum(array.size * array.dtype.itemsize for array in arrays)
        require_memory(needed, f"a cache of {slots} slots of {context} tokens", "--slots or --context")
        self.slots, self.context, self.max_new_tokens = slots, context, max_new_tokens
        self.prefilled = 0  # ids computed by prefill; sampled ids are not counted
        self.steps = self.sampled = 0  # steps of all rows, and ids that they sampled
        self._chunk, self._stops, self._early = chunk, frozenset(stop_ids), large if early is None else early
        places = self._rows * (1 + min(drafts, 1) if on_cpu else 1 + drafts)
        self._speculation = Speculation(width=1 + drafts, places=places)
        self._seen = np.array([*prefix, *[NOTHING] * SEEN], np.int32)  # ids that drafts are looked up in
        self._config, self._graph = config, decoder.graph
        stops_V = np.isin(np.arange(config.vocab_size), list(self._stops))
        self._decoder = decoder.weights._replace(stops_V=stops_V)
        self._decoder = self._decoder._replace(prefix=self._prefill_prefix(prefix))

        # W^T, codes and adapters have two axes.
        tiled = all(array.ndim != 2 for array in jax.tree.leaves(self._decoder.layers[0]))
        self._sizes = TILED_SIZES if tiled else SIZES
        self._ends = np.cumsum(sizes).tolist()  # end of each cache block, in tiles
        self._cache = [empty_cache(*cache) for _ in range(groups)]
        # XLA:CPU runs the calls of one thread in order; separate threads let groups run concurrently.
        self._pool = ThreadPoolExecutor(min(len(self._cache), os.cpu_count() or 1))
        self._ids: dict[int, list[int]] = {}  # of each open session
        self._lengths: dict[int, int] = {}  # how many of a session's ids are in the cache
        self._slot: dict[int, int] = {}  # of each session that has one, least recently used first
        self._ready: dict[int, dict[int, Request]] = {}  # by group and session: waiting for their (next) chunk
        self._waiting: list[Request] = []  # submitted while all slots were busy
        self._running: dict[Future, int] = {}  # groups that are decoding
        self._busy: set[int] = set()  # sessions with a pending request

    def _prefill_prefix(self, ids: Sequence[int]) -> list:
        """Keys [K, C, S] and values [K, S, C] of the shared prefix, per layer."""
        C, dtype = self._config.head_dim, self._decoder.embed.dtype
        empty = (jnp.zeros((self._config.num_key_value_heads, C, 0), dtype),) * 2
        empty = empty[0], empty[1].swapaxes(1, 2)
        if not len(ids):
            return [empty for _ in self._decoder.layers]
        x_FD, prefix, zero = look_up(self._decoder.embed, np.array(ids, np.int32)), [], np.zeros(1, np.int32)
        batch = PrefillBatch(
            rows_B=zero,
            lengths_B=zero,
            counts_B=zero,
            row_F=np.zeros(len(ids), np.int32),
            index_F=np.arange(len(ids), dtype=np.int32),
        )
        for weights in self._decoder.layers:
            x_FD, fresh = prefill_layer(self._graph, self._config, weights, x_FD, batch, empty, [], width=len(ids))
            prefix.append((fresh[0][0], fresh[1][0]))
        return prefix

    def open(self) -> int:
        """Opens a session: the lowest free number, in the lowest free slot (or none until its first request)."""
        session = next(index for index in itertools.count() if index not in self._ids)
        self._ids[session], self._lengths[session] = [], 0
        if (slot := self._free_slot()) is not None:
            self._slot[session] = slot
        return session

    def extend(self, session: int, ids: Sequence[int]) -> None:
        """Queues ids; nothing is computed before `submit`. A session without `room` left gets None as its reply."""
        self._ids[session].extend(ids)

    def close(self, session: int) -> None:
        """Closes the session. Raises ValueError while a request is pending."""
        if session in self._busy:
            raise ValueError(f"session {session} cannot be closed while its request is pending: call `poll` first.")
        own = len(self._seen) - SEEN
        earlier = [*self._seen[own:].tolist(), NOTHING, *self._ids.pop(session)][-SEEN:]
        self._seen = np.concatenate([self._seen[:own], np.array(earlier, np.int32)])  # a new array: others read it
        del self._lengths[session]
        self._slot.pop(session, None)

    def length(self, session: int) -> int:
        """The number of ids in the session, queued and sampled ones included."""
        return len(self._ids[session])

    def room(self, session: int) -> int:
        """How many more ids fit into the context; negative if too many are queued."""
        return self.context - self.length(session)

    def submit(self, session: int, temperature: float, seed: int, top_p: float = 1.0) -> None:
        """Requests a reply, sampled until a stop id; temperature 0 is greedy, `seed` is a uint32 (see `sample`).

        Raises ValueError for a session that is not open, has a pending request or no queued ids, and for a top_p
        outside (0, 1].
        """
        if not 0 < top_p <= 1:
            raise ValueError(f"session {session} got top_p={top_p}; expected more than 0 and at most 1.")
        if session in self._busy or len(self._ids.get(session, ())) == self._lengths.get(session, 0):
            raise ValueError(f"session {session} cannot sample: it must be open, extended and have no pending request.")
        self._busy.add(session)
        request = Request(session=session, temperature=temperature, seed=seed, top_p=top_p)
        if session in self._slot:
            self._assign(request, self._slot.pop(session))
        else:
            self._waiting.append(request)
            self._assign_slots()

    def _assign(self, request: Request, slot: int) -> None:
        """Makes a request ready in a slot, as the most recently used one."""
        self._slot[request.session] = slot
        self._ready.setdefault(slot // self._rows, {})[request.session] = request

    def _free_slot(self) -> int | None:
        return min(set(range(self.slots)).difference(self._slot.values()), default=None)

    def _assign_slots(self) -> None:
        """Gives requests without a slot a free one, or that of the least recently used session that is not busy."""
        while self._waiting:
            slot = self._free_slot()
            if slot is None:
                evicted = next((session for session in self._slot if session not in self._busy), None)
                if evicted is None:
                    return
                slot, self._lengths[evicted] = self._slot.pop(evicted), 0
            self._assign(self._waiting.pop(0), slot)

    def poll(self, wait: bool = True) -> dict[int, Reply | None]:
        """Starts idle groups and returns the replies that have finished, by session; possibly none.

        A group starts when all its sessions have pending requests. With `wait`, other groups with requests start too if
        nothing else runs, and the call blocks until a group finishes its chunk. A reply without a stop id ended at
        max_new_tokens or at the end of the context; None means that the context had no room for a single id (nothing
        was computed for that session). Sampled ids become part of the session.
        """
        seated = Counter(slot // self._rows for slot in self._slot.values())
        idle = [group for group, rows in self._ready.items() if rows and group not in self._running.values()]
        complete = [group for group in idle if len(self._ready[group]) == seated[group]]
        for group in complete or (idle if wait and not self._running else []):
            self._running[self._pool.submit(self._sample_group, group, [*self._ready.pop(group).values()])] = group
        done, _ = wait_for(self._running, timeout=None if wait else 0, return_when=FIRST_COMPLETED)
        replies = {}
        for future in done:
            group, (finished, unfinished, counts) = self._running.pop(future), future.result()
            replies |= finished
            self.prefilled += counts[0]
            self.sampled += counts[1]
            self.steps += counts[2]
            self._ready.setdefault(group, {}).update((request.session, request) for request in unfinished)
        self._busy -= replies.keys()
        self._assign_slots()
        return replies

    def sample(self, requests: Sequence[tuple]) -> list[Reply | None]:
        """The replies to requests (session, temperature, seed[, top_p]), in their order."""
        replies = {}
        for request in requests:
            self.submit(*request)
        while len(replies) < len(requests):
            replies |= self.poll()
        return [replies[request[0]] for request in requests]

    def _sample_group(
        self, group: int, members: list[Request]
    ) -> tuple[dict[int, Reply | None], list[Request], tuple[int, int, int]]:
        """Runs a chunk for the requests of a group, whose cache and busy sessions no other thread touches.

        Returns the finished replies, the unfinished requests and how many ids were prefilled, how many were sampled and
        in how many steps of a row.
        """
        replies: dict[int, Reply | None] = {
            request.session: None for request in members if self.room(request.session) <= 0
        }
        members, unfinished = [request for request in members if request.session not in replies], []
        if not members:
            return replies, unfinished, (0, 0, 0)
        computed = self._prefill(group, [request.session for request in members])
        sampled = Sampled(*(np.asarray(x) for x in self._decode(group, members)))
        for request in members:
            index, session = self._slot[request.session] % self._rows, request.session
            count = int(sampled.counts_R[index])
            if not np.isfinite(sampled.logprobs_RP[index, :count]).all():
                raise ValueError("the model's log-probabilities are not finite: its base or its adapter is damaged.")
            fresh = sampled.ids_RP[index, :count].tolist()
            request.ids += fresh
            request.logprobs += sampled.logprobs_RP[index, :count].tolist()
            self._ids[session] += fresh
            self._lengths[session] += count  # the last queued id and all sampled ids but the last
            if request.ids[-1] in self._stops or len(request.ids) == self.max_new_tokens or self.room(session) == 0:
                replies[session] = Reply(request.ids, request.logprobs)
            else:
                unfinished.append(request)
        return replies, unfinished, (computed, int(sampled.counts_R.sum()), int(sampled.steps_R.sum()))

    def _prefill(self, group: int, sessions: list[int]) -> int:
        """Prefills all ids but the last, split by each session's own length only. Returns how many were computed."""
        computed = 0

        def left(session: int) -> int:
            return len(self._ids[session]) - 1 - self._lengths[session]

        for width, narrower in zip(WIDTHS, (*WIDTHS[1:], 0), strict=True):
            while counts := {session: min(width, left(session)) for session in sessions if left(session) > narrower}:
                size = prefill_size(sum(counts.values()), self._sizes)
                totals = itertools.accumulate(counts.values())
                fitting = [each for each, total in zip(counts.items(), totals, strict=True) if total <= size]
                rows = min(self._rows, max(1, 2 * size // width))  # attention sees at most twice the ids
                self._prefill_batch(group, dict(fitting[:rows]), rows, width, size)
                computed += sum(count for _, count in fitting[:rows])
        return computed

    def _prefill_batch(self, group: int, counts: dict[int, int], rows: int, width: int, size: int) -> None:
        """Prefills the next `counts` ids of at most `rows` sessions, at most `width` each and `size` in total."""
        rows_B, lengths_B, counts_B = np.zeros((3, rows), np.int32)
        batch = PrefillBatch(
            rows_B=rows_B,
            lengths_B=lengths_B,
            counts_B=counts_B,
            row_F=np.full(size, rows, np.int32),
            index_F=np.zeros(size, np.int32),
        )
        ids_F, filled = np.zeros(size, np.int32), 0
        for index, (session, count) in enumerate(counts.items()):
            start, part = self._lengths[session], slice(filled, filled + count)
            ids_F[part] = self._ids[session][start : start + count]
            rows_B[index] = self._slot[session] % self._rows
            lengths_B[index], counts_B[index] = start, count
            batch.row_F[part], batch.index_F[part] = index, np.arange(count)
            filled += count
        # Rounding the reach up to an odd number halves the shapes to compile; it costs little, as a batch has few rows.
        reach = self._reach(counts)
        reach |= reach > 0
        x_FD = look_up(self._decoder.embed, ids_F)
        for layer, weights in enumerate(self._decoder.layers):
            x_FD, fresh = prefill_layer(
                self._graph,
                self._config,
                weights,
                x_FD,
                batch,
                self._decoder.prefix[layer],
                self._cache[group][layer][:reach],
                width=width,
            )
            self._append(group, layer, fresh, rows_B, lengths_B, counts_B)
        for session, count in counts.items():
            self._lengths[session] += count

    def _decode(self, group: int, members: list[Request]) -> Sampled:
        """Decodes a chunk for a group's requests."""
        params = SamplingParams(
            limit=np.zeros(self._rows, np.int32),
            drawn=np.zeros(self._rows, np.int32),
            temperature=np.zeros(self._rows, np.float32),
            top_p=np.ones(self._rows, np.float32),
            seed=np.zeros(self._rows, np.uint32),
        )
        lengths_R = np.zeros(self._rows, np.int32)
        for request in members:
            row, drawn = self._slot[request.session] % self._rows, len(request.ids)
            lengths_R[row] = self._lengths[request.session]
            params.drawn[row] = drawn
            params.limit[row] = min(self._chunk, self.max_new_tokens - drawn, self.room(request.session))
            params.temperature[row], params.top_p[row] = request.temperature, request.top_p
            params.seed[row] = request.seed
        reach = self._reach([request.session for request in members])
        past = [blocks[:reach] for blocks in self._cache[group]]
        text = self._texts([request.session for request in members])
        how = {"chunk": self._chunk, "speculation": self._speculation, "early": self._early}
        sampled, buffer = decode(self._graph, self._config, self._decoder, past, lengths_R, params, *text, **how)
        rows_R = np.arange(self._rows, dtype=np.int32)
        for layer, fresh in enumerate(buffer):
            self._append(group, layer, fresh, rows_R, lengths_R, sampled.counts_R, params.limit)
        return sampled

    def _texts(self, sessions: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """What drafts for a group's sessions are looked up in, [R, X], and where each row's last id is in it."""
        width, end_R = self._speculation.width, np.zeros(self._rows, np.int32)
        seen = self._seen if width > 1 else self._seen[:0]
        own = self.context if width > 1 else 1 + self._chunk
        text_RX = np.full((self._rows, len(seen) + own + width), NOTHING, np.int32)
        text_RX[:, : len(seen)] = seen
        for session in sessions:
            row, ids = self._slot[session] % self._rows, self._ids[session][-own if width > 1 else -1 :]
            end_R[row] = len(seen) + len(ids) - 1
            text_RX[row, len(seen) : len(seen) + len(ids)] = ids
        return text_RX, end_R

    def _reach(self, sessions: Iterable[int]) -> int:
        """The number of cache blocks that the longest of the sessions reaches into."""
        longest = max(self._lengths[session] for session in sessions)
        return int(np.searchsorted([0, *self._ends], -(-longest // self._tile)))

    def _append(self, group: int, layer: int, buffer, rows_B, lengths_B, counts_B, limit_B=None) -> None:
        """Writes the first `counts_B` positions of a layer's buffer into the cache blocks that they can fall into.

        `limit_B` is an upper bound on `counts_B`, for counts that are still being computed on the device.
        """
        limit_B = counts_B if limit_B is None else limit_B
        first, last = lengths_B[limit_B > 0].min(), (lengths_B + limit_B)[limit_B > 0].max()
        blocks = self._cache[group][layer]
        for index, (start, end) in enumerate(itertools.pairwise(end * self._tile for end in [0, *self._ends])):
            if first < end and last > start:
                blocks[index] = append(blocks[index], buffer, start, rows_B, lengths_B, counts_B)

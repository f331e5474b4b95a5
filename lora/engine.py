"""Batched sampling for many concurrent sessions; each session's KV cache stays in a slot across its turns.

`extend` only queues ids and `submit` only queues a request. A group of slots (group.py) then prefills what is queued
and decodes until every row has sampled a stop id, reached its limit, filled its context or sampled a chunk of ids.
`poll` returns the finished replies; the other rows resume in their group's next chunk together with new requests.
Groups run independently, spread over the devices, each of which holds a copy of the weights. A `prefix` shared by all
sessions is computed once: attention reads it for all rows together. There may be more sessions than slots: the least
recently used one is evicted, and is prefilled again at its next request.

A row's samples depend only on its own ids, temperature, top_p and seed, on a CPU to the last bit: its prefill is split
by its own length, cache blocks beyond its length add exact zeros, and attention and decoding always run on a whole
group of slots, or, with tiled weights, on a part of it. (Two things may change the last bits: an evicted session is
prefilled where it was once decoded; and with tiled weights, company may change the rows of a prefill batch.)
Left out: stop strings that are not a set of ids; a model that no single device holds.

    engine = Engine(make_decoder(model), slots=64, context=1024, max_new_tokens=64, stop_ids=[13])
    session = engine.open()
    engine.extend(session, prompt_ids)
    [reply] = engine.sample([(session, 0.7, 1234)])
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

import jax
import numpy as np

from lora.config import Config
from lora.decoder import Decoder
from lora.decoding import Tile
from lora.flops import matmul_weights
from lora.group import Group, How, Member, Outcome, Reply, Request, Session, prefill_prefix
from lora.speculation import NOTHING

# Tiles of the cache: of one or two lines of a CPU's cache, and of an accelerator's registers, which are 128 wide.
TILE, ACCELERATOR_TILE = Tile(positions=32, channels=16), Tile(positions=128, channels=0)
# Weights that a CPU's caches hold. A step of a larger model also reads them: its groups are wider, it verifies drafts,
# and a chunk ends when half of its rows are done.
CACHED = 2**23
# Drafts of a row in a step: on accelerators, where a step reads much and computes little, and on a CPU whose caches do
# not hold the model.
DRAFTS, CPU_DRAFTS = 3, 1
# Ids of a chunk. The keys and values of a longer one, computed or not, would be read and written at every step.
CHUNK = 32
# Ids of sessions that were closed, the latest, in which drafts are looked up.
SEEN = 4096


def default_drafts(config: Config, on_cpu: bool) -> int:
    """Drafts of a row in a step, unless they are given."""
    if not on_cpu:
        return DRAFTS
    return CPU_DRAFTS if matmul_weights(config) > CACHED else 0


class Engine:
    """Sessions over one model, as laid out by `make_decoder`.

    A group has `rows` slots: they decode together, all of them or, for few requests, a half or a quarter
    (group.decoded_rows). Groups run concurrently, spread over the devices. After `chunk` ids, or with `early` when half
    of its rows are done, a group's unfinished rows let new requests join. On a CPU the default is 8 rows, 16 for a
    large model (half the slots if those are fewer); on accelerators a group per device. Up to `drafts` ids of a row are
    guessed at each step, and kept if they are the ones drawn (speculation.py). `copies` are the same decoder on further
    devices (decoder.copy_to).

    Every session begins with the ids of `prefix`, which count neither as its own nor towards `context`. `poll` raises
    ValueError for a model whose log-probabilities are not finite. What it takes in memory: footprint.py.
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
        copies: Sequence[Decoder] = (),
    ):
        config, on_cpu, decoders = decoder.config, jax.default_backend() == "cpu", [decoder, *copies]
        longest, large = config.max_position_embeddings - len(prefix), not on_cpu or matmul_weights(config) > CACHED
        if rows is None:
            rows = min(16 if large else 8, -(-slots // 2)) if on_cpu else -(-slots // len(decoders))
        chunk = min(CHUNK if chunk is None else chunk, max_new_tokens)
        drafts = default_drafts(config, on_cpu) if drafts is None else drafts
        if not 1 <= context <= longest or min(slots, max_new_tokens, rows, chunk, drafts + 1) < 1:
            raise ValueError(
                f"Engine got slots={slots}, context={context}, max_new_tokens={max_new_tokens}, rows={rows}, "
                f"chunk={chunk}, drafts={drafts}; expected each to be at least 1 (drafts: 0), and a context of at most "
                f"the model's max_position_embeddings less the prefix's {len(prefix)} ids, {longest}."
            )
        rows = min(rows, slots)
        how = How(
            config=config,
            graph=decoder.graph,
            rows=rows,
            tile=TILE if on_cpu else ACCELERATOR_TILE,
            context=context,
            max_new_tokens=max_new_tokens,
            chunk=chunk,
            stops=frozenset(stop_ids),
            drafts=drafts,
            early=large if early is None else early,
        )
        groups = -(-slots // rows)
        self.slots, self.context = slots, context
        self.prefilled = 0  # ids computed by prefill; sampled ids are not counted
        self.steps = self.sampled = 0  # steps of all rows, and ids that they sampled
        self._rows, self._devices = rows, len(decoders)
        self._seen = np.array([*prefix, *[NOTHING] * SEEN], np.int32)  # ids that drafts are looked up in

        stops_V, arrays = np.isin(np.arange(config.vocab_size), list(stop_ids)), prefill_prefix(decoder, prefix)
        shared = {"stops_V": stops_V, "prefix": arrays}
        # Committed to their devices, so that all calls of a group find the same programs; nothing is copied.
        placed = [(jax.device_put(each.weights._replace(**shared), each.device), each.device) for each in decoders]
        self._groups = [Group(how, *placed[group % len(placed)]) for group in range(groups)]
        # XLA:CPU runs the calls of one thread in order; separate threads let groups run concurrently.
        self._pool = ThreadPoolExecutor(min(groups, max(len(decoders), os.cpu_count() or 1)))
        self._sessions: dict[int, Session] = {}
        self._slot: dict[int, int] = {}  # of each session that has one, least recently used first
        self._ready: dict[int, dict[int, Request]] = {}  # by group and session: waiting for their (next) chunk
        self._waiting: list[Request] = []  # submitted while all slots were busy
        self._running: dict[Future[Outcome], int] = {}  # groups that are decoding
        self._busy: set[int] = set()  # sessions with a pending request

    def open(self) -> int:
        """Opens a session: the lowest free number, in the lowest free slot (or none until its first request)."""
        session = next(index for index in itertools.count() if index not in self._sessions)
        self._sessions[session] = Session()
        if (slot := self._free_slot()) is not None:
            self._slot[session] = slot
        return session

    def extend(self, session: int, ids: Sequence[int]) -> None:
        """Queues ids; nothing is computed before `submit`. A session without `room` left gets None as its reply."""
        self._sessions[session].ids.extend(ids)

    def close(self, session: int) -> None:
        """Closes the session. Raises ValueError while a request is pending."""
        if session in self._busy:
            raise ValueError(f"session {session} cannot be closed while its request is pending: call `poll` first.")
        own = len(self._seen) - SEEN
        earlier = [*self._seen[own:].tolist(), NOTHING, *self._sessions.pop(session).ids][-SEEN:]
        self._seen = np.concatenate([self._seen[:own], np.array(earlier, np.int32)])  # a new array: others read it
        self._slot.pop(session, None)

    def length(self, session: int) -> int:
        """The number of ids in the session, queued and sampled ones included."""
        return len(self._sessions[session].ids)

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
        state = self._sessions.get(session, Session())
        if session in self._busy or len(state.ids) == state.cached:
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
        """The lowest free slot; of several devices, each gets one in turn."""

        def order(slot: int) -> tuple[int, int, int]:
            group, row = divmod(slot, self._rows)
            return group // self._devices, row, group % self._devices

        return min(set(range(self.slots)).difference(self._slot.values()), key=order, default=None)

    def _assign_slots(self) -> None:
        """Gives requests without a slot a free one, or that of the least recently used session that is not busy."""
        while self._waiting:
            slot = self._free_slot()
            if slot is None:
                evicted = next((session for session in self._slot if session not in self._busy), None)
                if evicted is None:
                    return
                slot, self._sessions[evicted].cached = self._slot.pop(evicted), 0
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
            self._running[self._pool.submit(self._groups[group].run, self._members(group), self._seen)] = group
        done, _ = wait_for(self._running, timeout=None if wait else 0, return_when=FIRST_COMPLETED)
        replies = {}
        for future in done:
            group, outcome = self._running.pop(future), future.result()
            replies |= outcome.replies
            self.prefilled += outcome.prefilled
            self.sampled += outcome.sampled
            self.steps += outcome.steps
            self._ready.setdefault(group, {}).update((request.session, request) for request in outcome.unfinished)
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

    def _members(self, group: int) -> list[Member]:
        """Takes the requests of a group that are ready, each with its row and its session."""
        return [
            Member(self._slot[request.session] % self._rows, self._sessions[request.session], request)
            for request in self._ready.pop(group).values()
        ]

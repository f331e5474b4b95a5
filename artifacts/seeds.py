"""Addressed randomness: every draw is seeded by its address, such as (seed, stage, round, task, trial, turn).

Draws are independent of order, batching and resuming, and differ between rounds. There is no global state.
"""

from __future__ import annotations

import zlib

import numpy as np


def address(*parts: int | str) -> list[int]:
    """The integers that seed a draw, e.g. of (seed, "actre", round, task_id, trial, turn); strings by their crc32."""
    return [zlib.crc32(p.encode()) if isinstance(p, str) else int(p) for p in parts]


def generator(*parts: int | str) -> np.random.Generator:
    """A generator for one address: the same draws whatever the order, batching or resuming."""
    return np.random.default_rng(address(*parts))


def draw_seed(*parts: int | str) -> int:
    """A uint32 for one address, for samplers that take an integer seed."""
    return int(np.random.SeedSequence(address(*parts)).generate_state(1)[0])

"""Addressed randomness: every draw is made from its address, such as (seed, stage, round, task, trial, turn).

The same draws whatever the order, the batch or a resume; different ones in every round. Nothing is global."""

from __future__ import annotations

import zlib

import numpy as np


def address(*parts: int | str) -> list[int]:
    """The place of a draw, e.g. (seed, "actre", round, task_id, trial, turn): strings by their crc32."""
    return [zlib.crc32(p.encode()) if isinstance(p, str) else int(p) for p in parts]


def generator(*parts: int | str) -> np.random.Generator:
    """A generator for one place: the same draws whatever the order, the batch or a resume."""
    return np.random.default_rng(address(*parts))


def draw_seed(*parts: int | str) -> int:
    """A uint32 for one place, for samplers that take an integer seed."""
    return int(np.random.SeedSequence(address(*parts)).generate_state(1)[0])

"""Drafts of the next ids, looked up in ids seen before, and which of them a decoding step verifies.

Prompt lookup decoding (Saxena 2023) with the draws of `decoding.sample`: a draft is kept only where it is the very id
that is drawn there, so the ids are those of decoding one by one, at any temperature.

Shapes: R rows, X ids of text, T ids of a row in a step (its last id and T - 1 drafts), F places.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LONGEST = 8  # ids of the longest match that is looked for
NOTHING = -1  # in a text: no id, which matches nothing but itself


def look_up_drafts(text_RX: jax.Array, end_R: jax.Array, stops_V: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Drafts [R, count] for the ids that follow each row's last one, at `end_R` of its text, and how many are usable.

    They are what followed the latest of the longest matches of the row's last ids, up to an id that ends a reply.
    """
    X = text_RX.shape[1]
    found_RX = jnp.arange(X) < end_R[:, None]
    matched_RX = jnp.zeros_like(text_RX)
    for back in range(LONGEST):
        last_R1 = jnp.take_along_axis(text_RX, (end_R - back)[:, None], axis=1)
        shifted_RX = jnp.pad(text_RX, ((0, 0), (back, 0)), constant_values=NOTHING)[:, :X]
        found_RX &= shifted_RX == last_R1
        matched_RX += found_RX
    best_R = (matched_RX * X + jnp.arange(X)).argmax(axis=1)
    at_RD = best_R[:, None] + 1 + jnp.arange(count)
    drafts_RD = jnp.take_along_axis(text_RX, jnp.minimum(at_RD, X - 1), axis=1)
    usable_RD = (at_RD <= end_R[:, None]) & (drafts_RD >= 0) & ~stops_V[jnp.maximum(drafts_RD, 0)]
    usable_RD &= (matched_RX.max(axis=1) > 0)[:, None]
    return drafts_RD, jnp.cumprod(usable_RD, axis=1).sum(axis=1)


class Places(NamedTuple):
    """The ids that are computed together: the row of each, and its index below `width` among its row's ids."""

    row_F: jax.Array  # the number of rows for a place that nothing needs
    index_F: jax.Array
    rows: int
    width: int

    def by_row(self, x_F: jax.Array) -> jax.Array:
        """[F, ...] as [R, T, ...], with zeros where a row has no id."""
        if len(x_F) == self.rows * self.width and isinstance(self.row_F, np.ndarray):  # each has its place
            return x_F.reshape(self.rows, self.width, *x_F.shape[1:])
        zeros = jnp.zeros((self.rows, self.width, *x_F.shape[1:]), x_F.dtype)
        return zeros.at[self.row_F, self.index_F].set(x_F, mode="drop")

    def flat(self, x_RT: jax.Array) -> jax.Array:
        """[R, T, ...] as [F, ...]."""
        return x_RT[self.row_F, self.index_F]


def every_place(rows: int, width: int) -> Places:
    """A place for each of `width` ids of each row."""
    row_F, index_F = np.divmod(np.arange(rows * width), width)
    return Places(row_F, index_F, rows, width)


def accepted(drafts_RT: jax.Array, drawn_RT: jax.Array, wanted_R: jax.Array) -> jax.Array:
    """How many of the drawn ids of each row count [R]: the first, and each that follows a draft equal to its draw.

    `drafts_RT` begins with the row's last id; `wanted_R` of them may count.
    """
    wanted_RT = jnp.arange(1, drafts_RT.shape[1]) < wanted_R[:, None]
    right_RT = wanted_RT & (drafts_RT[:, 1:] == drawn_RT[:, :-1])
    return 1 + jnp.cumprod(right_RT, axis=1).sum(axis=1)

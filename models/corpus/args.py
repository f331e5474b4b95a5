"""The settings of a corpus: which tasks are demonstrated, and how skilled the players are.

`models.pretrain.Args` inherits them as flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from artifacts.cli import Range


@dataclass(frozen=True, kw_only=True)
class CorpusArgs:
    """The tasks and the players of the demonstrations."""

    data: str | None = None
    """(ALFWorld, WebShop) Folder of the world's real data. Unset: $ALFWORLD_DATA or $WEBSHOP_DATA; without that, only
    generated tasks."""
    generated: Annotated[int, Range(0, 10**7)] = 2000
    """(ALFWorld, WebShop) Number of generated games, or products, to demonstrate on."""
    generated_share: Annotated[float, Range(0, 1)] = 0.3
    """(ALFWorld, WebShop) Share of demonstrations from generated tasks if real ones are available."""
    displaced: tuple[Annotated[float, Range(0, 1)], ...] = (0.0, 0.0, 0.1, 0.2)
    """(ALFWorld, WebShop) Probabilities of a random action per turn; each demonstration draws one of them. ReAct texts
    give such a turn weight 0 (it cannot be predicted and should not be imitated); ActRe texts learn its reason."""
    careless: tuple[Annotated[float, Range(0, 1)], ...] = (0.1, 0.7, 0.7, 0.7)
    """(ALFWorld, WebShop) Shares of careless players; each kind of task draws one of them. At 0.7, greedy play is
    careless and about every third sampled attempt is not."""
    max_turns: Annotated[int, Range(1, 10_000)] = 30
    """(ALFWorld, WebShop) Turns after which an unfinished demonstration is dropped."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seeds the weights, the order of tasks and every random action."""

"""What can be chosen of a corpus: whose games, whose skill. pretrain.py takes these flags as its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CorpusArgs:
    data: str | None = None
    """The world's real data (default: $ALFWORLD_DATA or $WEBSHOP_DATA; without either, generated tasks only)."""
    generated: int = 2000
    """Generated games, or products, to demonstrate on."""
    generated_share: float = 0.3
    """Share of demonstrations from generated tasks when real ones are there."""
    displaced: tuple[float, ...] = (0.0, 0.0, 0.1, 0.2)
    """Probabilities of a random action per turn; a demonstration draws one of them. ReAct texts give such a turn weight
    0 (nobody can predict it, and nobody should do it), ActRe texts learn its reason."""
    careless: tuple[float, ...] = (0.1, 0.7, 0.7, 0.7)
    """Shares of careless players; a kind of task (what it is about) draws one of them. At 0.7 greedy play is careless,
    and every third or so of sampled attempts is not."""
    max_turns: int = 30
    """Turns after which a demonstration is given up and dropped."""
    seed: int = 0
    """Seeds the weights, the order of games and every displacement."""

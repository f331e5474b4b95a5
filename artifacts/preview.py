"""Prints packed trajectories with the weights that they are trained on, in colour or, in a pipe, as numbers.

A terminal gets green above 0 and red below, stronger the larger the weight, and plain text at 0. Elsewhere, and where
NO_COLOR is set, every line of text starts with its weight:

      +0.05 | Observation: Your task is to: put a mug in desk. ...
      +0.05 | Action:
         +1 |  think[I need a mug.]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from artifacts.packing import Packed, Place
from lora.tokenizer import load_tokenizer

GREY, GREEN, RED = (150, 150, 150), (0, 190, 0), (235, 40, 40)
RESET = "\033[0m"


def segment_of(packed: Packed, place: Place) -> tuple[np.ndarray, np.ndarray]:
    """The ids [L] and weights [L] of one packed trajectory."""
    inside = packed.segments_NL[place.row] == place.segment
    return packed.ids_NL[place.row][inside], packed.weights_NL[place.row][inside]


def weighted_text(ids: np.ndarray, weights: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """The text of ids [L] in pieces of one weight. Ids that are decoded alone may lose the blank before them, or end
    amid a character: so a piece is what its ids add to the text before, and a character belongs to where it ends."""

    def text_of(start: int, stop: int) -> str:
        return tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=False)

    pieces, before, begin = [], 0, 0
    for end in [*(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(ids)] if len(ids) else []:
        head, text = text_of(before, begin), text_of(before, end)
        whole = text if end == len(ids) else text.rstrip("\ufffd")
        pieces.append((whole[len(head.rstrip("\ufffd")) :], float(weights[begin])))
        before, begin = before if head.endswith("\ufffd") else begin, end
    return pieces


def preview(packed: Packed, places: Sequence[Place], model_dir: Path, count: int) -> None:
    """Prints the first `count` trajectories, whose ids are those of a base's tokenizer."""
    tokenizer = load_tokenizer(model_dir)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for place in places[:count]:
        ids, weights = segment_of(packed, place)
        pieces = weighted_text(ids, weights, tokenizer)
        where = f"row {place.row} segment {place.segment}: {place.file}:{place.line}"
        print(f"--- {where} weight {place.weight:+g}, {len(ids)} tokens")
        if coloured:
            legend = " ".join(painted(number(weight), weight) for weight in sorted({w for _, w in pieces}))
            print(f"weights of tokens: {legend}")
            print("".join(painted(text, weight) for text, weight in pieces))
        else:
            for text, weight in pieces:
                print("".join(f"{number(weight):>8} | {line}\n" for line in text.strip("\n").split("\n")), end="")


def number(weight: float) -> str:
    return f"{weight:+g}" if weight else "0"


def painted(text: str, weight: float) -> str:
    """The text in the colour of its weight: from grey to full green or red at 1, by the square root of the size."""
    if not weight:
        return text
    strength = min(1.0, abs(weight)) ** 0.5
    mixed = (
        round(grey + strength * (full - grey)) for grey, full in zip(GREY, GREEN if weight > 0 else RED, strict=True)
    )
    return f"\033[38;2;{';'.join(map(str, mixed))}m{text}{RESET}"

"""Prints a text's log-probabilities under a model, for parity tests and to compare bases, precisions and adapters.

    python -m lora.score --model models/tiny-alfworld --weights nf4 --text FILE

Prints one JSON object: `ids` of the text (including the tokenizer's prefix, such as <s>), `logprobs` of every id after
the first (natural logarithm), and their `sum`.

Left out: several texts at once, texts longer than the model's positions.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from artifacts.cli import run_main
from lora.checkpoint import Checkpoint
from lora.load import Weights, load_adapter, load_model
from lora.logprobs import token_logprobs
from lora.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Args:
    model: Path
    """Hugging Face folder."""
    text: Path
    """UTF-8 file, scored as it is, including a final newline."""
    adapter: Path | None = None
    """LoRA adapter in PEFT's layout. Unset: the base without an adapter."""
    weights: Weights = "nf4"
    """Form of the linear layers: fp32, bf16 (also for activations), NF4, or NF4 with double quantisation (nf4-dq)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations. Unset: bfloat16 for --weights bf16, else float32."""


def score(args: Args) -> dict:
    """The JSON object.

    Raises ValueError for a text that is not UTF-8 or has fewer than two tokens or more than the model's positions, and
    for log-probabilities that are not finite.
    """
    checkpoint = Checkpoint(args.model)
    try:
        ids = load_tokenizer(args.model).encode(args.text.read_text(encoding="utf-8")).ids
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.text} is not UTF-8 ({error}); expected a text") from error
    if not 2 <= len(ids) <= checkpoint.config.max_position_embeddings:
        raise ValueError(
            f"{args.text} has {len(ids)} tokens, expected 2 to {checkpoint.config.max_position_embeddings}, the "
            "model's max_position_embeddings."
        )
    dtype = None if args.dtype is None else jnp.dtype(args.dtype)
    if args.adapter is None:
        model = load_model(checkpoint, weights=args.weights, dtype=dtype)
    else:
        model = load_adapter(checkpoint, args.adapter, args.weights, dtype=dtype)
    graph, state = nnx.split(model)
    ids_BL = np.array([ids], np.int32)
    logprobs_BL = jax.jit(lambda state: token_logprobs(nnx.merge(graph, state), ids_BL, np.ones_like(ids_BL)))(state)
    logprobs = np.asarray(logprobs_BL)[0, 1:].tolist()
    if not np.isfinite(logprobs).all():
        raise ValueError(f"the log-probabilities under {args.model} are not finite: it or its adapter is damaged")
    return {"ids": ids, "logprobs": logprobs, "sum": float(np.sum(logprobs))}


def main(args: Args) -> None:
    print(json.dumps(score(args)))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

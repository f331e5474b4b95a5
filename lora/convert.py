"""Weights in and out: base models into JAX, LoRA adapters in PEFT's layout, and the command that converts folders.

A base is read tensor by tensor (`lora/checkpoint.py`) and quantised on the way when it is to be NF4. An adapter
remembers the sha256 of the base it was trained on and is refused on any other. Files are written beside their place and
then moved into it.

    model = load_model("models/tiny-alfworld", weights="nf4", lora=LoRAConfig(rank=16, alpha=32.0, targets=("q", "v")))
    save_adapter("runs/a3t/round_0/train_pg/adapter", model, "models/tiny-alfworld")
    model = load_adapter("models/tiny-alfworld", "runs/a3t/round_0/train_pg/adapter", weights="nf4")

    python -m lora.convert --model mistral-7b --out base-nf4 --weights nf4          # quantised once
    python -m lora.convert --model mistral-7b --adapter ADAPTER --out merged        # dense, the adapter in it

Shapes: N layers, O out-features, I in-features, G NF4 blocks of an in-row, M blocks of absmax, V vocabulary, D model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from artifacts.cli import parse
from lora.adapter import read_adapter
from lora.checkpoint import (
    BASE_SHA,
    HF_NAMES,
    Checkpoint,
    bitsandbytes_tensors,
    copy_companions,
    decoded,
    is_linear,
    write_checkpoint,
)
from lora.load import DTYPES, Weights

# ---- into JAX --------------------------------------------------------------------------------------------------------


# ---- adapters --------------------------------------------------------------------------------------------------------


# ---- out -------------------------------------------------------------------------------------------------------------


def convert(model_dir: Path, out_dir: Path, weights: Weights, adapter_dir: Path | None, dtype: str | None) -> str:
    """Writes a base in another form, or a dense model with an adapter merged into it; returns what was done.

    A merged model's weights are those of the base in the form `weights`, decoded, plus alpha/r B A, summed in float32
    and rounded to `dtype`.
    """
    checkpoint = Checkpoint(model_dir)
    config = json.loads((Path(model_dir) / "config.json").read_text())
    quantise = weights.startswith("nf4")
    stored_dtype = str(checkpoint.dense("model.embed_tokens.weight").dtype)
    kept = np.dtype(DTYPES[dtype]) if dtype else np.dtype(stored_dtype)
    lora, adapter = (None, {}) if adapter_dir is None else read_adapter(checkpoint, adapter_dir)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in tqdm(checkpoint.shapes.items(), desc="convert", unit="tensor"):
            if not (quantise and is_linear(name)):
                array = checkpoint.dense(name)
            else:
                stored = checkpoint.nf4(name, weights == "nf4-dq")
                if lora is None:
                    yield from bitsandbytes_tensors(name, stored, shape, str(kept)).items()
                    continue
                array = decoded(stored).reshape(shape)
            yield name, merge_into(array, name).astype(kept)

    def merge_into(array: np.ndarray, name: str) -> np.ndarray:
        place = name.split(".")
        target = next((t for t, theirs in HF_NAMES.items() if name.endswith(f"{theirs}.weight")), None)
        if (target, "a") not in adapter:
            return array
        a, b = (adapter[target, side][int(place[2])] for side in "ab")
        return array.astype(np.float32) + np.float32(lora.alpha / lora.rank) * (b @ a)

    config.pop("quantization_config", None)
    if lora is None:
        config[BASE_SHA] = checkpoint.sha256
        if quantise:
            config["quantization_config"] = {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": weights == "nf4-dq",
                "bnb_4bit_compute_dtype": str(kept),
            }
    else:
        config.pop(BASE_SHA, None)
    write_checkpoint(out_dir, tensors(), config | {"dtype": str(kept)})
    copy_companions(model_dir, out_dir)
    return f"{model_dir} -> {out_dir}: {weights}" + ("" if lora is None else f" + {adapter_dir}, {kept}")


@dataclass(frozen=True, kw_only=True)
class Args:
    model: Path
    """Hugging Face folder: safetensors in bf16, fp16, fp32, or bitsandbytes NF4."""
    out: Path
    """Folder to write; it must not hold a model yet."""
    weights: Weights = "nf4"
    """Form of the linear layers: NF4 as bitsandbytes writes it, with double quantisation (nf4-dq), or dense."""
    adapter: Path | None = None
    """Merge this LoRA adapter into the weights and write a dense model; --weights is then the form that it was trained
    on, and its values are what is merged with."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Dtype of what is not quantised (default: as --weights says, or that of the input's embeddings)."""


def main(args: Args) -> None:
    if (args.out / "config.json").exists():
        raise ValueError(f"{args.out} holds a model already; remove it or give another --out.")
    dtype = args.dtype or (args.weights if args.weights in DTYPES else None)
    print(convert(args.model, args.out, args.weights, args.adapter, dtype))


if __name__ == "__main__":
    try:
        main(parse(Args, __doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error

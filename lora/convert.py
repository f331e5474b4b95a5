"""Converts model folders: quantises a base to NF4, changes its dtype, or merges a LoRA adapter into it.

    python -m lora.convert --model mistral-7b --out base-nf4 --weights nf4          # quantise once
    python -m lora.convert --model mistral-7b --adapter ADAPTER --out merged        # dense, adapter merged

The output is a Hugging Face folder that transformers can load. Tensors are converted one at a time (checkpoint.py), and
config.json is written last, so an interrupted run leaves no complete model.

Left out: loading into JAX (load.py), writing adapters (adapter.py), merging straight into NF4.
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


@dataclass(frozen=True, kw_only=True)
class Args:
    model: Path
    """Hugging Face folder: safetensors in bf16, fp16, fp32, or bitsandbytes NF4."""
    out: Path
    """Folder to write; refused if it already holds a model."""
    weights: Weights = "nf4"
    """Form of the linear layers: bitsandbytes NF4, NF4 with double quantisation (nf4-dq), or dense."""
    adapter: Path | None = None
    """LoRA adapter to merge into the weights; the output is then dense, and --weights is the form that the adapter was
    trained on, whose decoded values it is added to. Unset: nothing is merged."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Dtype of unquantised weights. Unset: bf16 or fp32 if --weights is, else the dtype of the input's embeddings."""


def convert(model_dir: Path, out_dir: Path, weights: Weights, adapter_dir: Path | None, dtype: str | None) -> str:
    """Writes a base in another form, or a dense model with an adapter merged; returns a summary line.

    Merged weights are the base's in the form `weights`, decoded, plus alpha/r B A, summed in float32 and rounded to
    `dtype`.
    """
    checkpoint = Checkpoint(model_dir)
    config = json.loads((Path(model_dir) / "config.json").read_text())
    quantise = weights.startswith("nf4")
    stored_dtype = str(checkpoint.dense("model.embed_tokens.weight").dtype)
    dense_dtype = np.dtype(DTYPES[dtype]) if dtype else np.dtype(stored_dtype)
    lora, adapter = (None, {}) if adapter_dir is None else read_adapter(checkpoint, adapter_dir)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in tqdm(checkpoint.shapes.items(), desc="convert", unit="tensor"):
            if not (quantise and is_linear(name)):
                array = checkpoint.dense(name)
            else:
                stored = checkpoint.nf4(name, weights == "nf4-dq")
                if lora is None:
                    yield from bitsandbytes_tensors(name, stored, shape, str(dense_dtype)).items()
                    continue
                array = decoded(stored).reshape(shape)
            yield name, merge_into(array, name).astype(dense_dtype)

    def merge_into(array: np.ndarray, name: str) -> np.ndarray:
        target = next((t for t, theirs in HF_NAMES.items() if name.endswith(f"{theirs}.weight")), None)
        if (target, "a") not in adapter:
            return array
        layer = int(name.split(".")[2])
        a, b = (adapter[target, side][layer] for side in "ab")
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
                "bnb_4bit_compute_dtype": str(dense_dtype),
            }
    else:
        config.pop(BASE_SHA, None)
    write_checkpoint(out_dir, tensors(), config | {"dtype": str(dense_dtype)})
    copy_companions(model_dir, out_dir)
    return f"{model_dir} -> {out_dir}: {weights}" + ("" if lora is None else f" + {adapter_dir}, {dense_dtype}")


def main(args: Args) -> None:
    if (args.out / "config.json").exists():
        raise ValueError(f"{args.out} already holds a model; remove it or give another --out.")
    dtype = args.dtype or (args.weights if args.weights in DTYPES else None)
    print(convert(args.model, args.out, args.weights, args.adapter, dtype))


if __name__ == "__main__":
    try:
        main(parse(Args, __doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error

"""Converts models: quantises a base to NF4, changes its dtype, reads a GGUF file, or merges a LoRA adapter.

    python -m lora.convert --model mistral-7b --out base-nf4 --weights nf4          # quantise once
    python -m lora.convert --model mistral-7b --adapter ADAPTER --out merged        # dense, adapter merged
    python -m lora.convert --model model.Q4_K_M.gguf --out base --weights bf16      # of llama.cpp's format

The output is a Hugging Face folder that transformers can load. Tensors are converted one at a time (checkpoint.py) into
a folder of its own beside --out, which is renamed at the end: whenever it is killed, the same command starts again and
ends with the same bytes. A finished conversion of the same inputs is kept; anything else in its place is refused.

Left out: loading into JAX (load.py), writing adapters (adapter.py), merging straight into NF4, writing GGUF.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from artifacts.atomic import lock
from artifacts.cli import run_main
from artifacts.json_io import parse_json, read_json, write_json
from lora.adapter import read_adapter
from lora.checkpoint import (
    BASE_SHA,
    EMBEDDINGS,
    HF_NAMES,
    Checkpoint,
    as_finite,
    bitsandbytes_tensors,
    decoded,
    is_linear,
    write_checkpoint,
    write_companions,
)
from lora.gguf import GGUFFile
from lora.load import DTYPES, Weights
from lora.tokenizer import chat_template, load_tokenizer

# The file in which a conversion says what it was made of: settings, and sha256 by the name of what was read.
RECORD = "conversion.json"


@dataclass(frozen=True, kw_only=True)
class Args:
    model: Path
    """Hugging Face folder (safetensors in bf16, fp16, fp32, or bitsandbytes NF4), or GGUF file of any quantisation."""
    out: Path
    """Folder to write. One that holds this conversion already is left as it is; any other content is refused."""
    weights: Weights = "nf4"
    """Form of the linear layers: bitsandbytes NF4, NF4 with double quantisation (nf4-dq), or dense."""
    adapter: Path | None = None
    """LoRA adapter to merge into the weights; the output is then dense, and --weights is the form that the adapter was
    trained on, whose decoded values it is added to. Unset: nothing is merged."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Dtype of unquantised weights. Unset: bf16 or fp32 if --weights is, else the dtype of the input's embeddings;
    where they are quantised (GGUF), fp32."""


def convert(
    base: str | Path | Checkpoint, out_dir: Path, weights: Weights, adapter_dir: Path | None, dtype: str | None
) -> str:
    """Writes a base in another form, or a dense model with an adapter merged; returns a summary line.

    Merged weights are the base's in the form `weights`, decoded, plus alpha/r B A, summed in float32 and rounded to
    `dtype`. Raises ValueError for what cannot be read, and for a result that is not finite in `dtype`.
    """
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint(base)
    quantise, dense_dtype = weights.startswith("nf4"), dtype_of(checkpoint, dtype)
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
            yield name, as_finite(merge_into(array, name), dense_dtype, f"{out_dir}: {name}")

    def merge_into(array: np.ndarray, name: str) -> np.ndarray:
        target = next((t for t, theirs in HF_NAMES.items() if name.endswith(f"{theirs}.weight")), None)
        if (target, "a") not in adapter:
            return array
        layer = int(name.split(".")[2])
        a, b = (adapter[target, side][layer] for side in "ab")
        return array.astype(np.float32) + np.float32(lora.alpha / lora.rank) * (b @ a)

    write_checkpoint(out_dir, tensors(), converted_config(checkpoint, weights, lora is not None, str(dense_dtype)))
    write_companions(checkpoint, out_dir)
    return f"{weights}" + ("" if lora is None else f" + {adapter_dir}, {dense_dtype}")


def dtype_of(checkpoint: Checkpoint, dtype: str | None) -> np.dtype:
    """The dtype of unquantised weights; None means that of the input's embeddings."""
    return np.dtype(DTYPES[dtype]) if dtype else checkpoint.dense(EMBEDDINGS).dtype


def converted_config(checkpoint: Checkpoint, weights: Weights, merged: bool, dtype: str) -> dict[str, Any]:
    """The config.json of a conversion: the input's, with RoPE described where transformers 4 and 5 look for it."""
    config = parse_json(checkpoint.files["config.json"], dict[str, Any], f"{checkpoint.folder}: config.json")
    for key in ("quantization_config", BASE_SHA):
        config.pop(key, None)
    config |= checkpoint.config.rope_json() | {"dtype": dtype}
    if "torch_dtype" in config:  # transformers 4
        config["torch_dtype"] = dtype
    if merged:
        return config
    config[BASE_SHA] = checkpoint.sha256
    if weights.startswith("nf4"):
        config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": weights == "nf4-dq",
            "bnb_4bit_compute_dtype": dtype,
        }
    return config


# ---- the folder ------------------------------------------------------------------------------------------------------


def record_of(checkpoint: Checkpoint, weights: Weights, adapter_dir: Path | None, dtype: str | None) -> dict[str, str]:
    """What decides the bytes of a conversion, whatever the folders are called: settings, and sha256 by file."""
    files = dict(checkpoint.files)
    if adapter_dir is not None:
        names = ("adapter_config.json", "adapter_model.safetensors")
        files |= {name: (adapter_dir / name).read_bytes() for name in names}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    settings = {"--weights": weights, "--dtype": str(dtype_of(checkpoint, dtype))}
    return settings | {"base": checkpoint.weights_sha256} | hashes


def is_finished(out: Path, record: dict[str, str]) -> bool:
    """Whether `out` holds this conversion; False if there is nothing. Raises ValueError for anything else."""
    if not out.exists():
        return False
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return False
    if RECORD not in names:
        raise ValueError(f"{out} holds {names[0]} but no {RECORD}: it is no conversion. Give another --out.")
    there = read_json(out / RECORD, dict[str, str])
    differing = [
        f"{name}: there {there.get(name, 'none')}, now {record.get(name, 'none')}"
        for name in sorted({*there, *record})
        if there.get(name) != record.get(name)
    ]
    if differing:
        raise ValueError(
            f"{out} holds another conversion ({'; '.join(differing)}). Give another --out, or remove the folder."
        )
    Checkpoint(out)  # raises if a file was damaged or removed since
    return True


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds a lock beside `out`. Raises ValueError if another process holds it."""
    path = out.with_name(f".{out.name}.lock")
    descriptor = lock(path)
    if descriptor is None:
        raise ValueError(f"another process is converting to {out}; wait until it ends, or give another --out")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def open_base(model: Path) -> tuple[Checkpoint, str | None]:
    """A GGUF file or a folder, and its chat template. Raises ValueError if its tokenizer is missing or broken too."""
    if model.is_file():
        file = GGUFFile(model)
        return file, file.chat_template
    checkpoint = Checkpoint(model)
    load_tokenizer(model)
    return checkpoint, chat_template(model)


def main(args: Args) -> None:
    dtype = args.dtype or (args.weights if args.weights in DTYPES else None)
    (checkpoint, template), out = open_base(args.model), Path(os.path.realpath(args.out))
    if args.adapter is not None:
        read_adapter(checkpoint, args.adapter)  # raises if it is broken, before anything is made
    if template is None:
        print(f"{args.model} has no chat template: a prompt will be played as plain text")
    record = record_of(checkpoint, args.weights, args.adapter, dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out):
        if is_finished(out, record):
            print(f"{args.out}: finished already")
            return
        ours = re.compile(re.escape(out.name) + r"\.\d+\.tmp")
        for path in [path for path in out.parent.iterdir() if ours.fullmatch(path.name)]:
            shutil.rmtree(path)  # of a process that was killed, or it would hold the lock
        temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
        artifacts.interrupts.advice = f"interrupted; {args.out} is not made, the same command starts again"
        try:
            summary = convert(checkpoint, temporary, args.weights, args.adapter, dtype)
            write_json(temporary / RECORD, record)
            os.rename(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    print(f"{args.model} -> {args.out}: {summary}")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

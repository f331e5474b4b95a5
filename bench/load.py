"""Loading a checkpoint of over a billion parameters: seconds and peak host memory, compared with their lower bounds.

Writes a random bf16 checkpoint of a 1.1 B-parameter Mistral shape (2.2 GB) into a temporary folder, converts it to NF4
(`lora.convert`), and loads both, each in a separate process. Lower bounds: the time to read the source once, and the
size of the result (on a CPU JAX stores a 4-bit code in a byte). Figures for 7B are extrapolated by parameter count.

    JAX_PLATFORMS=cpu python -m bench.load
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from artifacts.cli import run_main
from bench.shapes import MISTRAL_7B, parameters
from lora.checkpoint import tensor_shapes, weight_files, write_checkpoint
from lora.config import Config

SHAPE = Config(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    rope_theta=1e6,
)
MEASURE = """
import json, re, sys, time
from pathlib import Path
sys.path.insert(0, "")
start = time.time()
{code}
# Not ru_maxrss, which a process inherits from the one that started it.
peak = int(re.search(r"VmHWM:\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({{"seconds": time.time() - start, "peak_memory": peak}}))
"""
IMPORTS = "import jax\nfrom lora.convert import convert\nfrom lora.load import load_model\nstart = time.time()\n"


@dataclass(frozen=True, kw_only=True)
class Args:
    folder: Path | None = None
    """Parent of the temporary folder for the checkpoints (default: the system's)."""


def measure(code: str) -> dict:
    """Seconds and peak memory of a piece of code, run in a subprocess."""
    command = [sys.executable, "-c", MEASURE.format(code=code)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def random_checkpoint(folder: Path) -> int:
    """Writes the checkpoint; returns its size in bytes."""
    random = np.random.default_rng(0)
    pool = random.standard_normal(2**24, np.float32).astype(ml_dtypes.bfloat16)
    shapes = tensor_shapes(SHAPE)
    write_checkpoint(folder, ((n, np.resize(pool, shape)) for n, shape in shapes.items()), SHAPE.to_json())
    return sum(path.stat().st_size for path in weight_files(folder))


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        dense, quantised = Path(temporary) / "dense", Path(temporary) / "nf4"
        size = random_checkpoint(dense)
        start = time.time()
        for path in weight_files(dense):
            with path.open("rb") as file:
                while file.read(2**24):
                    pass
        read_seconds = time.time() - start
        load = "jax.block_until_ready(jax.tree.leaves(__import__('flax').nnx.state(load_model({!r}, weights='nf4'))))"
        rows = {
            "imports alone": measure(IMPORTS + "jax.devices()"),
            "convert to NF4": measure(
                IMPORTS + f"convert(Path({str(dense)!r}), Path({str(quantised)!r}), 'nf4', None, None)"
            ),
            "load, quantising": measure(IMPORTS + load.format(str(dense))),
            "load NF4": measure(IMPORTS + load.format(str(quantised))),
        }
        result = sum(path.stat().st_size for path in weight_files(quantised))
    count = parameters(SHAPE)
    ratio = parameters(MISTRAL_7B) / count
    print(
        f"{count / 1e9:.2f} B parameters, {size / 2**30:.2f} GiB in bf16, {result / 2**30:.2f} GiB in NF4; "
        f"reading the source once: {read_seconds:.1f} s"
    )
    for name, row in rows.items():
        print(
            f"{name:18} {row['seconds']:7.1f} s {row['peak_memory'] / 2**30:6.2f} GiB peak; "
            f"7B, extrapolated: {row['seconds'] * ratio:6.0f} s"
        )
    print(json.dumps({"parameters": count, "bytes": size, "bytes_nf4": result, "read_seconds": read_seconds, **rows}))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

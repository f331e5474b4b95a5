"""What a base takes in memory, by model: its weights in NF4 and in 16 bits, an adapter in training, and the KV cache.

Arithmetic on shapes, no measurement: what must be resident. Temporaries come on top: bench/tpu_compile.py has them for
a TPU.

    python -m bench.memory
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

from dataclasses import dataclass
from typing import Annotated

from artifacts.cli import Range, run_main
from bench.shapes import SHAPES, adapter_bytes, base_bytes, cache_bytes, parameters
from lora.linear import TARGETS, LoRAConfig

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True, kw_only=True)
class Args:
    rank: Annotated[int, Range(1, 2**16)] = 16
    """Rank of the adapter, on all seven projections."""


def main(args: Args) -> None:
    lora = LoRAConfig(rank=args.rank, targets=TARGETS)
    print(
        f"{'model':14} {'parameters':>14} {'NF4, GiB':>9} {'bf16, GiB':>9} {'adapter + Adam':>15} {'1,000 tokens':>13}"
    )
    for name, config in SHAPES.items():
        base = [base_bytes(config, bits) / GIB for bits in (4.5, 16)]
        training, cache = 3 * adapter_bytes(config, lora) / GIB, cache_bytes(config, 1000) / MIB
        print(f"{name:14} {parameters(config):14,} {base[0]:9.2f} {base[1]:9.2f} {training:11.2f} GiB {cache:9.1f} MiB")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

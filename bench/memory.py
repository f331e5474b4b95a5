"""Plans of memory (lora/footprint.py): what models take, and plans against what processes take on a CPU.

First prints, by model, weights in NF4 and in 16 bits, an adapter in training, and the KV cache: arithmetic on shapes.
Then measures playing and training at three shapes. Each case runs in a process of its own, on random weights: a base is
loaded, and sessions fill their context, or two optimizer steps are taken and saved. Measured is the peak resident size,
less that of a process that has imported the same and compiled a sum. Programs are compiled anew, without a cache.

    JAX_PLATFORMS=cpu python -m bench.memory
    JAX_PLATFORMS=cpu python -m bench.memory --only tiny/playing
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agent.local import load_decoders
from artifacts.cli import run_main
from bench.shapes import MISTRAL_100M, SHAPES, SMOLLM2_135M, parameters
from lora import trainer
from lora.checkpoint import tensor_shapes, write_checkpoint
from lora.config import Config
from lora.engine import Engine
from lora.footprint import (
    Plan,
    Playing,
    Training,
    adapter_bytes,
    base_bytes,
    cache_bytes,
    nf4_bits,
    plan_playing,
    plan_training,
)
from lora.linear import TARGETS, LoRAConfig
from lora.load import load_model
from lora.memory import this_cpu
from lora.sharding import make_mesh
from lora.train_step import Batch
from train_pg import objective

ROOT, GIB = Path(__file__).parents[1], 2**30
TINY = Config.read(ROOT / "models" / "tiny-alfworld")
LORA = LoRAConfig(rank=16, targets=TARGETS)
CASES: dict[str, tuple[Config, Playing | Training]] = {
    "tiny/playing": (TINY, Playing(rollout="fp32", slots=64, context=1024)),
    "98m/playing": (MISTRAL_100M, Playing(rollout="fp32", slots=16, context=1024)),
    "smollm2-135m/playing": (SMOLLM2_135M, Playing(rollout="nf4", slots=8, context=512)),
    "tiny/training": (TINY, Training(lora=LORA, batch_rows=2, device_rows=2, remat="none")),
    "98m/training": (MISTRAL_100M, Training(lora=LORA, batch_rows=1, device_rows=1, remat="none")),
    "smollm2-135m/training": (SMOLLM2_135M, Training(lora=LORA, batch_rows=1, device_rows=1, remat="full")),
}
TURN, REPLY = 150, 64  # ids: queued in each turn, and sampled at most


@dataclass(frozen=True, kw_only=True)
class Args:
    only: tuple[Literal[tuple(CASES)], ...] = tuple(CASES)
    """Cases to measure."""
    child: Literal[("", "nothing", *CASES)] = ""
    """Run one case in this process, on the checkpoint in --folder (used by the benchmark itself)."""
    folder: Path = Path()
    """Checkpoint of the child."""


def write_random(folder: Path, config: Config) -> None:
    """Writes a float32 checkpoint of that shape with random weights."""
    pool = 0.02 * np.random.default_rng(0).standard_normal(2**22 + 1, np.float32)  # of an odd length
    shapes = tensor_shapes(config).items()
    tensors = ((name, np.ones(s, np.float32) if "norm" in name else np.resize(pool, s)) for name, s in shapes)
    write_checkpoint(folder, tensors, config.to_json())


def play(config: Config, how: Playing, folder: Path) -> None:
    """All slots play turns of random ids until their context is full."""
    [decoder] = load_decoders(folder, None, how.weights, how.rollout)
    engine = Engine(decoder, slots=how.slots, context=how.context, max_new_tokens=how.max_new_tokens, stop_ids=[])
    random, sessions = np.random.default_rng(1), [engine.open() for _ in range(how.slots)]
    while engine.room(sessions[0]) >= TURN + REPLY:
        for session in sessions:
            engine.extend(session, random.integers(3, config.vocab_size, TURN).tolist())
        engine.sample([(session, 1.0, session) for session in sessions])


def train(config: Config, how: Training, folder: Path) -> None:
    """An epoch of two optimizer steps on rows of random ids, and its checkpoint."""
    mesh, steps = make_mesh(how.mesh), 2
    model = load_model(folder, weights=how.weights, dtype=jnp.dtype(how.dtype), lora=how.lora, mesh=mesh)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    shape = (steps * how.batch_rows, how.row_length)
    ids = np.random.default_rng(1).integers(3, config.vocab_size, shape).astype(np.int32)
    plan = trainer.Plan(
        rows=Batch(ids=ids, segments=np.ones(shape, np.int32), weights=np.ones(shape, np.float32)),
        epochs=1,
        order=lambda epoch: np.arange(len(ids)).reshape(steps, -1),
        rate=lambda step: jnp.float32(1e-4),
        key=lambda step: None,
        device_rows=how.device_rows,
    )
    weighted, checkpoints = functools.partial(objective, remat=how.remat), folder / "checkpoints"
    for _ in trainer.Trainer(model, weighted, optimizer, mesh, plan, checkpoints=checkpoints, minutes=10):
        pass


def run_child(args: Args) -> None:
    """Runs a case and prints the process's peak resident bytes."""
    jax.block_until_ready(jax.jit(jnp.add)(1, 1))
    if args.child != "nothing":
        config, how = CASES[args.child]
        (play if isinstance(how, Playing) else train)(config, how, args.folder)
    # Not ru_maxrss, which a process inherits from the one that started it.
    print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)


def measure(child: str, folder: Path) -> int:
    """Peak resident bytes of a process that runs a case."""
    command = [sys.executable, "-m", "bench.memory", "--child", child, "--folder", str(folder)]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def plan_of(name: str) -> Plan:
    config, how = CASES[name]
    return (plan_playing if isinstance(how, Playing) else plan_training)(config, how, this_cpu())


def print_models() -> None:
    """What must be resident, by model."""
    print(
        f"{'model':14} {'parameters':>14} {'NF4, GiB':>9} {'bf16, GiB':>9} {'adapter + Adam':>15} {'1,000 tokens':>13}"
    )
    for name, config in SHAPES.items():
        base = [base_bytes(config, bits) / GIB for bits in (nf4_bits(), 16)]
        training, cache = 3 * adapter_bytes(config, LORA) / GIB, cache_bytes(config, 1000) / 2**20
        print(f"{name:14} {parameters(config):14,} {base[0]:9.2f} {base[1]:9.2f} {training:11.2f} GiB {cache:9.1f} MiB")


def main(args: Args) -> None:
    if args.child:
        run_child(args)
        return
    print_models()
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        nothing = measure("nothing", Path(temporary))
        print(f"an empty process: {nothing / GIB:.2f} GiB")
        print(f"{'case':22} {'plan, GiB':>9} {'measured':>9} {'plan / measured':>15}")
        for name in args.only:
            folder = Path(temporary) / name.split("/")[0]
            if not folder.exists():
                write_random(folder, CASES[name][0])
            plan, peak = plan_of(name), measure(name, folder) - nothing
            rows[name] = {"plan": plan._asdict() | {"peak": plan.peak}, "measured": peak}
            print(f"{name:22} {plan.peak / GIB:9.2f} {peak / GIB:9.2f} {plan.peak / peak:15.2f}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

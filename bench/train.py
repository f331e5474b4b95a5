"""QLoRA training compared with torch + PEFT: the same trajectories through the same model shape in the same run.

Trajectories with the lengths that the loop collects go through a model with random weights and an adapter of the same
rank on the same projections: forward, backward and AdamW for each batch. Ours is the step of train_pg.py with packed
rows and NF4. The peer is transformers + PEFT, fed in two ways: batches of trajectories padded to the longest, as the
usual collator does, and the same packed rows as ours, with positions restarting at each trajectory. Its base is
bitsandbytes' NF4, or dense, which needs no decoding; ours is compared with the faster. Prints for each: real
(non-padding) tokens/s over all steps, achieved FLOP/s (4 per weight and real token), peak memory.

    JAX_PLATFORMS=cpu python -m bench.train                                      # 98 M parameters, on the CPU
    JAX_PLATFORMS=cpu python -m bench.train --shape smollm2-135m --tokens 1920 --targets all --trajectories 18
    python -m bench.train --shape mistral-7b --tokens 4096 --targets all                 # on a GPU
    python -m bench.train --shape mistral-7b --tokens 2048 --remat full --peers          # only ours: its memory

Each contender runs in a subprocess. A peer and ours alternate, a few steps per turn, so that other load on the machine
slows both. A turn begins with an uncounted step, because machines reclaim memory from waiting processes. Ours is
measured again for every peer, so it is printed once for each.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from artifacts.cli import run_main
from artifacts.packing import pack
from bench.shapes import MISTRAL_100M, SHAPES, described, random_like


@dataclass(frozen=True, kw_only=True)
class Args:
    shape: Literal["100m", *SHAPES] = "100m"
    """Model shape."""
    tokens: int = 1280
    """Tokens per packed row."""
    rows: int = 2
    """Packed rows per step; on a CPU each is computed on a separate device, as in train_pg.py."""
    trajectories: int = 64
    """Total number of trajectories; the default fills rows to 94 %, as in a round of the loop."""
    batch: int = 8
    """Trajectories per padded step (transformers' Trainer: 8)."""
    targets: Literal["qv", "all"] = "qv"
    """Projections with an adapter."""
    rank: int = 16
    """LoRA rank."""
    remat: Literal["none", "full", "dots"] = "none"
    """Rematerialisation in the backward pass; the peer uses gradient checkpointing unless none."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Activations (default: float32 on a CPU, bfloat16 on an accelerator)."""
    peers: tuple[Literal["nf4", "dense"], ...] = ("nf4", "dense")
    """Bases of the peer; if empty, only ours is measured."""
    seed: int = 0
    """Seed of weights and ids."""
    turn: int = 3
    """Counted steps per turn."""
    contender: str | None = None
    """Internal: run as this contender: ours, nf4-padded, nf4-packed, dense-padded or dense-packed."""


TARGETS = {"qv": ("q", "v"), "all": ("q", "k", "v", "o", "gate", "up", "down")}


# Trajectory lengths in tokens: 20 quantiles of the 152 that round 1 of `make run` trains on (mean 412, longest 913).
LENGTHS = (215, 223, 271, 280, 291, 310, 322, 348, 368, 378, 380, 405, 424, 453, 488, 520, 546, 569, 653, 759)


def make_trajectories(args: Args, vocabulary: int) -> list[np.ndarray]:
    """Random ids for each trajectory."""
    random = np.random.default_rng(args.seed)
    return [random.integers(3, vocabulary, length) for length in random.choice(LENGTHS, args.trajectories)]


def build_rows(args: Args, trajectories: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The packed trajectories: ids and segments [rows, tokens] of each step; empty rows fill the last one."""
    packed = pack([(ids, np.ones(len(ids))) for ids in trajectories], args.tokens)
    missing = -len(packed.ids_NL) % args.rows
    filled = (np.pad(x, ((0, missing), (0, 0))) for x in (packed.ids_NL, packed.segments_NL))
    return list(zip(*(x.reshape(-1, args.rows, args.tokens) for x in filled), strict=True))


def load_config(args: Args):
    return MISTRAL_100M if args.shape == "100m" else SHAPES[args.shape]


def ours(args: Args) -> tuple[list[Callable[[], object]], Callable[[], int], str]:
    """The steps to run, a function that returns peak memory, and the name of the device."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from lora.attention import segment_bounds
    from lora.flops import peak_memory
    from lora.linear import LoRAConfig, LoRAParam
    from lora.sharding import make_mesh
    from lora.train_step import Batch, initial_state, make_update
    from train_pg import objective

    jax.config.update("jax_num_cpu_devices", args.rows)
    on_cpu = jax.default_backend() == "cpu"
    config, mesh = load_config(args), make_mesh((jax.device_count(), 1, 1))
    lora = LoRAConfig(rank=args.rank, alpha=2.0 * args.rank, targets=TARGETS[args.targets])
    dtype = jnp.dtype(args.dtype or ("float32" if on_cpu else "bfloat16"))
    graph, adapter, frozen = nnx.split(described(config, lora, mesh, dtype=dtype), LoRAParam, ...)
    adapter, frozen = random_like(adapter), random_like(frozen)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    rows = build_rows(args, make_trajectories(args, config.vocab_size))
    bounds = segment_bounds(np.concatenate([segments for _, segments in rows]))
    weighted = partial(objective, bounds=bounds, remat=args.remat)
    update = make_update(weighted, graph, optimizer, mesh, adapter, frozen)
    state = initial_state(optimizer, adapter, mesh)

    def step(ids: np.ndarray, segments: np.ndarray) -> None:
        nonlocal adapter, state
        weights = (segments > 0).astype(np.float32)
        ids, segments, weights = (x.reshape(-1, mesh.size, args.tokens) for x in (ids, segments, weights))
        batch = Batch(ids=ids, segments=segments, weights=weights)
        adapter, state, values = update(adapter, state, frozen, 1e-4, batch, np.float32(args.batch), None)
        jax.block_until_ready((adapter, values))

    return [partial(step, *row) for row in rows], peak_memory, jax.devices()[0].device_kind


def peer(args: Args, base: str, layout: str) -> tuple[list[Callable[[], object]], Callable[[], int], str]:
    """Like `ours`, for torch + PEFT."""
    import resource

    import peft
    import torch
    import transformers

    from lora.checkpoint import HF_NAMES

    config = load_config(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "bfloat16"))
    raw = {k: v for k, v in config.to_json().items() if k not in ("architectures", "model_type", "dtype")}
    shape = transformers.AutoConfig.for_model(config.model_type, **raw, use_cache=False)
    torch.manual_seed(args.seed)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = transformers.AutoModelForCausalLM.from_config(shape)
        torch.set_default_dtype(torch.float32)
    if base == "nf4":
        import bitsandbytes

        for layer in model.model.layers:
            for holder, name in ((layer.self_attn, n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")):
                quantize_layer(holder, name, bitsandbytes, dtype, device)
            for name in ("gate_proj", "up_proj", "down_proj"):
                quantize_layer(layer.mlp, name, bitsandbytes, dtype, device)
    names = [HF_NAMES[target].split(".")[1] for target in TARGETS[args.targets]]
    model = peft.get_peft_model(model, peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=names))
    if args.remat != "none":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    trajectories = make_trajectories(args, config.vocab_size)
    if layout == "padded":
        starts = range(0, len(trajectories), args.batch)
        batches = [padded_batch(trajectories[start : start + args.batch]) for start in starts]
    else:
        batches = [packed_batch(*rows) for rows in build_rows(args, trajectories)]

    def step(batch: dict[str, np.ndarray]) -> None:
        loss = model(**{name: torch.from_numpy(x).to(device) for name, x in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        if device == "cuda":
            torch.cuda.synchronize()

    def peak() -> int:
        if device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return [partial(step, batch) for batch in batches], peak, kind


def padded_batch(trajectories: list[np.ndarray]) -> dict[str, np.ndarray]:
    """A batch as made by transformers' collators: padded to the longest, with padding masked and excluded from loss."""
    longest = max(len(ids) for ids in trajectories)
    ids, mask = (
        np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
        for rows in (trajectories, [np.ones(len(ids), np.int64) for ids in trajectories])
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": np.where(mask, ids, -100)}


def packed_batch(ids: np.ndarray, segments: np.ndarray) -> dict[str, np.ndarray]:
    """Packed rows as transformers accepts them: restarting positions separate the trajectories."""
    new = np.diff(segments, axis=1, prepend=-1) != 0
    index = np.arange(ids.shape[1])
    positions = index - np.maximum.accumulate(np.where(new, index, 0), axis=1)
    labels = np.where((segments > 0) & ~new, ids, -100)
    return {
        name: x.astype(np.int64) for name, x in (("input_ids", ids), ("position_ids", positions), ("labels", labels))
    }


def quantize_layer(holder, name: str, bitsandbytes, dtype, device: str) -> None:
    """Replaces a dense layer by bitsandbytes' NF4 layer with the same weight."""
    dense = getattr(holder, name)
    layer = bitsandbytes.nn.Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=False,
        quant_type="nf4",
    )
    layer.load_state_dict({"weight": dense.weight.data.cpu()})
    setattr(holder, name, layer.to(device))


def run_contender(args: Args) -> None:
    """Runs a step per stdin line and prints its seconds; "count" advances to the next. Ends with memory and device."""
    out, sys.stdout = sys.stdout, sys.stderr  # keep prints of libraries out of the replies
    steps, peak, kind = ours(args) if args.contender == "ours" else peer(args, *args.contender.split("-"))
    print(len(steps), file=out, flush=True)
    counted = 0
    while counted < len(steps):
        line, start = sys.stdin.readline(), time.time()
        steps[counted]()
        print(time.time() - start, file=out, flush=True)
        counted += line == "count\n"
    print(json.dumps({"peak_memory": peak(), "device": kind}), file=out, flush=True)


class Contender:
    """A subprocess that runs a step on request."""

    def __init__(self, name: str):
        command = [sys.executable, "-m", "bench.train", *sys.argv[1:], "--contender", name]
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # both share the GPU
        if name == "ours":
            env["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # as in run.sh; torch is slower with it
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.steps, self.seconds = int(self._read()), []
        self._step("warm up")  # compiles

    def _read(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: a contender exited with status {self._process.wait()}; its output is above")
        return line

    @property
    def share(self) -> float:
        """Share of its steps that are done."""
        return len(self.seconds) / self.steps

    def _step(self, command: str) -> float:
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def turn(self, steps: int) -> None:
        self._step("warm up")
        self.seconds += [self._step("count") for _ in range(min(steps, self.steps - len(self.seconds)))]

    def result(self, args: Args) -> dict:
        """Its figures, once all its steps are done."""
        from lora.flops import lora_step_flops

        config, memory = load_config(args), json.loads(self._read())
        self._process.communicate()
        tokens, seconds = sum(map(len, make_trajectories(args, config.vocab_size))), sum(self.seconds)
        return memory | {
            "tokens_per_s": tokens / seconds,
            "flops_per_s": lora_step_flops(config, tokens) / seconds,
            "seconds": [round(s, 3) for s in self.seconds],
            "tokens": tokens,
        }


def processor() -> str:
    """Name of the CPU, as reported by Linux."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main(args: Args) -> None:
    if args.contender:
        return run_contender(args)
    comparisons = []
    for against in [f"{base}-{layout}" for layout in ("padded", "packed") for base in args.peers] or [None]:
        contenders = {name: Contender(name) for name in ("ours", against) if name}
        while (behind := min(contenders.values(), key=lambda contender: contender.share)).share < 1:
            behind.turn(args.turn)
        results = {name: contender.result(args) for name, contender in contenders.items()}
        for name, row in results.items():
            print(
                f"{name:12} {row['tokens_per_s']:10.1f} tokens/s {row['flops_per_s'] / 1e12:8.3f} TFLOP/s "
                f"{row['peak_memory'] / 2**30:7.2f} GiB   {row['device']}",
                flush=True,
            )
        comparisons.append(results | {"against": against})
    ratios: dict[str, float] = {}
    for results in comparisons:
        base, _, layout = (results["against"] or "").partition("-")
        if base:
            ratio = results["ours"]["tokens_per_s"] / results[results["against"]]["tokens_per_s"]
            ratios[layout] = min(round(ratio, 3), ratios.get(layout, math.inf))
    print(
        f"{processor()}, {os.cpu_count()} cores; {args.shape}, {args.targets} r {args.rank}, {args.trajectories} "
        f"trajectories, {args.rows} rows of {args.tokens} or {args.batch} trajectories per step; ours / faster peer: "
        f"{ratios.get('padded')} padded, {ratios.get('packed')} packed"
    )
    arguments = {key: value for key, value in asdict(args).items() if key != "contender"}
    print(json.dumps({"args": arguments, "processor": processor(), "ratios": ratios, "meetings": comparisons}))
    return None


if __name__ == "__main__":
    run_main(main, Args, __doc__)

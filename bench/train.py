"""QLoRA training steps a second: ours beside torch + PEFT on the same shape, the same rows, in the same run.

Both take packed rows of the same length through the same Mistral with random weights, an adapter of the same rank on
the same projections, forward, backward and AdamW, batch after batch. Ours is the step of train_pg.py on NF4. The peer
is transformers + PEFT, its base in bitsandbytes' NF4 and, beside it, dense (no decoding: the faster of the two is what
ours is compared with). Printed for each: tokens/s (median step), achieved FLOP/s (4 a weight and token), peak memory.

    JAX_PLATFORMS=cpu python -m bench.train                             # 98 M parameters, on the CPU
    python -m bench.train --shape 7b --tokens 4096 --targets all        # on a GPU
    python -m bench.train --shape 7b --tokens 2048 --remat full --peers # ours alone: how much memory it takes

Each contender runs in a process of its own, so that none keeps the other's memory.
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro


@dataclass(frozen=True, kw_only=True)
class Args:
    shape: Literal["100m", "7b"] = "100m"
    """Model shape."""
    tokens: int = 512
    """Tokens of a packed row."""
    rows: int = 1
    """Rows of a step."""
    steps: int = 5
    """Timed steps, after one that compiles and one more."""
    targets: Literal["qv", "all"] = "qv"
    """Projections with an adapter."""
    rank: int = 16
    """LoRA rank."""
    remat: Literal["none", "full", "dots"] = "none"
    """What layers keep for the backward pass; the peer's gradient checkpointing where it is not none."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Activations (default: float32 on a CPU, bfloat16 on an accelerator)."""
    peers: tuple[Literal["nf4", "dense"], ...] = ("nf4", "dense")
    """The base of the peer; none: ours alone."""
    seed: int = 0
    """Of weights and ids."""
    contender: Literal["ours", "nf4", "dense"] | None = None
    """Internal: run this one alone and print its JSON."""


TARGETS = {"qv": ("q", "v"), "all": ("q", "k", "v", "o", "gate", "up", "down")}


def rows_of(args: Args, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segments [rows, tokens]: four trajectories a row."""
    ids = np.random.default_rng(args.seed).integers(3, vocabulary, (args.rows, args.tokens)).astype(np.int32)
    segments = np.broadcast_to(1 + 4 * np.arange(args.tokens) // args.tokens, ids.shape).astype(np.int32)
    return ids, segments


def shape_of(args: Args):
    from bench.shapes import MISTRAL_7B, MISTRAL_100M

    return {"7b": MISTRAL_7B, "100m": MISTRAL_100M}[args.shape]


def ours(args: Args) -> dict:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from bench.shapes import described, random_like
    from lora.device import lora_step_flops, peak_memory
    from lora.linear import LoRAConfig, LoRAParam
    from lora.sharding import make_mesh
    from train_pg import Batch, initial_state, make_update

    on_cpu = jax.default_backend() == "cpu"
    config, mesh = shape_of(args), make_mesh((1, 1, 1))
    lora = LoRAConfig(rank=args.rank, alpha=2.0 * args.rank, targets=TARGETS[args.targets])
    dtype = jnp.dtype(args.dtype or ("float32" if on_cpu else "bfloat16"))
    graph, adapter, frozen = nnx.split(described(config, lora, mesh, dtype=dtype), LoRAParam, ...)
    adapter, frozen = random_like(adapter), random_like(frozen)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    update = make_update(graph, optimizer, mesh, adapter, frozen, remat=args.remat)
    state = initial_state(optimizer, adapter, mesh)
    ids, segments = rows_of(args, config.vocab_size)
    batch = Batch(*(x[:, None] for x in (ids, segments, np.ones(ids.shape, np.float32))))
    seconds = []
    for _ in range(args.steps + 2):
        start = time.time()
        adapter, state, values = update(adapter, state, frozen, 1e-4, batch, np.float32(4 * args.rows), None)
        jax.block_until_ready((adapter, values))
        seconds.append(time.time() - start)
    return report(args, seconds, lora_step_flops(config, ids.size), peak_memory(), jax.devices()[0].device_kind)


def peer(args: Args, base: str) -> dict:
    import resource

    import peft
    import torch
    import transformers

    from lora.checkpoint import HF_NAMES
    from lora.device import lora_step_flops

    config = shape_of(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "bfloat16"))
    raw = {k: v for k, v in config.to_json().items() if k not in ("architectures", "model_type", "dtype")}
    torch.manual_seed(args.seed)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**raw, use_cache=False))
        torch.set_default_dtype(torch.float32)
    if base == "nf4":
        import bitsandbytes

        for layer in model.model.layers:
            for holder, name in ((layer.self_attn, n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")):
                replace(holder, name, bitsandbytes, dtype, device)
            for name in ("gate_proj", "up_proj", "down_proj"):
                replace(layer.mlp, name, bitsandbytes, dtype, device)
    names = [HF_NAMES[target].split(".")[1] for target in TARGETS[args.targets]]
    model = peft.get_peft_model(model, peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=names))
    if args.remat != "none":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    ids, segments = rows_of(args, config.vocab_size)
    ids_BL = torch.tensor(ids.astype(np.int64), device=device)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(segments[0])) + 1, [args.tokens]])
    positions = np.concatenate([np.arange(n) for n in np.diff(starts)])
    positions_BL = torch.tensor(np.broadcast_to(positions, ids.shape).copy(), device=device)
    seconds = []
    for _ in range(args.steps + 2):
        start = time.time()
        # Packed as transformers packs: positions that begin again separate the texts.
        loss = model(input_ids=ids_BL, position_ids=positions_BL, labels=ids_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.time() - start)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # fmt: skip
    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return report(args, seconds, lora_step_flops(config, ids.size), memory, kind)


def replace(holder, name: str, bitsandbytes, dtype, device: str) -> None:
    """Puts bitsandbytes' NF4 layer in the place of a dense one, with its weight."""
    dense = getattr(holder, name)
    layer = bitsandbytes.nn.Linear4bit(
        dense.in_features, dense.out_features, bias=False, compute_dtype=dtype, compress_statistics=False,
        quant_type="nf4",
    )  # fmt: skip
    layer.load_state_dict({"weight": dense.weight.data.cpu()})
    setattr(holder, name, layer.to(device))


def report(args: Args, seconds: list[float], flops: float, memory: int, kind: str) -> dict:
    step = float(np.median(seconds[2:]))
    return {
        "tokens_per_s": args.rows * args.tokens / step, "flops_per_s": flops / step, "peak_memory": memory,
        "seconds": [round(s, 4) for s in seconds], "device": kind,
    }  # fmt: skip


def processor() -> str:
    """The CPU's name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main(args: Args) -> None:
    if args.contender:
        print(json.dumps(ours(args) if args.contender == "ours" else peer(args, args.contender)))
        return
    found = {}
    for contender in ("ours", *args.peers):
        command = [sys.executable, "-m", "bench.train", *sys.argv[1:], "--contender", contender]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            print(f"{contender}: failed\n{result.stderr[-2000:]}")
            continue
        found[contender] = row = json.loads(result.stdout.splitlines()[-1])
        print(f"{contender:6} {row['tokens_per_s']:10.1f} tokens/s {row['flops_per_s'] / 1e12:8.3f} TFLOP/s "
              f"{row['peak_memory'] / 2**30:7.2f} GiB   {row['device']}")  # fmt: skip
    best = max((found[name]["tokens_per_s"] for name in args.peers if name in found), default=None)
    ratio = None if best is None or "ours" not in found else found["ours"]["tokens_per_s"] / best
    print(f"{processor()}, {os.cpu_count()} cores; {args.shape}, rows of {args.tokens}, {args.targets} r {args.rank}; "
          f"ours / the faster peer: {'-' if ratio is None else f'{ratio:.2f}'}")  # fmt: skip
    arguments = {key: value for key, value in asdict(args).items() if key != "contender"}
    print(json.dumps({"args": arguments, "processor": processor(), "ratio": ratio, **found}))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

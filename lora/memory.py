"""Plans of memory: what a device holds, which settings fit it, and what would fit instead of those that do not.

    how, plan = choose_playing(config, Playing(context=1920), this_device())    # rollout weights and slots that fit
    print(describe_playing(how, plan))
    how, plan = choose_training(config, Training(row_length=2048), DEVICES["RTX 3090"])

    python -m lora.memory --model ~/mistral-7b --device "RTX 3090" --devices 4

A choice leaves a SPARE share of the device free; a setting that is given may use all of it.
Left out: the arithmetic (footprint.py).
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from artifacts.cli import Range, run_main
from lora.config import Config
from lora.decoder import RolloutWeights
from lora.footprint import MIB, Device, Plan, Playing, Training, adapter_bytes, plan_playing, plan_training
from lora.linear import TARGETS, LoRAConfig
from lora.sharding import CPU_DEVICES

GIB = 2**30
# Of a GPU's memory, what JAX takes: run.sh sets XLA_PYTHON_CLIENT_MEM_FRACTION to this. JAX's own default is .75.
GPU_SHARE = 0.92
SPARE = 0.05  # of a device, what a choice leaves free: compiled programs, fragments
ENOUGH = 2**13  # tokens at a time, chosen at most: more make no matmul faster
SLOTS, FEWEST_SLOTS = 64, 16  # chosen at most; below the latter, smaller rollout weights are tried first


def gpu(gib: float) -> Device:
    return Device(platform="gpu", limit=int(GPU_SHARE * gib * GIB))


def tpu(gib: float) -> Device:
    return Device(platform="tpu", limit=int(gib * GIB))


# GPUs: what the driver leaves of the nominal memory. TPUs: the limits of their compiler, a quarter GiB below nominal.
DEVICES = {
    "RTX 3090": gpu(23.6),
    "RTX 4090": gpu(23.6),
    "A100-40": gpu(39.4),
    "A100-80": gpu(79.1),
    "H100-80": gpu(79.1),
    "H200": gpu(139.8),
    "TPU v5e": tpu(15.75),
    "TPU v6e": tpu(31.25),
    "TPU v5p": tpu(95e9 / GIB - 0.25),
}


def this_cpu() -> Device:
    """This machine's CPU, with its memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(platform="cpu", limit=memory, cores=os.cpu_count() or 1)


def this_device() -> Device:
    """The first local device, with the memory that it reports."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return Device(platform=jax.default_backend(), limit=limit) if limit else this_cpu()


def training_device() -> Device:
    """This device as all processes of a training plan with it: with the least memory of any, and for CPUs, which plan
    for the whole mesh, with that of every machine."""
    device = this_device()
    least = int(multihost_utils.process_allgather(np.array(device.limit // MIB, np.int32)).min()) * MIB
    return device._replace(limit=least * (jax.process_count() if device.platform == "cpu" else 1))


# ---- playing ---------------------------------------------------------------------------------------------------------


def choose_playing(config: Config, how: Playing, device: Device) -> tuple[Playing, Plan]:
    """Rollout weights and slots, where they are None, and the plan.

    On a CPU the first choice is float32, on accelerators bfloat16, with 64 slots; then fewer slots, down to 16; then
    smaller weights; then fewer slots still, on accelerators in eights. Raises ValueError, with what would fit, if the
    settings do not.
    """
    forms = [how.rollout] if how.rollout else rollout_forms(how, device)
    options: list[tuple[Playing, Plan]] = []
    for form in forms:
        found = most_slots(config, dataclasses.replace(how, rollout=form), device)
        if found and (how.slots or found[0].slots >= FEWEST_SLOTS * how.devices):
            return found
        options += [found] if found else []
    if options:
        return max(options, key=lambda option: option[0].slots)
    raise ValueError(refused_playing(config, how, forms, device))


def rollout_forms(how: Playing, device: Device) -> list[RolloutWeights]:
    """Rollout weights in the order of choice; NF4 only if the base is loaded in it."""
    first: RolloutWeights = "fp32" if device.platform == "cpu" else "bf16"
    return [first, "nf4"] if how.weights == "nf4" else [first]


def most_slots(config: Config, how: Playing, device: Device) -> tuple[Playing, Plan] | None:
    """The settings with the slots given, or with the most that fit; None if they do not."""
    each = range(SLOTS, 0, -1) if device.platform == "cpu" else [*range(SLOTS, 0, -8), 4, 2, 1]
    counts = [how.slots] if how.slots else [how.devices * count for count in each]
    limit = device.limit if how.slots else (1 - SPARE) * device.limit
    for slots in counts:
        option = dataclasses.replace(how, slots=slots)
        if (plan := plan_playing(config, option, device)).peak <= limit:
            return option, plan
    return None


def refused_playing(config: Config, how: Playing, forms: list[RolloutWeights], device: Device) -> str:
    """Says what the settings would take and which would fit."""
    least = dataclasses.replace(how, rollout=forms[-1], slots=how.slots or 1)
    plan = plan_playing(config, least, device)
    remedies = []
    for form in dict.fromkeys([*forms, *rollout_forms(how, device)]):
        if found := most_slots(config, dataclasses.replace(how, rollout=form, slots=None), device):
            flag = "" if form == how.rollout else f" --rollout-weights {form}"
            remedies.append(f"--slots {found[0].slots}{flag}")
    context = how.context
    while not remedies and (context := context // 2) >= 16:
        shorter = dataclasses.replace(least, context=context, slots=1)
        if plan_playing(config, shorter, device).peak <= device.limit:
            remedies.append(f"--slots 1 --context {context}")
    remedy = " or ".join(remedies) or "a smaller base, --weights nf4 or a larger device"
    return f"{describe_playing(least, plan)}. That does not fit; expected {remedy}."


def describe_playing(how: Playing, plan: Plan) -> str:
    """The plan in a line."""
    copies = f"{len(how.prefixes)} x " if len(how.prefixes) > 1 else ""
    parts = [f"base {gib(plan.base)} ({how.rollout})"] + [f"adapter {gib(plan.adapter)}"] * (plan.adapter > GIB // 20)
    parts += [f"cache {copies}{how.slots} slots x {how.context:,} = {gib(plan.cache)}", f"working {gib(plan.working)}"]
    return f"memory: {', '.join(parts)}; {totals(plan)}"


def gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def totals(plan: Plan) -> str:
    loading = f" (loading {plan.loading / GIB:.1f})" if plan.loading > plan.running else ""
    return f"{plan.running / GIB:.1f}{loading} of {gib(plan.limit)}"


# ---- training --------------------------------------------------------------------------------------------------------


def choose_training(config: Config, how: Training, device: Device) -> tuple[Training, Plan]:
    """Rematerialisation and rows at a time, where they are None, and the plan.

    On accelerators the most rows that fit without rematerialisation, else with it; on a CPU one row, rematerialised
    only if it would not fit otherwise. Raises ValueError, with what would fit, if the settings do not.
    """
    share = how.batch_rows // (how.mesh[0] * how.mesh[1])
    rows = [n for n in range(share, 0, -1) if share % n == 0 and (n == 1 or n * how.row_length <= ENOUGH)]
    rows = [how.device_rows] if how.device_rows else [1] if device.platform == "cpu" else rows
    remats = [how.remat] if how.remat else ["none", "full"]
    for remat in remats:
        for count in rows:
            option = dataclasses.replace(how, remat=remat, device_rows=count)
            limit = device.limit if how.remat and how.device_rows else (1 - SPARE) * device.limit
            if (plan := plan_training(config, option, device)).peak <= limit:
                return option, plan
    raise ValueError(refused_training(config, dataclasses.replace(how, remat=remats[-1], device_rows=rows[-1]), device))


def cpu_devices(config: Config, how: Training) -> int:
    """The number of devices, at least one and at most a row each, that this machine's memory has room for."""
    how, cpu = dataclasses.replace(how, device_rows=how.device_rows or 1, remat=how.remat or "none"), this_cpu()
    counts = range(min(how.batch_rows, CPU_DEVICES), 1, -1)
    return next(
        (n for n in counts if plan_training(config, on_devices(how, n), cpu).peak <= (1 - SPARE) * cpu.limit), 1
    )


def on_devices(how: Training, count: int) -> Training:
    """The settings on a mesh that has only a data axis."""
    return dataclasses.replace(how, mesh=(count, 1, 1))


def refused_training(config: Config, how: Training, device: Device) -> str:
    """Says what the settings would take and which would fit."""
    data, fsdp, tensor = how.mesh
    remedies = {f"--device-rows {n} --remat full": {"device_rows": n} for n in range(how.device_rows, 0, -1)}
    if data > 1:
        sharded = (1, data * fsdp, tensor)
        remedies[f"--device-rows 1 --remat full --mesh {' '.join(map(str, sharded))}"] = {
            "device_rows": 1,
            "mesh": sharded,
        }
    for length in (how.row_length // 2**n for n in range(1, 8)):
        remedies[f"--device-rows 1 --remat full --row-length {length}"] = {"device_rows": 1, "row_length": length}
    fitting = (
        flags
        for flags, settings in remedies.items()
        if plan_training(config, dataclasses.replace(how, remat="full", **settings), device).peak <= device.limit
    )
    remedy = next(fitting, "fewer --batch-rows, a lower --rank, a smaller base or more devices (--mesh)")
    return f"{describe_training(how, plan_training(config, how, device))}. That does not fit; expected {remedy}."


def describe_training(how: Training, plan: Plan) -> str:
    """The plan in a line."""
    rows = f"{how.device_rows} row{'s' * (how.device_rows > 1)} of {how.row_length:,} at a time, remat {how.remat}"
    return (
        f"memory: base {gib(plan.base)} ({how.weights}), adapter and Adam {gib(plan.adapter)}, "
        f"working {gib(plan.working)} ({rows}); {totals(plan)}"
    )


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Args:
    model: Path
    """Base model: a Hugging Face folder, of which only config.json is read."""
    device: Literal[tuple(DEVICES)] | None = None
    """A device that need not be at hand (default: this machine's)."""
    devices: Annotated[int, Range(1, 10_000)] = 1
    """Devices of that kind."""
    context: Annotated[int, Range(16, 10**7)] = 1920
    """Maximum tokens of an attempt, as in ./run.sh paper."""
    prefix: Annotated[int, Range(0, 10**6)] = 512
    """Tokens of each policy's prompt."""
    row_length: Annotated[int, Range(2, 2**20)] = 2048
    """Tokens per packed row in training."""
    batch_rows: Annotated[int, Range(1, 10_000)] = 16
    """Packed rows per optimizer step."""
    rank: Annotated[int, Range(1, 10**6)] = 16
    """LoRA rank."""
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = ("q", "v")
    """Projections that get an adapter."""


def main(args: Args) -> None:
    config, device = Config.read(args.model), DEVICES[args.device] if args.device else this_device()
    lora = LoRAConfig(rank=args.rank, targets=tuple(target for target in TARGETS if target in args.targets))
    for stage, policies in (("rollout.py, evaluate.py", 1), ("actre.py", 2)):
        how = Playing(
            context=args.context,
            prefixes=policies * (args.prefix,),
            adapters=(adapter_bytes(config, lora), 0)[:policies],
            devices=args.devices,
        )
        show(stage, choose_playing, describe_playing, config, how, device)
    training = Training(
        dtype="float32" if device.platform == "cpu" else "bfloat16",
        lora=lora,
        row_length=args.row_length,
        batch_rows=args.batch_rows,
        mesh=(math.gcd(args.batch_rows, args.devices), 1, 1),
    )
    show("train_pg.py", choose_training, describe_training, config, training, device)


def show(stage: str, choose, describe, config: Config, how: Playing | Training, device: Device) -> None:
    """Prints a stage's flags and plan, or why nothing fits."""
    try:
        how, plan = choose(config, how, device)
    except ValueError as error:
        print(f"{stage}: {error}")
        return
    if isinstance(how, Playing):
        flags = f"--slots {how.slots} --rollout-weights {how.rollout}"
    else:
        flags = f"--dtype {how.dtype} --remat {how.remat} --device-rows {how.device_rows}"
    print(f"{stage} {flags}\n  {describe(how, plan)}")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

"""Trains the adapter by policy gradient with binarised rewards on everything collected so far (A3T, sections 1.3-1.5).

Reads rollout/ and actre/ of this round and all before it, keeps every success (+1), keeps the policy's own failure of a
task (R_f, -1 in the paper) only where that task was also solved in the same round, drops failed compositions, and
maximises sum(w * log p) / trajectories over whole trajectories, observations included. Only LoRA weights move; the
base stays quantised. The adapter that is saved is the average over the epochs' ends, in PEFT's layout.

    python train_pg.py                       # the current round of runs/a3t
    python train_pg.py --preview 3           # print three trajectories with their weights coloured, train nothing

Left out: baselines, importance weights, KL, clipping of ratios (the paper has none), weights split over devices (each
has them all and takes its share of a step's rows).
Shapes: N packed rows, B rows of a step, L tokens.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from lora.convert import base_sha, load_adapter, load_model, save_adapter
from lora.linear import LoRAConfig, LoRAParam
from lora.mistral import token_logprobs
from policy import load_tokenizer
from stage import (
    Stage,
    StageError,
    adapter_of_round,
    current_round,
    draw_seed,
    generator,
    require_done,
    round_directory,
    run_main,
    sha256,
)
from trajectory import FAULTS, Packed, Trajectory, pack, read_trajectories, token_weights, tokens_of


@dataclass(frozen=True, kw_only=True)
class Args:
    run: Path = Path("runs/a3t")
    """The run's directory."""
    round: int | None = None
    """Round to train (default: the first one that is not trained yet)."""
    model: Path = Path("models/tiny-alfworld")
    """Base model, a Hugging Face folder."""
    weights: Literal["nf4", "fp32"] = "nf4"
    """How the frozen base is held."""
    rank: int = 16
    """LoRA rank (paper: 16)."""
    alpha: float = 32.0
    """LoRA alpha; the update is scaled by alpha / rank (paper: 32)."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Projections that carry an adapter (paper: q v)."""
    init: Literal["base", "previous"] = "base"
    """Start from fresh LoRA weights on the base, or from the previous round's adapter (not stated in the paper)."""
    learning_rate: float = 1e-3
    """Peak rate of Adam, after a warm-up over 3 % of the steps; cosine decay to a tenth (paper: 1e-4)."""
    epochs: tuple[int, ...] = (2, 2, 1)
    """Passes over the data in rounds 0, 1, ...; the last number holds for all later rounds too (paper: 10 6)."""
    batch_rows: int = 2
    """Packed rows of one optimizer step (not stated in the paper)."""
    row_length: int = 1280
    """Tokens of a packed row; no trajectory may be longer (the context and a last observation)."""
    clip: float = 1.0
    """Largest global norm of the gradient of the mean over tokens (not stated in the paper)."""
    average: bool = True
    """Average the adapters at the ends of the epochs (paper: rounds 1-3); otherwise keep the last one."""
    failure_reward: float = -0.5
    """R_f, the weight of the policy's own failure of a task that was also solved (paper: -1; 0 is plain SFT).
    At -1 the tiny base's failures, a fifth of the data and twice as long as successes, drown the rest."""
    fractional: bool = False
    """Weight each own trajectory by the world's reward instead of binarising it."""
    threshold: float = 1.0
    """A trajectory is a success if its reward reaches this (paper: 1)."""
    positives: int | None = None
    """At most so many successes (K) of a task and round, in order of trial (default: all)."""
    world_weight: float = 0.05
    """Share of a trajectory's weight on the tokens that the world wrote (paper: 1; 0 trains on the agent's alone). A
    tiny model spends its adapter on learning the training rooms by heart at 1."""
    seed: int = 0
    """Seeds LoRA's start and the order of rows."""
    preview: int = 0
    """Print so many packed trajectories with their weights coloured and stop."""


class Example(NamedTuple):
    """A trajectory that is trained on, its weight, and the file and line it came from."""

    trajectory: Trajectory
    weight: float
    file: str
    line: int


# ---- which trajectories, with which weight ---------------------------------------------------------------------------


def select_round(rows: Iterable[Example], args: Args) -> list[Example]:
    """A3T's filter for one round: every success, and a task's first own failure where the task has a success.

    Failed compositions are dropped; rows ended by a fault are not evidence of anything and dropped too.
    """
    by_task: dict[str, list[Example]] = defaultdict(list)
    for row in rows:
        if row.trajectory.end not in FAULTS:
            by_task[row.trajectory.task_id].append(row)
    selected: list[Example] = []
    for task_id in sorted(by_task):
        won = [r for r in by_task[task_id] if r.trajectory.reward >= args.threshold]
        lost = [r for r in by_task[task_id] if r.trajectory.reward < args.threshold and r.trajectory.source == "react"]
        won.sort(key=lambda r: (r.trajectory.source, r.trajectory.trial))
        for row in won[: args.positives]:
            selected.append(row._replace(weight=row.trajectory.reward if args.fractional else 1.0))
        if won and lost:
            weight = lost[0].trajectory.reward if args.fractional else args.failure_reward
            selected += [lost[0]._replace(weight=weight)] if weight else []
    return selected


def collect(args: Args, number: int) -> tuple[list[Example], dict[str, str]]:
    """The examples of rounds 0..number, and the sha256 of every file read. StageError if a stage is not finished."""
    examples, hashes = [], {}
    for earlier in range(number + 1):
        rows = []
        for stage in ("rollout", "actre"):
            directory = round_directory(args.run, earlier) / stage
            require_done(directory, f"python {stage}.py --run {args.run} --round {earlier}")
            path = directory / "trajectories.jsonl"
            name = str(path.relative_to(args.run))
            hashes[name] = sha256(path)
            rows += [Example(t, 0.0, name, line) for line, t in enumerate(read_trajectories(path), 1)]
        selected = select_round(rows, args)
        # Round 0 has nothing to pair a failure with: the paper trains on the prompted agent's successes only.
        examples += [e for e in selected if earlier > 0 or e.weight > 0]
    return examples, hashes


def pack_examples(examples: list[Example], args: Args, encode: Callable[[str], list[int]]) -> Packed:
    """Tokens and weights of all examples in rows. ValueError if no token has a weight."""
    sequences = []
    for example in examples:
        tokens = tokens_of(example.trajectory, encode)
        weights = token_weights(example.trajectory, tokens, example.weight, world_weight=args.world_weight)
        sequences.append((tokens.ids, weights))
    packed = pack(sequences, args.row_length)
    if not np.any(packed.weights_NL):
        raise ValueError(f"all token weights are zero ({len(examples)} trajectories): there is nothing to train on; "
                         "play more tasks, or look at the rewards and at --threshold")  # fmt: skip
    return packed


def save_packed(directory: Path, packed: Packed, examples: list[Example]) -> None:
    """packed.npz, and packed.jsonl with the origin of each (row, segment)."""
    with open(directory / "packed.npz.tmp", "wb") as file:
        np.savez(file, ids_NL=packed.ids_NL, segments_NL=packed.segments_NL, weights_NL=packed.weights_NL)
    os.replace(directory / "packed.npz.tmp", directory / "packed.npz")
    lines = [
        {"row": row, "segment": segment, "weight": e.weight, "file": e.file, "line": e.line}
        for (row, segment), e in zip(packed.places, examples, strict=True)
    ]
    (directory / "packed.jsonl.tmp").write_text("".join(json.dumps(line) + "\n" for line in sorted(
        lines, key=lambda line: (line["row"], line["segment"]))))  # fmt: skip
    os.replace(directory / "packed.jsonl.tmp", directory / "packed.jsonl")


def preview(packed: Packed, examples: list[Example], decode: Callable[[list[int]], str], count: int) -> None:
    """Prints packed trajectories: green +, red -, plain 0."""
    for (row, segment), example in list(zip(packed.places, examples, strict=True))[:count]:
        print(f"--- row {row} segment {segment}: {example.file}:{example.line} weight {example.weight:+g}")
        where = packed.segments_NL[row] == segment
        ids, weights = packed.ids_NL[row][where], packed.weights_NL[row][where]
        for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(weights)) + 1):
            colour = {1: "\033[32m", -1: "\033[31m", 0: ""}[int(np.sign(weights[run[0]]))]
            print(f"{colour}{decode(ids[run].tolist())}\033[0m", end="")
        print()


# ---- the objective ---------------------------------------------------------------------------------------------------


def objective(model, ids_BL: jax.Array, segments_BL: jax.Array, weights_BL: jax.Array, trajectories: jax.Array):
    """sum(w * log p) / trajectories, to be maximised, and the log-likelihood of + and - tokens apart (sums).

    The first token of a segment has no context and log-probability 0.
    """
    logprobs_BL = token_logprobs(model, ids_BL, segments_BL)
    value = (weights_BL * logprobs_BL).sum() / trajectories
    return value, ((weights_BL > 0) * logprobs_BL).sum(), ((weights_BL < 0) * logprobs_BL).sum()


def make_update(graph, optimizer: optax.GradientTransformation, mesh: Mesh):
    """The jitted optimizer step: (adapter, state, frozen, rate, batch) -> (adapter, state, metrics).

    Every device of the mesh takes its rows of the batch. The rate is an argument: a schedule's length differs from
    round to round, and would be compiled anew with it.
    """

    def of_rows(adapter, frozen, ids_BL, segments_BL, weights_BL, trajectories):
        def loss(adapter):
            value, positive, negative = objective(
                nnx.merge(graph, adapter, frozen), ids_BL, segments_BL, weights_BL, trajectories
            )
            return -value, (positive, negative)

        return jax.lax.psum(jax.value_and_grad(loss, has_aux=True)(adapter), "rows")

    # check_vma would add a sum over devices of its own to the gradient of the adapter, which all of them share.
    rows, whole = P("rows"), P()
    of_batch = jax.shard_map(
        of_rows, mesh=mesh, in_specs=(whole, whole, rows, rows, rows, whole), out_specs=whole, check_vma=False
    )

    @jax.jit
    def update(adapter, state, frozen, rate, ids_BL, segments_BL, weights_BL, trajectories):
        (value, sums), gradient = of_batch(adapter, frozen, ids_BL, segments_BL, weights_BL, trajectories)
        updates, state = optimizer.update(gradient, state, adapter)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return optax.apply_updates(adapter, updates), state, (value, *sums, optax.tree.norm(gradient))

    return update


def batch_order(args: Args, number: int, epoch: int, rows: int) -> list[np.ndarray]:
    """The rows of each step of an epoch; the last step is filled up with row -1 (an empty row), so shapes are fixed."""
    order = generator(args.seed, "train_pg", number, epoch).permutation(rows)
    order = np.concatenate([order, np.full(-rows % args.batch_rows, -1, order.dtype)])
    return np.split(order, len(order) // args.batch_rows)


def train(args: Args, number: int, packed: Packed, model, directory: Path) -> tuple[object, dict]:
    """Runs all epochs, resuming from the last whole one. Returns the adapter to save and counts for done.json.

    Raises StageError on a non-finite loss, naming the step.
    """
    rows, epochs = len(packed.ids_NL), args.epochs[min(number, len(args.epochs) - 1)]
    per_epoch = -(-rows // args.batch_rows)
    steps = epochs * per_epoch
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, max(1, round(0.03 * steps)), max(2, steps), 0.1 * args.learning_rate
    )
    optimizer = optax.chain(optax.clip_by_global_norm(args.clip), optax.scale_by_adam())
    graph, adapter, frozen = nnx.split(model, LoRAParam, ...)
    mesh = Mesh(jax.devices()[: math.gcd(args.batch_rows, jax.device_count())], ("rows",))
    update = make_update(graph, optimizer, mesh)
    progress = {"adapter": adapter, "state": optimizer.init(adapter), "sum": jax.tree.map(jnp.zeros_like, adapter)}
    progress, frozen = jax.device_put((progress, frozen), NamedSharding(mesh, P()))

    empty = np.zeros((1, args.row_length), np.int32)  # row -1
    ids_NL, segments_NL = (np.concatenate([a, empty]) for a in (packed.ids_NL, packed.segments_NL))
    weights_NL = np.concatenate([packed.weights_NL, empty.astype(np.float32)])
    trajectories_N = segments_NL.max(axis=1)

    metrics_path, checkpoints = directory / "metrics.jsonl", directory / "checkpoints"
    with ocp.training.Checkpointer(checkpoints.resolve()) as checkpointer:
        first = 0
        if checkpointer.latest is not None:
            first = checkpointer.latest.step
            leaves = checkpointer.load(first, {"leaves": jax.tree.leaves(progress)})["leaves"]
            progress = jax.tree.unflatten(jax.tree.structure(progress), leaves)
        keep_metrics(metrics_path, first * per_epoch)
        with open(metrics_path, "a") as metrics, tqdm(total=steps, initial=first * per_epoch, desc="train_pg") as bar:
            for epoch in range(first, epochs):
                adapter, state = progress["adapter"], progress["state"]
                for index, members in enumerate(batch_order(args, number, epoch, rows)):
                    step, start = epoch * per_epoch + index + 1, time.time()
                    batch = (ids_NL[members], segments_NL[members], weights_NL[members])
                    rate, trajectories = schedule(step - 1), np.float32(max(1, trajectories_N[members].sum()))
                    adapter, state, values = update(adapter, state, frozen, rate, *batch, trajectories)
                    loss, positive, negative, norm = (float(v) for v in values)
                    if not np.isfinite([loss, norm]).all():
                        raise StageError(
                            f"step {step}: loss {loss}, gradient norm {norm}. Lower --learning-rate (now "
                            f"{args.learning_rate:g}) or raise --failure-reward (now {args.failure_reward:g}), then "
                            f"remove {directory} and run again."
                        )
                    tokens = int((batch[1] > 0).sum())
                    line = {
                        "step": step, "epoch": epoch, "loss": loss, "gradient_norm": norm,
                        "logprob_positive": positive / max(1, int((batch[2] > 0).sum())),
                        "logprob_negative": negative / max(1, int((batch[2] < 0).sum())),
                        "tokens": tokens, "seconds": round(time.time() - start, 4),
                    }  # fmt: skip
                    metrics.write(json.dumps(line) + "\n")
                    metrics.flush()
                    bar.set_postfix(loss=f"{loss:.2f}", positive=f"{line['logprob_positive']:.4f}", refresh=False)
                    bar.update()
                total = jax.tree.map(jnp.add, progress["sum"], adapter)
                progress = {"adapter": adapter, "state": state, "sum": total}
                checkpointer.save(epoch + 1, {"leaves": jax.tree.leaves(progress)})
    final = jax.tree.map(lambda x: x / epochs, progress["sum"]) if args.average else progress["adapter"]
    return nnx.merge(graph, final, frozen), {"epochs": epochs, "steps": steps, "rows": rows}


def keep_metrics(path: Path, steps: int) -> None:
    """Drops the lines after the step that a resumed run starts from."""
    if path.exists():
        lines = path.read_text().split("\n")[:steps]
        path.write_text("".join(line + "\n" for line in lines))


def main(args: Args) -> None:
    if min(args.epochs, default=0) < 1 or args.batch_rows < 1:
        raise ValueError(f"--epochs {args.epochs} and --batch-rows {args.batch_rows} must be numbers of at least 1; "
                         "--epochs needs one or more of them")  # fmt: skip
    number = current_round(args.run) if args.round is None else args.round
    examples, hashes = collect(args, number)
    tokenizer = load_tokenizer(args.model)
    packed = pack_examples(examples, args, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    if args.preview:
        return preview(packed, examples, lambda ids: tokenizer.decode(ids, skip_special_tokens=False), args.preview)
    directory = round_directory(args.run, number) / "train_pg"
    stage = Stage(directory, args, {"inputs": hashes, "base": base_sha(args.model)})
    if stage.finished:
        return None
    save_packed(directory, packed, examples)
    previous = adapter_of_round(args.run, number) if args.init == "previous" else None
    lora = LoRAConfig(rank=args.rank, alpha=args.alpha, targets=args.targets)
    if previous is None:
        seed = draw_seed(args.seed, "train_pg", number)
        model = load_model(args.model, weights=args.weights, lora=lora, seed=seed)
    else:
        model = load_adapter(args.model, previous, weights=args.weights)
    model, counts = train(args, number, packed, model, directory)
    save_adapter(directory / "adapter", model, args.model)
    failed = sum(e.weight < 0 for e in examples)
    summary = {
        "round": number, "sequences": len(examples), "sequences_failed": failed,
        "tokens": int((packed.segments_NL > 0).sum()), **counts,
    }  # fmt: skip
    stage.finish(summary)
    print(f"train_pg round {number}: {len(examples)} trajectories ({failed} failed), {counts['steps']} steps "
          f"-> {directory / 'adapter'}")  # fmt: skip
    return None


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    jax.config.update("jax_num_cpu_devices", args.batch_rows)  # on a CPU a row each, however many cores there are
    run_main(main, args)

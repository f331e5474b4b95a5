"""Trains the adapter by policy gradient with binarised rewards on all trajectories so far (A3T).

Reads rollout/ and actre/ of this round and all earlier ones. Keeps every success (+1); keeps the policy's own failure
at a task (R_f, -1 in the paper) only if the task was also solved in the same round; drops failed compositions. Then
maximises sum(w * log p) / trajectories over whole trajectories, observations included. Trains only LoRA weights; the
base stays quantised. The saved adapter is the average of the adapters after each epoch, in PEFT's layout. Trajectories
of refine.py (--inputs, --refinement) are trained on as in AgentRefine: only thoughts and actions, mistakes masked.

    python train_pg.py                       # the current round of runs/a3t
    python train_pg.py --run runs/refine --inputs runs/refine/refine --row-length 2048
    python train_pg.py --preview 3           # print three trajectories coloured by weight, train nothing

Left out: baselines, importance weights, KL, ratio clipping (the paper has none).
Shapes: N packed rows, S microbatches of B rows, L tokens.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from artifacts.cli import parse
from artifacts.metrics import MetricsLog
from artifacts.packing import Example, Packed, pack, preview, save_packed, token_weights, tokens_of
from artifacts.seeds import draw_seed, generator
from artifacts.stage import (
    Stage,
    StageError,
    adapter_of_round,
    current_round,
    require_done,
    round_directory,
    run_main,
    sha256,
)
from artifacts.trajectory import FAULTS, Trajectory, read_trajectories
from lora.adapter import adapter_name, save_adapter
from lora.checkpoint import base_sha
from lora.config import Config
from lora.flops import lora_step_flops, peak_flops, peak_memory
from lora.linear import LoRAConfig, LoRAParam
from lora.load import load_adapter, load_model
from lora.logprobs import token_logprobs
from lora.sharding import is_first_process, join_processes
from lora.tokenizer import encode_piece, load_tokenizer
from lora.train_step import Batch, initial_state, make_update, shard_rows, training_mesh


@dataclass(frozen=True, kw_only=True)
class Args:
    run: Path = Path("runs/a3t")
    """Directory of the run."""
    round: int | None = None
    """Round to train (default: the first untrained round)."""
    inputs: tuple[Path, ...] = ()
    """Finished stage directories to train on instead of the run's rollout/ and actre/: demonstrations, synthetic
    trajectories of refine.py, rollouts of any run. Several are pooled."""
    refinement: Literal["mask-errors", "mask-refined", "drop-errors", "no-mask"] = "mask-errors"
    """Mistakes in synthetic trajectories: masked (AgentRefine), masked with the turn that follows, dropped from the
    text, or imitated (the paper's three controls)."""
    model: Path = Path("models/tiny-alfworld")
    """Base model: a Hugging Face folder."""
    weights: Literal["nf4", "nf4-dq", "bf16", "fp32"] = "nf4"
    """Storage of the frozen base (paper: 4 bits, taken as nf4; nf4-dq also quantises its scales)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Activations (default: bfloat16 with --weights bf16, else float32; choose bfloat16 on an accelerator)."""
    rank: int = 16
    """LoRA rank (paper: 16)."""
    alpha: float = 32.0
    """LoRA alpha; the update is scaled by alpha / rank (paper: 32)."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Projections that get an adapter (paper: q v)."""
    dropout: float = 0.0
    """Dropout on the adapter's input (not stated in the paper)."""
    init: Literal["base", "previous"] = "base"
    """Start from fresh LoRA weights or from the previous round's adapter (not stated in the paper)."""
    learning_rate: float = 1e-3
    """Adam's peak learning rate, after a warm-up over 3 % of the steps; cosine decay to a tenth (paper: 1e-4)."""
    epochs: tuple[int, ...] = (2, 2, 1)
    """Epochs in rounds 0, 1, ...; the last number also applies to all later rounds (paper: 10 6)."""
    batch_rows: int = 2
    """Packed rows per optimizer step (not stated in the paper)."""
    device_rows: int = 1
    """Rows per device in a microbatch; a step accumulates gradients over its microbatches."""
    mesh: tuple[int, int, int] = (-1, 1, 1)
    """Devices along data, fsdp and tensor (lora/sharding.py); -1 for data: as many as divide --batch-rows."""
    remat: Literal["none", "full", "dots"] = "none"
    """Rematerialisation: layers keep all activations (none), only their input (full), or input and matmuls (dots)."""
    attention: Literal["blocks", "splash", "cudnn", "xla"] | None = None
    """Attention implementation (default: the best for the device; lora/attention.py)."""
    row_length: int = 1280
    """Tokens per packed row; no trajectory may be longer (a full context plus its last observation)."""
    weight_decay: float = 0.0
    """AdamW's weight decay on the adapter (not stated in the paper)."""
    clip: float = 1.0
    """Clip the global norm of a step's gradient to this (not stated in the paper)."""
    average: bool = True
    """Average the adapters at the end of each epoch (paper: rounds 1-3) instead of keeping the last one."""
    failure_reward: float = -0.5
    """R_f, the weight of the policy's own failure at a task that was also solved (paper: -1; 0 is plain SFT). At -1 the
    loss of a tiny base, which fails often and at length, diverges."""
    floor: float = -20.0
    """Stop if the mean log-probability of a step's failures falls below this: with R_f < 0 the loss is unbounded."""
    fractional: bool = False
    """Weight rollout and actre trajectories by the world's reward instead of binarising it."""
    threshold: float = 1.0
    """Reward from which a trajectory counts as a success (paper: 1)."""
    positives: int | None = None
    """Use at most this many successes (K) per task and round, in order of trial (default: all)."""
    world_weight: float = 0.05
    """Factor on the weight of tokens that the world wrote (paper: 1; 0 trains only on the agent's). At 1, a tiny model
    spends its adapter on memorising the training rooms."""
    seed: int = 0
    """Seeds LoRA's initial weights, dropout and the order of rows."""
    preview: int = 0
    """Print this many packed trajectories, coloured by weight, instead of training."""


# ---- selecting and weighting trajectories ----------------------------------------------------------------------------


def select_round(rows: Iterable[Example], args: Args) -> list[Example]:
    """A3T's filter for one round: every success, and the first own failure of each task that has a success.

    Drops failed compositions, and rows that ended in a fault, which say nothing about the policy.
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


def select(rows: list[Example], args: Args) -> list[Example]:
    """The training examples: A3T's selection from each round's rollout and actre, and every success of a teacher."""
    taught = [row._replace(weight=1.0) for row in rows if row.trajectory.source in ("demo", "refine")]
    selected = [row for row in taught if row.trajectory.success and row.trajectory.end not in FAULTS]
    for round_index in sorted({row.trajectory.round for row in rows}):
        of_round = [r for r in rows if r.trajectory.round == round_index and r.trajectory.source in ("react", "actre")]
        # Round 0 has nothing to pair a failure with: the paper trains on the prompted agent's successes only.
        selected += [e for e in select_round(of_round, args) if round_index > 0 or e.weight > 0]
    return selected


def collect(args: Args, round_index: int) -> tuple[list[Example], dict[str, str]]:
    """The examples of rounds 0..round_index, or of args.inputs, and the sha256 of every file read.

    Round 0 may have none, since compositions start in round 1. Raises StageError if a later round or args.inputs has
    none, or if a stage is not finished.
    """
    rounds = [(earlier, stage) for earlier in range(round_index + 1) for stage in ("rollout", "actre")]
    own = [
        (round_directory(args.run, earlier) / stage, f"python {stage}.py --run {args.run} --round {earlier}")
        for earlier, stage in rounds
    ]
    given = [(directory, f"the stage that writes {directory}") for directory in args.inputs]
    rows, hashes = [], {}
    for directory, command in given or own:
        require_done(directory, command)
        path = directory / "trajectories.jsonl"
        name = str(path if args.inputs else path.relative_to(args.run))
        hashes[name] = sha256(path)
        numbered = enumerate(read_trajectories(path), 1)
        rows += [Example(trajectory=t, weight=0.0, file=name, line=line) for line, t in numbered]
    examples = select(rows, args)
    if not examples and (round_index > 0 or args.inputs):
        raise StageError(
            f"none of {len(rows)} trajectories was won, so there is nothing to train on; play more tasks, "
            "or look at the rewards and at --threshold"
        )
    return examples, hashes


def refined(trajectory: Trajectory, how: str) -> tuple[Trajectory, set[int]]:
    """A synthetic trajectory with mistakes as it is trained on, and the turns whose tokens get no weight.

    `how`: mask-errors (AgentRefine), or one of its paper's controls: mask-refined masks the turn after a mistake too,
    drop-errors drops mistakes from the text, no-mask imitates them.
    """
    wrong = {index for index, turn in enumerate(trajectory.turns) if turn.errors}
    if how == "drop-errors":
        return msgspec.structs.replace(trajectory, turns=[turn for turn in trajectory.turns if not turn.errors]), set()
    masked = {"mask-errors": wrong, "mask-refined": wrong | {index + 1 for index in wrong}, "no-mask": set()}
    return trajectory, masked[how]


def pack_examples(examples: list[Example], args: Args, encode: Callable[[str, bool], list[int]]) -> Packed:
    """Packs the tokens and weights of all examples into rows. Raises ValueError if every weight is 0."""
    sequences = []
    for trajectory, weight, *_ in examples:
        synthetic = trajectory.source == "refine"
        trajectory, masked = refined(trajectory, args.refinement) if synthetic else (trajectory, set())
        tokens = tokens_of(trajectory, encode)
        world_weight = 0.0 if synthetic else args.world_weight
        sequences.append((tokens.ids, token_weights(tokens, weight, world_weight=world_weight, masked=masked)))
    packed = pack(sequences, args.row_length)
    if examples and not np.any(packed.weights_NL):
        raise ValueError(
            f"all token weights are zero ({len(examples)} trajectories): there is nothing to train on; "
            "play more tasks, or look at the rewards and at --threshold"
        )
    return packed


# ---- the objective ---------------------------------------------------------------------------------------------------


def objective(model, batch: Batch, trajectories: jax.Array, **forward):
    """sum(w * log p) / trajectories, to be maximised, and the summed log-likelihoods of + and - tokens.

    The first token of a segment has no context, hence log-probability 0. `forward`: see `token_logprobs`.
    """
    logprobs_BL = token_logprobs(model, batch.ids, batch.segments, **forward)
    value = (batch.weights * logprobs_BL).sum() / trajectories
    return value, (((batch.weights > 0) * logprobs_BL).sum(), ((batch.weights < 0) * logprobs_BL).sum())


def batch_order(args: Args, round_index: int, epoch: int, rows: int) -> list[np.ndarray]:
    """The row indices of each step of an epoch. The last step is padded with -1 (an empty row) to keep shapes fixed."""
    order = generator(args.seed, "train_pg", round_index, epoch).permutation(rows)
    order = np.concatenate([order, np.full(-rows % args.batch_rows, -1, order.dtype)])
    return list(order.reshape(-1, args.batch_rows))


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Epochs:
    """What the optimizer steps of one run share; `run` takes those of one epoch."""

    args: Args
    round_index: int
    directory: Path
    rows: Batch  # on the host, [N + 1, L]; the last one is empty
    mesh: Mesh
    update: Callable
    schedule: optax.Schedule
    frozen: nnx.State
    model_config: Config

    def run(self, epoch: int, adapter: nnx.State, state, log: MetricsLog) -> tuple[nnx.State, optax.OptState]:
        """Trains on every row once. Returns the adapter and the optimizer state. Raises StageError (check_step)."""
        args, (_, segments_NL, weights_NL) = self.args, self.rows
        order = batch_order(args, self.round_index, epoch, len(segments_NL) - 1)
        peak = peak_flops(self.mesh.size)
        for step, members in enumerate(order, epoch * len(order) + 1):
            start = time.time()
            segments, weights = segments_NL[members], weights_NL[members]
            trajectories = np.float32(max(1, segments.max(axis=1).sum()))
            key = jax.random.key(draw_seed(args.seed, "dropout", self.round_index, step)) if args.dropout else None
            batch = shard_rows(Batch(*(x[members] for x in self.rows)), self.mesh, args.device_rows)
            rate = self.schedule(step - 1)
            adapter, state, metrics = self.update(adapter, state, self.frozen, rate, batch, trajectories, key)
            loss, positive, negative, norm = (float(value) for value in metrics)
            tokens, seconds = int((segments > 0).sum()), time.time() - start
            flops = lora_step_flops(self.model_config, tokens) / seconds
            line = {
                "step": step,
                "epoch": epoch,
                "loss": loss,
                "gradient_norm": norm,
                "logprob_positive": positive / max(1, int((weights > 0).sum())),
                "logprob_negative": negative / max(1, int((weights < 0).sum())),
                "tokens": tokens,
                "seconds": round(seconds, 4),
                "tokens_per_s": round(tokens / seconds, 1),
                "mfu": peak and round(flops / peak, 4),
                "peak_memory": peak_memory(),
            }
            check_step(args, line, self.directory)
            log.write(line)
        return adapter, state


def train(args: Args, round_index: int, packed: Packed, model, mesh: Mesh, directory: Path) -> tuple[object, dict]:
    """Runs all epochs, resuming after the last complete one. Returns the model to save and counts for done.json.

    Raises StageError, naming the step, if the loss is not finite or the likelihood of the failures diverges.
    """
    count, epochs = len(packed.ids_NL), args.epochs[min(round_index, len(args.epochs) - 1)]
    per_epoch = -(-count // args.batch_rows)
    steps = epochs * per_epoch
    optimizer = optax.chain(
        optax.clip_by_global_norm(args.clip), optax.scale_by_adam(), optax.add_decayed_weights(args.weight_decay)
    )
    graph, adapter, frozen = nnx.split(model, LoRAParam, ...)
    weighted = functools.partial(objective, implementation=args.attention, remat=args.remat)
    runner = Epochs(
        args=args,
        round_index=round_index,
        directory=directory,
        rows=Batch(*(np.pad(x, ((0, 1), (0, 0))) for x in packed[:3])),
        mesh=mesh,
        update=make_update(weighted, graph, optimizer, mesh, adapter, frozen),
        schedule=optax.warmup_cosine_decay_schedule(
            0.0, args.learning_rate, max(1, round(0.03 * steps)), max(2, steps), 0.1 * args.learning_rate
        ),
        frozen=frozen,
        model_config=model.config,
    )
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), adapter)
    progress = {"adapter": adapter, "state": initial_state(optimizer, adapter, mesh), "sum": zeros}
    latest = ocp.training.preservation_policies.LatestN(1)
    with ocp.training.Checkpointer((directory / "checkpoints").resolve(), preservation_policy=latest) as checkpointer:
        first = 0 if checkpointer.latest is None else checkpointer.latest.step
        if first:
            leaves = checkpointer.load(first, {"leaves": jax.tree.leaves(progress)})["leaves"]
            progress = jax.tree.unflatten(jax.tree.structure(progress), leaves)
        with MetricsLog(directory, first * per_epoch, steps, active=is_first_process()) as log:
            for epoch in range(first, epochs):
                adapter, state = runner.run(epoch, progress["adapter"], progress["state"], log)
                total = jax.tree.map(jnp.add, progress["sum"], adapter)
                progress = {"adapter": adapter, "state": state, "sum": total}
                checkpointer.save(epoch + 1, {"leaves": jax.tree.leaves(progress)})
    final = jax.tree.map(lambda x: x / epochs, progress["sum"]) if args.average else progress["adapter"]
    return nnx.merge(graph, final, frozen), {"epochs": epochs, "steps": steps, "rows": count}


def check_step(args: Args, line: dict, directory: Path) -> None:
    """Raises StageError if a step's loss or gradient is not finite, or its failures have become too unlikely."""
    found = None
    if not np.isfinite([line["loss"], line["gradient_norm"]]).all():
        found = f"loss {line['loss']}, gradient norm {line['gradient_norm']}"
    elif line["logprob_negative"] < args.floor:
        found = (
            f"the mean log-probability of the failures' tokens is {line['logprob_negative']:.1f}, under --floor "
            f"{args.floor:g}: with R_f < 0 the loss is unbounded below, and this one diverges"
        )
    if found:
        raise StageError(
            f"step {line['step']}: {found}. Lower --learning-rate (now {args.learning_rate:g}) or raise "
            f"--failure-reward (now {args.failure_reward:g}), then remove {directory} and run again."
        )


def main(args: Args) -> None:
    if min(args.epochs, default=0) < 1 or min(args.batch_rows, args.device_rows) < 1:
        raise ValueError(
            f"--epochs {args.epochs}, --batch-rows {args.batch_rows} and --device-rows {args.device_rows} "
            "must be at least 1; --epochs needs at least one number"
        )
    round_index = current_round(args.run) if args.round is None else args.round
    examples, hashes = collect(args, round_index)
    tokenizer = load_tokenizer(args.model)
    packed = pack_examples(examples, args, functools.partial(encode_piece, tokenizer))
    if args.preview:
        return preview(packed, examples, lambda ids: tokenizer.decode(ids, skip_special_tokens=False), args.preview)
    mesh = training_mesh(args.mesh, args.batch_rows, args.device_rows)
    directory = round_directory(args.run, round_index) / "train_pg"
    stage = Stage(directory, args, {"inputs": hashes, "base": base_sha(args.model)}) if is_first_process() else None
    finished = stage is not None and stage.finished
    if multihost_utils.broadcast_one_to_all(np.array(finished)):
        return None
    if stage:
        save_packed(directory, packed, examples)
    previous = adapter_of_round(args.run, round_index) if args.init == "previous" else None
    lora = LoRAConfig(rank=args.rank, alpha=args.alpha, targets=args.targets, dropout=args.dropout)
    dtype = None if args.dtype is None else jnp.dtype(args.dtype)
    if previous is None:
        seed = draw_seed(args.seed, "train_pg", round_index)
        model = load_model(args.model, weights=args.weights, lora=lora, seed=seed, dtype=dtype, mesh=mesh)
    else:
        model = load_adapter(args.model, previous, weights=args.weights, dtype=dtype, mesh=mesh)
    model, counts = train(args, round_index, packed, model, mesh, directory)
    save_adapter(directory / "adapter", model, args.model)
    if not stage:
        return None
    failed = sum(e.weight < 0 for e in examples)
    name = adapter_name(args.run.name, round_index, directory / "adapter")
    summary = {
        "round": round_index,
        "adapter": name,
        "sequences": len(examples),
        "sequences_failed": failed,
        "tokens": int((packed.segments_NL > 0).sum()),
        **counts,
    }
    stage.finish(summary)
    why = "" if examples else " (nothing was won yet: the policy is still the base)"
    print(
        f"train_pg round {round_index}: {len(examples)} trajectories ({failed} failed), {counts['steps']} steps{why} "
        f"-> {directory / 'adapter'} ({name})"
    )
    return None


def launch(args: Args) -> None:
    """Joins the other processes, if any, and trains. A CPU is split into one device per row of a step."""
    jax.config.update("jax_num_cpu_devices", max(1, args.batch_rows // join_processes()))
    main(args)


if __name__ == "__main__":
    run_main(launch, parse(Args, __doc__))

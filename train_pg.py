"""Trains the adapter by policy gradient with binarised rewards on all trajectories so far (A3T).

Reads rollout/ and actre/ of this round and all earlier ones. Keeps every success (+1); keeps the policy's own failure
at a task (R_f, -1 in the paper) only if the task was also solved in the same round; drops failed compositions. Then
maximises sum(w * log p) / trajectories over whole trajectories, observations included. Trains only LoRA weights; the
base stays quantised. The saved adapter is the average of the adapters after each epoch, in PEFT's layout. Trajectories
of refine.py (--inputs, --refinement) are trained on as in AgentRefine: only thoughts and actions, mistakes masked.

    python train_pg.py                       # the current round of runs/a3t
    python train_pg.py --run runs/refine --inputs runs/refine/refine --row-length 2048
    python train_pg.py --preview 3           # print three trajectories with the weights of their tokens, train nothing

Left out: baselines, importance weights, KL, ratio clipping (the paper has none).
Shapes: N packed rows, B of them in a step, L tokens.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import contextlib
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from artifacts.cli import Range
from artifacts.metrics import MetricsLog, check_step
from artifacts.packing import (
    Example,
    Packed,
    load_packed,
    pack,
    places_of,
    read_examples,
    require_trajectories,
    save_packed,
    token_weights,
)
from artifacts.preview import preview
from artifacts.render import Form
from artifacts.seeds import draw_seed, generator
from artifacts.stage import (
    Stage,
    StageError,
    adapter_of_round,
    adapter_sha,
    base_of,
    current_round,
    require_done,
    round_directory,
    run_stage,
    sha256,
)
from artifacts.tokens import Codec, read_codec, tokens_of
from artifacts.trackers import TrackArgs
from artifacts.trajectory import FAULTS, Trajectory
from lora.adapter import adapter_name, save_adapter
from lora.attention import Implementation, require_supported, segment_bounds
from lora.checkpoint import base_facts
from lora.config import Config
from lora.footprint import Training
from lora.linear import TARGETS, LoRAConfig
from lora.load import load_adapter, load_model
from lora.logprobs import token_logprobs
from lora.memory import choose_training, cpu_devices, describe_training, training_device
from lora.sharding import ending_together, is_first_process, require_shape, start_devices
from lora.train_step import Batch, training_mesh
from lora.trainer import Plan, Trainer

Devices = Annotated[int, Range(1, 10**6)]


@dataclass(frozen=True, kw_only=True)
class Args(TrackArgs):
    run: Path = Path("runs/a3t")
    """Directory of the run."""
    round: Annotated[int, Range(0, 10_000)] | None = None
    """Round to train (default: the first untrained round)."""
    inputs: tuple[Path, ...] = ()
    """Finished stage directories to train on instead of the run's rollout/ and actre/: demonstrations, synthetic
    trajectories of refine.py, rollouts of any run. Several are pooled."""
    form: Form = "react"
    """Form of the sessions: the agent's, or ActRe's, for --actre-adapter of actre.py (then add --world-weight 0)."""
    refinement: Literal["mask-errors", "mask-refined", "drop-errors", "no-mask"] = "mask-errors"
    """Mistakes marked in synthetic trajectories and demonstrations: masked (AgentRefine), masked with the turn that
    follows, dropped from the text, or imitated (the paper's three controls)."""
    model: Path | None = None
    """Base model: a Hugging Face folder (default: the run's base, or models/tiny-alfworld in a new run)."""
    weights: Literal["nf4", "nf4-dq", "bf16", "fp32"] = "nf4"
    """Storage of the frozen base (paper: 4 bits, taken as nf4; nf4-dq also quantises its scales)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Activations (default: bfloat16 with --weights bf16, else float32; choose bfloat16 on an accelerator)."""
    rank: Annotated[int, Range(1, 10**6)] = 16
    """LoRA rank (paper: 16)."""
    alpha: Annotated[float, Range(0, 10_000, above=True)] = 32.0
    """LoRA alpha; the update is scaled by alpha / rank (paper: 32)."""
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Projections that get an adapter (paper: q v)."""
    dropout: Annotated[float, Range(0, 0.99)] = 0.0
    """Dropout on the adapter's input (not stated in the paper)."""
    init: Literal["base", "previous"] = "base"
    """Start from fresh LoRA weights or from the previous round's adapter (not stated in the paper)."""
    learning_rate: Annotated[float, Range(0, 1, above=True)] = 1e-3
    """Adam's peak learning rate (paper: 1e-4). Of S steps, the first W = max(1, round(0.03 S)) warm up: step s has s/W
    of the peak. A cosine then falls to a tenth of the peak at step S. A single step has the peak."""
    epochs: tuple[Annotated[int, Range(1, 10_000)], ...] = (2, 2, 1)
    """Epochs in rounds 0, 1, ...; the last number also applies to all later rounds (paper: 10 6)."""
    batch_rows: Annotated[int, Range(1, 10_000)] = 2
    """Packed rows per optimizer step (not stated in the paper)."""
    device_rows: Annotated[int, Range(1, 10_000)] | None = None
    """Rows per device in a microbatch, the others' gradients being added (default: 1; on accelerators, what fits)."""
    mesh: tuple[Annotated[int, Range(-1, 10**6)], Devices, Devices] = (-1, 1, 1)
    """Devices along data, fsdp and tensor (lora/sharding.py); -1 for data: as many as divide --batch-rows."""
    remat: Literal["none", "full", "dots"] | None = None
    """What layers keep: all activations (none), their input (full), or input and matmuls (dots; default: what fits)."""
    attention: Implementation | None = None
    """Attention implementation (default: the best for the device; lora/attention.py)."""
    row_length: Annotated[int, Range(2, 2**20)] = 1280
    """Tokens per packed row; no trajectory may be longer (a full context plus its last observation)."""
    weight_decay: Annotated[float, Range(0, 1)] = 0.0
    """AdamW's weight decay on the adapter (not stated in the paper)."""
    clip: Annotated[float, Range(0, 1e6, above=True)] = 1.0
    """Before Adam, scale down a step's gradient (of the objective, over all adapter weights) to this norm if it is
    longer (not stated in the paper): with the tiny base most steps are. metrics.jsonl has the norm before."""
    average: bool = True
    """Average the adapters at the end of each epoch (paper: rounds 1-3) instead of keeping the last one."""
    failure_reward: Annotated[float, Range(-10, 1)] = -0.5
    """R_f, the weight of the policy's own failure at a task that was also solved (paper: -1; 0 is plain SFT, without
    failures). At -1 the loss of a tiny base, which fails often and at length, diverges."""
    floor: Annotated[float, Range(-1e6, 0)] = -20.0
    """Stop if a step's negative tokens have a mean log-probability below this: with R_f < 0 the loss has no bound."""
    fractional: bool = False
    """Weight the agent's trajectories by the world's reward instead of binarising it."""
    threshold: Annotated[float, Range(0, 1e6)] = 1.0
    """Reward from which a trajectory counts as a success (paper: 1)."""
    positives: Annotated[int, Range(1, 10**6)] | None = None
    """Use at most this many successes (K) per task and round, in order of trial (default: all)."""
    world_weight: Annotated[float, Range(0, 10)] = 0.05
    """Factor on the weight of tokens that the world wrote (paper: 1, at which a tiny model learns rooms by heart)."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seeds LoRA's initial weights, dropout and the order of rows."""
    checkpoint_minutes: Annotated[float, Range(0, 1e6)] = 10.0
    """Minutes between checkpoints, from which a killed run goes on; there is also one after every epoch."""
    preview: Annotated[int, Range(0, 10**6)] = 0
    """Print this many packed trajectories with the weights of their tokens instead of training: those that the round
    was trained on, or else would be. Without --round: the round to train, if it has data, or else the one before."""

    def check(self) -> None:
        super().check()
        for flag, value in (("--epochs", self.epochs), ("--targets", self.targets)):
            if not value:
                raise ValueError(f"{flag} needs at least one value")
        require_shape(self.mesh)
        if (self.weights, self.dtype) in (("bf16", "float32"), ("fp32", "bfloat16")):
            raise ValueError(f"--weights {self.weights} has its own activations, but --dtype is {self.dtype}: give one")


# ---- selecting and weighting trajectories ----------------------------------------------------------------------------


def is_failure(row: Example, args: Args) -> bool:
    """Whether a row is the policy's own failure. Compositions and demonstrations are kept only if they were won."""
    return row.trajectory.source == "react" and row.trajectory.reward < args.threshold


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
        won = [row for row in by_task[task_id] if row.trajectory.reward >= args.threshold]
        lost = [row for row in by_task[task_id] if is_failure(row, args)]
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
        selected += [e for e in select_round(of_round, args) if round_index > 0 or not is_failure(e, args)]
    return selected


def collect(args: Args, round_index: int) -> tuple[list[Example], list[str]]:
    """The examples of rounds 0..round_index, or of args.inputs, and the sha256 of every file read.

    Round 0 may have none, since compositions start in round 1. Raises StageError if a later round or args.inputs has
    none, or if a stage is not finished, and ValueError for an input that is no stage.
    """
    rounds = [(earlier, stage) for earlier in range(round_index + 1) for stage in ("rollout", "actre")]
    own = [
        (round_directory(args.run, earlier) / stage, f"python {stage}.py --run {args.run} --round {earlier}")
        for earlier, stage in rounds
    ]
    given = [(require_trajectories(directory), f"the stage that writes {directory}") for directory in args.inputs]
    rows, hashes = [], []
    for directory, command in given or own:
        require_done(directory, command)
        path = directory / "trajectories.jsonl"
        hashes.append(sha256(path))
        rows += read_examples(directory, str(path if args.inputs else path.relative_to(args.run)))
    examples = select(rows, args)
    if not examples and (round_index > 0 or args.inputs):
        raise StageError(
            f"none of {len(rows)} trajectories was won, so there is nothing to train on; play more tasks, "
            "or look at the rewards and at --threshold"
        )
    return examples, hashes


def refined(trajectory: Trajectory, how: str) -> tuple[Trajectory, set[int]]:
    """A trajectory with marked mistakes as it is trained on, and the turns whose tokens get no weight.

    `how`: mask-errors (AgentRefine), or one of its paper's controls: mask-refined masks the turn after a mistake too,
    drop-errors drops mistakes from the text, no-mask imitates them.
    """
    wrong = {index for index, turn in enumerate(trajectory.turns) if turn.errors}
    if how == "drop-errors":
        return msgspec.structs.replace(trajectory, turns=[turn for turn in trajectory.turns if not turn.errors]), set()
    masked = {"mask-errors": wrong, "mask-refined": wrong | {index + 1 for index in wrong}, "no-mask": set()}
    return trajectory, masked[how]


def pack_examples(examples: list[Example], args: Args, codec: Codec) -> Packed:
    """Packs the tokens and weights of all examples into rows. Raises ValueError if every weight is 0, or if the ids of
    a record do not spell it (tokens_of)."""
    sequences = []
    for trajectory, weight, file, line in examples:
        trajectory, masked = refined(trajectory, args.refinement)
        tokens = tokens_of(trajectory, codec, f"{file}:{line}", args.form)
        world_weight = 0.0 if trajectory.source == "refine" else args.world_weight
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


def batch_order(args: Args, round_index: int, epoch: int, rows: int) -> np.ndarray:
    """The row indices of each step of an epoch. The last step is padded with -1 (an empty row) to keep shapes fixed."""
    order = generator(args.seed, "train_pg", round_index, epoch).permutation(rows)
    return np.pad(order, (0, -rows % args.batch_rows), constant_values=-1).reshape(-1, args.batch_rows)


def learning_rate(args: Args, steps: int) -> optax.Schedule:
    """The learning rate of steps 1, 2, ..., `steps`; see --learning-rate."""
    warmup, peak = max(1, round(0.03 * steps)), args.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(warmup + 1, steps), 0.1 * peak)


# ---- the run ---------------------------------------------------------------------------------------------------------


def epochs_of(args: Args, round_index: int) -> int:
    return args.epochs[min(round_index, len(args.epochs) - 1)]


def train(args: Args, round_index: int, packed: Packed, model, mesh: Mesh, directory: Path) -> tuple[object, dict]:
    """Trains from the newest checkpoint on. Returns the model to save and counts for done.json.

    Raises ValueError, naming the step, if the loss is not finite or the likelihood of the failures diverges.
    """
    rows, epochs = len(packed.ids_NL), epochs_of(args, round_index)
    steps = epochs * -(-rows // args.batch_rows)
    plan = Plan(
        rows=Batch(ids=packed.ids_NL, segments=packed.segments_NL, weights=packed.weights_NL),
        epochs=epochs,
        order=lambda epoch: batch_order(args, round_index, epoch, rows),
        rate=learning_rate(args, steps),
        key=lambda step: jax.random.key(draw_seed(args.seed, "dropout", round_index, step)) if args.dropout else None,
        device_rows=args.device_rows,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(args.clip), optax.scale_by_adam(), optax.add_decayed_weights(args.weight_decay)
    )
    bounds = segment_bounds(packed.segments_NL)
    weighted = functools.partial(objective, implementation=args.attention, bounds=bounds, remat=args.remat)
    checkpoints, minutes = directory / "checkpoints", args.checkpoint_minutes
    trainer = Trainer(model, weighted, optimizer, mesh, plan, checkpoints=checkpoints, minutes=minutes)
    remedy = (
        f"Lower --learning-rate (now {args.learning_rate:g}) or raise --failure-reward (now {args.failure_reward:g}), "
        f"then remove {directory} and run again."
    )
    with MetricsLog(directory, trainer.done, steps, active=is_first_process(), track=args.track) as log:
        for line in trainer:
            check_step(line, args.floor, remedy)
            log.write(line)
    counts = {"epochs": epochs, "steps": steps, "rows": rows, "remat": args.remat, "device_rows": args.device_rows}
    return trainer.result(args.average), counts


def training(args: Args, mesh: tuple[int, ...] = (1, 1, 1)) -> Training:
    """What a step's memory depends on."""
    lora = LoRAConfig(rank=args.rank, alpha=args.alpha, targets=args.targets, dropout=args.dropout)
    same = ("weights", "dtype", "row_length", "batch_rows", "device_rows", "remat", "attention")
    return Training(lora=lora, mesh=mesh, **{name: getattr(args, name) for name in same})


def load_base(args: Args, round_index: int, previous: Path | None, mesh: Mesh):
    """The base with the adapter to train: a fresh one, or that of the previous round."""
    how = {"weights": args.weights, "dtype": jnp.dtype(args.dtype), "mesh": mesh}
    if previous is not None:
        return load_adapter(args.model, previous, **how)
    return load_model(args.model, lora=training(args).lora, seed=draw_seed(args.seed, "train_pg", round_index), **how)


def show(args: Args) -> None:
    """Prints what a round was trained on, or would be; see --preview."""
    current = current_round(args.run)
    ready = all((round_directory(args.run, current) / stage / "done.json").exists() for stage in ("rollout", "actre"))
    round_index = args.round if args.round is not None else current if ready else max(0, current - 1)
    directory = round_directory(args.run, round_index) / "train_pg"
    if (directory / "packed.jsonl").exists():
        packed, places = load_packed(directory)
        print(f"what round {round_index} was trained on, from {directory}")
    else:
        examples, _ = collect(args, round_index)
        packed = pack_examples(examples, args, read_codec(args.model))
        places = places_of(packed, examples)
        print(f"what round {round_index} would be trained on")
    preview(packed, places, args.model, args.preview)


def resolve(args: Args) -> Args:
    """The arguments with the run's base, and in one form for one meaning."""
    dtype = "bfloat16" if args.weights == "bf16" else "float32"
    targets = tuple(target for target in TARGETS if target in args.targets)
    return dataclasses.replace(args, model=base_of(args.run, args.model), dtype=args.dtype or dtype, targets=targets)


def main(args: Args) -> None:
    args = resolve(args)
    if args.preview:
        show(args)
        return
    require_supported(args.attention, jax.default_backend(), jnp.dtype(args.dtype))
    mesh = training_mesh(args.mesh, args.batch_rows, args.device_rows or 1)
    round_index = current_round(args.run) if args.round is None else args.round
    examples, hashes = collect(args, round_index)
    packed = pack_examples(examples, args, read_codec(args.model))
    previous = adapter_of_round(args.run, round_index) if args.init == "previous" else None
    base, directory = base_facts(args.model), round_directory(args.run, round_index) / "train_pg"
    facts = {"inputs": hashes, "epochs": epochs_of(args, round_index), "previous": adapter_sha(previous), **base}
    adapter, identity = directory / "adapter", {"model": str(args.model), **base}
    with Stage(directory, args, facts, identity) if is_first_process() else contextlib.nullcontext() as stage:
        if multihost_utils.broadcast_one_to_all(np.array(stage is not None and stage.finished)):
            return
        how, plan = choose_training(Config.read(args.model), training(args, (*mesh.shape.values(),)), training_device())
        args = dataclasses.replace(args, remat=how.remat, device_rows=how.device_rows)
        if stage:
            print(describe_training(how, plan))
            save_packed(directory, packed, examples)
        model = load_base(args, round_index, previous, mesh)
        model, counts = train(args, round_index, packed, model, mesh, directory)
        save_adapter(adapter, model, args.model)
        if not stage:
            return
        name = adapter_name(args.run.name, round_index, adapter)
        failed = sum(is_failure(example, args) for example in examples)
        summary = {"round": round_index, "adapter": name, "sequences": len(examples), "sequences_failed": failed}
        stage.finish({**summary, "tokens": int((packed.segments_NL > 0).sum()), **counts})
    why = "" if examples else " (nothing was won yet: the policy is still the base)"
    print(
        f"train_pg round {round_index}: {len(examples)} trajectories ({failed} failed), {counts['steps']} steps{why} "
        f"-> {adapter} ({name})"
    )


def launch(args: Args) -> None:
    given = resolve(args)
    start_devices(args.batch_rows, cpu_devices(Config.read(given.model), training(given)))
    with ending_together():
        main(args)


if __name__ == "__main__":
    run_stage(launch, Args, __doc__)

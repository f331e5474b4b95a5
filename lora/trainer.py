"""The loop over optimizer steps: resumes from checkpoints, measures every step, averages the adapters of the epochs.

    trainer = Trainer(model, objective, optimizer, mesh, plan, checkpoints=directory / "checkpoints", minutes=10.0)
    for metrics in trainer:                     # one dict per step that is left; a checkpoint follows when one is due
        log.write(metrics)
    model = trainer.result(average=True)

A trainer that is made again after a kill goes on at the newest checkpoint and ends with the same bytes.
Left out: the objective, the choice of rows, their order and weights, the learning rate (all in train_pg.py).
Shapes: N packed rows, B of them in a step, L tokens.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from lora.flops import lora_step_flops, peak_flops, peak_memory
from lora.linear import LoRAParam
from lora.model import CausalLM
from lora.sharding import is_first_process
from lora.train_step import Batch, initial_state, make_update, shard_rows

SPARE_BYTES = 2**20  # what a checkpoint takes beside its arrays, at most
KEPT = ocp.training.preservation_policies.LatestN(2)  # the second is for the case that the newest is damaged


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained on, in which order and how fast. Epochs count from 0, steps from 1."""

    rows: Batch  # on the host, [N, L]
    epochs: int
    order: Callable[[int], np.ndarray]  # epoch -> the rows of its steps [steps, B]; -1 is an empty row
    rate: Callable[[int], jax.Array]  # step -> learning rate
    key: Callable[[int], jax.Array | None]  # step -> random key of LoRA dropout
    device_rows: int = 1


class Progress(NamedTuple):
    """What a checkpoint holds: the adapter, the optimizer's state, the sum of the adapters after each whole epoch."""

    adapter: nnx.State
    state: optax.OptState
    total: nnx.State


class Trainer:
    """Iterates over the steps that are left. `done`: finished steps; `steps`: all of them.

    `objective`: see `make_update`. `minutes` between checkpoints; there is also one after every epoch.
    """

    def __init__(
        self,
        model: CausalLM,
        objective: Callable,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        plan: Plan,
        *,
        checkpoints: Path,
        minutes: float,
    ):
        self.plan, self.mesh, self.minutes = plan, mesh, minutes
        self.checkpoints = checkpoints.resolve()
        self.config = model.config
        self.graph, adapter, self.frozen = nnx.split(model, LoRAParam, ...)
        self.update = make_update(objective, self.graph, optimizer, mesh, adapter, self.frozen)
        self.rows = Batch(*(np.pad(x, ((0, 1), (0, 0))) for x in plan.rows))  # the last one is the empty row
        self.steps_per_epoch = len(plan.order(0))
        self.steps = plan.epochs * self.steps_per_epoch
        start = Progress(
            adapter=adapter,
            state=initial_state(optimizer, adapter, mesh),
            total=jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), adapter),
        )
        self.done, self.progress = restore(self.checkpoints, start)

    def __iter__(self) -> Iterator[dict]:
        """Takes step after step and yields its metrics. Raises OSError if a checkpoint cannot be written."""
        saved = time.monotonic()
        with open_checkpoints(self.checkpoints) as checkpointer:
            while self.done < self.steps:
                epoch, index = divmod(self.done, self.steps_per_epoch)
                yield self.step(epoch, self.plan.order(epoch)[index])
                last = index == self.steps_per_epoch - 1
                if last:
                    total = jax.tree.map(jnp.add, self.progress.total, self.progress.adapter)
                    self.progress = self.progress._replace(total=total)
                if last or self.is_due(saved):
                    save(checkpointer, self.done, self.progress)
                    saved = time.monotonic()

    def step(self, epoch: int, members: np.ndarray) -> dict:
        """One optimizer step on the given rows. Returns the line of metrics.jsonl."""
        start, self.done = time.time(), self.done + 1
        adapter, state, total = self.progress
        rows = Batch(*(x[members] for x in self.rows))
        trajectories = np.float32(max(1, rows.segments.max(axis=1).sum()))
        batch = shard_rows(rows, self.mesh, self.plan.device_rows)
        rate, key = self.plan.rate(self.done), self.plan.key(self.done)
        adapter, state, metrics = self.update(adapter, state, self.frozen, rate, batch, trajectories, key)
        self.progress = Progress(adapter=adapter, state=state, total=total)
        loss, positive, negative, norm = (float(value) for value in metrics)
        tokens, seconds = int((rows.segments > 0).sum()), time.time() - start
        peak = peak_flops(self.mesh.size)
        return {
            "step": self.done,
            "epoch": epoch,
            "loss": loss,
            "gradient_norm": norm,
            "logprob_positive": positive / max(1, int((rows.weights > 0).sum())),
            "logprob_negative": negative / max(1, int((rows.weights < 0).sum())),
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "tokens_per_s": round(tokens / seconds, 1),
            "mfu": peak and round(lora_step_flops(self.config, tokens) / seconds / peak, 4),
            "peak_memory": peak_memory(),
        }

    def is_due(self, saved: float) -> bool:
        """Whether `minutes` have passed since `saved`, by the clock of the first process: all must save together."""
        due = time.monotonic() - saved >= 60 * self.minutes
        return bool(multihost_utils.broadcast_one_to_all(np.array(due)))

    def result(self, average: bool) -> CausalLM:
        """The model with the average of the adapters after each epoch, or with the last one."""
        adapter, _, total = self.progress
        if average and self.steps:
            adapter = jax.tree.map(lambda x: x / self.plan.epochs, total)
        return nnx.merge(self.graph, adapter, self.frozen)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def open_checkpoints(folder: Path) -> ocp.training.Checkpointer:
    return ocp.training.Checkpointer(folder, preservation_policy=KEPT)


def save(checkpointer: ocp.training.Checkpointer, step: int, progress: Progress) -> None:
    """Writes the checkpoint of a step; a kill leaves it whole or not at all. Raises OSError if the disk has no room."""
    leaves = jax.tree.leaves(progress)
    folder, needed = checkpointer.directory, sum(leaf.nbytes for leaf in leaves) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:  # Orbax would print tracebacks from its threads
        why = f"no space left for the checkpoint of step {step}: it takes {needed:,} bytes, {free:,} are free"
        raise OSError(errno.ENOSPC, why, str(folder))
    checkpointer.save(step, {"progress": leaves})


def restore(folder: Path, start: Progress) -> tuple[int, Progress]:
    """The step and content of the newest checkpoint that can be read; (0, start) if there is none.

    One that cannot be read is moved aside, and says so. Raises OSError if the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    leaves, tree = jax.tree.flatten(start)
    while True:
        with open_checkpoints(folder) as checkpointer:
            if (latest := checkpointer.latest) is None:
                return 0, start
            try:
                found = checkpointer.load(latest.step, {"progress": leaves})["progress"]
                return latest.step, jax.tree.unflatten(tree, found)
            except KeyError:  # Orbax's for whatever is wrong with a checkpoint
                path = Path(latest.path)
        aside = path.with_name(f"{path.name}.damaged")
        tqdm.write(f"{path} cannot be read, so training goes on from an earlier step; it is now {aside.name}")
        if is_first_process():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        multihost_utils.sync_global_devices("a damaged checkpoint is out of the way")

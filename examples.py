"""Which trajectories are trained on, with which weight on which token, in which rows.

A3T: every success +1, and the policy's own failure of a task that was also solved R_f, whole trajectories, the world's
words included. Demonstrations: successes. AgentRefine: thoughts and actions, but for the mistakes. Used by train_pg.py,
whose Args say what can be chosen.

Shapes: N packed rows, L tokens.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from stage import StageError, require_done, round_directory, sha256
from trajectory import FAULTS, Packed, Trajectory, pack, read_trajectories, token_weights, tokens_of

if TYPE_CHECKING:
    from train_pg import Args


class Example(NamedTuple):
    """A trajectory that is trained on, its weight, and the file and line it came from."""

    trajectory: Trajectory
    weight: float
    file: str
    line: int


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


def select(rows: list[Example], args: Args) -> list[Example]:
    """What is trained on: A3T's choice of each round's own and composed trajectories, every success of a teacher."""
    taught = [row._replace(weight=1.0) for row in rows if row.trajectory.source in ("demo", "refine")]
    selected = [row for row in taught if row.trajectory.success and row.trajectory.end not in FAULTS]
    for number in sorted({row.trajectory.round for row in rows}):
        of_round = [r for r in rows if r.trajectory.round == number and r.trajectory.source in ("react", "actre")]
        # Round 0 has nothing to pair a failure with: the paper trains on the prompted agent's successes only.
        selected += [e for e in select_round(of_round, args) if number > 0 or e.weight > 0]
    return selected


def collect(args: Args, number: int) -> tuple[list[Example], dict[str, str]]:
    """The examples of rounds 0..number, or of args.inputs, and the sha256 of every file read.

    There are none in round 0 where nothing was won there: compositions come with round 1. StageError if there are none
    otherwise, or if a stage is not finished.
    """
    rounds = [(earlier, stage) for earlier in range(number + 1) for stage in ("rollout", "actre")]
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
        rows += [Example(t, 0.0, name, line) for line, t in enumerate(read_trajectories(path), 1)]
    examples = select(rows, args)
    if not examples and (number > 0 or args.inputs):
        raise StageError(
            f"none of {len(rows)} trajectories was won, so there is nothing to train on; play more tasks, "
            "or look at the rewards and at --threshold"
        )
    return examples, hashes


def refined(trajectory: Trajectory, how: str) -> tuple[Trajectory, set[int]]:
    """What is trained on of a synthetic trajectory with mistakes, and the turns of it whose tokens have no weight.

    `how`: mask-errors (AgentRefine), or one of its paper's controls: mask-refined masks the turn after a mistake too,
    drop-errors leaves mistakes out of the text, no-mask imitates them.
    """
    wrong = {number for number, turn in enumerate(trajectory.turns) if turn.errors}
    if how == "drop-errors":
        return msgspec.structs.replace(trajectory, turns=[turn for turn in trajectory.turns if not turn.errors]), set()
    return trajectory, {"mask-errors": wrong, "mask-refined": wrong | {n + 1 for n in wrong}, "no-mask": set()}[how]


def pack_examples(examples: list[Example], args: Args, encode: Callable[[str, bool], list[int]]) -> Packed:
    """Tokens and weights of all examples in rows. ValueError if no token of them has a weight."""
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


def save_packed(directory: Path, packed: Packed, examples: list[Example]) -> None:
    """packed.npz, and packed.jsonl with the origin of each (row, segment)."""
    with open(directory / "packed.npz.tmp", "wb") as file:
        np.savez(file, ids_NL=packed.ids_NL, segments_NL=packed.segments_NL, weights_NL=packed.weights_NL)
    os.replace(directory / "packed.npz.tmp", directory / "packed.npz")
    lines = [
        {"row": row, "segment": segment, "weight": e.weight, "file": e.file, "line": e.line}
        for (row, segment), e in zip(packed.places, examples, strict=True)
    ]
    (directory / "packed.jsonl.tmp").write_text(
        "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: (line["row"], line["segment"])))
    )
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

"""Evaluates an adapter, or the base alone, on panels of held-out tasks and prints the table of all rounds so far.

    python evaluate.py                       # every trained round of runs/a3t that is not evaluated yet
    python evaluate.py --round 2 --panels valid_seen-140
    python evaluate.py --base                # the base without an adapter
    python evaluate.py --adapter DIR         # any adapter in PEFT's layout
    python evaluate.py --perturb all         # the world's own wording and five perturbed ones (envs/wording.py)
    python evaluate.py --best-of 10 --temperature 1
    python evaluate.py --temperature 1 --name hot      # other settings beside those evaluated before

Writes <run>/round_<k>/evaluate/{trajectories.jsonl,scores.json}; for --base and --adapter, base/ or adapter/ replaces
round_<k>/. The last folder names what was played: evaluate (unchanged ALFWorld), evaluate_P1, evaluate_webshop,
evaluate_best_of_10, evaluate_hot. A finished evaluation of other settings is refused, never shown as the answer.
Best-of-rounds counts a task that any round so far solved: an oracle that picks the right round, comparable only with
pass@k.
Finally writes <run>/report.html: all scores of the run, and every attempt to read (artifacts/report.py).
Left out: figures and tables (artifacts/scores.py).
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import dataclasses
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from agent.args import (
    PlayArgs,
    Player,
    agent_facts,
    explain_faults,
    fit_memory,
    make_policy,
    make_settings,
    resolve,
    run_identity,
    sampler,
    world_maker,
)
from agent.attempt import Job
from agent.loop import PlayLoop
from artifacts.cli import Range
from artifacts.json_io import read_json, write_json
from artifacts.report import write_report
from artifacts.scores import (
    WORDINGS,
    closing_notes,
    directory_name,
    perturbation_table,
    perturbations,
    score,
    subjects,
    table,
)
from artifacts.shards import adopt, finish_shards, open_shard, share
from artifacts.stage import Stage, StageError, adapter_of_round, current_round, round_directory, run_stage
from artifacts.track import track_rounds
from artifacts.trajectory import Trajectory, Writer, read_trajectories, sort_file
from envs.base import World
from envs.make import world_name
from envs.panel import NAMES, default_panels, panel_name, pick_tasks, require_tasks
from envs.wording import Perturbed
from lora.checkpoint import adapter_weights
from lora.sharding import play_together


@dataclass(frozen=True, kw_only=True)
class Args(PlayArgs):
    run: Path = Path("runs/a3t")
    """Directory of the run."""
    round: Annotated[int, Range(0, 10_000)] | None = None
    """Evaluate the adapter trained in this round (default: every trained round)."""
    base: bool = False
    """Evaluate the base without an adapter, or with --server.url the server's model."""
    adapter: Path | None = None
    """Evaluate the adapter in this folder (adapter_model.safetensors), from any run."""
    panels: tuple[str, ...] = ()
    """Panels to play: of those that `python -m envs.panel` lists, files FILE.txt with sorted task ids, one per line, or
    splits of the world (default: those made for the world's data, such as valid_seen-140 and valid_unseen-134, or
    gen_valid-100; for a world of your own the split test)."""
    limit: Annotated[int, Range(1)] | None = None
    """Play at most this many tasks per panel, spread evenly over it (default: all)."""
    perturb: Literal["none", "P1", "P2", "P3", "P4", "P5", "all"] = "none"
    """Wording of the world's commands: its own (none), a perturbed one, or all six, with mean and standard
    deviation."""
    best_of: Annotated[int, Range(1, 10_000)] = 1
    """Attempts per task; above 1, scores report their best as well as their mean (paper: 10 at --temperature 1)."""
    name: str = ""
    """Suffix of the evaluation's folder, for settings that differ from those already evaluated in this run."""

    def check(self) -> None:
        super().check()
        if self.base + (self.adapter is not None) + (self.round is not None) > 1:
            raise ValueError("got more than one of --base, --adapter and --round; expected one or none")
        if self.best_of > 1 and self.temperature == 0:
            raise ValueError(
                f"--best-of {self.best_of} at temperature 0 repeats one attempt {self.best_of} times; "
                "give a --temperature (paper: 1)"
            )
        if not re.fullmatch(r"[A-Za-z0-9.-]*", self.name):
            raise ValueError(f"--name is {self.name!r}; expected letters, digits, dots and hyphens")

    @property
    def directory_name(self) -> str:
        return directory_name(world_name(self.env), self.perturb, self.best_of, self.name)


def evaluate(args: Args, subject: str, adapter: Path | None, round_index: int) -> bool:
    """Plays all panels with one policy in one wording and writes scores.json. Resumes like every stage.

    Returns whether there was anything to do.
    """
    panels = args.panels or default_panels("evaluate", args.env, args.data)
    world = world_maker(args, args.perturb)()
    tasks = {panel_name(panel): pick_tasks(panel, args.limit, world) for panel in panels}
    if len(tasks) < len(panels):
        raise ValueError(f"got panels of one name, {' '.join(panels)}; expected different ones, to tell scores apart")
    for panel in panels:
        ids, _ = tasks[panel_name(panel)]
        require_tasks(world, ids)
        if panel not in NAMES and subject.isdecimal():
            require_unseen(args.run, round_index, panel, ids)
    facts = {
        "panels": {panel: panel_hash for panel, (_, panel_hash) in tasks.items()},
        "tasks": {panel: len(ids) for panel, (ids, _) in tasks.items()},
        "content": {panel: world.fingerprint(ids) for panel, (ids, _) in tasks.items()},
        "world": world.facts,
        **agent_facts(args, adapter, prompt=args.prompt),
    }
    whole = subjects(args.run)[subject] / args.directory_name
    with open_shard(whole, args, facts, run_identity(args)) as stage:
        if played := not stage.finished:
            panel_tasks = {panel: ids for panel, (ids, _) in tasks.items()}
            counts = play(args, panel_tasks, adapter, round_index, stage)
            trajectories = sort_file(stage.directory / "trajectories.jsonl")
            summary = {} if args.shard else summarise(args, panel_tasks, trajectories, world, stage)
            stage.finish(summary | counts)
            grammar = world.facts.get("grammar") if args.perturb == "none" else None
            if note := closing_notes(trajectories, stage.directory, grammar):
                print(f"{stage.directory / 'trajectories.jsonl'}:{note}")
    unfinished, alone = not (whole / "done.json").exists(), dataclasses.replace(args, shard=None)
    finish_shards(whole, args.shard, lambda: evaluate(alone, subject, adapter, round_index))
    return played or unfinished


def require_unseen(run: Path, round_index: int, panel: str, task_ids: list[str]) -> None:
    """Raises ValueError if some tasks of a panel of the user's were played to train the round's adapter and others were
    not, which no score could tell apart. If all were, the panel is meant: a score on training tasks."""
    played: set[str] = set()
    for index in range(round_index + 1):
        folder = round_directory(run, index)
        inputs = read_json(folder / "train_pg" / "config.json", dict[str, Any])["args"]["inputs"]
        for path in (Path(each) / "trajectories.jsonl" for each in inputs or [folder / "rollout"]):
            played |= {trajectory.task_id for trajectory in read_trajectories(path)} if path.exists() else set()
    if 0 < (count := len(played & set(task_ids))) < len(task_ids):
        seen = next(task_id for task_id in task_ids if task_id in played)
        raise ValueError(
            f"{count} of {len(task_ids)} tasks of {panel} were played to train round {round_index}, such as {seen}; "
            "expected none of them, or all, for a score on the training tasks: take them out"
        )


def play(args: Args, tasks: dict[str, list[str]], adapter: Path | None, round_index: int, stage: Stage) -> dict:
    """Plays what is missing of the panels' tasks. Returns counts for done.json."""
    counts = {"rates": {}}
    with Writer(stage.directory / "trajectories.jsonl") as writer:
        shards = {} if args.shard else adopt(stage, writer)
        unique = [*dict.fromkeys(task for ids in tasks.values() for task in ids)]
        jobs = [Job(task, trial) for task in share(unique, args.shard) for trial in range(args.best_of)]
        if jobs := [job for job in jobs if job not in writer.known]:
            player = Player(args.server, adapter, args.prompt)
            args = fit_memory(args, player)
            policy = make_policy(args, player, stage.directory / "replies.sqlite")
            settings = make_settings(args, "evaluate", round_index)
            loop = PlayLoop(jobs, settings, world_maker(args, args.perturb), policy)
            for trajectory in loop:
                writer.write(trajectory)
            counts = {"rates": loop.rates.summary(), "sampler": sampler(args)}
    return counts | shards


def summarise(
    args: Args, tasks: dict[str, list[str]], trajectories: list[Trajectory], world: World, stage: Stage
) -> dict[str, Any]:
    """Writes scores.json and returns its essence, by panel, for done.json."""
    by_key, scores = {t.key: t for t in trajectories}, {}
    for panel, ids in tasks.items():
        played = [by_key[task, trial] for task in ids for trial in range(args.best_of)]
        facts = {"world": world.facts, "content": stage.config["facts"]["content"][panel]}
        scores[panel] = score(played, args.best_of) | facts
    write_json(stage.directory / "scores.json", scores)
    return {p: {k: s[k] for k in ("success", "n", "rate", "wilson95", "progress")} for p, s in scores.items()}


def policies(args: Args) -> list[tuple[str, Path | None, int]]:
    """The policies to evaluate: (subject, adapter, round index). Raises StageError if the run has none."""
    if args.base:
        return [("base", None, 0)]
    if args.adapter is not None:
        adapter_weights(args.adapter)  # raises if it is none
        return [("adapter", args.adapter, 0)]
    trained = current_round(args.run)
    if not args.run.is_dir():
        raise StageError(f"no such run: {args.run}; python rollout.py --run {args.run} begins one")
    if trained == 0 or (args.round is not None and args.round >= trained):
        raise StageError(
            f"round {args.round or 0} of {args.run} is not trained ({trained} rounds are); "
            f"run: python train_pg.py --run {args.run} --round {args.round or 0}, or evaluate the base by --base"
        )
    rounds = range(trained) if args.round is None else [args.round]
    return [(str(round_index), adapter_of_round(args.run, round_index + 1), round_index) for round_index in rounds]


@explain_faults
def main(args: Args) -> None:
    args = resolve(args)
    subjects_to_play = policies(args)
    wordings = [dataclasses.replace(args, perturb=w) for w in (WORDINGS if args.perturb == "all" else (args.perturb,))]
    panel = (args.panels or default_panels("evaluate", args.env, args.data))[0]
    for perturbed in (each for each in wordings if each.perturb != "none"):  # before any attempt
        world = world_maker(args)()
        Perturbed(world, perturbed.perturb).require_change(pick_tasks(panel, args.limit, world)[0])
    played = [evaluate(each, *subject) for subject in subjects_to_play for each in wordings]
    if not any(played):
        print("nothing to play: all of these evaluations are finished")
    print(table(args.run, wordings[0].directory_name))
    if args.perturb == "all":
        found = perturbations(args.run, world_name(args.env), args.best_of, args.name)
        write_json(args.run / f"{args.directory_name}.json", found)
        print(perturbation_table(found))
    print(f"report -> {write_report(args.run)}")
    folders = [subjects(args.run)[subject] for subject, *_ in subjects_to_play]
    if all((folder / each.directory_name / "done.json").exists() for folder in folders for each in wordings):
        track_rounds(args.run, args.track)  # else another shard is still at work, and does it


if __name__ == "__main__":
    run_stage(functools.partial(play_together, main), Args, __doc__)

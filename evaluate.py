"""Evaluates an adapter, or the base alone, on panels of held-out tasks and prints the table of all rounds so far.

    python evaluate.py                       # every trained round of runs/a3t that is not evaluated yet
    python evaluate.py --round 2 --panels valid_seen-140
    python evaluate.py --base                # the base without an adapter
    python evaluate.py --adapter DIR         # any adapter in PEFT's layout
    python evaluate.py --perturb all         # the world's own wording and five perturbed ones (envs/wording.py)
    python evaluate.py --best-of 10 --temperature 1

Writes <run>/round_<k>/evaluate/{trajectories.jsonl,scores.json}; for --base and --adapter, base/ or adapter/ replaces
round_<k>/. The last folder names what was played: evaluate (unchanged ALFWorld), evaluate_P1, evaluate_webshop,
evaluate_best_of_10. Best-of-rounds counts a task that any round so far solved: an oracle that picks the right round,
comparable only with pass@k.
Finally writes <run>/report.html: all scores of the run, with sample trajectories (artifacts/report.py).
Left out: figures and tables (artifacts/scores.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent.args import PlayArgs, make_policy, make_settings, prompt_facts, world_maker
from agent.attempt import Job
from agent.loop import PlayLoop
from artifacts.cli import parse
from artifacts.report import write_report
from artifacts.scores import WORDINGS, directory_name, perturbation_table, perturbations, score, subjects, table
from artifacts.stage import Stage, StageError, adapter_of_round, adapter_sha, current_round, run_main, write_json
from artifacts.trajectory import Writer, fault_note, sort_file
from envs.panel import default_panels, pick_tasks, require_tasks
from envs.wording import Perturbed
from lora.checkpoint import base_sha


@dataclass(frozen=True, kw_only=True)
class Args(PlayArgs):
    run: Path = Path("runs/a3t")
    """Directory of the run."""
    round: int | None = None
    """Evaluate the adapter trained in this round (default: every trained round not evaluated yet)."""
    base: bool = False
    """Evaluate the base without an adapter, or with --server.url the server's model."""
    adapter: Path | None = None
    """Evaluate the adapter in this folder (adapter_model.safetensors), from any run."""
    panels: tuple[str, ...] = ()
    """Panels to play (default: those made for the world's data, such as valid_seen-140 and valid_unseen-134, or
    gen_valid-100; `python -m envs.panel` lists all)."""
    limit: int | None = None
    """Play at most this many tasks per panel, spread evenly over it (default: all)."""
    perturb: Literal["none", "P1", "P2", "P3", "P4", "P5", "all"] = "none"
    """Wording of the world's commands: its own (none), a perturbed one, or all six, with mean and standard
    deviation."""
    best_of: int = 1
    """Attempts per task; above 1, scores report their best as well as their mean (paper: 10 at --temperature 1)."""


def evaluate(args: Args, subject: str, adapter: Path | None, round_index: int) -> None:
    """Plays all panels with one policy in one wording and writes scores.json. Resumes like every stage."""
    directory = subjects(args.run)[subject] / directory_name(args.env, args.perturb, args.best_of)
    panels = args.panels or default_panels("evaluate", args.env, args.data)
    tasks = {panel: pick_tasks(panel, args.limit) for panel in panels}
    world = world_maker(args, args.perturb)()
    facts = {
        "panels": {p: h for p, (_, h) in tasks.items()},
        "world": world.facts,
        "base": base_sha(args.model),
        "adapter": adapter_sha(adapter),
        **prompt_facts(args.prompt),
    }
    stage = Stage(directory, args, facts)
    if stage.finished:
        return
    for ids, _ in tasks.values():
        require_tasks(world, ids)
    policy = make_policy(args, args.server, directory / "replies.sqlite", adapter, args.prompt)
    path = directory / "trajectories.jsonl"
    settings = make_settings(args, "evaluate", round_index)
    with Writer(path) as writer:
        jobs = [Job(task, trial) for ids, _ in tasks.values() for task in ids for trial in range(args.best_of)]
        jobs = [job for job in jobs if job not in writer.known]
        loop = PlayLoop(jobs, settings, world_maker(args, args.perturb), policy)
        for trajectory in loop:
            writer.write(trajectory)
    trajectories = {t.key: t for t in sort_file(path)}
    scores = {}
    for panel, (ids, _) in tasks.items():
        played = [trajectories[task, trial] for task in ids for trial in range(args.best_of)]
        scores[panel] = score(played, args.best_of) | {"world": world.facts}
    write_json(directory / "scores.json", scores)
    summary = {p: {k: s[k] for k in ("success", "n", "rate", "wilson95", "progress")} for p, s in scores.items()}
    stage.finish(summary | {"rates": loop.rates.summary()})
    if note := fault_note(trajectories.values(), directory):
        print(f"{path}:{note}")


def policies(args: Args) -> list[tuple[str, Path | None, int]]:
    """The policies to evaluate: (subject, adapter, round index)."""
    if args.base + (args.adapter is not None) + (args.round is not None) > 1:
        raise StageError("got more than one of --base, --adapter and --round; expected one or none")
    if args.base:
        return [("base", None, 0)]
    if args.adapter is not None:
        if not (args.adapter / "adapter_model.safetensors").exists():
            raise StageError(
                f"{args.adapter} is no adapter: expected a folder with adapter_model.safetensors, such as "
                "<run>/round_0/train_pg/adapter"
            )
        return [("adapter", args.adapter, 0)]
    trained = current_round(args.run)
    if args.round is not None and args.round >= trained:
        raise StageError(
            f"round {args.round} of {args.run} is not trained ({trained} rounds are); "
            f"run: python train_pg.py --run {args.run} --round {args.round}"
        )
    rounds = range(trained) if args.round is None else [args.round]
    return [(str(round_index), adapter_of_round(args.run, round_index + 1), round_index) for round_index in rounds]


def main(args: Args) -> None:
    if args.best_of > 1 and args.temperature == 0:
        raise StageError(
            f"--best-of {args.best_of} at temperature 0 repeats one attempt {args.best_of} times; "
            "give a --temperature (paper: 1)"
        )
    wordings = WORDINGS if args.perturb == "all" else (args.perturb,)
    panel = (args.panels or default_panels("evaluate", args.env, args.data))[0]
    for wording in (name for name in wordings if name != "none"):  # before any attempt
        Perturbed(world_maker(args)(), wording).require_change(pick_tasks(panel, args.limit)[0])
    for subject, adapter, round_index in policies(args):
        for wording in wordings:
            done = subjects(args.run)[subject] / directory_name(args.env, wording, args.best_of) / "done.json"
            # A finished evaluation that was named on the command line reports so itself.
            if not done.exists() or args.round is not None or not subject.isdecimal():
                evaluate(dataclasses.replace(args, perturb=wording), subject, adapter, round_index)
    for wording in wordings if args.perturb != "all" else ("none",):
        print(table(args.run, directory_name(args.env, wording, args.best_of)))
    if args.perturb == "all":
        found = perturbations(args.run, args.env, args.best_of)
        write_json(args.run / f"{directory_name(args.env, 'all', args.best_of)}.json", found)
        print(perturbation_table(found))
    print(f"report -> {write_report(args.run)}")


if __name__ == "__main__":
    run_main(main, parse(Args, __doc__))

"""Plays an adapter, or the base alone, once on panels of held-out tasks and prints the table of all rounds so far.

    python evaluate.py                       # every trained round of runs/a3t that is not evaluated yet
    python evaluate.py --round 2 --panels valid_seen-140
    python evaluate.py --base                # the base without an adapter

Writes <run>/round_<k>/evaluate/{trajectories.jsonl,scores.json} (<run>/base/evaluate for the base). Best-of-rounds
counts a task that any round so far has won: an oracle over as many attempts, comparable with pass@k only.
Left out: perturbed wordings, held-out worlds and the report, which later stages add.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from agent import Job, PlayArgs, play, policy_of, require_tasks, settings_of, world_of
from envs.alfworld import TASK_TYPES, task_type
from envs.panel import default_panels, pick_tasks
from lora.checkpoint import base_sha
from policy import prompt_facts
from stage import (
    Stage,
    StageError,
    adapter_of_round,
    adapter_sha,
    current_round,
    read_json,
    round_directory,
    run_main,
    write_json,
)
from trajectory import FAULTS, Trajectory, Writer, fault_note, sort_file

SHORT = dict(zip(TASK_TYPES, ("Pick", "Clean", "Heat", "Cool", "Examine", "PickTwo"), strict=True))


@dataclass(frozen=True, kw_only=True)
class Args(PlayArgs):
    round: int | None = None
    """Evaluate the adapter trained in this round (default: every trained round that is not evaluated yet)."""
    base: bool = False
    """Evaluate the base without an adapter."""
    panels: tuple[str, ...] = ()
    """Panels to play (default: what `python -m envs.panel` lists for evaluation on the world's data; ALFWorld:
    valid_seen-140, valid_unseen-134 where its games are; or gen_valid-100)."""
    limit: int | None = None
    """Play only so many tasks of each panel, spread evenly over it."""


# ---- figures ---------------------------------------------------------------------------------------------------------


def wilson(won: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. Source: Wilson (1927)."""
    if n == 0:
        return 0.0, 1.0
    share, width = won / n, z * z / n
    middle = (share + width / 2) / (1 + width)
    half = z * math.sqrt(share * (1 - share) / n + width / (4 * n)) / (1 + width)
    return middle - half, middle + half


def success_by_type(trajectories: list[Trajectory]) -> dict[str, dict[str, int]]:
    """{"Pick": {"success": 3, "n": 5}, ...} over ALFWorld's six task types; other worlds have none."""
    if any(trajectory.env != "alfworld" for trajectory in trajectories):
        return {}
    by_type = {name: {"success": 0, "n": 0} for name in SHORT.values()}
    for trajectory in trajectories:
        counts = by_type[SHORT[task_type(trajectory.task_id)]]
        counts["success"] += trajectory.success
        counts["n"] += 1
    return by_type


def score(trajectories: list[Trajectory]) -> dict[str, Any]:
    """Success with n and interval, by type, mean reward, progress and turns, invalid actions, ends. Faults are counted,
    never scored."""
    rows = [t for t in trajectories if t.end not in FAULTS]
    won = sum(t.success for t in rows)
    turns = [turn for t in rows for turn in t.turns]
    return {
        "success": won, "n": len(rows), "rate": round(won / max(1, len(rows)), 4),
        "wilson95": [round(x, 4) for x in wilson(won, len(rows))], "types": success_by_type(rows),
        "reward": round(sum(t.reward for t in rows) / max(1, len(rows)), 4),
        "progress": round(sum(t.progress for t in rows) / max(1, len(rows)), 4),
        "mean_turns": round(len(turns) / max(1, len(rows)), 2),
        "invalid_action_rate": round(sum(not t.valid for t in turns) / max(1, len(turns)), 4),
        "ends": dict(Counter(t.end for t in trajectories)),
        "won_tasks": sorted(t.task_id for t in rows if t.success),
    }  # fmt: skip


def table(run: Path) -> str:
    """One line per panel and evaluated round, best-of-rounds beside it."""
    header = f"{'panel':<22}{'round':>6}{'success':>14}{'95 % interval':>16}{'reward':>8}"
    header += "".join(f"{s:>9}" for s in SHORT.values())
    lines = [header + f"{'best of rounds':>16}{'turns':>7}{'invalid':>9}  ends"]
    places = [("base", run / "base")] + [(str(k), round_directory(run, k)) for k in range(current_round(run))]
    scores = {name: read_json(p / "evaluate/scores.json") for name, p in places if (p / "evaluate/done.json").exists()}
    for panel in sorted({panel for s in scores.values() for panel in s}):
        solved: set[str] = set()
        rounds = 0
        for name, by_panel in scores.items():
            if panel not in by_panel:
                continue
            s = by_panel[panel]
            best = "-"
            if name != "base":
                solved |= set(s["won_tasks"])
                rounds += 1
                best = f"{100 * len(solved) / s['n']:.1f} (k={rounds})"
            low, high = s["wilson95"]
            shares = (s["types"].get(name, {"n": 0}) for name in SHORT.values())
            types = "".join(f"{100 * t['success'] / t['n'] if t['n'] else math.nan:>9.0f}" for t in shares)
            ends = " ".join(f"{end}:{count}" for end, count in sorted(s["ends"].items()))
            lines.append(
                f"{panel:<22}{name:>6}{100 * s['rate']:>7.1f} {s['success']:>3}/{s['n']:<3}"
                f"{100 * low:>8.1f}-{100 * high:<7.1f}{100 * s['reward']:>8.1f}{types}{best:>16}{s['mean_turns']:>7.1f}"
                f"{100 * s['invalid_action_rate']:>8.1f}%  {ends}"
            )
    return "\n".join(lines) + "\nbest of rounds: an oracle over the policies so far (best-of-k), not one policy's score"


# ---- playing ---------------------------------------------------------------------------------------------------------


def evaluate(args: Args, directory: Path, adapter: Path | None, number: int) -> None:
    """Plays all panels with one policy and writes scores.json; resumes like every stage."""
    panels = args.panels or default_panels("evaluate", args.env, args.data)
    tasks = {panel: pick_tasks(panel, args.limit) for panel in panels}
    world = world_of(args)()
    facts = {"panels": {p: h for p, (_, h) in tasks.items()}, "world": world.facts, "base": base_sha(args.model),
             "adapter": adapter_sha(adapter), **prompt_facts(args.prompt)}  # fmt: skip
    stage = Stage(directory, args, facts)
    if stage.finished:
        return
    for ids, _ in tasks.values():
        require_tasks(world, ids)
    policy = policy_of(args, args.server, directory / "replies.sqlite", adapter, args.prompt)
    path = directory / "trajectories.jsonl"
    with Writer(path) as writer:

        def on_done(trajectory: Trajectory) -> tuple[Job, ...]:
            writer.write(trajectory)
            return ()

        jobs = [Job(task, 0) for ids, _ in tasks.values() for task in ids if (task, 0) not in writer.known]
        rates = play(jobs, settings_of(args, "evaluate", number), world_of(args), policy, None, on_done,
                     total=len(jobs))  # fmt: skip
    trajectories = {t.task_id: t for t in sort_file(path)}
    scores = {panel: score([trajectories[i] for i in ids]) | {"world": world.facts}
              for panel, (ids, _) in tasks.items()}  # fmt: skip
    write_json(directory / "scores.json", scores)
    summary = {p: {k: s[k] for k in ("success", "n", "rate", "wilson95")} for p, s in scores.items()}
    stage.finish(summary | {"rates": rates})
    if note := fault_note(trajectories.values(), directory):
        print(f"{path}:{note}")


def main(args: Args) -> None:
    if args.base:
        evaluate(args, args.run / "base" / "evaluate", None, 0)
    else:
        trained = current_round(args.run)
        if args.round is not None and args.round >= trained:
            raise StageError(f"round {args.round} of {args.run} is not trained ({trained} rounds are); "
                             f"run: python train_pg.py --run {args.run} --round {args.round}")  # fmt: skip
        for number in range(trained) if args.round is None else [args.round]:
            directory = round_directory(args.run, number) / "evaluate"
            if args.round is not None or not (directory / "done.json").exists():
                evaluate(args, directory, adapter_of_round(args.run, number + 1), number)
    print(table(args.run))


if __name__ == "__main__":
    run_main(main, tyro.cli(Args, description=__doc__))

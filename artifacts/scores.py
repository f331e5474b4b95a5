"""Scores of played trajectories, and the tables that evaluate.py prints.

`score` makes one entry of a scores.json: success with its interval, reward, progress, by type, best of several trials.
The tables read only scores.json files: those of the base, of a given adapter and of every round of a run.
Left out: playing (evaluate.py).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from artifacts.json_io import read_json
from artifacts.stage import compared, current_round, round_directory, shown
from artifacts.trajectory import FAULTS, Trajectory
from envs.alfworld.index import TASK_TYPES, task_type
from envs.alfworld.world import other_grammar
from envs.wording import PERTURBATIONS

SHORT = dict(zip(TASK_TYPES, ("Pick", "Clean", "Heat", "Cool", "Examine", "PickTwo"), strict=True))
COLUMNS = 8  # types of task that the terminal's table has room for; the report has them all
WORDINGS = ("none", *PERTURBATIONS)
# Success in % after rounds 0 to 3, one trial (A3T, the tables on ALFWorld and WebShop).
PAPER = {
    "valid_seen-140": (80, 87, 91, 93),
    "valid_unseen-134": (86, 94, 96, 95),
    "webshop_test-500": (45.4, 49.0, 48.0, 49.0),
}
PEOPLE = "people on WebShop's official test (arXiv 2207.01206): average reward 75.5, success 50.0; experts 82.1, 59.6"


class BestOf(msgspec.Struct):
    """The best of several trials per task; see `best_of`."""

    trials: int
    success: int
    n: int
    rate: float
    wilson95: tuple[float, float]
    progress: float


class Score(msgspec.Struct):
    """One panel's entry of a scores.json; see `score`. Files of earlier versions have no progress and no content."""

    success: int
    n: int
    rate: float
    types: dict[str, dict[str, int]]
    wilson95: tuple[float, float]
    reward: float
    mean_turns: float
    invalid_action_rate: float
    ends: dict[str, int]
    won_tasks: list[str]
    progress: float = math.nan
    best_of: BestOf | None = None
    content: str = ""
    world: dict[str, Any] = {}


# ---- scores ----------------------------------------------------------------------------------------------------------


def wilson(won: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion. Source: Wilson (1927)."""
    if n == 0:
        return 0.0, 1.0
    share, width = won / n, z * z / n
    middle = (share + width / 2) / (1 + width)
    half = z * math.sqrt(share * (1 - share) / n + width / (4 * n)) / (1 + width)
    return max(0.0, middle - half), min(1.0, middle + half)


def type_of(trajectory: Trajectory) -> str:
    """The task's type: ALFWorld's, such as Heat, or that of an id <split>/<type>-<number>, such as barman of
    pddl_test/barman-001; else the world's name."""
    if trajectory.env == "alfworld":
        return SHORT[task_type(trajectory.task_id)]
    kind, _, number = trajectory.task_id.rpartition("/")[2].rpartition("-")
    typed = kind and number.isdecimal() and trajectory.env != "webshop"  # whose ids have a product and a hash
    return kind if typed else trajectory.env


def success_by_type(trajectories: Sequence[Trajectory]) -> dict[str, dict[str, int]]:
    """{"Pick": {"success": 3, "n": 5}, ...}: all six types of ALFWorld, and of other worlds those that were played;
    empty if the tasks have no types."""
    kinds = {type_of(trajectory) for trajectory in trajectories}
    if not kinds - {trajectory.env for trajectory in trajectories}:
        return {}
    whole = all(trajectory.env == "alfworld" for trajectory in trajectories)
    by_type = {kind: {"success": 0, "n": 0} for kind in (SHORT.values() if whole else sorted(kinds))}
    for trajectory in trajectories:
        counts = by_type[type_of(trajectory)]
        counts["success"] += trajectory.success
        counts["n"] += 1
    return by_type


def mean(numbers: Iterable[float]) -> float:
    """The mean, rounded to four decimals; 0 if empty."""
    numbers = list(numbers)
    return round(sum(numbers) / max(1, len(numbers)), 4)


def score(trajectories: Sequence[Trajectory], trials: int = 1) -> dict[str, Any]:
    """Means over single attempts, `trials` per task: success, its interval, reward, progress, turns, invalid actions;
    success by type; counts of ends; with several trials, `best_of`. Faults are counted but never scored.

    The interval is that of one attempt per task, since attempts at the same task are not independent.
    """
    rows = [t for t in trajectories if t.end not in FAULTS]
    by_task = defaultdict(list)
    for row in rows:
        by_task[row.task_id].append(row)
    rate, tasks = mean(t.success for t in rows), len(by_task)
    turns = [turn for t in rows for turn in t.turns]
    scores = {
        "success": sum(t.success for t in rows),
        "n": len(rows),
        "rate": rate,
        "wilson95": [round(x, 4) for x in wilson(rate * tasks, tasks)],
        "types": success_by_type(rows),
        "reward": mean(t.reward for t in rows),
        "progress": mean(t.progress for t in rows),
        "mean_turns": round(len(turns) / max(1, len(rows)), 2),
        "invalid_action_rate": mean(not turn.valid for turn in turns),
        "ends": dict(Counter(t.end for t in trajectories)),
        "won_tasks": sorted({t.task_id for t in rows if t.success}),
    }
    return scores if trials == 1 else scores | {"best_of": best_of(list(by_task.values()), trials)}


def best_of(tasks: Sequence[Sequence[Trajectory]], trials: int) -> dict[str, Any]:
    """Any success and the largest progress in `trials` attempts (AgentRefine, best of N). Leaves out tasks that lost a
    trial to a fault, which had fewer chances."""
    complete = [rows for rows in tasks if len(rows) == trials]
    won = sum(any(t.success for t in rows) for rows in complete)
    return {
        "trials": trials,
        "success": won,
        "n": len(complete),
        "rate": round(won / max(1, len(complete)), 4),
        "wilson95": [round(x, 4) for x in wilson(won, len(complete))],
        "progress": mean(max(t.progress for t in rows) for rows in complete),
    }


def closing_notes(trajectories: Iterable[Trajectory], directory: Path, grammar: str | None) -> str:
    """A stage's closing notes: rows that ended in a fault, and (ALFWorld, of that grammar) commands of the other one.
    Empty if there are none."""
    trajectories = list(trajectories)
    ends = Counter(t.end for t in trajectories if t.end in FAULTS)
    named = ", ".join(f"{end}: {count}" for end, count in sorted(ends.items()))
    notes = [f"not the agent's failures: {named}; to play them again, remove {directory}/done.json"] if ends else []
    if grammar and all(t.env == "alfworld" for t in trajectories):
        refused = (turn.action for t in trajectories for turn in t.turns if not turn.valid)
        notes += filter(None, [other_grammar(refused, grammar)[1]])
    return "".join(f"\n  {note}" for note in notes)


# ---- files -----------------------------------------------------------------------------------------------------------


def directory_name(env: str, perturb: str, trials: int, name: str = "") -> str:
    """The folder of an evaluation: evaluate (unchanged ALFWorld), evaluate_P1, evaluate_babyai_best_of_10_NAME, ..."""
    parts = [env] * (env != "alfworld") + [perturb] * (perturb != "none") + [f"best_of_{trials}"] * (trials > 1)
    return "_".join(["evaluate", *parts, *[name] * bool(name)])


def subjects(run: Path) -> dict[str, Path]:
    """The folders of all subjects that a run may score: the base, a given adapter, and every trained round."""
    found = {"base": run / "base", "adapter": run / "adapter"}
    return found | {str(index): round_directory(run, index) for index in range(current_round(run))}


def evaluations(run: Path) -> list[str]:
    """The names of a run's finished evaluations: evaluate, evaluate_P1, ..."""
    return sorted(
        {done.parent.name for folder in subjects(run).values() for done in folder.glob("evaluate*/done.json")}
    )


def read_scores(run: Path, name: str) -> dict[str, dict[str, Any]]:
    """{subject: {panel: score}} of the finished evaluations called `name`; progress is NaN where it was not scored."""
    found = {}
    for subject, folder in subjects(run).items():
        if (folder / name / "done.json").exists():
            scores = read_json(folder / name / "scores.json", dict[str, Score])
            found[subject] = {panel: msgspec.to_builtins(s) for panel, s in scores.items()}
    return found


def settings_of(run: Path, name: str, subject: str) -> dict[str, Any]:
    """What decided an evaluation's result, without what may differ in one table: the adapter and a server's model."""
    config = read_json(subjects(run)[subject] / name / "config.json", dict[str, Any])
    return {key: value for key, value in compared(config).items() if key not in ("facts.adapter", "args.server.model")}


def difference_of(these: dict[str, Any], others: dict[str, Any], word: str) -> str:
    """The settings that differ, each with both values, the second after `word`."""
    return "; ".join(
        f"{key} {shown(these.get(key))} ({word} {shown(others.get(key))})"
        for key in sorted({*these, *others})
        if these.get(key) != others.get(key)
    )


def settings_notes(run: Path, name: str, chosen: Iterable[str]) -> dict[str, str]:
    """{subject: what differs} for the subjects whose evaluation `name` had other settings than the last one's."""
    settings = {subject: settings_of(run, name, subject) for subject in chosen}
    last = next(reversed(settings.values()), {})
    notes = {subject: difference_of(these, last, "else") for subject, these in settings.items()}
    return {subject: note for subject, note in notes.items() if note}


# ---- tables ----------------------------------------------------------------------------------------------------------


def tasks_played(score: dict[str, Any]) -> int:
    """How many tasks an evaluation played, those lost to faults included."""
    trials = score["best_of"]["trials"] if score["best_of"] else 1
    return sum(score["ends"].values()) // trials


def best_of_rounds(by_subject: dict[str, dict[str, Any]], panel: str) -> dict[str, tuple[float, int]]:
    """{round: (share of the panel's tasks that any round up to it solved, how many rounds these are)}. A task that was
    lost to faults counts as not solved then."""
    solved: set[str] = set()
    found = {}
    for subject, by_panel in by_subject.items():
        if subject.isdecimal() and panel in by_panel:
            solved |= set(by_panel[panel]["won_tasks"])
            found[subject] = len(solved) / max(1, tasks_played(by_panel[panel])), len(found) + 1
    return found


def table(run: Path, name: str) -> str:
    """One line per panel and subject, with the best of rounds and, with several trials, the best of trials."""
    scores = read_scores(run, name)
    notes = settings_notes(run, name, scores)
    entries = [s for by_panel in scores.values() for s in by_panel.values()]
    types = list(dict.fromkeys(kind for s in entries for kind in s["types"]))
    types = types if len(types) <= COLUMNS else []
    trials = max((s["best_of"]["trials"] for s in entries if s["best_of"]), default=1)
    header = f"{'panel':<24}{'round':>8}{'success':>16}{'95 % interval':>16}{'reward':>8}{'progress':>10}"
    header += "".join(f"{kind[:8]:>9}" for kind in types) + f"{'best of rounds':>16}"
    header += f"{f'best of {trials}':>12}{'progress':>10}" if trials > 1 else ""
    lines = [f"{header}{'turns':>7}{'invalid':>9}  ends"]
    for panel in sorted({panel for by_panel in scores.values() for panel in by_panel}):
        rounds = best_of_rounds(scores, panel)
        for subject, by_panel in scores.items():
            if (s := by_panel.get(panel)) is None:
                continue
            best = s["best_of"] or s
            of_rounds = f"{100 * rounds[subject][0]:.1f} (k={rounds[subject][1]})" if subject in rounds else "-"
            low, high = s["wilson95"]
            shares = (s["types"].get(kind, {"n": 0}) for kind in types)
            lines.append(
                f"{panel:<24}{subject + '*' * (subject in notes):>8}"
                f"{100 * s['rate']:>7.1f} {s['success']:>4}/{s['n']:<4}"
                f"{100 * low:>8.1f}-{100 * high:<7.1f}{100 * s['reward']:>8.1f}"
                f"{100 * s['progress']:>10.1f}"
                + "".join(f"{100 * t['success'] / t['n'] if t['n'] else math.nan:>9.0f}" for t in shares)
                + f"{of_rounds:>16}"
                + (f"{100 * best['rate']:>12.1f}{100 * best['progress']:>10.1f}" if trials > 1 else "")
                + f"{s['mean_turns']:>7.1f}{100 * s['invalid_action_rate']:>8.1f}%  "
                + " ".join(f"{end}:{count}" for end, count in sorted(s["ends"].items()))
            )
    lines += [f"* round {subject} was played with other settings: {note}" for subject, note in notes.items()]
    lines += ["best of rounds: an oracle over the policies so far (best-of-k), not one policy's score"]
    lines += [f"best of {trials}: any success, most progress in {trials} attempts"] if trials > 1 else []
    return "\n".join(lines + ([PEOPLE] if name.startswith("evaluate_webshop") else []))


def perturbations(run: Path, env: str, trials: int, name: str = "") -> dict[str, dict[str, dict[str, Any]]]:
    """{subject: {panel: {"success": {"none": %, "P1": %, ..., "mean", "std"}, "progress": ...}}} where all six wordings
    were played: mean and population standard deviation over them, as in AgentRefine's table."""
    by_wording = {wording: read_scores(run, directory_name(env, wording, trials, name)) for wording in WORDINGS}
    found = {}
    for subject in subjects(run):
        if all(subject in scores for scores in by_wording.values()):
            panels = set.intersection(*(set(scores[subject]) for scores in by_wording.values()))
            found[subject] = {panel: {} for panel in sorted(panels)}
            for panel, measure in itertools.product(found[subject], ("success", "progress")):
                key = "rate" if measure == "success" else measure
                percents = {wording: 100 * scores[subject][panel][key] for wording, scores in by_wording.items()}
                spread = {"mean": statistics.mean(percents.values()), "std": statistics.pstdev(percents.values())}
                found[subject][panel][measure] = {column: round(x, 2) for column, x in (percents | spread).items()}
    return found


def perturbation_table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table of `perturbations`: a line for success and one for progress per panel and subject."""
    columns = ("original", *PERTURBATIONS, "mean", "std")
    lines = [f"{'panel':<24}{'round':>8}{'in %':>10}" + "".join(f"{column:>9}" for column in columns)]
    for subject, panels in found.items():
        for panel, measures in panels.items():
            for measure, numbers in measures.items():
                values = "".join(f"{number:>9.1f}" for number in list(numbers.values())[:-1])
                lines.append(f"{panel:<24}{subject:>8}{measure:>10}{values}{numbers['std']:>9.2f}")
    return "\n".join([*lines, "mean and population standard deviation are over the six wordings (envs/wording.py)"])

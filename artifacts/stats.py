"""What a run's trajectories are: counts, lengths, repeats, refused actions, leakage, and how evaluations were lost.

    python -m artifacts.stats runs/a3t          # every trajectories.jsonl below the folder

Four tables. Reads one trajectory at a time; a line that a stage is still writing is left out.
Left out: scores with their intervals (evaluate.py), the diversity of thoughts (agentrefine/diversity.py).
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from artifacts.cli import run_main
from artifacts.scores import type_of
from artifacts.trajectory import FAULTS, Trajectory, read_trajectories, trajectory_files
from envs.panel import NAMES, read_panel

PATTERNS = 8  # of refused actions, in the table
WIDTH = 150  # of the lines that are wrapped


@dataclass(frozen=True, kw_only=True)
class Args:
    run: tyro.conf.Positional[Path] = Path("runs/a3t")
    """Directory of the run, or of one stage."""


@dataclass
class Group:
    """Counts over some trajectories: a file's, or its lost attempts at one type of task."""

    n: int = 0
    won: int = 0
    progress: float = 0.0
    sources: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)  # number of turns -> trajectories
    tokens: Counter[int] = field(default_factory=Counter)  # number of ids, where there are any -> trajectories
    refused: Counter[str] = field(default_factory=Counter)  # pattern -> turns
    attempts_refused: int = 0  # with a refused action
    attempts_insisting: int = 0  # with the same refused action twice or more

    def add(self, trajectory: Trajectory) -> None:
        refused = Counter(turn.action for turn in trajectory.turns if not turn.valid)
        self.n += 1
        self.won += trajectory.success
        self.progress += trajectory.progress
        self.sources[trajectory.source] += 1
        self.ends[trajectory.end] += 1
        self.turns[len(trajectory.turns)] += 1
        if trajectory.ids:
            self.tokens[len(trajectory.ids)] += 1
        for action, count in refused.items():
            self.refused[pattern(action)] += count
        self.attempts_refused += bool(refused)
        self.attempts_insisting += any(count > 1 for count in refused.values())

    @property
    def scored(self) -> int:
        """Attempts that count: faults are nobody's failure."""
        return self.n - sum(self.ends[fault] for fault in FAULTS)

    @property
    def share_refused(self) -> float:
        """Refused turns / all turns; NaN if there are none."""
        turns = sum(length * count for length, count in self.turns.items())
        return self.refused.total() / turns if turns else math.nan


@dataclass
class File:
    """The counts of one trajectories.jsonl."""

    path: Path
    name: str  # its folder, below the run
    whole: Group = field(default_factory=Group)
    types: dict[str, Group] = field(default_factory=dict)
    lost: dict[str, Group] = field(default_factory=dict)  # by type; without faults, which are nobody's failure
    repeats: int = 0  # the task and actions of an earlier row, of an evaluation or of the training data so far
    leaks: Counter[str] = field(default_factory=Counter)  # the panel or evaluation that has the task -> trajectories
    alike: Counter[str] = field(default_factory=Counter)  # the evaluation that has another task with its opening


# ---- counting --------------------------------------------------------------------------------------------------------


def is_evaluation(path: Path) -> bool:
    return path.parent.name.startswith("evaluate")


def pattern(action: str) -> str:
    """An action without what changes from task to task: "take mug 1 from shelf 2" -> "take _ from _", "click[red]" ->
    "click[_]"; at most 40 characters, all of them printable."""
    line = "".join(character if character.isprintable() else "?" for character in " ".join(action.split()))
    short = re.sub(r"\[.*\]", "[_]", re.sub(r"\S+ [0-9]+", "_", line))
    return short if len(short) <= 40 else short[:37] + "..."


def evaluation_tasks() -> dict[str, str]:
    """{task id: panel} of every panel that is not for training."""
    return {task_id: name for name in NAMES if "train" not in name for task_id in read_panel(name)}


def count(run: Path) -> list[File]:
    """The counts of every file below `run`, evaluations first: training data is compared with their tasks. Raises
    ValueError, with file:line, for a line that is no trajectory."""
    elsewhere, openings, trained = evaluation_tasks(), {}, set()
    paths, files = trajectory_files(run), []
    rounds = list(dict.fromkeys(path.parent.parent for path in paths))

    def when(path: Path) -> tuple[bool, int, bool]:
        return not is_evaluation(path), rounds.index(path.parent.parent), not path.parent.name.startswith("rollout")

    for path in sorted(paths, key=when):
        found, played = File(path, name_of(path, run)), set()
        for trajectory in read_trajectories(path, partial=True):
            kind = type_of(trajectory)
            opening = hash((trajectory.first_observation, trajectory.task))
            actions = hash((trajectory.task_id, *(turn.action for turn in trajectory.turns)))
            known = played if is_evaluation(path) else trained
            found.repeats += actions in known
            known.add(actions)
            found.whole.add(trajectory)
            found.types.setdefault(kind, Group()).add(trajectory)
            if not is_evaluation(path):
                if trajectory.task_id in elsewhere:
                    found.leaks[elsewhere[trajectory.task_id]] += 1
                elif opening in openings:
                    found.alike[openings[opening]] += 1
            else:
                elsewhere.setdefault(trajectory.task_id, found.name)
                openings.setdefault(opening, found.name)
                if not trajectory.success and trajectory.end not in FAULTS:
                    found.lost.setdefault(kind, Group()).add(trajectory)
        files.append(found)
    return sorted(files, key=lambda found: paths.index(found.path))


def name_of(path: Path, run: Path) -> str:
    """The stage directory of a file, below the run."""
    return str(path.parent.relative_to(run)) if path.parent != run else run.resolve().name


def spread(lengths: Counter[int]) -> str:
    """Minimum, median, 95 % and maximum, by nearest rank; dashes if there are none."""
    if not lengths:
        return "".join(f"{'-':>6}" for _ in range(4))
    ranked, total, below, found = sorted(lengths.items()), lengths.total(), 0, []
    wanted = [max(1, math.ceil(share * total)) for share in (0, 0.5, 0.95, 1)]
    for length, frequency in ranked:
        below += frequency
        while wanted and wanted[0] <= below:
            wanted.pop(0)
            found.append(length)
    return "".join(f"{length:>6}" for length in found)


# ---- tables ----------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.most_common())


def wrapped(head: str, entries: Sequence[str]) -> str:
    """Lines of WIDTH, `head` before the first; no entry is broken."""
    how = {"initial_indent": head, "subsequent_indent": " " * len(head)}
    text = "  ".join(entry.replace(" ", "\0") for entry in entries or ["-"])
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False, **how).replace("\0", " ")


def overview(files: Sequence[File], wide: int) -> Iterator[str]:
    """One line per file."""
    lengths = f"{'turns: min':>12}{'med':>6}{'95 %':>6}{'max':>6}{'tokens: min':>13}{'med':>6}{'95 %':>6}{'max':>6}"
    yield f"{'file':<{wide}}{'n':>7}{'won':>7}{'%':>7}{lengths}{'refused %':>11}{'repeats':>9}  source; ends"
    for found in files:
        whole = found.whole
        share = percent(whole.won / whole.scored if whole.scored else math.nan)
        numbers = f"{spread(whole.turns):>30}{spread(whole.tokens):>31}{percent(whole.share_refused):>11}"
        sources = f"{listed(whole.sources)}; {listed(whole.ends)}" if whole.n else "empty"
        yield f"{found.name:<{wide}}{whole.n:>7}{whole.won:>7}{share:>7}{numbers}{found.repeats:>9}  {sources}"


def by_type(files: Sequence[File], wide: int) -> Iterator[str]:
    yield "won of all that count, by type of task"
    for found in files:
        entries = [f"{kind} {group.won}/{group.scored}" for kind, group in sorted(found.types.items())]
        yield wrapped(f"{found.name:<{wide}}", entries)


def refusals(files: Sequence[File], wide: int) -> Iterator[str]:
    yield "refused actions, the most frequent, in % of them"
    for found in files:
        total = found.whole.refused.total()
        entries = [
            f"{name or '(empty)'} {percent(number / total)}"
            for name, number in found.whole.refused.most_common(PATTERNS)
        ]
        yield wrapped(f"{found.name:<{wide}}", entries)


def leakage(files: Sequence[File]) -> Iterator[str]:
    for found in files:
        for where, number in found.leaks.most_common():
            yield f"LEAK: {number} of {found.whole.n} trajectories of {found.name} play tasks of {where}"
        for where, number in found.alike.most_common():
            yield f"alike: {number} of {found.whole.n} trajectories of {found.name} open like other tasks of {where}"
    if not any(found.leaks for found in files):
        yield "no training trajectory plays a task of an evaluation panel, or one that was evaluated here"


def failures(files: Sequence[File], wide: int) -> Iterator[str]:
    """How evaluations were lost: a line per file, then per type of task."""
    lost = [found for found in files if found.lost]
    if lost:
        yield (
            f"{'attempts lost':<{wide}}{'type':<24}{'lost':>7}{'of':>7}{'progress %':>12}{'turns: med':>12}"
            f"{'refused %':>11}{'any refused':>13}{'same twice':>12}  ends"
        )
    for found in lost:
        for kind, group in [("all", merged(found.lost.values())), *sorted(found.lost.items())]:
            of = (found.whole if kind == "all" else found.types[kind]).scored
            yield (
                f"{found.name if kind == 'all' else '':<{wide}}{kind:<24}{group.n:>7}{of:>7}"
                f"{percent(group.progress / group.n):>12}{spread(group.turns)[6:12]:>12}"
                f"{percent(group.share_refused):>11}{group.attempts_refused:>13}{group.attempts_insisting:>12}"
                f"  {listed(group.ends)}"
            )


def merged(groups: Iterable[Group]) -> Group:
    """The sum of groups."""
    total = Group()
    for group in groups:
        for name, value in vars(group).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def report(files: Sequence[File]) -> str:
    """The tables, with notes on their columns."""
    wide = max(len(found.name) for found in files) + 2
    sections = [
        [*overview(files, wide)],
        [*by_type(files, wide)],
        [*refusals(files, wide)],
        [*leakage(files)],
        [*failures(files, wide)],
        [
            "%: won, of the attempts that were not lost to faults (env_error, llm_error, timeout)",
            "repeats: task and actions as in an earlier row, of the same evaluation or of all training data so far",
            "refused %: turns whose action the world did not accept, of all turns; _ is an object or an option",
            "same twice: lost attempts that took the same refused action again",
        ],
    ]
    return "\n\n".join("\n".join(section) for section in sections if section)


def main(args: Args) -> None:
    if not args.run.is_dir():
        raise ValueError(f"no such run: {args.run}")
    files = count(args.run)
    if not files:
        raise ValueError(f"{args.run} holds no trajectories.jsonl; expected the directory of a run or of a stage")
    print(report(files))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

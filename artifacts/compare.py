"""Compares runs, and the rounds of a run, on the same tasks: paired differences of success, and settings that differ.

    python -m artifacts.report --run runs/a3t runs/resampling      # prints the tables and writes one page with both

A difference is paired: both sides played the same tasks, so only the tasks that exactly one of them solved count.
Scores are of the same tasks if their `content` is the same: the hash of every task's text. Others are named, and not
compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from artifacts.json_io import read_json
from artifacts.scores import difference_of, evaluations, read_scores, settings_of, wilson
from artifacts.stage import compared, shown
from artifacts.trajectory import FAULTS

# Facts that follow from earlier stages: they differ between any two runs.
FOLLOWING = {"facts.adapter", "facts.previous", "facts.inputs", "facts.rollout", "facts.actre_adapter"}


class Paired(NamedTuple):
    """Two sides on the same n tasks: solved by both, by one alone, the difference of the shares (second minus first),
    its 95 % interval, and the p value of McNemar's exact test."""

    n: int
    both: int
    first_only: int
    second_only: int
    difference: float
    interval: tuple[float, float]
    p: float


def paired(first: set[str], second: set[str], n: int) -> Paired:
    """Compares the sets of solved tasks, out of the same n. Source of the interval: Newcombe (1998), method 10; of the
    test: McNemar (1947), exact, two-sided."""
    both, one, other = len(first & second), len(first - second), len(second - first)
    neither = n - both - one - other
    share_1, share_2 = (both + one) / n, (both + other) / n
    (low_1, high_1), (low_2, high_2) = wilson(both + one, n), wilson(both + other, n)
    margins = (both + one) * (other + neither) * (both + other) * (one + neither)
    product = both * neither - one * other
    corrected = max(0.0, product - n / 2) if product > 0 else product
    correlation = corrected / math.sqrt(margins) if margins else 0.0

    def width(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    difference = share_2 - share_1
    interval = (
        max(-1.0, difference - width(high_1 - share_1, share_2 - low_2)),
        min(1.0, difference + width(share_1 - low_1, high_2 - share_2)),
    )
    tail = sum(math.comb(one + other, k) for k in range(min(one, other) + 1)) / 2 ** (one + other)
    return Paired(
        n=n,
        both=both,
        first_only=one,
        second_only=other,
        difference=difference,
        interval=interval,
        p=min(1.0, 2 * tail),
    )


class Difference(NamedTuple):
    """Two entries of scores.json for one panel: of two runs, or of two rounds of a run; `subject` says which rounds.
    The shares are of single attempts, or of tasks solved in any of several trials. `paired` is None where the two
    cannot be compared; `why` says it then. `note` names settings that differ."""

    evaluation: str
    panel: str
    subject: str
    first: float
    second: float
    paired: Paired | None
    why: str
    note: str


def obstacle(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Why two entries of scores.json cannot be compared; empty if they can."""
    trials = [(entry["best_of"] or {"trials": 1})["trials"] for entry in (first, second)]
    obstacles = {
        "other tasks or data": not first["content"] or first["content"] != second["content"],
        "another world": first["world"] != second["world"],
        "another number of trials": trials[0] != trials[1],
        "attempts lost to faults": any(end in FAULTS for entry in (first, second) for end in entry["ends"]),
    }
    return next((why for why, holds in obstacles.items() if holds), "")


class Side(NamedTuple):
    """One side of a comparison: a run, and which of its policies."""

    run: Path
    subject: str


def compare_sides(name: str, first: Side, second: Side, subject: str, word: str) -> Iterator[Difference]:
    """The panels that both sides have scored in the evaluation `name`; `word` stands before the first's settings."""
    then, now = (read_scores(side.run, name)[side.subject] for side in (first, second))
    settings = [settings_of(side.run, name, side.subject) for side in (first, second)]
    for panel in (panel for panel in then if panel in now):
        one, other = then[panel], now[panel]
        why = obstacle(one, other)
        shares = [entry["best_of"] or entry for entry in (one, other)]
        yield Difference(
            evaluation=name,
            panel=panel,
            subject=subject,
            first=shares[0]["rate"],
            second=shares[1]["rate"],
            paired=None if why else paired(set(one["won_tasks"]), set(other["won_tasks"]), shares[0]["n"]),
            why=why,
            note=difference_of(settings[1], settings[0], word),
        )


def last_round(scores: dict[str, Any]) -> str:
    """The last round that was scored; empty if none was."""
    return max(filter(str.isdecimal, scores), key=int, default="")


def differences(first: Path, second: Path) -> Iterator[Difference]:
    """All panels that both runs have scored after the same round, and after the last round of each if it is another."""
    for name in evaluations(first):
        then, now = read_scores(first, name), read_scores(second, name)
        pairs = [(subject, subject) for subject in then if subject in now]
        last = last_round(then), last_round(now)
        for one, other in pairs + [last] * (all(last) and last not in pairs):
            subject = one if one == other else f"{one} → {other}"
            yield from compare_sides(name, Side(first, one), Side(second, other), subject, "first")


def steps(run: Path, name: str) -> Iterator[Difference]:
    """Each round of a run against the one before, the first against the base, and the last against the first."""
    scored = [subject for subject in read_scores(run, name) if subject != "adapter"]
    pairs = list(itertools.pairwise(scored))
    rounds = [subject for subject in scored if subject.isdecimal()]
    if len(rounds) > 2:
        pairs.append((rounds[0], rounds[-1]))
    for one, other in pairs:
        yield from compare_sides(name, Side(run, one), Side(run, other), f"{one} → {other}", "before")


def settings(run: Path) -> dict[str, Any]:
    """What decided a run's results, by stage and name, without what follows from earlier stages. A setting that is not
    the same in all rounds has {folder: value}."""
    found: dict[str, dict[str, Any]] = {}
    rounds = sorted(run.glob("*/*/config.json"), key=lambda path: (len(path.parts[-3]), path))  # round 10 after round 9
    for config in rounds:
        stage, folder = config.parent.name, config.parent.parent.name
        found.setdefault(stage, {})[folder] = True
        for name, value in compared(read_json(config, dict[str, Any])).items():
            if name not in FOLLOWING:
                found.setdefault(f"{stage}: {name.partition('.')[2]}", {})[folder] = value
    return {name: same(values) for name, values in found.items()}


def same(values: dict[str, Any]) -> Any:
    """The value of all keys, or, where they differ, the values by key."""
    first, *others = values.values()
    return first if all(other == first for other in others) else values


def differing(runs: Sequence[Path]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) for those that differ; a stage that not every run has is one row."""
    by_run = [settings(run) for run in runs]
    rows = []
    for name in sorted({name for found in by_run for name in found}):
        stage, _, setting = name.partition(":")
        everywhere = all(stage in found for found in by_run)
        values = [shown(found[name]) if name in found else "-" for found in by_run]
        if setting and everywhere and len(set(values)) > 1:
            rows.append((name, values))
        elif not setting and not everywhere:
            rows.append((name, ["there" if name in found else "-" for found in by_run]))
    return rows


# ---- the terminal ----------------------------------------------------------------------------------------------------


def points(found: Difference) -> str:
    """The difference in percentage points with its interval, or why there is none."""
    if found.paired is None:
        return f"not compared: {found.why}"
    low, high = (100 * x for x in found.paired.interval)
    return f"{100 * found.paired.difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def comparison_table(runs: Sequence[Path]) -> str:
    """The first run against each other one."""
    lines = []
    for other in runs[1:]:
        lines.append(f"{other} minus {runs[0]}, in percentage points, over the same tasks")
        lines.append(
            f"{'evaluation':<20}{'panel':<24}{'round':>8}{'first':>8}{'second':>8}   {'difference, 95 %':<24}"
            f"{'only first':>11}{'only second':>12}{'n':>6}{'p':>8}"
        )
        rows = list(differences(runs[0], other))
        for row in rows:
            counts, subject = "", row.subject + "*" * bool(row.note)
            if row.paired is not None:
                counts = f"{row.paired.first_only:>11}{row.paired.second_only:>12}{row.paired.n:>6}{row.paired.p:>8.3f}"
            lines.append(
                f"{row.evaluation:<20}{row.panel:<24}{subject:>8}{100 * row.first:>8.1f}{100 * row.second:>8.1f}   "
                f"{points(row):<24}{counts}"
            )
        lines += [f"  * played with other settings: {note}" for note in dict.fromkeys(r.note for r in rows if r.note)]
        lines += [] if rows else ["  they share no evaluation: none has the same name and panel"]
    lines.append(
        "intervals: Newcombe's, of paired shares; p: McNemar's exact test; neither is corrected for their number"
    )
    lines.append("settings that differ:")
    lines += [f"  {name}: {' | '.join(values)}" for name, values in differing(runs)] or ["  none"]
    return "\n".join(lines)

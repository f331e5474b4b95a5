"""Compares runs on the same tasks: paired differences of success, and the settings that differ.

    python -m artifacts.report --run runs/a3t runs/resampling      # prints the tables and writes one page with both

A difference is paired: both runs played the same tasks, so that only those count which one solved and the other did
not. Scores are of the same tasks if their `content` is the same: the hash of every task's text. Others are named, and
not compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from artifacts.json_io import read_json
from artifacts.scores import difference_of, evaluations, read_scores, settings_of, wilson
from artifacts.stage import compared, shown


class Paired(NamedTuple):
    """Two runs on the same n tasks: solved by both, by one alone, the difference of the shares (second less first), its
    95 % interval, and the p value of McNemar's exact test."""

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
    """One evaluation of two runs on one panel. `paired` is None where they cannot be compared; `why` says it then.
    `note` names settings that differ."""

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
        "attempts lost to faults": first["n"] != second["n"],
    }
    return next((why for why, holds in obstacles.items() if holds), "")


def differences(first: Path, second: Path) -> Iterator[Difference]:
    """All panels and subjects that both runs have scored."""
    for name in evaluations(first):
        then, now = read_scores(first, name), read_scores(second, name)
        for subject in (subject for subject in then if subject in now):
            note = difference_of(settings_of(second, name, subject), settings_of(first, name, subject), "first")
            for panel in (panel for panel in then[subject] if panel in now[subject]):
                one, other = then[subject][panel], now[subject][panel]
                why, n = obstacle(one, other), (one["best_of"] or one)["n"]
                yield Difference(
                    evaluation=name,
                    panel=panel,
                    subject=subject,
                    first=one["rate"],
                    second=other["rate"],
                    paired=None if why or not n else paired(set(one["won_tasks"]), set(other["won_tasks"]), n),
                    why=why or "no attempt counts",
                    note=note,
                )


def settings(run: Path) -> dict[str, Any]:
    """What decided a run's results, by name: settings of each kind of stage, of its last round, and what it is."""
    found: dict[str, Any] = {}
    for config in sorted(run.glob("*/*/config.json"), key=lambda path: (len(path.parts[-3]), path)):
        record = compared(read_json(config, dict[str, Any]))
        found |= {f"{config.parent.name}: {name.partition('.')[2]}": value for name, value in record.items()}
    return found


def differing(runs: Sequence[Path]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) for those that differ; a dash where a run has no such stage or setting."""
    by_run = [settings(run) for run in runs]
    stages = [{name.partition(":")[0] for name in found} for found in by_run]
    common = set.intersection(*stages)
    rows = []
    for name in sorted({name for found in by_run for name in found}):
        if name.partition(":")[0] in common:
            values = [shown(found[name]) if name in found else "-" for found in by_run]
            if len(set(values)) > 1:
                rows.append((name, values))
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
        lines.append(f"{other} less {runs[0]}, in percentage points, over the same tasks")
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
        lines += [] if rows else ["  they share no evaluation: none has the same name, panel and round"]
    lines.append(
        "intervals: Newcombe's, of paired shares; p: McNemar's exact test; neither is corrected for their number"
    )
    lines.append("settings that differ:")
    lines += [f"  {name}: {' | '.join(values)}" for name, values in differing(runs)] or ["  none"]
    return "\n".join(lines)

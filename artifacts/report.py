"""A run's report: one HTML file with every score, its interval, and sample trajectories. evaluate.py writes it.

    python -m artifacts.report --run runs/a3t          # rewrite it from the run's files

The file is self-contained; only its links to trajectories.jsonl need the run's directory.
Reads scores.json, trajectories.jsonl and evaluate_all*.json of finished evaluations; writes <run>/report.html.
Left out: training curves (train_pg/metrics.jsonl).
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from artifacts.atomic import atomic_write
from artifacts.cli import run_main
from artifacts.json_io import read_json
from artifacts.render import react_segments, text_of
from artifacts.scores import PEOPLE, perturbation_table, read_scores, settings_notes, subjects
from artifacts.trajectory import Trajectory, read_trajectories

Perturbations = dict[str, dict[str, dict[str, dict[str, float]]]]  # of evaluate*_all*.json

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, td:last-child { text-align: left; } pre { white-space: pre-wrap; background: #f6f6f6;
padding: .8em; font-size: 13px; } summary { cursor: pointer; } .note { color: #666; }"""


@dataclass(frozen=True, kw_only=True)
class Args:
    run: Path = Path("runs/a3t")
    """Directory of the run."""


def evaluations(run: Path) -> list[str]:
    """The names of a run's finished evaluations: evaluate, evaluate_P1, ..."""
    return sorted(
        {done.parent.name for folder in subjects(run).values() for done in folder.glob("evaluate*/done.json")}
    )


class Markup(str):
    """HTML of our own; any other text is escaped."""


def cells(values: Iterable[Any], tag: str = "td") -> str:
    """A table row; every value but Markup is escaped."""
    texts = (value if isinstance(value, Markup) else escape(str(value)) for value in values)
    return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"


def interval_bar(rate: float, low: float, high: float) -> Markup:
    """An SVG bar of a share and its interval, from 0 to 100 %."""
    return Markup(
        f'<svg width="120" height="12" role="img"><rect width="120" height="12" fill="#eee"/>'
        f'<rect x="{120 * low:.1f}" width="{120 * (high - low):.1f}" height="12" fill="#9bd"/>'
        f'<rect x="{120 * rate - 1:.1f}" width="2" height="12" fill="#036"/></svg>'
    )


def score_table(scores: dict[str, dict[str, Any]], notes: dict[str, str]) -> str:
    """An HTML table with one row per panel and subject; an asterisk marks the subjects in `notes`."""
    head = (
        "panel",
        "round",
        "success %",
        "",
        "95 % interval",
        "n",
        "reward",
        "progress",
        "best of trials",
        "turns",
        "invalid %",
        "ends",
    )
    rows = [cells(head, "th")]
    for panel in sorted({panel for by_panel in scores.values() for panel in by_panel}):
        for subject, s in ((subject, by_panel[panel]) for subject, by_panel in scores.items() if panel in by_panel):
            low, high = s["wilson95"]
            best = s["best_of"]
            rows.append(
                cells(
                    (
                        panel,
                        subject + "*" * (subject in notes),
                        f"{100 * s['rate']:.1f}",
                        interval_bar(s["rate"], low, high),
                        f"{100 * low:.1f} to {100 * high:.1f}",
                        s["n"],
                        f"{100 * s['reward']:.1f}",
                        f"{100 * s['progress']:.1f}",
                        f"{100 * best['rate']:.1f} (of {best['trials']})" if best else "-",
                        s["mean_turns"],
                        f"{100 * s['invalid_action_rate']:.1f}",
                        ", ".join(f"{end} {count}" for end, count in sorted(s["ends"].items())),
                    )
                )
            )
    return f"<table>{''.join(rows)}</table>"


def examples(path: Path) -> list[Trajectory]:
    """The first success and the first other trajectory."""
    found: dict[bool, Trajectory] = {}
    for trajectory in read_trajectories(path):
        found.setdefault(trajectory.success, trajectory)
    return [found[won] for won in (True, False) if won in found]


def sections(run: Path) -> Iterator[str]:
    for name in evaluations(run):
        scores = read_scores(run, name)
        notes = settings_notes(run, name, scores)
        yield f"<h2>{escape(name)}</h2>{score_table(scores, notes)}"
        for subject, note in notes.items():
            yield f'<p class="note">* round {escape(subject)} was played with other settings: {escape(note)}</p>'
        if name.startswith("evaluate_webshop"):
            yield f'<p class="note">{escape(PEOPLE)}</p>'
        for subject in scores:
            path = subjects(run)[subject] / name / "trajectories.jsonl"
            link = escape(os.path.relpath(path, run))
            yield f'<p>round {subject}: <a href="{link}">{link}</a></p>'
            for example in examples(path):
                title = f"{example.task_id}, trial {example.trial}: {example.task} ({example.end})"
                text = text_of(react_segments(example))
                yield f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
    for path in sorted(run.glob("evaluate*_all*.json")):
        yield f"<h2>{escape(path.stem)}</h2><pre>{escape(perturbation_table(read_json(path, Perturbations)))}</pre>"


def write_report(run: Path) -> Path:
    """Writes <run>/report.html, atomically, and returns its path."""
    title = f"Evaluations of {escape(run.name)}"
    note = (
        "Intervals are Wilson's. round: the round that trained the adapter (base: no adapter; adapter: the one given "
        "by --adapter). progress: the largest share of the goal reached. Reward and progress are out of 100."
    )
    body = "\n".join(sections(run))
    path = run / "report.html"
    page = (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>\n'
        f'<h1>{title}</h1>\n<p class="note">{note}</p>\n{body}\n</html>\n'
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, errors="replace")
    return path


def main(args: Args) -> None:
    if not args.run.is_dir():
        raise ValueError(f"no such run: {args.run}")
    if not evaluations(args.run):
        raise ValueError(f"{args.run} holds no finished evaluation; run: python evaluate.py --run {args.run}")
    print(f"report -> {write_report(args.run)}")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

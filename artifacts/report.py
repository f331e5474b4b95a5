"""The report: one HTML file that shows what runs did, compares them, and opens every trajectory. evaluate.py writes it.

    python -m artifacts.report --run runs/a3t                       # runs/a3t/report.html, from what is there
    python -m artifacts.report --run runs/a3t runs/resampling       # both in one page, and their differences printed

The file needs nothing beside it and no network. Reads what finished stages have left: scores.json, trajectories.jsonl,
metrics.jsonl, packed.npz, config.json and done.json; what a run lacks is left out of its page.
Left out: the charts (charts.py), the trajectories' form in the page (viewer.py), the differences (compare.py).
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from artifacts.atomic import atomic_write
from artifacts.charts import Line, chart
from artifacts.cli import Range, run_main
from artifacts.compare import Difference, comparison_table, differences, differing, points, settings, steps
from artifacts.html import folded, gallery, html_table, share
from artifacts.json_io import read_json
from artifacts.metrics import read_metrics
from artifacts.scores import (
    PAPER,
    PEOPLE,
    best_of_rounds,
    directory_name,
    evaluations,
    perturbation_table,
    read_scores,
    settings_notes,
    tasks_played,
)
from artifacts.stage import current_round, read_run, round_directory, shown
from artifacts.viewer import entries, packed_entries

Perturbations = dict[str, dict[str, dict[str, dict[str, float]]]]  # of evaluate*_all*.json
HERE = Path(__file__).parent
NOTE = (
    "Success in %, with 95 % intervals (Wilson's). In a round the agent (react) plays the training tasks; those it "
    "failed are tried again with some actions sampled and explained by a second prompt, ActRe (compositions: actre); "
    "then an adapter of the base is trained towards the successes of all rounds so far, demonstrations included, and "
    "away from the agent's failures at tasks that were also solved (A3T, arXiv 2403.14589). The row of a round is that "
    "adapter on a panel, a fixed set of tasks; of base no adapter, of adapter one from elsewhere. Best of rounds: what "
    "any round so far solved. Reward and progress, the largest share of the goal reached, are out of 100. An attempt "
    "ends as stuck if a turn and its answer come again and again (--patience), as max_turns or context_full at a "
    "limit; limits of play and of evaluations may differ."
)
MOST = 5000


@dataclass(frozen=True, kw_only=True)
class Args:
    run: tuple[Path, ...] = (Path("runs/a3t"),)
    """Directory of the run, or of several: the first and those to compare with it."""
    out: Path | None = None
    """File to write (default: report.html in the run; of several, A-B.html beside the first)."""
    trajectories: Annotated[int, Range(0, 10**7)] = MOST
    """Trajectories in the page, evaluations first; 1,000 take some 2 MB."""


# ---- what the runs show ----------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run, as the page calls it."""

    name: str
    path: Path


Scores = dict[str, dict[str, dict[str, Any]]]  # run's name -> subject -> panel -> score


def panels_of(scores: Scores) -> list[str]:
    return sorted({panel for subjects in scores.values() for by_panel in subjects.values() for panel in by_panel})


def called(subject: str) -> str:
    return f"round {subject}" if subject.isdecimal() else f"the {subject}"


def interval(score: dict[str, Any]) -> str:
    low, high = (100 * x for x in score["wilson95"])
    return f"{100 * score['rate']:.1f} % [{low:.0f}, {high:.0f}]"


def headline(name: str, by_subject: dict[str, dict[str, Any]], panel: str) -> str:
    """One sentence on a panel: the first subject, and the last."""
    found = [(subject, by_panel[panel]) for subject, by_panel in by_subject.items() if panel in by_panel]
    (first, before), (last, after) = found[0], found[-1]
    text = f"{name}, {panel}: {called(first)} solved {interval(before)} of {before['n']} attempts"
    return text + (f", {called(last)} {interval(after)}" if len(found) > 1 else "")


def paper_line(found: dict[str, dict[str, dict[str, Any]]], evaluation: str, panel: str) -> dict[str, float]:
    """{round: the paper's share} where all of its panel was played as the paper plays it, else empty."""
    plain = [directory_name(env, "none", 1) for env in ("alfworld", "webshop")]
    entries = [score for by_subject in found.values() for score in by_subject.values()]
    whole = all(str(tasks_played(score)) == panel.rpartition("-")[2] for score in entries)
    return {str(k): y / 100 for k, y in enumerate(PAPER.get(panel, ()))} if evaluation in plain and whole else {}


def success_chart(scores: Scores, evaluation: str, panel: str) -> str | None:
    """Success by round of each run, best of rounds for a single one, and the paper's line; None for a single point."""
    found = {name: {s: p[panel] for s, p in subjects.items() if panel in p} for name, subjects in scores.items()}
    order = sorted({s for by_subject in found.values() for s in by_subject}, key=lambda s: (s.isdecimal(), len(s), s))
    ticks = [subject for subject in order if subject != "adapter"]
    if len(ticks) < 2:
        return None

    def line(name: str, values: dict[str, float], **how: Any) -> Line:
        known = [subject for subject in ticks if subject in values]
        return Line(name=name, x=[ticks.index(s) for s in known], y=[100 * values[s] for s in known], **how)

    lines = []
    for colour, (name, by_subject) in enumerate(found.items()):
        band = [tuple(100 * x for x in by_subject[subject]["wilson95"]) for subject in ticks if subject in by_subject]
        lines.append(line(name, {s: score["rate"] for s, score in by_subject.items()}, band=band, colour=colour))
    if len(scores) == 1:
        best = {s: solved for s, (solved, _) in best_of_rounds(*scores.values(), panel).items()}
        lines.append(line("best of rounds", best, colour=1, dashed=True))
    lines.append(line("the paper (7B)", paper_line(found, evaluation, panel), colour=None, dashed=True))
    return chart(
        f"{panel}: success in %", [each for each in lines if each.x], xlabel="round", ticks=ticks, percent=True
    )


NONE = {"success": 0, "n": 0}
SCORES = ("run", "round", "success", "solved", "best of rounds %", "best of trials %", "reward", "progress", "turns")
SCORES += ("refused %", "how attempts ended")


def score_rows(run: Run, evaluation: str, by_subject: dict[str, dict[str, Any]], panel: str) -> Iterator[list[Any]]:
    best, notes = best_of_rounds(by_subject, panel), settings_notes(run.path, evaluation, by_subject)
    for subject, s in ((subject, by_panel[panel]) for subject, by_panel in by_subject.items() if panel in by_panel):
        trials = s["best_of"]
        yield [
            run.name,
            subject + "*" * (subject in notes),
            interval(s),
            f"{s['success']}/{s['n']}",
            f"{100 * best[subject][0]:.1f}" if subject in best else "-",
            f"{100 * trials['rate']:.1f} (of {trials['trials']})" if trials else "-",
            f"{100 * s['reward']:.1f}",
            f"{100 * s['progress']:.1f}",
            s["mean_turns"],
            f"{100 * s['invalid_action_rate']:.1f}",
            ", ".join(f"{end} {count}" for end, count in sorted(s["ends"].items())),
        ]


def type_table(scores: Scores, panel: str) -> str:
    """Success by task type; nothing for worlds without types."""
    columns = [(n, s, p[panel]) for n, subjects in scores.items() for s, p in subjects.items() if panel in p]
    types = {kind: None for _, _, score in columns for kind in score["types"]}
    head = ["type", *(called(s) if len(scores) == 1 else f"{name} {called(s)}" for name, s, _ in columns)]
    rows = [[kind, *(share(**score["types"].get(kind, NONE)) for _, _, score in columns)] for kind in types]
    return html_table(head, rows) if rows else ""


def evaluation_section(runs: Sequence[Run], evaluation: str) -> Iterator[str]:
    scores = {run.name: read_scores(run.path, evaluation) for run in runs}
    panels = panels_of(scores)
    yield f"<h2>{escape(evaluation)}</h2>"
    yield gallery(filter(None, (success_chart(scores, evaluation, panel) for panel in panels)))
    for panel in panels:
        rows = [row for run in runs for row in score_rows(run, evaluation, scores[run.name], panel)]
        yield f"<h3>{escape(panel)}</h3>{html_table(SCORES, rows)}{type_table(scores, panel)}"
    for run in runs:
        for subject, note in settings_notes(run.path, evaluation, scores[run.name]).items():
            text = f"* {run.name}, {called(subject)}: played with other settings: {note}"
            yield f'<p class="note">{escape(text)}</p>'
    if evaluation.startswith("evaluate_webshop"):
        yield f'<p class="note">{escape(PEOPLE)}</p>'


def difference_table(found: Sequence[Difference], first: str, second: str) -> str:
    """Paired differences; the settings that differ stand below it."""
    head = ["evaluation", "panel", "round", first, second, "difference in points", f"only {first}", f"only {second}"]
    rows = []
    for each in found:
        counts: tuple[Any, ...] = ("-",) * 4
        if each.paired is not None:
            counts = each.paired.first_only, each.paired.second_only, each.paired.n, f"{each.paired.p:.3f}"
        shares = f"{100 * each.first:.1f}", f"{100 * each.second:.1f}", points(each)
        rows.append([each.evaluation, each.panel, each.subject + "*" * bool(each.note), *shares, *counts])
    notes = (f"* {each.subject}: played with other settings: {each.note}" for each in found if each.note)
    below = "".join(f'<p class="note">{escape(note)}</p>' for note in dict.fromkeys(notes))
    return html_table([*head, "n", "p"], rows) + below


def comparison_section(runs: Sequence[Run]) -> Iterator[str]:
    """Of several runs, the first against each other one; of a single one, its rounds."""
    first = runs[0]
    if len(runs) > 1:
        for other in runs[1:]:
            found = list(differences(first.path, other.path))
            yield f"<h2>{escape(f'{other.name} minus {first.name}')}</h2>"
            yield difference_table(found, first.name, other.name)
    else:
        found = [each for name in evaluations(first.path) for each in steps(first.path, name)]
        if not found:
            return
        yield f"<h2>Rounds compared</h2>{difference_table(found, 'before', 'after')}"
    yield (
        '<p class="note">Over the same tasks only: what one side solved and the other did not. Success in %, the best '
        "of several trials. Intervals: Newcombe's, of paired shares; p: McNemar's exact test; neither is corrected for "
        "their number.</p>"
    )
    if len(runs) > 1:
        rows = ([name, *values] for name, values in differing([run.path for run in runs]))
        yield f"<h2>Settings that differ</h2>{html_table(('setting', *(run.name for run in runs)), rows)}"


# ---- how it was trained ----------------------------------------------------------------------------------------------


def done_of(run: Path, round_index: int, stage: str) -> dict[str, Any]:
    path = round_directory(run, round_index) / stage / "done.json"
    return read_json(path, dict[str, Any]) if path.exists() else {}


def round_rows(run: Run) -> Iterator[list[Any]]:
    for index in range(current_round(run.path)):
        played, composed, trained = (done_of(run.path, index, stage) for stage in ("rollout", "actre", "train_pg"))
        seconds = [str(round(done["seconds"])) if "seconds" in done else "-" for done in (played, composed, trained)]
        yield [
            run.name,
            index,
            share(played.get("success", 0), played.get("trajectories", 0)),
            composed.get("failed_tasks", "-"),
            composed.get("sampled_turns", "-"),
            share(composed.get("success", 0), composed.get("composed", 0)),
            composed.get("solved_tasks", "-"),
            trained.get("sequences", "-"),
            trained.get("sequences_failed", "-"),
            trained.get("tokens", "-"),
            trained.get("steps", "-"),
            " / ".join(seconds),
        ]


ROUNDS = ("run", "round", "played, or demonstrations: won %", "tasks failed", "sampled turns", "compositions won %")
ROUNDS += (
    "of failed tasks solved",
    "trained on",
    "failures in it",
    "tokens",
    "steps",
    "seconds: play / compose / train",
)


CURVES = {
    "loss": ("loss",),
    "mean log-probability (failures dashed)": ("logprob_positive", "logprob_negative"),
    "tokens per second": ("tokens_per_s",),
}


def curves(runs: Sequence[Run]) -> Iterator[str]:
    """Loss, likelihood and speed by optimizer step: of one run a line for each round, of several a chart for each."""
    groups: dict[str, dict[tuple[int, str], list[dict[str, Any]]]] = {}
    for place, run in enumerate(runs):
        for index in range(current_round(run.path)):
            title, line = ("", (index, f"round {index}")) if len(runs) == 1 else (f"round {index}: ", (place, run.name))
            groups.setdefault(title, {})[line] = read_metrics(
                round_directory(run.path, index) / "train_pg" / "metrics.jsonl"
            )
    for title, lines in groups.items():
        for what, measures in CURVES.items():
            drawn = [
                Line(
                    name=name if measure == measures[0] else "", x=x, y=y, colour=colour, dashed=measure != measures[0]
                )
                for (colour, name), found in lines.items()
                for measure in measures
                for x, y in [points_of(found, measure)]
                if y
            ]
            if drawn:
                yield chart(title + what, drawn, xlabel="optimizer step")


def points_of(found: Sequence[dict[str, Any]], measure: str) -> tuple[list[int], list[float]]:
    known = [(step["step"], y) for step in found if isinstance(y := step.get(measure), int | float)]
    if measure.startswith("logprob_"):  # 0: the step had no successes, or no failures
        known = [(x, y) for x, y in known if y]
    return [x for x, _ in known], [y for _, y in known]


# ---- what it was made of ---------------------------------------------------------------------------------------------


def identity_rows(run: Path) -> Iterator[tuple[str, str]]:
    record = read_run(run)
    for key in ("env", "model", "base", "tokenizer", "prompts"):
        if key in record:
            yield key, shown(record[key])
    for panel, content in record.get("content", {}).items():
        yield f"training tasks: {panel}", shown(content)
    found: dict[str, set[str]] = {}
    for path in sorted(run.glob("*/*/config.json")):
        config = read_json(path, dict[str, Any])
        git = config.get("git", {})
        found.setdefault("commit", set()).add(f"{git.get('commit')}{' and changes' if git.get('dirty') else ''}")
        found.setdefault("device", set()).add(str(config.get("device")))
        found.setdefault("versions", set()).add(", ".join(f"{k} {v}" for k, v in config.get("versions", {}).items()))
    for key, values in found.items():
        yield key, "; ".join(sorted(values))


def settings_section(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        yield f"<h3>{escape(run.name)}</h3>{html_table(('what', 'value'), identity_rows(run.path))}"
        rows = ((key, shown(value)) for key, value in sorted(settings(run.path).items()))
        title = "all settings that decide results; where rounds differ, those of each"
        yield folded(title, html_table(("setting", "value"), rows))


# ---- the page --------------------------------------------------------------------------------------------------------


def headlines(runs: Sequence[Run], found: Sequence[str]) -> Iterator[str]:
    for evaluation in found:
        scores = {run.name: read_scores(run.path, evaluation) for run in runs}
        for panel in panels_of(scores):
            for name, by_subject in scores.items():
                if any(panel in by_panel for by_panel in by_subject.values()):
                    yield f"{headline(name, by_subject, panel)} ({evaluation})"


def sections(runs: Sequence[Run]) -> Iterator[str]:
    found = list(dict.fromkeys(name for run in runs for name in evaluations(run.path)))
    lines = "".join(f"<li>{escape(line)}</li>" for line in headlines(runs, found))
    yield f'<ul>{lines}</ul><p class="note">{NOTE}</p>'
    if len(runs) > 1:
        yield from comparison_section(runs)
    for evaluation in found:
        yield from evaluation_section(runs, evaluation)
    if len(runs) == 1:
        yield from comparison_section(runs)
    for run in runs:
        for path in sorted(run.path.glob("evaluate*_all*.json")):
            text = perturbation_table(read_json(path, Perturbations))
            yield f"<h2>{escape(f'{run.name}: {path.stem}')}</h2><pre>{escape(text)}</pre>"
    rows = [row for run in runs for row in round_rows(run)]
    if rows:
        yield f"<h2>Rounds of training</h2>{html_table(ROUNDS, rows)}{gallery(curves(runs))}"
    yield "<h2>What it was made of</h2>"
    yield from settings_section(runs)


VIEWER = """<h2 id="trajectories">Trajectories</h2>
<p class="note">{which} of every finished stage. Choose one: attempts of other rounds at its task stand next to
it. {weights}</p>
<p class="note legend"><span class="thought">thought</span> <span class="action">&gt; action</span>
<span class="action sampled">&#9670; sampled action</span> <span class="action mistake">&#10007; mistake, masked</span>
<span class="action refused">&#8856; refused action</span> <span class="observation">observation</span></p>
<form id="filters">
<input type="search" name="text" placeholder="task, action or thought" aria-label="search">
<select name="run" aria-label="run"></select><select name="stage" aria-label="stage"></select>
<select name="type" aria-label="task type"></select><select name="source" aria-label="source"></select>
<select name="end" aria-label="how it ended"></select><select name="trained" aria-label="training"></select>
<output></output></form>
<div id="viewer"><ol id="list"></ol><div id="shown"></div></div>"""


WEIGHTS = """Where a round trained on it, its text is also there with the weight of every token:
<span class="plus">trained towards</span>, <span class="minus">trained away from</span>."""


def page(runs: Sequence[Run], most: int) -> str:
    title = " and ".join(run.name for run in runs)
    stream = entries([run.path for run in runs])
    found = list(itertools.islice(stream, most))
    more = next(stream, None) is not None
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{(HERE / 'report.css').read_text()}</style></head>"
    )
    body = "\n".join(sections(runs))
    if found:
        which = f"The first {most:,} attempts (--trajectories), evaluations first," if more else "Every attempt"
        viewer = VIEWER.replace("{which}", which).replace("{weights}", WEIGHTS if any(e.trained for e in found) else "")
        names = msgspec.json.encode([run.name for run in runs]).decode().replace("<", "\\u003c")
        body += (
            f'{viewer}<script type="application/json" id="runs">{names}</script>'
            f'<script type="application/gzip" id="data">{packed_entries(found)}</script>'
            f"<script>{(HERE / 'report.js').read_text()}</script>"
        )
    return f"{head}\n<body><main><h1>{escape(title)}</h1>\n{body}</main></body></html>\n"


def named(paths: Sequence[Path]) -> list[Run]:
    """The runs by their folders' names, or by their paths if two folders have the same."""
    names = [path.resolve().name for path in paths]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    return [Run(name=name, path=path) for name, path in zip(names, paths, strict=True)]


def write_report(*paths: Path, out: Path | None = None, most: int = MOST) -> Path:
    """Writes the report of runs, with `most` trajectories, atomically. Returns its path: `out`, <run>/report.html, or
    for several runs A-B.html beside the first."""
    together = "-".join(path.resolve().name for path in paths)
    out = out or (paths[0] / "report.html" if len(paths) == 1 else paths[0].parent / f"{together}.html")
    with atomic_write(out) as temporary:
        temporary.write_text(page(named(paths), most), encoding="utf-8", errors="replace")
    return out


def main(args: Args) -> None:
    if len({run.resolve() for run in args.run}) < len(args.run):
        raise ValueError(f"got --run {' '.join(map(str, args.run))}; expected each run once")
    for run in args.run:
        if not run.is_dir():
            raise ValueError(f"no such run: {run}")
        if not any(run.glob("*/*/done.json")):
            raise ValueError(f"{run} holds no finished stage; run: python rollout.py --run {run}")
    if len(args.run) > 1:
        print(comparison_table(args.run))
    print(f"report -> {write_report(*args.run, out=args.out, most=args.trajectories)}")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

"""The report holds every score and escapes what models and worlds have written."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from artifacts import report
from artifacts.json_io import write_json
from artifacts.scores import score
from artifacts.trajectory import write_file
from tests.support.helpers import trajectory, turn


class Tags(HTMLParser):
    """Raises AssertionError where tags are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def write_evaluation(run, name: str, rows) -> None:
    folder = run / "base" / name
    folder.mkdir(parents=True)
    write_file(folder / "trajectories.jsonl", rows)
    write_json(folder / "config.json", {"args": {}, "facts": {}})
    write_json(folder / "scores.json", {"<script>panel</script>": score(rows)})
    write_json(folder / "done.json", {})


def test_the_report_has_scores_examples_and_no_foreign_tags(tmp_path):
    lost = trajectory(
        trial=1,
        success=False,
        reward=0.0,
        progress=0.5,
        end="stuck",
        turns=[turn("<script>alert(1)</script>", "look & see", "Nothing happens.")],
    )
    write_evaluation(tmp_path, "evaluate", [trajectory(), lost])
    write_evaluation(tmp_path, "evaluate_webshop", [trajectory(env="webshop")])
    (tmp_path / "base/evaluate_P1").mkdir()  # begun, not finished
    html = report.write_report(tmp_path).read_text()
    tags = Tags()
    tags.feed(html)
    assert tags.open == [] and "script" not in tags.seen and tags.seen.count("details") == 3
    assert "&lt;script&gt;" in html and "look &amp; see" in html and "75.5" in html and "evaluate_P1" not in html
    assert ">50.0<" in html and ">75.0<" in html and 'href="base/evaluate/trajectories.jsonl"' in html


def test_a_run_without_evaluations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished evaluation"):
        report.main(report.Args(run=tmp_path))
    with pytest.raises(ValueError, match="no such run"):
        report.main(report.Args(run=tmp_path / "nope"))

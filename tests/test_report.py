"""The report holds every score and trajectory, escapes what models and worlds wrote, and works in a browser."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from artifacts import report
from artifacts.charts import Line, chart
from artifacts.json_io import write_json
from artifacts.packing import Example, pack, save_packed
from artifacts.pictures import find_browser
from artifacts.preview import weighted_text
from artifacts.scores import score
from artifacts.trajectory import Trajectory, write_file
from artifacts.viewer import entries
from models.tokenizer import byte_tokenizer
from tests.support.helpers import trajectory, turn

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Tags(HTMLParser):
    """Raises AssertionError where tags are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def write_evaluation(run: Path, name: str, rows: list[Trajectory], subject: str = "base", **facts: object) -> None:
    folder = run / subject / name
    folder.mkdir(parents=True)
    write_file(folder / "trajectories.jsonl", rows)
    write_json(folder / "config.json", {"args": {}, "facts": facts})
    write_json(folder / "scores.json", {"<script>panel</script>": score(rows) | {"content": "a", "world": {}}})
    write_json(folder / "done.json", {})


def lost(**changes: object) -> Trajectory:
    failed = {"success": False, "reward": 0.0, "progress": 0.5, "end": "stuck"}
    return trajectory(**failed | changes)


def write_training(run: Path, round_index: int, played: list[Trajectory], weights: list[float]) -> None:
    """A round of a run whose base is a folder with a tokenizer of bytes."""
    (run / "base-model").mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(run / "base-model" / "tokenizer.json"))
    write_json(run / "run.json", {"model": str(run / "base-model"), "env": "alfworld"})
    rollout, folder = run / f"round_{round_index}/rollout", run / f"round_{round_index}/train_pg"
    rollout.mkdir(parents=True), folder.mkdir()
    write_file(rollout / "trajectories.jsonl", played)
    write_json(rollout / "done.json", {"trajectories": len(played), "success": sum(t.success for t in played)})
    name = f"round_{round_index}/rollout/trajectories.jsonl"
    examples = [
        Example(trajectory=t, weight=w, file=name, line=k)
        for k, (t, w) in enumerate(zip(played, weights, strict=True), 1)
    ]
    text = byte_tokenizer().encode("Observation: <b> Action: look").ids
    rows = [(text, [0.0] * 5 + [weight] * (len(text) - 5)) for weight in weights]
    save_packed(folder, pack(rows, 64), examples)
    metrics = [{"step": k, "loss": 3.0 - k, "logprob_positive": -0.5, "logprob_negative": 0.0} for k in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    write_json(folder / "done.json", {"sequences": len(played), "seconds": 7.2})


def test_the_page_has_scores_and_no_foreign_tags(tmp_path):
    failed = lost(trial=1, turns=[turn(ATTACK, "look & see", "Nothing happens.")], task=ATTACK)
    run, other = tmp_path / f"a {ATTACK[:25].replace('/', '')}", tmp_path / "b"
    write_evaluation(run, "evaluate", [trajectory(), failed], model=ATTACK)
    write_evaluation(run, "evaluate_webshop", [trajectory(env="webshop")])
    (run / "base/evaluate_P1").mkdir()  # begun, not finished
    write_evaluation(other, "evaluate", [trajectory(), failed], model="another")
    alone, both = report.write_report(run).read_text(), report.write_report(run, other).read_text()
    for html in (alone, both):
        tags = Tags()
        tags.feed(html)
        assert tags.open == [] and tags.seen.count("script") == 3 and "img" not in tags.seen
        assert "&lt;img src=x onerror=alert(2)&gt;" in html  # the setting is there
    html = alone
    assert "&lt;script&gt;panel" in html and "75.5" in html and "evaluate_P1" not in html
    assert "50.0 % [" in html and ">75.0<" in html and "<td>stuck 1, success 1</td>" in html


def test_a_chart_is_the_page_s_own_colours_and_the_same_each_time():
    lines = [Line(name="a $5$ <b>", x=[0, 1], y=[10, 20], band=[(5, 15), (10, 30)])]
    svg = chart("x < y & $5$", lines, xlabel="round", ticks=["base", "0"], percent=True)
    assert svg == chart("x < y & $5$", lines, xlabel="round", ticks=["base", "0"], percent=True)
    assert re.search("#[0-9a-f]{6}", svg) is None and "var(--c0)" in svg and ">base</text>" in svg
    assert 'aria-label="x &lt; y &amp; $5$"' in svg and "x &lt; y &amp; $5$</text>" in svg


def write_rounds(run: Path, tasks: int, name: str = "evaluate") -> None:
    """Two rounds, which lose and win all tasks of a panel that is called valid_seen-140."""
    for index, make in enumerate((lost, trajectory)):
        rows = [make(task_id=f"s/pick_and_place_simple-x/t{k:03}") for k in range(tasks)]
        write_training(run, index, rows[:1], [1.0])
        write_evaluation(run, name, rows, subject=f"round_{index}")
    for path in run.glob("*/*/scores.json"):
        path.write_text(path.read_text().replace("<script>panel</script>", "valid_seen-140"))


def test_rounds_curves_and_the_paper_s_line_are_drawn(tmp_path):
    write_rounds(tmp_path, 140)
    html = report.write_report(tmp_path).read_text()
    charts = re.findall(r'aria-label="([^"]*)"', html.partition('id="trajectories"')[0])
    assert charts == [
        "valid_seen-140: success in %",
        "loss",
        "mean log-probability (failures dashed)",  # all of failures are 0: none was trained on
    ]
    assert "the paper (7B)" in html and "best of rounds" in html
    assert "round 0 solved 0.0 % [0, 3] of 140 attempts" in html and html.count(">round 1</text>") == 2
    assert "<td>0 → 1</td><td>0.0</td><td>100.0</td><td>+100.0 [" in html  # the rounds compared


@pytest.mark.parametrize(("tasks", "name"), [(20, "evaluate"), (140, "evaluate_P1"), (140, "evaluate_hot")])
def test_the_paper_s_line_is_not_drawn_beside_what_the_paper_did_not_play(tmp_path, tasks, name):
    write_rounds(tmp_path, tasks, name)
    assert "the paper (7B)" not in report.write_report(tmp_path).read_text()


def test_a_chart_names_a_single_run_in_its_own_colour(tmp_path):
    write_rounds(tmp_path / "_one", 1)
    write_evaluation(tmp_path / "none", "evaluate", [trajectory()])
    html = report.write_report(tmp_path / "none", tmp_path / "_one").read_text()
    curve = html.partition('aria-label="round 0: loss"')[2].partition("</svg>")[0]
    assert ">_one</text>" in curve and "var(--c1)" in curve and "var(--c0)" not in curve


def test_a_damaged_line_of_metrics_is_named(tmp_path):
    write_training(tmp_path, 0, [trajectory()], [1.0])
    write_evaluation(tmp_path, "evaluate", [trajectory()], subject="round_0")
    with open(tmp_path / "round_0/train_pg/metrics.jsonl", "a") as file:
        file.write('{"loss": 1}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:3: .*step"):
        report.write_report(tmp_path)


def test_several_runs_are_compared_in_one_page(tmp_path, capsys):
    for name, rows in {"first": [lost()], "second": [trajectory()]}.items():
        write_evaluation(tmp_path / name, "evaluate", rows, max_turns=len(name))
    report.main(report.Args(run=(tmp_path / "first", tmp_path / "second")))
    html, printed = (tmp_path / "first-second.html").read_text(), capsys.readouterr().out
    assert "<td>+100.0 [-" in html and "+100.0 [-" in printed
    assert "base: played with other settings: facts.max_turns 6 (first 5)" in html
    assert "<td>evaluate: max_turns</td><td>5</td><td>6</td>" in html and "evaluate: max_turns: 5 | 6" in printed


def test_a_run_can_be_read_before_its_first_evaluation(tmp_path):
    write_training(tmp_path, 0, [trajectory()], [1.0])
    report.main(report.Args(run=(tmp_path,)))
    html = (tmp_path / "report.html").read_text()
    assert 'aria-label="loss"' in html and 'id="trajectories"' in html


def test_a_page_says_how_many_attempts_it_left_out(tmp_path):
    write_training(tmp_path, 0, [trajectory(trial=k) for k in range(3)], [1.0] * 3)
    write_evaluation(tmp_path, "evaluate", [trajectory(), lost(trial=1)])
    assert "Every attempt of every" in report.write_report(tmp_path, most=5).read_text()
    assert "The first 4 attempts" in report.write_report(tmp_path, most=4).read_text()


def test_weights_are_found_however_their_file_was_named(tmp_path, monkeypatch):
    write_training(tmp_path / "run", 0, [trajectory()], [1.0])
    packed = tmp_path / "run/round_0/train_pg/packed.jsonl"
    text = packed.read_text()
    monkeypatch.chdir(tmp_path)
    names = "round_0/rollout/trajectories.jsonl", "run/round_0/rollout/trajectories.jsonl"
    for name in (*names, str(tmp_path / names[1])):
        packed.write_text(text.replace(names[0], name))
        for run in (tmp_path / "run", Path("run")):
            assert [entry.trained[0]["rounds"] for entry in entries([run])] == [[0]]


def test_pieces_of_weights_keep_every_blank_and_character():
    words = Tokenizer(models.WordLevel({"\u2581I": 0, "\u2581put": 1, "\u2581mug": 2}, unk_token="\u2581I"))
    words.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    found = weighted_text(np.array([0, 1, 2, 2]), np.array([1.0, 0.0, 0.0, 1.0]), words)  # as Llama's decoder does
    assert found == [("I", 1.0), (" put mug", 0.0), (" mug", 1.0)]
    text = "é→ü"
    ids = np.array(byte_tokenizer().encode(text).ids)
    for weights in itertools.product((0.0, 1.0), repeat=len(ids)):
        pieces = weighted_text(ids, np.array(weights), byte_tokenizer())
        assert "".join(piece for piece, _ in pieces) == text, weights
    assert weighted_text(np.array([], int), np.array([]), words) == []


def test_what_holds_no_finished_stage_or_is_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished stage"):
        report.main(report.Args(run=(tmp_path,)))
    write_evaluation(tmp_path / "a", "evaluate", [trajectory()])
    with pytest.raises(ValueError, match="each run once"):
        report.main(report.Args(run=(tmp_path / "a", tmp_path / "a" / ".." / "a")))
    with pytest.raises(ValueError, match="no such run"):
        report.main(report.Args(run=(tmp_path / "nope",)))


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if (path := find_browser()) is None:
        pytest.skip("needs Chromium: apt install chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


def open_page(browser, path: Path, **how: object):
    """The page, and the errors of its script, as they come."""
    page, errors = browser.new_page(**how), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: errors.append(f"dialog {dialog.message}") or dialog.dismiss())
    page.goto(f"file://{path}")
    page.wait_for_selector("#list button")
    return page, errors


def test_filters_rounds_and_weights_work_and_text_stays_text(browser, tmp_path):
    hostile = lost(task_id="s/look_at_obj_in_light-x/t2", turns=[turn(ATTACK, ATTACK, ATTACK)], task=ATTACK)
    sampled = turn("", "go to desk 1", "You arrive.")
    sampled.action_by = "sampled"
    first = lost(turns=[sampled])
    write_training(tmp_path, 0, [first, hostile], [-1.0, 1.0])
    write_evaluation(tmp_path, "evaluate", [first], subject="round_0")
    write_training(tmp_path, 1, [trajectory()], [1.0])
    write_evaluation(tmp_path, "evaluate", [trajectory(), hostile], subject="round_1")
    page, errors = open_page(browser, report.write_report(tmp_path))
    assert page.locator("output").inner_text() == "6 of 6, 2 solved"
    page.select_option("[name=end]", "success")
    assert page.locator("output").inner_text() == "2 of 6, 2 solved" and page.locator("#list button").count() == 2
    page.select_option("[name=end]", "")
    page.fill("[name=text]", "onerror")
    assert page.locator("#list button").count() == 2
    page.locator("#list button").first.click()
    assert ATTACK in page.locator("#shown .action").first.inner_text() and page.locator("main img").count() == 0
    page.fill("[name=text]", "")
    page.select_option("[name=stage]", "round_0/evaluate")
    page.locator("#list button").first.click()
    assert page.locator("#shown article strong").all_inner_texts() == ["round_0/evaluate", "round_1/evaluate"]
    assert page.locator("#shown .sampled").first.inner_text().startswith("◆ go to desk 1")
    page.locator("#shown .attempts button", has_text="round_0/rollout").click()
    article = page.locator("#shown article", has_text="round_0/rollout")
    article.locator("select").select_option(label="weights of round 0")
    assert article.locator(".minus").inner_text() == "vation: <b> Action: look"
    assert errors == []


def test_two_thousand_trajectories_open_in_two_seconds_and_fit_a_phone(browser, tmp_path):
    turns = [turn("I need a mug.", f"go to desk {k}", "You arrive at desk 1. " * 4) for k in range(15)]
    rows = [lost(task_id=f"s/pick_and_place_simple-x/t{k}", turns=turns) for k in range(2000)]
    write_evaluation(tmp_path, "evaluate", rows)
    path = report.write_report(tmp_path)
    opened = []
    for _ in range(3):
        page, errors = open_page(browser, path, viewport={"width": 360, "height": 700})
        opened.append(page.evaluate("performance.getEntriesByName('opened')[0].startTime"))
    assert page.locator("#list button").count() == 201 and min(opened) < 2000
    assert page.evaluate("document.documentElement.scrollWidth") == 360 and errors == []
    assert path.stat().st_size < 2e6

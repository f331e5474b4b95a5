"""Pictures of a report: of what it shows, and of nothing that it lacks."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from artifacts import pictures
from artifacts.json_io import write_json
from artifacts.report import write_report
from artifacts.trajectory import write_file
from tests.support.helpers import trajectory


class Page:
    """A browser's page, with what a report's script makes of its file."""

    def goto(self, address):
        self.text = Path(address.removeprefix("file://")).read_text()

    def wait_for_selector(self, selector):
        assert selector == "#list button" and 'id="list"' in self.text, "waits in vain"

    def eval_on_selector(self, place, script):
        assert (f'id="{place[1:]}"' if place.startswith("#") else f"<{place}>") in self.text

    def screenshot(self, path):
        path.write_bytes(b"")


@pytest.fixture
def browser(monkeypatch):
    """A stand-in for Chromium and playwright."""
    chromium = SimpleNamespace(new_page=lambda **_: Page(), close=lambda: None)
    started = SimpleNamespace(chromium=SimpleNamespace(launch=lambda **_: chromium))
    module = SimpleNamespace(sync_playwright=lambda: contextlib.nullcontext(started))
    monkeypatch.setitem(sys.modules, "playwright", SimpleNamespace(sync_api=module))
    monkeypatch.setitem(sys.modules, "playwright.sync_api", module)
    monkeypatch.setattr(pictures, "find_browser", lambda: "chromium")


def write_run(run: Path, trajectories: int) -> Path:
    """The report of a run with a finished stage."""
    folder = run / "round_0/rollout"
    folder.mkdir(parents=True)
    write_file(folder / "trajectories.jsonl", [trajectory(trial=trial) for trial in range(trajectories)])
    write_json(folder / "done.json", {"trajectories": trajectories, "success": trajectories})
    return write_report(run)


def test_a_report_is_pictured_with_its_trajectories(tmp_path, browser, capsys):
    pictures.main(pictures.Args(report=write_run(tmp_path / "run", 2), out=tmp_path / "out"))
    assert {path.stem for path in (tmp_path / "out").iterdir()} == set(pictures.PICTURES)
    assert "left out" not in capsys.readouterr().out


def test_a_report_without_trajectories_is_pictured_without_them_and_says_so(tmp_path, browser, capsys):
    report = write_run(tmp_path / "run", 0)
    pictures.main(pictures.Args(report=report, out=tmp_path / "out"))
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"report-desktop", "report-phone"}
    assert f"report-trajectories.png is left out: {report} has no trajectories\n" in capsys.readouterr().out

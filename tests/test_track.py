"""Trackers show what metrics.jsonl and scores.json hold, through kills, and can neither end nor change a training."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_pg
from artifacts import track, trackers
from artifacts.json_io import write_json
from artifacts.metrics import MetricsLog
from artifacts.scores import score
from artifacts.stage import compared
from artifacts.trackers import PACKAGES, Curves, figures
from tests.support.helpers import tensorboard_scalars, trajectory

ROOT = Path(__file__).parent.parent


def needs(tracker: str) -> None:
    for package in (PACKAGES[tracker], tracker):
        pytest.importorskip(package, reason=f"{package} is not installed (requirements/tracking.txt)")


def line(step: int, **more) -> dict:
    return {"step": step, "loss": 1 / step, "logprob_positive": -0.5, "tokens_per_s": 9.0, "mfu": None} | more


# ---- what a tracker's own files hold: {name: [(step, value), ...]} ---------------------------------------------------


def wandb_records(path: Path) -> list[bytes]:
    """The records of a .wandb file: after 7 bytes, blocks of 32 kB in LevelDB's log format."""
    data, records, at = path.read_bytes(), [], 7
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part = data[at + 7 : at + 7 + length]
        if kind in (1, 2):  # whole, or first
            records.append(part)
        elif kind in (3, 4):  # middle or last
            records[-1] += part
        at += 7 + length
    return records


def in_wandb(run: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = run.glob(f"wandb/offline-run-*-{name}/*.wandb")  # one copy, whatever was killed
    found: dict[str, list[tuple[int, float]]] = {}
    for data in wandb_records(path):
        history = Record.FromString(data).history
        values = {"/".join([*item.nested_key]) or item.key: json.loads(item.value_json) for item in history.item}
        for key in values.keys() - {"_step", "_runtime", "_timestamp"}:
            found.setdefault(key, []).append((values["_step"], values[key]))
    return found


def in_trackio(run: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    code = (
        "import json, sys, trackio\n"
        f"[run] = [r for r in trackio.Api().runs('a3t') if r.name == '{run.name}/{name}']\n"
        "json.dump(trackio.SQLiteStorage.get_logs('a3t', run.name, run_id=run.id), sys.stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, list[tuple[int, float]]] = {}
    for row in json.loads(done.stdout):
        for key in row.keys() - {"step", "timestamp"}:
            found.setdefault(key, []).append((row["step"], row[key]))
    return found


READ = {"tensorboard": tensorboard_scalars, "wandb": in_wandb, "trackio": in_trackio}

TRAIN = """
import os, signal, sys
from pathlib import Path
from artifacts.metrics import MetricsLog
directory, tracker, done, first, last, end = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:7])
with MetricsLog(directory, done, 5, track=tracker) as log:
    for step in range(first, last + 1):
        log.write({"step": step, "loss": 1 / step, "logprob_positive": -0.5, "tokens_per_s": 9.0, "mfu": None})
    if end:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Nobody's account, settings or database; no network is asked for."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_", "HF_"))]:
        monkeypatch.delenv(name)
    for name in ("HOME", "TRACKIO_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "home").mkdir()


def log_in_a_process(directory: Path, tracker: str, *numbers: int, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", TRAIN, str(directory), tracker, *map(str, numbers)]
    return subprocess.run(
        words, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


@pytest.mark.parametrize("tracker", READ)
def test_a_run_killed_and_resumed_is_shown_with_every_step_once(tracker, tmp_path, alone):
    """Killed after step 4, resumed from step 2's checkpoint, with no account and no network."""
    needs(tracker)
    directory = tmp_path / "a3t" / "round_0" / "train_pg"
    directory.mkdir(parents=True)
    assert log_in_a_process(directory, tracker, 0, 1, 4, 1).returncode == -signal.SIGKILL
    second = log_in_a_process(directory, tracker, 2, 3, 5, 0)
    assert second.returncode == 0, second.stderr
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    found = READ[tracker](tmp_path / "a3t", "round_0" if tracker != "wandb" else "*round_0")
    assert found.keys() == {"loss", "logprob_positive", "tokens_per_s"}  # mfu was not known
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5]
    assert [value for _, value in found["loss"]] == pytest.approx([line["loss"] for line in lines])


def test_a_tracker_is_no_setting_of_the_result():
    assert compared({"args": {"track": "wandb", "seed": 1}}) == {"args.seed": 1}


def test_only_the_process_that_logs_opens_a_tracker(tmp_path):
    directory = tmp_path / "a3t" / "round_0" / "train_pg"
    directory.mkdir(parents=True)
    with MetricsLog(directory, 0, 1, active=False, track="tensorboard") as log:
        log.write(line(1))
    assert list(tmp_path.glob("**/*")) == [directory.parents[1], directory.parent, directory]


# ---- trackers that fail ----------------------------------------------------------------------------------------------


class Failing:
    """A tracker that raises in the method that is named."""

    def __init__(self, run, name, settings):
        self.seen = []
        if self.where == "open":
            raise RuntimeError("no such server\nand a second line")

    def log(self, step, values):
        self.seen.append(step)
        if self.where == "log" and step == 2:
            raise OSError(28, "No space left on device")

    def flush(self):
        pass

    def close(self):
        if self.where == "close":
            raise TimeoutError("upload")


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_what_a_tracker_raises_is_said_once_and_ends_nothing(where, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", type("T", (Failing,), {"where": where}))
    directory = tmp_path / "a3t" / "round_0" / "train_pg"
    directory.mkdir(parents=True)
    with MetricsLog(directory, 0, 3, track="wandb") as log:
        for step in (1, 2, 3):
            log.write(line(step))
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 3
    said = capsys.readouterr().err
    assert said.count("wandb failed") == 1 and "second line" not in said
    assert f"python -m artifacts.track --run {tmp_path / 'a3t'} --to wandb" in said
    with pytest.raises(ValueError, match="wandb took 0 of 1 sets of curves"):
        track.main(track.Args(run=tmp_path / "a3t", to="wandb"))


def test_a_disk_that_fills_up_ends_the_curves_and_not_the_training(tmp_path, monkeypatch, capsys):
    needs("tensorboard")
    from tensorboardX.record_writer import RecordWriter

    curves = Curves("tensorboard", tmp_path, "round_0", {}, [line(1)])

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(2, 40):  # more than any queue of the writer's holds
        curves.add([line(step)])
    curves.close()
    assert curves.failed and capsys.readouterr().err.count("No space left on device") == 1


def test_a_server_that_cannot_be_reached_is_said_once(tmp_path, alone):
    needs("wandb")
    directory = tmp_path / "a3t" / "round_0" / "train_pg"
    directory.mkdir(parents=True)
    server = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4, "WANDB_INIT_TIMEOUT": "2"}
    done = log_in_a_process(directory, "wandb", 0, 1, 5, 0, **server)
    assert done.returncode == 0 and done.stderr.count("wandb failed (CommError") == 1
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)], ids=["nothing", "a folder of its name"])
def test_a_missing_package_is_named_with_the_command_before_anything_is_done(spec, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    said = r"^--track tensorboard needs the package tensorboardX.*pip install --constraint requirements/tracking.txt"
    with pytest.raises(ValueError, match=said):
        train_pg.Args(track="tensorboard").check()
    with pytest.raises(ValueError, match="^--to trackio needs the package trackio"):
        track.Args(to="trackio").check()
    train_pg.Args(track=None).check()


# ---- figures, rounds, the command ------------------------------------------------------------------------------------


def test_only_finite_numbers_are_figures():
    given = {"step": 3, "loss": 2, "nan": math.nan, "inf": -math.inf, "mfu": None, "name": "x", "best_of": {"n": 1}}
    assert figures(given | {"progress": 0.5}) == {"loss": 2.0, "progress": 0.5}


def write_run(run: Path, rates: dict[str, float]) -> None:
    """A run whose base and rounds were evaluated with the given shares of success."""
    for subject, rate in rates.items():
        where = run / (subject if subject == "base" else f"round_{subject}")
        rows = [trajectory(trial=trial, success=trial < 10 * rate) for trial in range(10)]
        (where / "evaluate").mkdir(parents=True)
        write_json(where / "evaluate" / "config.json", {"args": {}, "facts": {}})
        write_json(where / "evaluate" / "scores.json", {"panel": score(rows)})
        write_json(where / "evaluate" / "done.json", {})
        if subject != "base":
            (where / "train_pg").mkdir()
            write_json(where / "train_pg" / "done.json", {"round": subject, "steps": 4})
            (where / "rollout").mkdir()
            write_json(where / "rollout" / "done.json", {"round": subject, "success": 7, "rates": {"x": 1}})


def test_rounds_are_shown_by_the_names_of_their_files_and_sent_again_replace_themselves(tmp_path):
    needs("tensorboard")
    run = tmp_path / "a3t"
    write_run(run, {"base": 0.2, "0": 0.5})
    assert track.track_rounds(run, "tensorboard")
    write_run(run, {"1": 0.7})
    assert track.track_rounds(run, "tensorboard") and track.track_rounds(run, None)
    found = tensorboard_scalars(run, "rounds")
    assert found["evaluate/panel/rate"] == [(0, pytest.approx(0.5)), (1, pytest.approx(0.7))]
    assert found["base/evaluate/panel/rate"] == [(0, pytest.approx(0.2))]
    assert found["rollout/success"] == [(0, 7), (1, 7)] and found["train_pg/steps"] == [(0, 4), (1, 4)]
    assert not any("best_of" in name or "rates" in name or name.endswith("/round") for name in found)


def test_an_open_tensorboard_forgets_the_steps_that_are_repeated(tmp_path, monkeypatch):
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        patch.setattr("tensorboardX.event_file_writer.time", SimpleNamespace(time=lambda: 1e9))  # names have seconds
        Curves("tensorboard", tmp_path, "round_0", {}, [line(step) for step in (1, 2, 3, 4)])
    shown = EventAccumulator(str(tmp_path / "tensorboard" / "round_0"))
    shown.Reload()
    assert [each.step for each in shown.Scalars("loss")] == [1, 2, 3, 4]
    again = Curves("tensorboard", tmp_path, "round_0", {}, [line(step) for step in (1, 2)])
    again.add([line(3, loss=9.0)])
    shown.Reload()
    assert [(each.step, each.value) for each in shown.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_the_command_sends_every_round_and_leaves_out_a_line_that_is_being_written(tmp_path, capsys):
    needs("tensorboard")
    run = tmp_path / "a3t"
    write_run(run, {"0": 0.5, "1": 0.7})
    (run / "round_0/train_pg/metrics.jsonl").write_text(json.dumps(line(1)) + "\n" + '{"step": 2, "lo')
    (run / "round_1/train_pg/metrics.jsonl").write_text(json.dumps(line(1)) + "\n")
    track.main(track.Args(run=run, to="tensorboard"))
    assert "3 sets of curves" in capsys.readouterr().out
    assert tensorboard_scalars(run, "round_0")["loss"] == tensorboard_scalars(run, "round_1")["loss"] == [(1, 1.0)]
    (run / "round_1/train_pg/metrics.jsonl").write_text('{"step"\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"round_1/train_pg/metrics.jsonl:1 is not valid JSON"):
        track.main(track.Args(run=run, to="tensorboard"))


def test_a_folder_that_only_begins_like_a_round_is_none(tmp_path, capsys):
    needs("tensorboard")
    run = tmp_path / "a3t"
    write_run(run, {"0": 0.5, "old": 0.7, "10": 0.7, "9": 0.6})
    for name in ("0", "old"):
        (run / f"round_{name}/train_pg/metrics.jsonl").write_text(json.dumps(line(1)) + "\n")
    track.main(track.Args(run=run, to="tensorboard"))
    assert "2 sets of curves" in capsys.readouterr().out and not (run / "tensorboard/round_old").exists()
    assert tensorboard_scalars(run, "rounds")["rollout/success"] == [(0, 7), (9, 7), (10, 7)]


def test_a_stage_whose_config_has_no_settings_is_tracked_without_them(tmp_path):
    needs("tensorboard")
    write_run(tmp_path, {"0": 0.5})
    write_json(tmp_path / "round_0/train_pg/config.json", {})
    (tmp_path / "round_0/train_pg/metrics.jsonl").write_text(json.dumps(line(1)) + "\n")
    assert track.track_steps(tmp_path / "round_0/train_pg", "tensorboard")


def test_a_run_without_figures_is_refused(tmp_path):
    for run, said in ((tmp_path / "no", "no such run"), (tmp_path, "has no figures yet")):
        with pytest.raises(ValueError, match=said):
            track.main(track.Args(run=run, to="tensorboard"))

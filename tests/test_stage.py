"""The stage directory: resumed, finished or refused; the record of a run; addressed draws."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pytest

from artifacts.cli import Range
from artifacts.json_io import read_json, write_json
from artifacts.seeds import draw_seed, generator
from artifacts.stage import (
    Stage,
    StageError,
    adapter_of_round,
    current_round,
    read_run,
    require_done,
    round_directory,
)

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Server:
    model: str = "a"
    concurrency: int = 16


@dataclass(frozen=True, kw_only=True)
class Args:
    server: Server = Server()
    run: Path = Path("runs/x")
    seed: Annotated[int, Range(0)] = 0
    slots: int = 64
    limit: int | None = None


def begin(directory: Path, args: Args = Args(), facts: dict | None = None) -> None:
    """A stage that was killed after its first row."""
    with Stage(directory, args, {"panel": "abc"} if facts is None else facts):
        (directory / "trajectories.jsonl").write_text("row\n")


def test_config_comes_first_and_done_last(tmp_path):
    directory = tmp_path / "round_0" / "rollout"
    with Stage(directory, Args(), {"panel": "abc"}) as stage:
        config = read_json(directory / "config.json")
        assert config["args"]["server"] == {"model": "a", "concurrency": 16} and config["args"]["run"] == "runs/x"
        assert config["facts"] == {"panel": "abc"}
        assert config["versions"]["jax"] and not (directory / "done.json").exists() and not stage.finished
        stage.finish({"n": 3})
    assert read_json(directory / "done.json")["n"] == 3
    assert Stage(directory, Args(), {"panel": "abc"}).finished


def test_a_setting_that_is_newer_than_the_directory_had_its_default(tmp_path):
    stage = Stage(tmp_path, Args(), {})
    config = read_json(tmp_path / "config.json")
    del config["args"]["seed"], config["args"]["server"]["model"]
    write_json(tmp_path / "config.json", config)
    stage.finish({})
    assert Stage(tmp_path, Args(), {}).finished
    with pytest.raises(StageError, match=r"args\.seed: there 0, now 1.*args\.server\.model: there 'a', now 'b'"):
        Stage(tmp_path, Args(seed=1, server=Server(model="b")), {})


def test_other_settings_are_refused_by_name_and_nothing_is_replaced(tmp_path):
    begin(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(StageError, match=r"args\.seed: there 0, now 1"):
        Stage(tmp_path, replace(Args(), seed=1), {"panel": "abc"})
    with pytest.raises(StageError, match=r"facts\.panel: there 'abc', now 'def'"):
        Stage(tmp_path, Args(), {"panel": "def"})
    with pytest.raises(StageError, match=r"facts\.prompt: there None, now 'a prompt'"):
        Stage(tmp_path, Args(), {"panel": "abc", "prompt": "a prompt"})
    with pytest.raises(StageError, match=r"args\.server\.model: there 'a', now 'b'"):
        Stage(tmp_path, Args(server=Server(model="b")), {"panel": "abc"})
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_cannot_change_results_or_is_in_the_facts_may_differ(tmp_path):
    begin(tmp_path / "run" / "stage", Args(run=tmp_path / "run"))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    args = Args(run=Path("moved"), server=Server(concurrency=2), slots=8, limit=600)
    assert not Stage(tmp_path / "moved" / "stage", args, {"panel": "abc"}).finished


def test_a_stage_that_was_killed_before_its_first_row_may_begin_again_with_other_settings(tmp_path):
    with Stage(tmp_path, Args(), {}):
        (tmp_path / "trajectories.jsonl").touch()
    with Stage(tmp_path, Args(seed=1), {}):
        assert read_json(tmp_path / "config.json")["args"]["seed"] == 1


def test_files_without_a_config_are_not_adopted(tmp_path):
    (tmp_path / "trajectories.jsonl").write_text("of another\n")
    with pytest.raises(StageError, match="holds trajectories.jsonl but no config.json"):
        Stage(tmp_path, Args(), {})
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["trajectories.jsonl"]


def test_a_stage_that_fails_before_its_first_row_leaves_no_folder(tmp_path):
    run = tmp_path / "runs" / "new"
    with (
        pytest.raises(ValueError, match="no such model"),
        Stage(run / "round_0" / "x", Args(run=run), {}, {"env": "a"}),
    ):
        raise ValueError("no such model")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="late"), Stage(run / "round_0" / "x", Args(run=run), {}, {"env": "a"}):
        (run / "round_0" / "x" / "trajectories.jsonl").write_text("row\n")
        raise ValueError("late")
    assert read_run(run)["env"] == "a" and (run / "round_0" / "x" / "trajectories.jsonl").exists()


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    begin(tmp_path)
    (tmp_path / "scores.json.123.tmp").write_text("{")
    Stage(tmp_path, Args(), {"panel": "abc"})
    assert not list(tmp_path.glob("*.tmp"))


HOLDER = """
import sys, time
from pathlib import Path
from tests.test_stage import Args, Stage
with Stage(Path(sys.argv[1]), Args(), {"panel": "abc"}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_died(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(StageError, match="another process is at work in"):
        Stage(tmp_path, Args(), {"panel": "abc"})
    holder.kill()
    holder.wait()
    assert not Stage(tmp_path, Args(), {"panel": "abc"}).finished


def test_a_file_system_without_locks_is_played_on_with_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert not Stage(tmp_path, Args(), {}).finished
    assert "no locks" in capsys.readouterr().err


# ---- the run ---------------------------------------------------------------------------------------------------------

SHOP = {"env": "webshop", "world": {"mode": "text"}, "content": {"webshop (9 tasks)": "c1"}, "base": "b1", "model": "m"}


def stage_of(run: Path, name: str, identity: dict) -> None:
    with Stage(run / name, Args(run=run), {}, identity) as stage:
        stage.finish({})


def test_a_run_keeps_what_its_first_stage_said_and_learns_the_rest(tmp_path):
    stage_of(tmp_path, "first", SHOP)
    stage_of(tmp_path, "second", {"base": "b1", "model": "elsewhere/m", "content": {"webshop (8 tasks)": "c2"}})
    assert read_run(tmp_path)["content"] == {"webshop (9 tasks)": "c1", "webshop (8 tasks)": "c2"}


@pytest.mark.parametrize(
    ("other", "flag"),
    [
        ({"env": "alfworld"}, r"env is 'webshop' there, 'alfworld' now \(--env\)"),
        ({"base": "b2"}, r"its base was m.*base is 'b1' there, 'b2' now \(--model\)"),
        ({"world": {"mode": "text_rich"}}, r"world\.mode is 'text' there.*--mode"),
        ({"content": {"webshop (9 tasks)": "c2"}}, r"'c1' there, 'c2' now \(--data\)"),
    ],
)
def test_another_world_base_or_data_in_a_run_is_refused_by_the_flag(tmp_path, other, flag):
    stage_of(tmp_path, "first", SHOP)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(StageError, match=flag):
        stage_of(tmp_path, "second", SHOP | other)
    assert (tmp_path / "run.json").read_bytes() == before and not (tmp_path / "second").exists()


# ---- rounds ----------------------------------------------------------------------------------------------------------


def test_a_stage_without_done_stops_the_next_one(tmp_path):
    with pytest.raises(StageError, match="not finished.*run: python rollout.py"):
        require_done(tmp_path, "python rollout.py")
    with pytest.raises(StageError, match="train_pg.py --run .* --round 1"):
        adapter_of_round(tmp_path, 2)
    assert adapter_of_round(tmp_path, 0) is None


def test_current_round_is_the_first_untrained(tmp_path):
    assert current_round(tmp_path) == 0
    for number in range(2):
        directory = round_directory(tmp_path, number) / "train_pg"
        directory.mkdir(parents=True)
        write_json(directory / "done.json", {})
    assert current_round(tmp_path) == 2


def test_draws_depend_on_every_part_of_the_address_and_nothing_else():
    places = [
        (s, stage, r, task, trial, turn)
        for s in (0, 1)
        for stage in ("rollout", "actre")
        for r in (0, 1)
        for task in ("a", "b")
        for trial in (0, 1)
        for turn in (0, 1)
    ]
    seeds = [draw_seed(*place) for place in places]
    assert len(set(seeds)) == len(places) and all(0 <= s < 2**32 for s in seeds)
    assert seeds == [draw_seed(*place) for place in places]
    assert generator(*places[0]).random() == generator(*places[0]).random() != generator(*places[1]).random()

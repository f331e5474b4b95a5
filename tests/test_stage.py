"""The stage directory: resumed, finished or refused; addressed draws."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from artifacts.seeds import draw_seed, generator
from artifacts.stage import (
    Stage,
    StageError,
    adapter_of_round,
    current_round,
    read_json,
    require_done,
    round_directory,
    write_json,
)


@dataclass(frozen=True, kw_only=True)
class Server:
    model: str = "a"
    concurrency: int = 16


@dataclass(frozen=True, kw_only=True)
class Args:
    server: Server = Server()
    run: Path = Path("runs/x")
    seed: int = 0


def test_config_comes_first_and_done_last(tmp_path):
    directory = tmp_path / "round_0" / "rollout"
    stage = Stage(directory, Args(), {"panel": "abc"})
    config = read_json(directory / "config.json")
    assert config["args"] == {"server": {"model": "a", "concurrency": 16}, "run": "runs/x", "seed": 0}
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
    Stage(tmp_path, Args(), {"panel": "abc"})
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(StageError, match=r"args\.seed: there 0, now 1"):
        Stage(tmp_path, replace(Args(), seed=1), {"panel": "abc"})
    with pytest.raises(StageError, match=r"facts\.panel: there 'abc', now 'def'"):
        Stage(tmp_path, Args(), {"panel": "def"})
    with pytest.raises(StageError, match=r"args\.server\.model: there 'a', now 'b'"):
        Stage(tmp_path, Args(server=Server(model="b")), {"panel": "abc"})
    assert not Stage(tmp_path, Args(server=Server(concurrency=2)), {"panel": "abc"}).finished  # resumed
    assert (tmp_path / "config.json").read_bytes() == before


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

"""A run's folder with its card loads as a data set, whatever the first rows of its files hold."""

from __future__ import annotations

import json

import pytest

from artifacts import data_card
from artifacts.json_io import write_json
from artifacts.trajectory import Trajectory, to_line
from tests.support.helpers import trajectory, turn

FAULT = {"turns": [], "reward": 0.0, "progress": 0.0, "success": False, "end": "env_error"}
IDS = {"ids": [1, 2**31 - 1], "sampled": [0, 1]}
WRONG = [turn("Oops.", "fly", "Nothing happens.", valid=False, errors=["logic"])]
LONG = "x" * 60_000  # `datasets` guesses from the first ten megabytes: 200 such rows are more


def many(count: int, **changes) -> list[Trajectory]:
    return [trajectory(trial=trial, **changes) for trial in range(count)]


# Rows whose first ones do not show what the later ones hold.
FILES = {
    "no ids, then ids": [*many(200, task=LONG), trajectory(trial=999, **IDS)],
    "ids, then none": [*many(200, task=LONG, **IDS), trajectory(trial=999)],
    "no mistakes, then some": [*many(200, task=LONG), trajectory(trial=999, turns=WRONG)],
    "no turns, then some": [*many(200, task=LONG, **FAULT), trajectory(trial=999)],
    "faults alone": many(2, **FAULT),
    "lines within a text": [trajectory(task="a\u2028b\u2029c\x85d\x00e"), trajectory(trial=1, **IDS)],
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """datasets.load_dataset with a cache of its own and no network."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (requirements/tracking.txt)")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return lambda *names, **how: datasets.load_dataset(*map(str, names), cache_dir=str(tmp_path / "cache"), **how)


def stage(run, name: str, rows, **facts):
    folder = run / name
    folder.mkdir(parents=True)
    (folder / "trajectories.jsonl").write_bytes(b"".join(map(to_line, rows)))
    config = {"args": {"seed": 3}, "facts": facts, "git": {"commit": "c" * 40, "dirty": True}}
    write_json(folder / "config.json", config)
    write_json(folder / "done.json", {})


def as_json(row: Trajectory) -> dict:
    return json.loads(to_line(row))


@pytest.mark.parametrize("what", FILES)
def test_a_file_loads_whatever_its_first_rows_hold(what, tmp_path, load):
    run = tmp_path / "run"
    stage(run, "round_0/rollout", FILES[what])
    data_card.main(data_card.Args(run=run))
    rows = load(run, "rollout", split="round_0")
    assert len(rows) == len(FILES[what])
    assert rows[0] == as_json(FILES[what][0]) and rows[len(rows) - 1] == as_json(FILES[what][-1])
    alone = load("json", data_files=str(run / "round_0/rollout/trajectories.jsonl"), features=rows.features)
    assert alone["train"][len(rows) - 1] == as_json(FILES[what][-1])


def test_without_the_card_such_a_file_does_not_load(tmp_path, load):
    """Why there is a card; once this fails, `datasets` reads them by itself."""
    stage(tmp_path, "rollout", FILES["no ids, then ids"])
    with pytest.raises(Exception, match="generating the dataset"):
        load("json", data_files=str(tmp_path / "rollout/trajectories.jsonl"))


def test_a_run_is_a_configuration_per_stage_with_a_split_per_round(tmp_path, load):
    run = tmp_path / "a3t"
    stage(run, "round_0/rollout", many(2, **IDS), panel="gen_train-120", panel_sha256="d" * 64)
    stage(run, "round_0/actre", [])
    stage(run, "round_10/rollout", many(3))
    stage(run, "round_10/evaluate_x.y", many(1), panels={"gen_valid-100": "e" * 64}, adapter="f" * 64)
    stage(run, "refine", many(4, turns=WRONG))
    stage(run, "actre/demonstrations", many(5))
    (run / "round_11/rollout").mkdir(parents=True)
    (run / "round_11/rollout/trajectories.jsonl").write_bytes(to_line(trajectory()) + b'{"schema"')  # at work
    data_card.main(data_card.Args(run=run))
    found = {
        name: {split: len(rows) for split, rows in load(run, name).items()}
        for name in ("rollout", "evaluate_x.y", "refine", "demonstrations")
    }
    assert found == {
        "rollout": {"round_0": 2, "round_10": 3},
        "evaluate_x.y": {"round_10": 1},
        "refine": {"train": 4},
        "demonstrations": {"actre": 5},
    }
    with pytest.raises(ValueError, match="actre"):  # empty, so it is no configuration
        load(run, "actre")


def test_the_card_says_what_is_there_and_how_it_was_made(tmp_path):
    run = tmp_path / "a3t"
    played = trajectory(task_id="gen_train/pick_and_place_simple-Mug-None-Desk-1/trial_2")
    stage(run, "round_0/rollout", [trajectory(), played], panel="gen_train-120", panel_sha256="d" * 64)
    stage(run, "round_0/evaluate", [trajectory()], panels={"gen_valid-100": "e" * 64}, adapter="f" * 64)
    write_json(run / "run.json", {"model": "/home/me/secret/mistral", "base": "b" * 64})
    text = data_card.card(run)
    assert "| round_0/rollout | 2 | 2 | react 2 | success 2 |" in text
    assert f"| round_0/rollout | gen_train-120 ({'d' * 16}) | - | 3 | {'c' * 12} and changes |" in text
    assert f"| round_0/evaluate | gen_valid-100 ({'e' * 16}) | {'f' * 16} | 3 |" in text
    assert "- model: `mistral`" in text and "secret" not in text and f"- base: `{'b' * 64}`" in text
    assert "license: other" in text and "Licence: not chosen yet" in text
    assert "Trained tasks that are evaluated too: 1 of round_0/rollout play tasks of round_0/evaluate." in text


def test_a_config_of_another_program_lacks_what_the_card_then_leaves_out(tmp_path):
    stage(tmp_path, "rollout", many(1))
    write_json(tmp_path / "rollout/config.json", {"framework": "another"})
    assert "| rollout | - | - | - | - |" in data_card.card(tmp_path)


def test_a_stage_directory_has_a_card_too(tmp_path, load):
    stage(tmp_path, "refine", many(3))
    data_card.main(data_card.Args(run=tmp_path / "refine"))
    assert len(load(tmp_path / "refine", split="train")) == 3


def test_an_edited_card_is_never_replaced(tmp_path):
    stage(tmp_path, "rollout", many(1))
    data_card.main(data_card.Args(run=tmp_path))
    (tmp_path / "README.md").write_text("my licence")
    with pytest.raises(ValueError, match="README.md is there already"):
        data_card.main(data_card.Args(run=tmp_path))
    assert (tmp_path / "README.md").read_text() == "my licence"


def test_a_run_without_finished_trajectories_is_refused(tmp_path):
    stage(tmp_path, "rollout", [])
    for run, said in ((tmp_path / "no", "no such run"), (tmp_path, "no finished stage with trajectories")):
        with pytest.raises(ValueError, match=said):
            data_card.main(data_card.Args(run=run))
    assert not (tmp_path / "README.md").exists()

"""Logs written by artifacts/inspect_log.py, read back by Inspect's own reader."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from artifacts import inspect_log
from artifacts.inspect_log import player
from artifacts.json_io import write_json
from artifacts.trajectory import to_line
from tests.support.helpers import trajectory, turn
from tests.support.rooms import OPENING, TASK

LOST = {"success": False, "reward": 0.25, "progress": 0.5, "end": "stuck"}


@pytest.fixture
def read():
    pytest.importorskip("inspect_ai", reason="inspect-ai is not installed (requirements/tracking.txt)")
    from inspect_ai.log import read_eval_log

    return read_eval_log


def stage(run, name: str, *rows, finished: bool = True):
    folder = run / name
    folder.mkdir(parents=True)
    (folder / "trajectories.jsonl").write_bytes(b"".join(map(to_line, rows)))
    facts = {"adapter": "f" * 64, "panels": {"gen_valid-100": "e" * 64}}
    config = {"args": {"model": "models/tiny-alfworld", "server": {"url": None}}, "facts": facts}
    write_json(folder / "config.json", config | {"git": {"commit": "c" * 40, "dirty": False}})
    if finished:
        write_json(folder / "done.json", {"seconds": 60.0})


def test_inspect_reads_every_trajectory_with_its_messages_marks_and_scores(tmp_path, read):
    turns = [
        turn("I look.\nOnce more.", "look", "You see a desk."),
        turn("", "go to desk 1", "You are there.", thought_by="actre", action_by="sampled"),
        turn("Wrong.", "fly", "Nothing happens.", valid=False, errors=["parameter", "logic"]),
    ]
    fault = trajectory(trial=2, **(LOST | {"end": "env_error"}))
    stage(tmp_path, "round_1/actre", trajectory(), trajectory(trial=1, turns=turns, source="actre", **LOST), fault)
    stage(tmp_path, "round_0/actre")  # empty
    inspect_log.main(inspect_log.Args(run=tmp_path))
    [path] = (tmp_path / "inspect").iterdir()
    log = read(path)
    assert path.name == "round_1_actre.eval" and log.status == "success" and log.eval.task == "round_1/actre"
    assert log.eval.model == "tiny-alfworld+ffffffff" and log.eval.revision.commit == "c" * 40
    assert log.eval.metadata["panels"] == {"gen_valid-100": "e" * 64}
    assert (log.eval.dataset.samples, log.eval.config.epochs) == (1, 3)
    assert datetime.fromisoformat(log.stats.completed_at) - datetime.fromisoformat(log.eval.created) >= timedelta(0, 60)
    assert {each.name: each.metrics["mean"].value for each in log.results.scores} == {
        "success": 0.5,
        "reward": 0.625,
        "progress": 0.75,
    }
    assert (log.results.total_samples, log.results.completed_samples) == (3, 2)
    won, lost, broken = log.samples
    assert [(each.id, each.epoch) for each in log.samples] == [(TASK, 1), (TASK, 2), (TASK, 3)]
    assert {name: score.value for name, score in lost.scores.items()} == {"success": 0, "reward": 0.25, "progress": 0.5}
    assert broken.scores is None and broken.error.message == "env_error" and won.error is None
    assert lost.metadata["end"] == "stuck" and lost.metadata["task"] == "put a mug in desk"
    counts = {name: lost.metadata[name] for name in ("turns", "refused_actions", "sampled_actions", "mistakes")}
    assert counts == {"turns": 3, "refused_actions": 1, "sampled_actions": 1, "mistakes": 1}
    assert [message.role for message in lost.messages] == ["user", *["assistant", "user"] * 3]
    assert lost.input == lost.messages[0].text == OPENING
    spoken, shown = lost.messages[1::2], lost.messages[2::2]
    assert [message.content[0].reasoning for message in spoken[::2]] == ["I look.\nOnce more.", "Wrong."]
    assert [message.text for message in spoken] == ["look", "go to desk 1", "fly"]
    assert [message.text for message in shown] == ["You see a desk.", "You are there.", "Nothing happens."]
    assert [message.source for message in spoken] == ["generate", "input", "generate"]
    assert spoken[0].metadata is None and spoken[1].metadata == {"thought_by": "actre", "action_by": "sampled"}
    assert spoken[2].metadata == {"valid": False, "errors": ["parameter", "logic"]}


def test_strange_text_comes_back_unchanged(tmp_path, read):
    strange = 'a\u2028b\u2029c\x85d\x00\x1b[31m "quote" \\ é \U0001f9f9'
    stage(tmp_path, "rollout", trajectory(task=strange, turns=[turn(strange, strange, strange)]))
    inspect_log.main(inspect_log.Args(run=tmp_path))
    [sample] = read(tmp_path / "inspect" / "rollout.eval").samples
    [_, spoken, shown] = sample.messages
    assert sample.metadata["task"] == spoken.content[0].reasoning == spoken.text == shown.text == strange


def test_a_stage_at_work_is_logged_as_far_as_it_is_and_again_when_it_is_finished(tmp_path, read):
    stage(tmp_path, "rollout", trajectory(), finished=False)
    path = tmp_path / "rollout" / "trajectories.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + to_line(trajectory(trial=1))[:-9])
    inspect_log.main(inspect_log.Args(run=tmp_path))
    log = read(tmp_path / "inspect" / "rollout.eval")
    assert log.status == "started" and len(log.samples) == 1
    path.write_bytes(whole + to_line(trajectory(trial=1)))
    write_json(tmp_path / "rollout" / "done.json", {})
    inspect_log.main(inspect_log.Args(run=tmp_path))
    log = read(tmp_path / "inspect" / "rollout.eval")
    assert log.status == "success" and len(log.samples) == 2
    path.write_bytes(whole[:-9] + b"\n" + whole)
    with pytest.raises(ValueError, match="trajectories.jsonl:1: not a trajectory record"):
        inspect_log.main(inspect_log.Args(run=tmp_path))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "unknown"),
        (
            {"args": {"model": "/x/mistral", "server": {"url": None, "model": ""}}, "facts": {"adapter": None}},
            "mistral",
        ),
        ({"args": {"model": "/x/mistral", "server": {"url": "http://h", "model": "gpt"}}}, "gpt"),
        ({"args": {"model": "/x/mistral", "server": {"url": "http://h", "model": ""}}}, "unknown"),
    ],
)
def test_a_log_is_named_after_who_played(config, name):
    assert player(config) == name


def test_a_run_without_trajectories_is_refused(tmp_path):
    pytest.importorskip("inspect_ai", reason="inspect-ai is not installed (requirements/tracking.txt)")
    for run, said in ((tmp_path / "no", "no such run"), (tmp_path, "holds no trajectories")):
        with pytest.raises(ValueError, match=said):
            inspect_log.main(inspect_log.Args(run=run))


def test_without_inspect_the_command_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package inspect-ai.*pip install --constraint .* inspect-ai$"):
        inspect_log.Args().check()

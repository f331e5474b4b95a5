"""Conversations out and in: a round trip, samples as AgentRefine's and AgentGym's sets have them, and bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrefine import verify
from agentrefine.conversations import ANSWER_FORM, Args, Conversation, Message, main, to_conversation, to_trajectory
from artifacts.stage import StageError
from artifacts.trajectory import read_trajectories, write_file
from tests.support.helpers import trajectory, turn
from tests.support.planted_refine import kitchen, shell

REFINE = {
    "id": "refine_17",
    "conversations": [
        {"from": "human", "loss": False, "value": "A night watch.\nGoal: lock the east door.\nActions: lock {door}"},
        {"from": "gpt", "loss": False, "value": "Thought: I lock it.\nAction: lock door"},
        {"from": "human", "loss": False, "value": "Which door? There are east and west."},
        {"from": "gpt", "loss": True, "value": "Thought: The east one.\nAction: lock east"},
    ],
}
GYM = {
    "item_id": "alfworld_12",
    "conversations": [
        {"from": "human", "loss": None, "value": "Interact with a household. Your response should use the form ..."},
        {"from": "gpt", "loss": False, "value": "OK. I'll do my best."},
        {
            "from": "human",
            "loss": None,
            "value": "You are in a room.\nYour task is to: put a mug in desk.\nYou can: look",
        },
        {"from": "gpt", "loss": True, "value": "Thought:\nI need a mug.\nIt may be here.\n\nAction:\ngo to desk 1"},
        {"from": "human", "loss": None, "value": "On the desk 1, you see a mug 1."},
        {"from": "gpt", "loss": None, "value": "look"},
        {"from": "human", "loss": None, "value": "Nothing."},
    ],
}


def write_stage(directory: Path, rows: list) -> Path:
    directory.mkdir()
    write_file(directory / "trajectories.jsonl", rows)
    (directory / "done.json").write_text("{}\n")
    return directory


def write_lines(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def imported(path: Path, out: Path) -> list:
    main(Args(import_=path, out=out))
    return list(read_trajectories(out / "trajectories.jsonl"))


def test_round_trip(tmp_path):
    rows = [verify.to_trajectory(*pair(), split="made", task_id=pair.__name__, seed=0) for pair in (kitchen, shell)]
    source = write_stage(tmp_path / "refine", rows)
    main(Args(export=source, out=tmp_path / "out.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["id", "conversations"]] * 2
    losses = [message["loss"] for message in lines[0]["conversations"] if message["from"] == "gpt"]
    assert losses == [True, False, True, False, True, True]
    first = lines[0]["conversations"][0]
    assert first["from"] == "human" and first["loss"] is False and first["value"].endswith(ANSWER_FORM)
    assert "chop {food} with {tool}" in first["value"] and "Put the chopped red onion" in first["value"]
    assert lines[0]["conversations"][-1]["from"] == "gpt"  # chat trainers refuse an odd number of messages
    back = imported(tmp_path / "out.jsonl", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "done.json").read_text())["mistakes"] == 4
    for row, again in zip(rows, back, strict=True):
        assert (again.task_id, again.task, again.source) == (row.task_id, row.task, "refine")
        assert again.first_observation == row.first_observation and again.success
        for old, new in zip(row.turns, again.turns, strict=True):
            assert (new.thought, new.action, bool(new.errors)) == (old.thought, old.action, bool(old.errors))
            assert new.valid == old.valid and (new.observation == old.observation or old is row.turns[-1])
    main(Args(export=tmp_path / "back", out=tmp_path / "again.jsonl"))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


text = st.text(st.characters(exclude_categories=["Cs"])).map(str.strip).filter(lambda t: "Action:" not in t)


@given(st.lists(st.tuples(text, text, text, st.booleans()), min_size=1, max_size=4), text)
def test_any_texts_survive(played, opening):
    turns = [turn(f"{t}.", a, o, errors=["logic"] if e else []) for t, a, o, e in played]
    made = to_conversation(trajectory(turns=turns, first_observation=opening, trial=2))
    messages = [Message(m["from"], m["loss"], m["value"]) for m in made["conversations"]]
    back = to_trajectory(Conversation(messages, id=made["id"]), split="x", trial=0, where="x")
    assert back.first_observation == opening and made["id"].endswith("#2")
    assert [(t.thought.removeprefix("Thought:").strip(), t.action, bool(t.errors)) for t in back.turns] == [
        (f"{t}.".removeprefix("Thought:").strip(), a, e) for t, a, _, e in played
    ]


def test_samples_as_released(tmp_path):
    refine, gym = sorted(
        imported(write_lines(tmp_path / "set.jsonl", REFINE, GYM), tmp_path / "lines"),
        key=lambda row: -len(row.task_id),
    )[::-1]
    assert refine.task_id == "refine_17" and refine.task == "lock the east door." and refine.split == "set"
    assert [(t.action, t.errors, t.valid) for t in refine.turns] == [
        ("lock door", ["parameter", "place", "logic"], False),
        ("lock east", [], True),
    ]
    assert refine.turns[0].observation.startswith("Which door?") and refine.turns[1].observation == ""
    assert gym.task_id == "alfworld_12" and gym.task == "put a mug in desk."
    assert gym.first_observation.startswith("Interact") and "You are in a room." in gym.first_observation
    assert [(t.thought, t.action, t.errors, t.observation) for t in gym.turns] == [
        ("I need a mug.\nIt may be here.", "go to desk 1", [], "On the desk 1, you see a mug 1."),
        ("", "look", [], "Nothing."),
    ]
    array = tmp_path / "set.json"
    array.write_text(json.dumps([GYM, GYM, REFINE], indent=1))
    rows = imported(array, tmp_path / "array")
    assert [(row.task_id, row.trial) for row in rows] == [("alfworld_12", 0), ("alfworld_12", 1), ("refine_17", 0)]


def changed(number: int, **fields) -> dict:
    row = json.loads(json.dumps(REFINE))
    row["conversations"][number] |= fields
    return row


BAD = {
    "cut off": (json.dumps(REFINE)[:-30], "no conversation: JSON is malformed"),
    "empty line": ("", "no conversation"),
    "a list": ("[1]", "no conversation"),
    "no conversations": ({"id": "x"}, "missing required field `conversations`"),
    "no id": ({"conversations": REFINE["conversations"]}, "no id; expected a key id or item_id"),
    "another role": (changed(1, **{"from": "system"}), "Invalid enum value 'system'"),
    "value is null": (changed(2, value=None), "Expected `str`, got `null`"),
    "loss is a number": (changed(1, loss=1), "Expected `bool | null`, got `int`"),
    "gpt first": ({"id": "x", "conversations": REFINE["conversations"][1:]}, "message 0 is from gpt, expected human"),
    "human twice": (changed(1, **{"from": "human"}), "message 1 is from human, expected gpt"),
    "no answer": ({"id": "x", "conversations": REFINE["conversations"][:1]}, "1 messages, expected at least one"),
    "no messages": ({"id": "x", "conversations": []}, "0 messages, expected at least one"),
    "greeting alone": ({"id": "x", "conversations": GYM["conversations"][:3]}, "1 messages, expected at least one"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_and_nothing_written(tmp_path, name):
    line, message = BAD[name]
    path = write_lines(tmp_path / "set.jsonl", GYM, line, REFINE)
    with pytest.raises(ValueError) as caught:
        imported(path, tmp_path / "out")
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_arrays_and_empty_files(tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps([GYM, {"id": 3}]))
    with pytest.raises(ValueError, match=r"set.json:\[1\]: got .* missing required field"):
        imported(path, tmp_path / "out")
    path.write_text(json.dumps([GYM])[:-1])
    with pytest.raises(ValueError, match="starts as a JSON array but is not one"):
        imported(path, tmp_path / "out")
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        imported(path, tmp_path / "out")


def test_nothing_is_replaced(tmp_path, capsys):
    source = write_stage(tmp_path / "stage", [trajectory(), trajectory(trial=1, success=False, reward=0.0)])
    out = tmp_path / "out.jsonl"
    main(Args(export=source, out=out))
    assert "1 conversations; skipped 1 of 2 trajectories that did not succeed" in capsys.readouterr().out
    with pytest.raises(StageError, match="already exists"):
        main(Args(export=source, out=out))
    (source / "done.json").unlink()
    with pytest.raises(StageError, match="is not finished"):
        main(Args(export=source, out=tmp_path / "other.jsonl"))
    imported(out, tmp_path / "back")
    imported(out, tmp_path / "back")
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(StageError, match="other settings"):
        imported(write_lines(out, GYM), tmp_path / "back")
    with pytest.raises(StageError, match="either --export DIRECTORY or --import FILE"):
        main(Args(out=out))

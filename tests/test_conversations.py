"""Conversations out and in: what we export comes back whole, samples as others release them, and bad files."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrefine import verify
from agentrefine.conversations import ANSWER_FORM, Args, Row, main, to_conversation, to_trajectory
from agentrefine.teacher import make_trajectory, teach
from artifacts.cli import parse
from artifacts.json_io import parse_json
from artifacts.stage import StageError
from artifacts.trajectory import Trajectory, read_trajectories, write_file
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


def back(row: Trajectory) -> Trajectory:
    """What an import makes of the line that an export writes."""
    return to_trajectory(parse_json(msgspec.json.encode(to_conversation(row)), Row), split="x", name="x", where="x")


def test_round_trip(tmp_path):
    rows = [verify.to_trajectory(*pair(), split="made", task_id=pair.__name__, seed=0) for pair in (kitchen, shell)]
    source = write_stage(tmp_path / "refine", rows)
    main(Args(export=source, out=tmp_path / "out.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["id", "conversations", "a3t"]] * 2
    losses = [message["loss"] for message in lines[0]["conversations"] if message["from"] == "gpt"]
    assert losses == [True, False, True, False, True, True]
    first = lines[0]["conversations"][0]
    assert first["from"] == "human" and first["loss"] is False and first["value"].endswith(ANSWER_FORM)
    assert "chop {food} with {tool}" in first["value"] and "Put the chopped red onion" in first["value"]
    assert lines[0]["conversations"][-1]["from"] == "gpt"  # chat trainers refuse an odd number of messages
    again = imported(tmp_path / "out.jsonl", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "done.json").read_text())["mistakes"] == 4
    assert again == rows  # the last observation and the kinds of mistakes too
    main(Args(export=tmp_path / "back", out=tmp_path / "again.jsonl"))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_all_synthetic_trajectories_come_back_with_their_tasks():
    for number in range(20):
        task_id = f"syn_train/{number:05d}"
        row = make_trajectory(task_id, teach(task_id, np.random.default_rng(number)), seed=number)
        assert back(row) == row


def test_rollouts_come_back_whole_but_for_their_ids():
    for row in (
        trajectory(trial=3, ids=[5, 6], sampled=[0, 1]),
        trajectory(env="webshop", task="buy tea", first_observation="WebShop [SEP] Instruction: [SEP] buy tea"),
        trajectory(turns=[turn("", "look", "", valid=False)], task="", first_observation=""),
        trajectory(reward=0.5, progress=0.75, seed=9, source="actre"),
    ):
        assert back(row) == msgspec.structs.replace(row, ids=[], sampled=[])


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    [
        "Action: a\nAction: b",
        "\nAction: ",
        "Thought: Thought: x",
        " look ",
        ANSWER_FORM,
        "OK.",
        "Observation: x",
        "\r\n\t",
    ]
)
PLAYED = st.builds(
    lambda thought, action, observation, errors: turn(thought, action, observation, errors=errors, valid=not errors),
    TEXT,
    TEXT,
    TEXT,
    st.lists(st.sampled_from(["parameter", "place", "logic"]), max_size=2, unique=True),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PLAYED, min_size=1, max_size=4), TEXT, TEXT, st.integers(0, 3))
def test_any_texts_come_back_whole(turns, task, opening, trial):
    row = trajectory(turns=turns, task=task, first_observation=opening, task_id=f"x#{trial}", trial=trial)
    assert back(row) == row


def test_what_was_edited_in_the_messages_counts(tmp_path):
    row = trajectory(
        turns=[turn("I look.", "look", "A mug."), turn("I take it.", "take mug", "Taken.", errors=["place"])]
    )
    line = json.loads(msgspec.json.encode(to_conversation(row)))
    said = line["conversations"]
    said[1]["value"], said[2]["value"], said[3]["loss"] = "Thought: I look about.\nAction: look", "Two mugs.", True
    [edited] = imported(write_lines(tmp_path / "a.jsonl", line), tmp_path / "a")
    assert [(t.thought, t.observation, t.errors) for t in edited.turns] == [
        ("I look about.", "Two mugs.", []),
        ("I take it.", "Taken.", []),
    ]
    said[1]["value"], said[1]["loss"] = "Thought: I wait.\nAction: wait", False
    [edited] = imported(write_lines(tmp_path / "b.jsonl", line), tmp_path / "b")
    assert (edited.turns[0].action, edited.turns[0].errors) == ("wait", ["parameter", "place", "logic"])
    del said[2:]
    with pytest.raises(ValueError, match="c.jsonl:1: 2 messages, but `a3t` is of 2 turns; remove `a3t`"):
        imported(write_lines(tmp_path / "c.jsonl", line), tmp_path / "c")
    line["conversations"], line["a3t"]["schema"] = said * 2, 7
    with pytest.raises(ValueError, match="d.jsonl:1: `a3t` is of schema 7"):
        imported(write_lines(tmp_path / "d.jsonl", line), tmp_path / "d")


def test_two_exports_in_one_file_are_trials_of_one_task(tmp_path):
    line = msgspec.json.encode(to_conversation(trajectory(trial=1))).decode()
    rows = imported(write_lines(tmp_path / "two.jsonl", line, line), tmp_path / "two")
    assert [row.trial for row in rows] == [1, 2]


# ---- what others release ---------------------------------------------------------------------------------------------


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


def one(tmp_path, row: dict) -> Trajectory:
    """What is imported from a file of one row."""
    tmp_path.mkdir(exist_ok=True)
    [read] = imported(write_lines(tmp_path / "one.jsonl", row), tmp_path / "one")
    return read


def pairs(*texts: str, keys=("from", "value"), roles=("human", "gpt")) -> list[dict]:
    return [{keys[0]: roles[index % 2], keys[1]: text} for index, text in enumerate(texts)]


SHOPPING = (
    "You shop on the web. Use this form:\nThought: ...\nAction: click[something]",
    "OK",
    "WebShop [SEP] Instruction: [SEP] i need green tea, and price lower than 20.00 dollars [SEP] Search",
    "Thought: I search for it.\nAction: search[green tea]",
    "Observation: Instruction: [SEP] i need green tea [SEP] Back to Search [SEP] B01",
    "Thought: The first one.\nAction: click[b01]",
    "Observation: Buy Now",
    "Thought: It fits.\nAction: click[buy now]",
)


@pytest.mark.parametrize(
    "keys, roles", [(("from", "value"), ("human", "gpt")), (("role", "content"), ("user", "assistant"))]
)
@pytest.mark.parametrize("field", ["conversations", "messages"])
def test_rows_without_loss_are_read_in_either_naming(tmp_path, field, keys, roles):
    row = one(tmp_path, {"id": "webshop_0", "reward": 0.8, field: pairs(*SHOPPING, keys=keys, roles=roles)})
    assert row.task_id == "webshop_0" and row.task == "i need green tea, and price lower than 20.00 dollars"
    assert row.first_observation.startswith("You shop") and "OK" not in row.first_observation
    assert [(t.thought, t.action, t.errors) for t in row.turns] == [
        ("I search for it.", "search[green tea]", []),
        ("The first one.", "click[b01]", []),
        ("It fits.", "click[buy now]", []),
    ]
    assert row.turns[1].observation == "Buy Now"  # our own rendering writes the label


def test_upper_case_labels_are_labels(tmp_path):
    said = pairs("A house.\nYour task is to: look.", "THOUGHT: I look.\n ACTION: look", "A mug.", "ACTION: take mug 1")
    row = one(tmp_path, {"id": "alfworld_0", "conversations": said})
    assert [(t.thought, t.action) for t in row.turns] == [
        ("I look.", "look"),
        ("", "take mug 1"),
    ] and row.task == "look."


@pytest.mark.parametrize(
    "first", [{"role": "system", "content": "You play."}, {"from": "system", "value": "You play."}]
)
def test_a_system_turn_belongs_to_the_opening(tmp_path, first):
    row = one(tmp_path, {"messages": [first, *pairs("Goal: win", "Thought: I go.\nAction: go")]})
    assert row.first_observation == "You play.\n\nGoal: win" and row.task == "win" and row.turns[0].action == "go"
    assert row.task_id == "one/1"  # a row without a name has its number


def test_a_system_key_and_content_in_parts_are_read(tmp_path):
    parts = [{"type": "text", "text": "Your task is to boil water."}, {"type": "text", "text": "A kitchen."}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Action: look", "weight": 0}]
    row = one(tmp_path, {"system": "You play.", "messages": [*said, *pairs("A pot.", "Action: boil")]})
    assert row.first_observation == "You play.\n\nYour task is to boil water.\nA kitchen."
    assert row.task == "boil water." and [bool(t.errors) for t in row.turns] == [True, False]


def test_a_first_command_is_no_agreement(tmp_path):
    row = one(tmp_path, {"conversations": pairs("A room.", "go to desk 1", "A mug.", "take mug 1", "Taken.")})
    assert [t.action for t in row.turns] == ["go to desk 1", "take mug 1"]
    masked = pairs("A room.", "dance", "No.", "Thought: Hm.\nAction: look")
    masked[1]["loss"] = True
    assert [t.action for t in one(tmp_path / "b", {"conversations": masked}).turns] == ["dance", "look"]


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    for name, text in (("a.json", json.dumps([REFINE])), ("b.jsonl", json.dumps(REFINE) + "\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert len(imported(tmp_path / name, tmp_path / name[0])) == 1


# ---- bad files -------------------------------------------------------------------------------------------------------


def changed(number: int, **fields) -> dict:
    row = json.loads(json.dumps(REFINE))
    row["conversations"][number] |= fields
    return row


def with_extra(text: str) -> str:
    """A row with a further key, whose value is `text`."""
    return f'{{"extra": {text}, {json.dumps(REFINE)[1:]}'


BAD = {
    "cut off": (json.dumps(REFINE)[:-30], "is not valid JSON"),
    "empty line": ("", "is not valid JSON"),
    "a list": ("[1]", "Expected `object`, got `array`"),
    "no conversations": ({"id": "x"}, "no `conversations` and no `messages`"),
    "pairs of preference": ({"id": "x", "chosen": [], "rejected": []}, "no `conversations` and no `messages`"),
    "messages are null": ({"id": "x", "conversations": None}, "no `conversations` and no `messages`"),
    "another role": (changed(1, **{"from": "narrator"}), "message 1 is from 'narrator', expected gpt"),
    "no role": ({"id": "x", "messages": [{"content": "x"}]}, "message 0 is from None, expected human"),
    "system in the middle": (changed(1, **{"from": "system"}), "message 1 is from 'system', expected gpt"),
    "no text": (changed(2, value=None), "message 2 has no `value` and no `content`; tool calls are not read"),
    "text is a number": (changed(2, value=3), "Expected `str | null`, got `int` - at `$.conversations[2].value`"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "missing required field `text` - at `$.messages[0].content[0]`",
    ),
    "loss is a number": (changed(1, loss=1), "Expected `bool | null`, got `int`"),
    "name is a list": ({"id": [1], "conversations": []}, "got `array` - at `$.id`"),
    "name of 5,000 digits": (f'{{"id": {"1" * 5000}, "conversations": []}}', "out of range - at `$.id`"),
    "gpt first": ({"id": "x", "conversations": REFINE["conversations"][1:]}, "message 0 is from 'gpt', expected human"),
    "human twice": (changed(1, **{"from": "human"}), "message 1 is from 'human', expected gpt"),
    "no answer": ({"id": "x", "conversations": REFINE["conversations"][:1]}, "1 messages, expected at least one"),
    "no messages": ({"id": "x", "conversations": []}, "0 messages, expected at least one"),
    "greeting alone": ({"id": "x", "conversations": GYM["conversations"][:3]}, "1 messages, expected at least one"),
    "NaN": (with_extra("NaN"), "is not valid JSON"),
    "half an emoji": (with_extra('"\\ud83d"'), "is not valid JSON"),
    "10,000 levels": (with_extra("[" * 10_000 + "]" * 10_000), "is nested too deeply"),
    "another record of ours": (
        {"a3t": {"env": "x"}, "conversations": []},
        "missing required field `split` - at `$.a3t`",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_and_nothing_written(tmp_path, name):
    line, message = BAD[name]
    path = write_lines(tmp_path / "set.jsonl", GYM, line, REFINE)
    with pytest.raises(ValueError) as caught:
        imported(path, tmp_path / "out")
    assert str(caught.value).startswith(f"{path}:2") and message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_arrays_and_empty_files(tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps([GYM, {"id": 3}]))
    with pytest.raises(ValueError, match=r"set.json:\[1\]: no `conversations` and no `messages`"):
        imported(path, tmp_path / "out")
    path.write_text(json.dumps([GYM])[:-1])
    with pytest.raises(ValueError, match="set.json, which starts as a JSON array, is not valid JSON"):
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
    with pytest.raises(ValueError, match="either --export DIRECTORY or --import FILE"):
        parse(Args, "", ["--out", str(out)])


def test_a_foreign_file_or_folder_in_the_way_is_refused(tmp_path):
    """Those of a rollout whose config.json is gone, of another program, and links that lead nowhere."""
    path = write_lines(tmp_path / "set.jsonl", GYM)
    for name in ("trajectories.jsonl", "done.json", "notes.txt"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("kept\n")
        with pytest.raises(ValueError, match="no config.json"):
            imported(path, folder)
        assert [(each.name, each.read_text()) for each in folder.iterdir() if each.name != ".lock"] == [
            (name, "kept\n")
        ]
    with pytest.raises(OSError):
        imported(path, path)
    source = write_stage(tmp_path / "stage", [trajectory()])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StageError, match="already exists"):
        main(Args(export=source, out=tmp_path / "link.jsonl"))


def test_what_is_written_is_renamed_into_place_last(tmp_path, monkeypatch):
    source = write_stage(tmp_path / "stage", [trajectory()])
    out = tmp_path / "new/out.jsonl"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError):
        main(Args(export=source, out=out))
    assert not list(out.parent.iterdir())

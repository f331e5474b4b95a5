"""A world of the user's own through the stages: scripts, panels from files, resumes and refusals, and the page."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import actre
import evaluate
import rollout
import train_pg
from agent.scripted import DemonstratorScript, ScriptedPolicy
from artifacts.cli import parse
from artifacts.json_io import read_json, write_json
from artifacts.stage import StageError, read_run
from artifacts.trajectory import Trajectory, read_trajectories
from envs.make import make_world
from envs.own import Script, load_own
from envs.panel import panel_name, pick_tasks, read_panel, require_trainable
from tests.support.helpers import write_tiny_model
from tests.support.page import save_files, shell_commands

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "your-own-world.md"


class Wander:
    """Goes to the attic forever."""

    def extend(self, text: str) -> None: ...

    def reply(self) -> str:
        return " act[go to attic]\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The page's files, with policies that need no model."""
    for stage in (rollout, actre, evaluate):
        monkeypatch.setattr(stage, "make_policy", lambda *_, **__: ScriptedPolicy(lambda _: Wander()))
    monkeypatch.chdir(ROOT)
    save_files(PAGE, tmp_path)
    return tmp_path / "keys"


@pytest.fixture
def played(folder, model):
    """The arguments of a rollout of four tasks by the page's script."""

    def args(**changes) -> rollout.Args:
        where = {"run": folder / "run", "env": f"{folder}/world.py:Keys", "script": f"{folder}/player.py:Player"}
        return rollout.Args(**({"model": model, "limit": 4} | where | changes))

    return args


def rows(folder: Path) -> list[Trajectory]:
    return list(read_trajectories(folder / "run/round_0/rollout/trajectories.jsonl"))


def interrupt(stage: Path) -> None:
    """Leaves a stage as a kill after its first row does."""
    (stage / "done.json").unlink()
    path = stage / "trajectories.jsonl"
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")


def edit(path: Path, old: str, new: str) -> Path:
    """The same file, edited, in another folder: a process keeps to what it has loaded from a path."""
    there = path.parent / f"edited_{len(list(path.parent.iterdir()))}"
    there.mkdir()
    assert old in path.read_text()
    (there / path.name).write_text(path.read_text().replace(old, new))
    return there / path.name


# ---- scripts ---------------------------------------------------------------------------------------------------------


def test_a_script_s_demonstrations_are_what_round_0_trains_on(folder, played, model):
    rollout.main(played())
    for row in rows(folder):
        assert (row.env, row.source, row.success, row.end, row.ids) == ("keys", "demo", True, "success", [])
        assert {turn.thought_by for turn in row.turns} == {turn.action_by for turn in row.turns} == {"demo"}
        assert row.turns[0].thought == f"I need the {row.task.split()[2]} key. I go to the attic."
    facts = read_json(folder / "run/round_0/rollout/config.json")["facts"]
    assert facts["script"] == load_own(f"{folder}/player.py:Player", Script).facts
    assert facts["panel"] == "train" and facts["world"]["own"]["name"] == "keys" and facts["adapter"] is None
    assert read_run(folder / "run")["env"] == "keys"
    actre.main(actre.Args(run=folder / "run", env=played().env))
    assert read_json(folder / "run/round_0/actre/done.json")["composed"] == 0
    examples, _ = train_pg.collect(train_pg.Args(run=folder / "run", model=model), 0)
    assert {example.trajectory.source for example in examples} == {"demo"} and len(examples) == 4


def test_a_demonstrator_of_the_project_is_a_script_too(tmp_path, model, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.chdir(ROOT)
    script = "envs.alfworld.demonstrator:Demonstrator"
    rollout.main(rollout.Args(run=tmp_path, model=model, limit=3, script=script, max_turns=90))
    found = list(read_trajectories(tmp_path / "round_0/rollout/trajectories.jsonl"))
    assert len(found) == 3 and all(row.success and row.source == "demo" for row in found)


FAILING = [  # a method of a script that fails where the door is red
    (
        "__init__(self, opening)",
        "super().__init__(opening); self.colour != 'red' or 1 / 0",
        "ZeroDivisionError: division",
    ),
    ("observe(self, *seen)", "super().observe(*seen); self.colour != 'red' or 1 / 0", "ZeroDivisionError: division"),
    (
        "decide(self)",
        "return super().decide() if self.colour != 'red' else 1 / 0",
        "ZeroDivisionError: division by zero",
    ),
    ("decide(self)", "if self.colour == 'red': raise SystemExit(0)\n        return super().decide()", "SystemExit: 0"),
    (
        "decide(self)",
        "return super().decide() if self.colour != 'red' else 'go'",
        "decide returned 'go'; expected two texts",
    ),
    (
        "decide(self)",
        "return super().decide() if self.colour != 'red' else ('', None)",
        "TypeError: decide returned ('', No",
    ),
]


@pytest.mark.parametrize(("method", "body", "said"), FAILING)
def test_a_script_that_fails_ends_its_attempts_as_evidence_and_others_go_on(folder, played, capsys, method, body, said):
    script = folder / "failing.py"
    script.write_text(
        f"{(folder / 'player.py').read_text()}\n\nclass Failing(Player):\n    def {method}:\n        {body}\n"
    )
    rollout.main(played(script=f"{script}:Failing", limit=8))
    ends = [(row.task == "open the red door", row.end) for row in rows(folder)]
    assert set(ends) == {(True, "llm_error"), (False, "success")}
    printed = capsys.readouterr().out
    assert (
        "the script failed:" in printed and said in printed and f"llm_error: {sum(red for red, _ in ends)}" in printed
    )


@pytest.mark.parametrize(
    ("script", "changes", "said"),
    [
        (
            "{}/world.py:Keys",
            {},
            r"Keys of .* lacks observe, decide; expected a class with observe\(action, observation\), d",
        ),
        ("{}/plyer.py:Player", {}, r"plyer\.py is no file: did you mean player\.py\?"),
        ("{}/player.py:Playr", {}, r"has no class 'Playr': did you mean Player\?"),
        (
            "{}/player.py:Player",
            {"prompt": PAGE},
            r"--script .* plays without a model; expected no --server\.url and no --pr",
        ),
    ],
)
def test_what_is_no_script_is_refused_before_anything_is_written(folder, played, script, changes, said):
    with pytest.raises(ValueError, match=said):
        played(script=script.format(folder), **changes).check()


def test_a_script_reads_an_answer_that_looks_like_the_harness_s():
    heard = []

    class Player:
        def __init__(self, opening):
            heard.append(opening)

        def observe(self, action, observation):
            heard.append((action, observation))

        def decide(self):
            return ("Hm.", "wave") if len(heard) < 3 else ("", "win")

    script = DemonstratorScript("Observation: A room.\nAction:", player=Player)
    assert script.reply() == " think[Hm.]\n"
    script.extend("Observation: OK.\nAction:")
    assert script.reply() == " act[wave]\n"
    script.extend("Observation: OK.\nAction:")  # of the world, this time
    assert script.reply() == " think[Hm.]\n" and heard == ["A room.", ("wave", "OK.")]
    script.extend("Observation: OK.\nAction:")
    assert script.reply() == " act[wave]\n"
    script.extend("Observation: OK. You wave.\nAction:")
    assert script.reply() == " act[win]\n" and heard[2:] == [("wave", "OK. You wave.")]


# ---- what a run is ---------------------------------------------------------------------------------------------------


def test_a_world_that_is_edited_between_kill_and_resume_is_refused_and_a_moved_one_goes_on(folder, played):
    rollout.main(played())
    before = rows(folder)
    interrupt(folder / "run/round_0/rollout")
    env = f"{edit(folder / 'world.py', 'You cannot do that.', 'No.')}:Keys"
    with pytest.raises(
        StageError, match=r"world\.own\.file is '?[0-9a-f]{12}\.\.\.'? there, '?[0-9a-f]{12}\.\.\.'? now"
    ):
        rollout.main(played(env=env))
    assert len(rows(folder)) == 1
    (folder / "elsewhere").mkdir()
    for name in ("world.py", "player.py"):
        shutil.copy(folder / name, folder / "elsewhere" / name)
    moved = {"env": f"{folder}/elsewhere/world.py:Keys", "script": f"{folder}/elsewhere/player.py:Player"}
    rollout.main(played(**moved))
    assert rows(folder) == before
    with pytest.raises(StageError, match=r"world\.own\.file is"):
        actre.main(actre.Args(run=folder / "run", env=env))
    with pytest.raises(StageError, match=r"env is 'keys' there, 'alfworld' now \(--env\)"):
        actre.main(actre.Args(run=folder / "run"))


def test_a_world_that_is_edited_while_a_killed_stage_rests_is_refused_by_the_command_too(folder, played, model):
    """In processes of their own, the file in its place."""
    words = ["rollout.py", "--run", folder / "run", "--env", played().env, "--script", played().script, "--limit", "3"]
    words = [sys.executable, *map(str, words), "--model", str(model)]
    for status, said in ((0, ""), (2, "world.own.file is"), (0, "3/3 won")):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and said in done.stdout + done.stderr, done.stderr
        world = folder / "world.py"
        text = world.read_text()
        world.write_text(text.removesuffix("# edited\n") if text.endswith("# edited\n") else f"{text}# edited\n")
        if status == 0 and not said:
            interrupt(folder / "run/round_0/rollout")


def test_a_script_that_is_edited_between_kill_and_resume_is_refused(folder, played):
    rollout.main(played())
    interrupt(folder / "run/round_0/rollout")
    script = f"{edit(folder / 'player.py', 'I take it', 'I grab it')}:Player"
    with pytest.raises(StageError, match=r"facts\.script\.file: there [0-9a-f]{12}\.\.\., now [0-9a-f]{12}\.\.\."):
        rollout.main(played(script=script))
    with pytest.raises(StageError, match=r"facts\.script\.class: there 'Player', now None"):
        rollout.main(played(script=None))


def test_an_evaluation_of_an_own_world_is_called_by_its_name_and_by_its_panel(folder, played, model, capsys):
    env = played().env
    args = evaluate.Args(run=folder / "run", env=env, model=model, base=True, limit=3, max_turns=3)
    evaluate.main(args)
    scores = read_json(folder / "run/base/evaluate_keys/scores.json")
    assert list(scores) == ["test"] and scores["test"]["n"] == 3 and scores["test"]["world"]["own"]["name"] == "keys"
    evaluate.main(args)
    assert "nothing to play" in capsys.readouterr().out
    changed = f"{edit(folder / 'world.py', 'You cannot do that.', 'No.')}:Keys"
    with pytest.raises(StageError, match=r"facts\.world\.own\.file: there"):
        evaluate.main(evaluate.Args(run=folder / "run", env=changed, model=model, base=True, limit=3, max_turns=3))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("return content_hash(", "return {}['x'] and content_hash(", r"KeyError: 'x' \(world\.py, line 43\)"),
        ("return ids_of(split)", "return ids_of[split]", r"TypeError: 'function' .* \(world\.py, line 36\)"),
        ("return ids_of(split)", "raise SystemExit(0)", r"SystemExit: 0 \(world\.py, line 36\)"),
    ],
)
def test_a_world_that_fails_before_it_is_played_is_one_sentence_with_the_line(folder, played, model, old, new, said):
    path = edit(folder / "world.py", old, new)
    said = rf"^Keys of {re.escape(str(path))} failed: {said}$"
    with pytest.raises(ValueError, match=said):
        rollout.main(played(env=f"{path}:Keys"))
    with pytest.raises(ValueError, match=said):
        evaluate.main(evaluate.Args(run=folder / "run", env=f"{path}:Keys", model=model, base=True))
    assert not (folder / "run").exists()


# ---- panels ----------------------------------------------------------------------------------------------------------


def panel(folder: Path, text: str | bytes, name: str = "mine.txt") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_panel_is_a_file_anywhere_and_known_by_its_name_and_its_ids(folder, played):
    rollout.main(played(panel=panel(folder, "train/03\ntrain/07\ntrain/21\n"), limit=None))
    assert [row.task_id for row in rows(folder)] == ["train/03", "train/07", "train/21"]
    facts = read_json(folder / "run/round_0/rollout/config.json")["facts"]
    assert facts["panel"] == "mine" and list(facts["content"]) == ["mine (3 tasks)"]
    (folder / "there").mkdir()
    moved = panel(folder / "there", b"\xef\xbb\xbftrain/03\r\ntrain/07\r\ntrain/21")  # as an editor of Windows saves it
    rollout.main(played(panel=moved, limit=None))
    with pytest.raises(StageError, match=r"facts\.panel_sha256: there .*facts\.tasks: there 3, now 2|content"):
        rollout.main(played(panel=panel(folder, "train/03\ntrain/07\n"), limit=None))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "train/07\ntrain/03\n",
            r"mine\.txt:2: got train/03 after train/07; expected sorted ids: LC_ALL=C sort -u -o ",
        ),
        ("train/03\ntrain/03\n", r"mine\.txt:2: got train/03 a second time; expected sorted ids"),
        ("train/03\n\ntrain/07\n", r"mine\.txt:2: got ''; expected a task id, without blanks around it"),
        ("train/03 \ntrain/07\n", r"mine\.txt:1: got 'train/03 '; expected"),
        ("", r"mine\.txt:1: got ''; expected a task id"),
        (b"\xff\xfet\x00r\x00", r"mine\.txt cannot be read as text"),
        ("train/03\ntrain/77\n", r"1 of 2 tasks cannot be played: train/77 \(not in the data\)"),
        ("hard/03\n", r"no split 'hard': expected one of train, test"),
    ],
)
def test_a_panel_file_with_a_mistake_is_one_sentence_with_its_line(folder, played, text, said):
    with pytest.raises(ValueError, match=said):
        rollout.main(played(panel=panel(folder, text)))
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nowhere.txt", r"the panel nowhere\.txt cannot be read as text \(.*No such file"),
        (
            "hard",
            r"'hard' is no panel: expected one that `python -m envs\.panel` lists, a file FILE\.txt of task ids, or a "
            r"split of the world \(no split 'hard': expected one of train, test\); give it by --panel or --panels",
        ),
        ("{}/valid-60.txt", r"valid-60\.txt is called like a panel of the project; expected another name"),
    ],
)
def test_what_is_no_panel_is_one_sentence(folder, played, given, said):
    panel(folder, "train/03\n", "valid-60.txt")
    with pytest.raises(ValueError, match=said):
        rollout.main(played(panel=given.format(folder)))


def test_a_world_without_the_usual_splits_is_asked_for_a_panel(folder, played):
    env = str(edit(folder / "world.py", '"train": TASKS[:48]', '"easy": TASKS[:48]')) + ":Keys"
    with pytest.raises(
        ValueError, match=r"'train' is no panel: .*no split 'train': expected one of easy, test\); give it by --p"
    ):
        rollout.main(played(env=env))
    rollout.main(played(env=env, panel="easy"))
    assert len(rows(folder)) == 4
    sloppy = f"{edit(folder / 'world.py', 'check_split(split, SPLITS)', 'SPLITS[split]')}:Keys"
    with pytest.raises(ValueError, match=r"'hard' is no panel: .*\('hard'\); give it by --panel"):
        rollout.main(played(env=sloppy, panel="hard"))


def test_ids_that_do_not_begin_with_their_split_are_said_so(folder, played):
    env = str(edit(folder / "world.py", "{split}/{number:02d}", "{number:02d}")) + ":Keys"
    with pytest.raises(ValueError, match=r"the split train has a task '00'; expected ids that begin with train/"):
        rollout.main(played(env=env))


def test_a_mistyped_panel_of_the_project_is_told_the_nearest_name():
    with pytest.raises(ValueError, match=r"'valid_sen-140' is no panel: did you mean valid_seen-140\?"):
        pick_tasks("valid_sen-140", None, make_world("pddl"))
    assert panel_name("valid-60") == "valid-60" and pick_tasks("pddl_easy", 3, make_world("pddl"))[0][0].startswith(
        "pddl_e"
    )


def test_what_the_project_evaluates_on_is_not_trained_on_by_a_file_or_a_split(folder, played):
    """valid-60 is drawn from train, so that a panel made of train has it in part."""
    ids = sorted([*read_panel("train-600"), read_panel("valid-60")[7]])
    with pytest.raises(
        ValueError, match=rf"1 tasks of mine\.txt are in the panel valid-60, such as {ids[0].split('/')[0]}/"
    ):
        require_trainable("mine.txt", "alfworld", ids)
    require_trainable("mine.txt", "alfworld", read_panel("train-600"))
    require_trainable("valid-60", "alfworld", read_panel("valid-60"))  # chosen by its name
    require_trainable("mine.txt", played().env, ids)  # ids of another world


def train(folder: Path, inputs: list[str] | None = None) -> None:
    """A trained round 0, as far as an evaluation asks for it."""
    stage = folder / "run/round_0/train_pg"
    (stage / "adapter").mkdir(parents=True)
    write_json(stage / "config.json", {"args": {"inputs": inputs or []}})
    write_json(stage / "done.json", {})
    (stage / "adapter/adapter_model.safetensors").write_bytes(b"")


def test_an_own_panel_that_was_trained_on_in_part_is_refused_and_as_a_whole_is_a_training_score(folder, played, model):
    rollout.main(played(panel=panel(folder, "train/03\ntrain/07\n", "some.txt"), limit=None))
    train(folder)

    def scored(*panels: str, **changes) -> None:
        how = {"run": folder / "run", "env": played().env, "max_turns": 2, "panels": panels}
        evaluate.main(evaluate.Args(**(how | changes)))

    partly = panel(folder, "test/00\ntrain/07\ntrain/08\n", "partly.txt")
    with pytest.raises(
        ValueError, match=r"1 of 3 tasks of .*partly\.txt were played to train round 0, such as train/07; exp"
    ):
        scored(partly)
    with pytest.raises(ValueError, match=r"2 of 48 tasks of train were played to train round 0"):
        scored("train")
    scored("test", panel(folder, "train/03\ntrain/07\n", "seen.txt"), limit=2)
    assert sorted(read_json(folder / "run/round_0/evaluate_keys/scores.json")) == ["seen", "test"]
    scored(partly, base=True)  # which was trained on nothing here
    with pytest.raises(ValueError, match="got panels of one name, .*; expected different ones"):
        scored("test", panel(folder, "test/00\n", "test.txt"), name="x")


def test_tasks_of_inputs_count_as_trained_on(folder, played):
    rollout.main(played(run=folder / "demo"))
    rollout.main(played(panel="test", limit=2))
    train(folder, [str(folder / "demo/round_0/rollout")])
    with pytest.raises(ValueError, match=r"4 of 48 tasks of train were played to train round 0"):
        evaluate.main(evaluate.Args(run=folder / "run", env=played().env, panels=("train",)))


# ---- the page --------------------------------------------------------------------------------------------------------

SMALL = {  # flags that make a command small
    "rollout": ["--limit", "3", "--max-turns", "6"],
    "actre": ["--budget", "1", "--max-turns", "3"],
    "train_pg": ["--epochs", "1", "--learning-rate", "1e-4"],
    "evaluate": ["--limit", "3", "--max-turns", "3"],
    "envs.check": ["--limit", "1"],
    "envs.play": [],
}


def test_the_page_s_commands_run_through_all_stages(tmp_path, model, monkeypatch, capsys):
    """With a random model and a few tasks; envs.play is tested by tests/test_own_world.py."""
    monkeypatch.chdir(ROOT)
    save_files(PAGE, tmp_path)
    keys, ran = tmp_path / "keys", []
    for words in shell_commands(PAGE):
        module, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
        rest = [word.replace("~/", f"{tmp_path}/") for word in rest] + SMALL[module]
        rest += ["--model", str(model)] if module in ("rollout", "actre", "evaluate", "train_pg") else []
        if "--human" in rest:
            continue
        command, stop = (
            importlib.import_module(module),
            contextlib.suppress(SystemExit) if module == "envs.check" else None,
        )
        capsys.readouterr()
        with stop or contextlib.nullcontext():
            command.main(parse(command.Args, "", rest))
        if "--tasks" in rest:  # | head -8 > FILE
            listed = capsys.readouterr().out.splitlines()
            (keys / "eight.txt").write_text("\n".join(listed[:8]) + "\n")
        ran.append(module)
    assert [module for module in ran if "." not in module][:8] == [
        *["rollout", "actre", "train_pg"] * 2,
        *["evaluate"] * 2,
    ]
    assert {path.name for path in (keys / "run").iterdir()} >= {"run.json", "report.html", "base", "round_0", "round_1"}
    for stage in ("round_0/rollout", "round_0/actre", "round_0/train_pg", "round_1/rollout", "round_1/actre"):
        assert (keys / "run" / stage / "done.json").exists(), stage
    assert read_json(keys / "run/round_1/evaluate_keys/scores.json")["test"]["n"] == 3


@pytest.mark.slow
def test_the_page_says_what_its_commands_print(tmp_path):
    """All of it, by bash, in a home of its own."""
    save_files(PAGE, tmp_path)
    script = "".join(re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S))
    env = os.environ | {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, env=env, capture_output=True, input=b"quit\n"
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    rates = {
        folder: json.loads((tmp_path / f"keys/run/{folder}/evaluate_keys/scores.json").read_text())["test"]["success"]
        for folder in ("base", "round_0", "round_1")
    }
    assert rates["base"] == 0 < rates["round_0"] < rates["round_1"], rates

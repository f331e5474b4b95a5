"""A world of the user's own: loaded from a file or a package, checked, played by hand; and every mistake in it said."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from agent.attempt import AttemptSettings, Compose, Job
from agent.loop import PlayLoop
from agent.scripted import DemonstratorScript, ReplayScript, ScriptedPolicy
from envs import check
from envs.check import OWN_PROPERTIES, PROPERTIES, SPLITS, Case, verdict
from envs.make import WORLDS, make_world, own_world, require_base_for, world_name
from envs.own import Script, load_own
from envs.panel import default_panels
from tests.support.page import save_files

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "your-own-world.md"
TASK = "train/00"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The page's files, world.py and player.py."""
    save_files(PAGE, tmp_path)
    return tmp_path / "keys"


@pytest.fixture
def keys(folder) -> str:
    return f"{folder}/world.py:Keys"


def edited(folder: Path, *changes: tuple[str, str], name: str = "world.py") -> Path:
    """A copy of a file with texts replaced."""
    text = (folder / name).read_text()
    for old, new in changes:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    path = folder / f"edited_{name}"
    path.write_text(text)
    return path


def play(make, lines=(), script: Path | None = None, compose: Compose | None = None, tasks=(TASK,)) -> list:
    """The trajectories of a world's tasks, played by fixed lines or by the player of a script's file."""
    player = load_own(f"{script}:Player", Script).cls if script else None
    policy = ScriptedPolicy(
        functools.partial(DemonstratorScript, player=player) if script else lambda _: ReplayScript(lines)
    )
    how = AttemptSettings(
        env="keys", stage="test", round=0, seed=0, max_turns=9, patience=0, temperature=0.0, compose=compose
    )
    return list(PlayLoop([Job(task, 0) for task in tasks], how, make, policy))


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_an_own_world_has_a_name_and_says_what_it_was_loaded_from(folder, keys):
    world = make_world(keys, tell_commands=True)
    digest = hashlib.sha256((folder / "world.py").read_bytes()).hexdigest()
    own = {"name": "keys", "class": "Keys", "file": digest}
    assert world_name(keys) == "keys" and world.facts == {"own": own, "commands": "told"}
    assert world.reset("test/00").text.endswith("You can: go to {room}, take {colour} key, open {colour} door.")
    assert default_panels("train", keys, None) == ("train",) and default_panels("evaluate", keys, None) == ("test",)
    assert [own_world(env) for env in WORLDS] == [None] * len(WORLDS)


def test_a_base_of_one_world_alone_is_refused_in_an_own_one(keys):
    require_base_for(keys, ROOT / "models/tiny-neutral")
    with pytest.raises(
        ValueError, match=r"on alfworld alone.*another --model for .*world\.py:Keys, such as models/tiny-n"
    ):
        require_base_for(keys, ROOT / "models/tiny-alfworld")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("{}/wrld.py:Keys", r"wrld\.py is no file: did you mean world\.py\? expected the Python file that holds the"),
        ("{}/nowhere/zzz.py:Keys", r"zzz\.py is no file: expected the Python file"),
        ("{}/world.py:Kyes", r"has no class 'Kyes': did you mean Keys\? expected one of Keys$"),
        ("{}/world.py:random", r"has no class 'random': expected one of Keys$"),
        ("{}/world.py:content", r"has no class 'content': expected one of Keys$"),
        ("{}/world.py", r"world\.py' names no class; expected FILE\.py:CLASS or package\.module:CLASS"),
        ("{}/world.py:", r"world\.py:' names no class; expected FILE\.py:CLASS or package\.module:CLASS"),
        (":Keys", r"':Keys' names no class"),
        (
            "no.such.module:Keys",
            r"the module no\.such\.module cannot be imported: ModuleNotFoundError: No module named 'no",
        ),
        (
            "{}/player.py:Player",
            r"Player of .* lacks tasks, left_out, fingerprint, reset, step, actions, commands; expected ",
        ),
        ("webshp", r"unknown world 'webshp': did you mean webshop\? expected one of"),
    ],
)
def test_what_is_no_world_is_one_sentence(folder, address, said):
    with pytest.raises(ValueError, match=said):
        make_world(address.format(folder))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "keys"', 'name = "alfworld"', r"has the name 'alfworld'; expected `name = \.\.\.` with lower-case"),
        ('name = "keys"', 'name = "My keys"', r"has the name 'My keys'; expected"),
        ('name = "keys"', "title = 3", r"has the name None; expected"),
        (
            "class Keys:",
            "class Keys",
            r"edited_world\.py cannot be loaded: SyntaxError: .*\(edited_world\.py, line \d+\)",
        ),
        (
            "import json",
            "import jsonn",
            r"cannot be loaded: ModuleNotFoundError: No module named 'jsonn' \(edited_world\.",
        ),
        ("import json", "raise SystemExit(0)", r"cannot be loaded: SystemExit: 0 \(edited_world\.py, line 5\)"),
        ("TASKS[:48]", "TASKS[:1/0]", r"cannot be loaded: ZeroDivisionError: .*\(edited_world\.py, line 13\)"),
        ("def step(", "def stepp(", r"Keys of .* lacks step; expected a class with tasks\(split\), .*step\(action\), "),
        (
            'self.at, self.done = "", False',
            "self.at = [][1]",
            r"Keys\(\) failed: IndexError: .*\(edited_world\.py, line 32\)",
        ),
        ("self.facts = {}", "raise SystemExit(0)", r"Keys\(\) failed: SystemExit: 0 \(edited_world\.py, line 31\)"),
        ("self.facts = {}", "self.facts = []", r"has isolated = False and facts = \[\]; expected True or False, and a"),
        ("self.facts = {}", "pass", r"has isolated = False and facts = None; expected"),
        ("isolated = False", "isolated = None", r"has isolated = None and facts = \{\}; expected True or False"),
        (
            "self.facts = {}",
            "self.facts = {1: {2}}",
            r"Keys\.facts cannot be written as JSON .*; expected texts and numbers",
        ),
    ],
)
def test_a_file_that_cannot_be_played_is_one_sentence_with_the_line(folder, old, new, said):
    path = edited(folder, (old, new))
    with pytest.raises(ValueError, match=said) as error:
        make_world(f"{path}:Keys")
    assert "\n" not in str(error.value)


FACTS = "self.facts = {}  # what a score must also state, such as a version"
SLOTS = '__slots__ = ("facts", "at", "door", "done", "keys", "held")\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (SLOTS, r"has isolated = False and facts = None; expected True or False, and a dictionary"),
        ("facts = property(lambda self: {})\n", r"Keys\.facts cannot be set \(.*\); expected a plain attribute"),
        ("facts = property(lambda self: {}['x'])\n", r"Keys\(\) failed: KeyError: 'x' \(edited_world\.py, line "),
    ],
)
def test_facts_that_are_no_plain_attribute_are_one_sentence(folder, line, said):
    path = edited(folder, ("    isolated = False", f"    {line}    isolated = False"), (FACTS, ""))
    with pytest.raises(ValueError, match=said):
        make_world(f"{path}:Keys")


def test_a_world_with_slots_is_loaded_and_checked(folder):
    path = edited(folder, ("    isolated = False", f"    {SLOTS}    isolated = False"))
    assert make_world(f"{path}:Keys").facts.keys() == {"own"} and found(path) == {}
    last = ("valid, text = action", "self.door = action\n        valid, text = action")
    assert "changed door" in found(edited(folder, last, name=path.name))["bears_any_text"]


def test_a_module_that_exits_while_it_is_imported_is_one_sentence(folder, monkeypatch):
    (folder / "keys_that_exit.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(
        ValueError, match=r"the module keys_that_exit cannot be imported: SystemExit: 0 \(keys_that_exit"
    ):
        make_world("keys_that_exit:Keys")


def test_data_is_given_to_a_class_that_takes_it(folder, keys):
    path = edited(folder, ("def __init__(self):", "def __init__(self, data=None):"), ("= {}  #", "= {'data': data}  #"))
    assert (
        make_world(f"{path}:Keys", data="x").facts["data"] == "x" and make_world(f"{path}:Keys").facts["data"] is None
    )
    with pytest.raises(ValueError, match=r"Keys\(data='x'\) failed: TypeError: .*unexpected keyword argument 'data'"):
        make_world(keys, data="x")


def test_a_package_offers_a_world_by_an_entry_point_or_its_module(folder, monkeypatch):
    (folder / "keys_in_a_package.py").write_text((folder / "world.py").read_text())
    information = folder / "keys_in_a_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: keys-in-a-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[a3t.worlds]\ndoors = keys_in_a_package:Keys\n")
    monkeypatch.syspath_prepend(folder)
    for env in ("doors", "keys_in_a_package:Keys"):
        assert world_name(env) == "keys" and make_world(env).tasks("test")[0] == "test/00"
    with pytest.raises(
        ValueError, match=r"unknown world 'dors': did you mean doors\? expected one of .*, jericho, doors, or"
    ):
        make_world("dors")


# ---- playing ---------------------------------------------------------------------------------------------------------


def test_an_isolated_world_is_played_in_a_process_of_its_own(folder):
    path = edited(folder, ("isolated = False", "isolated = True"), ("def look", "def where(self): ...\n\n    def look"))
    make = functools.partial(make_world, f"{path}:Keys", file=own_world(f"{path}:Keys").sha256)
    [trajectory] = play(make, script=folder / "player.py")
    assert trajectory.success and trajectory.end == "success"


def test_an_isolated_world_that_is_edited_while_it_is_played_is_not_mixed_with_what_it_was(folder, capfd):
    path = edited(folder, ("isolated = False", "isolated = True"))
    make = functools.partial(make_world, f"{path}:Keys", file=own_world(f"{path}:Keys").sha256)
    path.write_text(path.read_text().replace("The door is open.", "The door opens."))
    [trajectory] = play(make, script=folder / "player.py")
    assert trajectory.end == "env_error" and trajectory.turns == []
    assert "edited_world.py was changed while Keys is played; play it again in a new run" in capfd.readouterr().err


FAULTS = [
    ("task = f", "1 / 0\n        task = f", "ZeroDivisionError"),
    ("valid, text =", "1 / 0\n        valid, text =", "ZeroDivisionError"),
    ("valid, text =", "raise SystemExit(0)\n        valid, text =", "SystemExit: 0"),
    ("        return Result(\n", "        return dict(\n", "TypeError: step returned {'observation': "),
    ("return Observation(text=text, task=task)", "return text", "TypeError: reset returned 'You are in the hall. "),
    ("reward=float(self.done)", "reward=2.0", "ValueError: got reward 2.0 and progress 0.0; expected both from 0 to 1"),
    ("reward=float(self.done)", "reward=float('nan')", "ValueError: got reward nan"),
    ("reward=float(self.done)", "reward=self.done", "TypeError: Result.reward is bool; expected float"),
    ("success=self.done", "success=0", "TypeError: Result.success is int; expected bool"),
    ("observation=text", "observation=None", "TypeError: Result.observation is NoneType; expected str"),
    ("task=task)", "task=None)", "TypeError: Observation.task is NoneType; expected str"),
    ("return sorted(found)", "return ()", "TypeError: actions returned (); expected a list of one command or more"),
    ("return sorted(found)", "return []", "TypeError: actions returned []; expected a list of one command or more"),
]


@pytest.mark.parametrize(("old", "new", "said"), FAULTS)
def test_a_fault_of_the_world_ends_its_attempt_as_evidence_and_says_what_was_wrong(folder, capsys, old, new, said):
    path = edited(folder, (old, new))
    if "actions" in said:  # which `step` asks too
        text = path.read_text().replace("action in self.actions()", "True")
        path.write_text(text)
    compose = Compose(probability=1.0, reason="empty")
    done = play(functools.partial(make_world, f"{path}:Keys"), [" act[go to attic]\n"] * 9, compose=compose)
    assert [trajectory.end for trajectory in done] == ["env_error"]
    assert said in capsys.readouterr().out


# ---- the check -------------------------------------------------------------------------------------------------------


def found(path: Path, tasks=(TASK, "train/01", "train/02")) -> dict[str, str]:
    """{property: what is wrong with it or was not checked}."""
    case = Case(make=functools.partial(make_world, f"{path}:Keys"), tasks=tasks, splits=SPLITS)
    verdicts = {hold.__name__: verdict(hold, case) for hold in OWN_PROPERTIES}
    return {name: f"{how} {said}" for name, (how, said) in verdicts.items() if how != "ok"}


def test_the_world_of_the_page_keeps_the_contract(folder):
    assert found(folder / "world.py") == {}
    assert all(hold.__doc__ and "\n" not in hold.__doc__ for hold in OWN_PROPERTIES)


BROKEN = [  # a property, and a change that breaks it
    (
        "has_the_protocol_s_methods",
        "def left_out(self, split)",
        "def left_out(self, split, more=0)",
        "left_out(split, more)",
    ),
    ("lists_its_tasks", "return [f", "return [f'{split}/99'] + [f", "expected sorted, unique ids"),
    (
        "lists_its_tasks",
        "return ids_of(split)",
        "return [*ids_of(split), f'{split}/9{random.random()}']",
        "of another ins",
    ),
    ("lists_its_tasks", 'f"{split}/{number:02d}"', 'f"{number:02d}"', "expected ids that begin with t"),
    ("lists_its_tasks", "return {}  #", "return []  #", "expected {id: reason}"),
    (
        "names_what_it_does_not_know",
        "check_split(split, SPLITS)",
        "pass",
        "raised KeyError('nosuchsplit'); expected a ValueE",
    ),
    ("has_a_fingerprint_of_its_tasks", "content_hash(task_ids, ", "content_hash([], ", "the same for other tasks"),
    (
        "has_a_fingerprint_of_its_tasks",
        "return content_hash",
        "return content_hash and str(task_ids) and 'x' or ",
        "sha256",
    ),
    ("needs_a_reset_first", "self.actions()  # raises", "# raises", "commands before any reset returned"),
    ("opens_with_the_task", "Your task is to {task}", "Open it", "expected the task in it"),
    (
        "accepts_what_it_lists",
        "else []\n        return sorted(found)",
        "else []\n        return sorted(found, reverse=True)",
        "expected sorted, unique actions",
    ),
    (
        "accepts_what_it_lists",
        "action in self.actions()",
        'action in self.actions() and "attic" not in action',
        "not valid",
    ),
    ("covers_actions_by_commands", '"take {colour} key", ', "", "matches no template"),
    ("bears_any_text", "valid, text = action", "self.last = action\n        valid, text = action", "changed last"),
    ("bears_any_text", '"You cannot do that."', '""', "expected False, False, a text"),
    ("stays_in_range", "0.5 if self.door in self.held", "0.5 if self.at == 'hall'", "fell from 0.5 to 0.0"),
    ("stays_in_range", "success=self.done", "success=self.at == 'attic'", "gave success with done False"),
    ("repeats_itself", '"You cannot do that."', 'f"You cannot do that {random.random()}."', "played again"),
    ("is_picklable", 'self.at, self.done = "", False', 'self.at, self.done, self.f = "", False, lambda: 0', "pickle"),
    (
        "starts_afresh",
        'self.at, self.done = dict(zip(ROOMS, keys)), [], "hall", False',
        'self.at, self.done = dict(zip(ROOMS, keys)), [], self.at or "hall", False',
        "after some play",
    ),
    ("ends_for_good", "if self.done:\n", "if False:\n", "step after the end returned"),
    ("ends_for_good", "reward=float(self.done)", "reward=0.7 * self.done", "expected reward and progress 1"),
    (
        "ends_for_good",
        "success=self.done, done=self.done",
        "success=False, done=self.done",
        "ended, but none in success",
    ),
    ("ends_for_good", "self.done, text = True, ", "text = ", "came to no end"),
    (
        "tests_on_other_tasks",
        '"test": TASKS[48:]',
        '"test": TASKS[46:]',
        "test/00 has the content of train/46 by the fi",
    ),
    (
        "tests_on_other_tasks",
        "json.dumps(content(task_id))",
        "task_id[-1]",
        "train/00 and train/10 apart by their ids alone",
    ),
    ("tests_on_other_tasks", '"train": TASKS', '"easy": TASKS', "not checked, the world has no split train"),
]


@pytest.mark.parametrize(("name", "old", "new", "said"), BROKEN)
def test_a_broken_property_is_found_and_said(folder, name, old, new, said):
    assert said in found(edited(folder, (old, new))).get(name, "(nothing)")


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ("ids_of(split)[:: -1 if split == 'train' else 1]", "tasks('train') begins ['train/47', 'train/46', "),
        ("ids_of(split) if split == 'test' else {}[split]", "KeyError: 'train' (edited_world.py, line 36)"),
    ],
)
def test_a_mistake_in_the_split_that_is_trained_on_is_found_where_only_test_is_played(folder, new, said):
    path = edited(folder, ("return ids_of(split)", f"return {new}"))
    assert said in found(path, tasks=("test/00", "test/01"))["lists_its_tasks"]


QUIZ = """
import json
from envs.base import Observation, Result, check_split, check_task, content_hash
SPLITS = {"train": ["2 + 2", "3 + 4"], "test": ["5 + 3"]}

def ids_of(split):
    return [f"{split}/{number}" for number in range(len(SPLITS[split]))]

def content(task_id):
    check_task(task_id, "quiz", "<number>", SPLITS, ids_of)
    return SPLITS[task_id.split("/")[0]][int(task_id[-1])]

class Keys:
    name, isolated = "quiz", False

    def __init__(self):
        self.facts, self.question, self.done = {}, "", False

    def tasks(self, split):
        check_split(split, SPLITS)
        return ids_of(split)

    def left_out(self, split):
        check_split(split, SPLITS)
        return {}

    def fingerprint(self, task_ids):
        return content_hash(task_ids, lambda task_id: content(task_id).encode())

    def reset(self, task_id):
        self.question, self.done = content(task_id), False
        return Observation(text=f"How much is {self.question}?", task=self.question)

    def step(self, action):
        valid = action in self.actions()
        self.done = valid
        right = valid and action == f"answer {eval(self.question)}"
        text = "Right." if right else "Wrong." if valid else "Answer with a number."
        return Result(observation=text, reward=right, progress=right, success=right, done=valid, valid=valid)

    def actions(self):
        if not self.question or self.done:
            raise RuntimeError("there is no task: call reset(task_id)")
        return [f"answer {number}" for number in range(1, 10)]

    def commands(self):
        self.actions()
        return ["answer {number}"]
""".replace("=right,", "=float(right),", 2)


def test_a_quiz_whose_first_answer_ends_the_task_keeps_the_contract(tmp_path):
    """Neither actions() nor commands() has an answer after the end, which the contract does not ask for."""
    path = tmp_path / "quiz.py"
    path.write_text(QUIZ)
    assert found(path, tasks=("train/0", "train/1")) == {}


def test_what_a_world_raises_while_it_is_checked_has_its_line(folder):
    path = edited(folder, ('text = f"You have', 'text = {}["x"] + f"You have'))
    assert "wrong KeyError: 'x' (edited_world.py, line 65)" in found(path).values()


def test_a_world_that_exits_while_it_is_checked_is_wrong(folder):
    path = edited(folder, ('text = f"You have', "raise SystemExit(0)  #"))
    assert "wrong SystemExit: 0 (edited_world.py, line 65)" in found(path).values()
    (folder / "other").mkdir()  # a process keeps to what it has loaded from a path
    unknown = ("check_split(split, SPLITS)", "if split not in SPLITS: raise SystemExit(0)")
    path = edited(folder, unknown).rename(folder / "other/world.py")
    assert "raised SystemExit(0); expected a ValueError" in found(path)["names_what_it_does_not_know"]


def run(*words: str, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *words]
    return subprocess.run(
        command, cwd=ROOT, input=stdin.encode(errors="surrogatepass"), capture_output=True, timeout=120
    )


def test_the_check_is_a_command_with_a_line_per_property_and_an_exit_status(folder, keys):
    done = run("envs.check", keys, "--limit", "2")
    lines = done.stdout.decode().splitlines()
    assert (done.returncode, done.stderr) == (0, b"") and lines[0] == f"{keys}, 2 tasks of test:"
    assert lines[1:] == [
        *(f"ok     {hold.__doc__.rstrip('.')}" for hold in OWN_PROPERTIES),
        f"ok: {len(OWN_PROPERTIES)}",
    ]
    path = edited(folder, ("self.actions()  # raises", "# raises"))
    done = run("envs.check", f"{path}:Keys", "--panel", "train", "--limit", "2")
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 1 and lines[-1] == f"ok: {len(OWN_PROPERTIES) - 1}, wrong: 1"
    [wrong] = [line for line in lines if line.startswith("wrong  ")]
    assert wrong.startswith(
        "wrong  Before the first reset, step, actions and commands are a RuntimeError: commands before"
    )
    path = edited(folder, ("import json", "import sys; sys.exit(0)"))
    quits, line = f"{path}:Keys", "edited_world.py cannot be loaded: SystemExit: 0 (edited_world.py, line 5)\n"
    for words, said in (
        ([quits], line),
        (["alfwrld"], "did you mean alfworld?"),
        ([keys, "--panel", "hard"], "'hard' is no panel"),
    ):
        done = run("envs.check", *words)
        assert (done.returncode, done.stdout) == (2, b"") and said in done.stderr.decode()


def test_our_worlds_are_checked_by_name(capsys):
    with pytest.raises(SystemExit) as end:
        check.main(check.Args(world="pddl", panel="pddl_easy", limit=2))
    assert end.value.code == 0 and f"ok: {len(PROPERTIES)}" in capsys.readouterr().out


def test_each_property_is_broken_by_a_test():
    assert {case[0] for case in BROKEN} == {hold.__name__ for hold in OWN_PROPERTIES}


# ---- by hand ---------------------------------------------------------------------------------------------------------


def by_hand(keys: str, typed: str, *words: str) -> str:
    done = run("envs.play", "--human", "--env", keys, *words, stdin=typed)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


def test_a_person_plays_by_numbers_and_by_words(keys):
    said = by_hand(keys, "go to attic\n9\nfly\n\n3\nquit\nnever read\n", "--task", "test/00")
    assert said.startswith("test/00 (type a command, its number, or quit)\n\nYou are in the hall. You see a ")
    assert "\n1 go to attic   2 go to cellar   3 go to garden\n> \nYou are in the attic. You see a " in said
    assert "> 9 is no command's number; expected 1 to 4, a command in words, or quit\n" in said
    assert "\nYou cannot do that. (not accepted)\n" in said and "> > \nYou are in the hall." in said
    assert said.endswith("\nLeft, not solved: reward 0, progress 0, commands 3.\n")


def test_a_person_sees_the_end_of_the_task_and_of_the_input(keys):
    world = make_world(keys)
    world.reset("test/00")
    room = next(room for room, key in world.keys.items() if key == world.door)
    typed = f"go to {room}\ntake {world.door} key\ngo to hall\nopen {world.door} door\nnever read\n"
    assert by_hand(keys, typed).endswith("\nThe door is open.\n\nSolved: reward 1, progress 1, commands 4.\n")
    assert "commands" not in by_hand(keys, "") and by_hand(keys, "go to attic").endswith("progress 0, commands 1.\n")


def test_what_a_person_types_in_another_encoding_is_an_action_too(folder):
    path = edited(folder, ('"You cannot do that."', 'f"You cannot {action}."'))
    said = by_hand(f"{path}:Keys", "\ud800\n")
    assert "\nYou cannot \ufffd\ufffd\ufffd. (not accepted)\n" in said and said.endswith("commands 1.\n")


@pytest.mark.parametrize(
    ("how", "old", "new", "said"),
    [
        ("--human", "valid, text =", "valid, text = {}['x'],", "KeyError: 'x' (edited_world.py, line 57)"),
        ("--task", "valid, text =", "valid, text = {}['x'],", "KeyError: 'x' (edited_world.py, line 57)"),
        (
            "--task",
            "valid, text =",
            "valid, text = int('x'),",
            "ValueError: invalid literal for int() with base 10: 'x' (",
        ),
        (
            "--human",
            "valid, text =",
            "raise SystemExit(0)\n        valid, text =",
            "SystemExit: 0 (edited_world.py, line 57)",
        ),
        (
            "--human",
            "        return Result(\n",
            "        return dict(\n",
            "TypeError: step returned {'observation': 'You ",
        ),
        (
            "--task",
            "return sorted(found)",
            "return []",
            "TypeError: actions returned []; expected a list of one command or more\n",
        ),
        (
            "--tasks",
            "return ids_of(split)",
            "return ids_of[split]",
            "TypeError: 'function' object is not subscriptable (edited",
        ),
    ],
)
def test_a_world_that_fails_in_the_shell_player_is_one_sentence_with_the_line(folder, how, old, new, said):
    path = edited(folder, (old, new))
    words = {"--human": ["--human"], "--task": ["--task", TASK], "--tasks": ["--tasks", "--split", "train"]}[how]
    done = run("envs.play", "--env", f"{path}:Keys", *words, stdin="go to attic\n")
    error = done.stderr.decode()
    assert (
        done.returncode == 2 and error.startswith(f"play.py: Keys of {path} failed: {said}") and error.count("\n") == 1
    )


def test_a_task_that_does_not_exist_is_told_in_the_world_s_own_words(keys):
    done = run("envs.play", "--env", keys, "--task", "test/99")
    assert done.returncode == 2 and done.stderr.decode().startswith(
        "play.py: unknown task 'test/99': expected <split>/<n"
    )


def test_a_person_plays_the_first_task_of_a_split(folder, keys):
    assert by_hand(keys, "quit\n").startswith("test/00 (type")
    assert by_hand(keys, "quit\n", "--split", "train").startswith("train/00 (type")
    path = edited(folder, ('"test": TASKS', '"hard": TASKS'))
    hard = f"{path}:Keys"
    assert by_hand(hard, "quit\n", "--split", "hard").startswith("hard/00 (type")
    for words in ((), ("--split", "test")):
        done = run("envs.play", "--human", "--env", hard, *words)
        said = "no split 'test': expected one of train, hard; choose one with --split, or a task with --task"
        assert (done.returncode, done.stdout, done.stderr.decode()) == (2, b"", f"play.py: {said}\n")


def test_an_open_command_asks_a_person_for_words(tmp_path):
    from tests.support.hand_shop import write_shop

    data = write_shop(tmp_path)["data"]
    words = ("--data", data, "--task", make_world("webshop", data=data).tasks("small_test")[0])
    for typed in ("1\nred oak\n", "search[\nred oak]\n", "search[red oak]\n"):
        said = by_hand("webshop", typed, *words)
        assert "Back to Search" in said and "not accepted" not in said and said.endswith("commands 1.\n")
    assert by_hand("webshop", "1\n\nquit\n", *words).endswith("> search[ > ")  # no words, no search


@pytest.mark.parametrize("words", [(), ("--human", "--tasks"), ("--task", "x", "--tasks")])
def test_one_way_to_play_is_asked_for(keys, words):
    done = run("envs.play", "--env", keys, *words)
    assert done.returncode == 2 and b"expected --task ID (play it), --human (play by hand) or --tasks" in done.stderr

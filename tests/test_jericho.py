"""Jericho on a stand-in for the package, a game of one room, and on a Z-machine game that TextWorld compiles; the
classics may not be in the project."""

from __future__ import annotations

import ctypes.util  # noqa: F401  (hides the package's own util from `jericho.util`)
import sys
from functools import partial
from pathlib import Path

import pytest

from envs.jericho import GAMES, LONGEST, Jericho
from envs.make import make_world
from envs.panel import read_panel, require_tasks
from envs.process import WorldProcess, ready

STAND_IN = '''
__version__ = "0"
from . import util


class FrotzEnv:
    """One room: `take lamp` (1 point), `light lamp` (2 more) wins; `jump` kills; `smash` halts the interpreter."""

    def __init__(self, story_file):
        self.is_fully_supported = b"story" in open(story_file, "rb").read()
        self.bindings = {}

    def seed(self, seed):
        self.seeded = seed

    def reset(self):
        self.score, self.over, self.halted, self.heard = 0, False, False, []
        return "\\nA dark room. A lamp is here.\\n", {}

    def step(self, action):
        assert action.isascii() and len(action) < 198
        self.heard.append(action)
        answers = {"look": "A dark room.", "take lamp": "Taken.", "light lamp": "Light!", "jump": "You die."}
        if action == "take lamp" and self.score == 0:
            self.score = 1
        if action == "light lamp" and self.score == 1:
            self.score = 3
        self.over = action == "jump"
        self.halted = action == "smash"
        return answers.get(action, "I don't know that word.") + "\\n", 0, self.over, {}

    def get_max_score(self):
        return 3

    def get_score(self):
        return -1 if self.over else self.score

    def victory(self):
        return self.score == 3

    def _emulator_halted(self):
        return self.halted

    def get_valid_actions(self, use_parallel):
        assert util.extract_objs("A dark room.") == {("a", "NOUN"), ("dark", "NOUN"), ("room", "NOUN")}
        return ["take lamp", "jump"]

    def get_walkthrough(self):
        return ["take lamp", "light lamp"]
'''


@pytest.fixture
def games(tmp_path, monkeypatch) -> str:
    """A folder of two games, with the stand-in in the package's place."""
    package = tmp_path / "site" / "jericho"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "util.py").write_text("def recognized(text):\n    return 'know' not in text\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "jericho"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(package.parent))
    folder = tmp_path / "games"
    folder.mkdir()
    for name in ("zork1.z5", "home.z3", "other.txt"):
        (folder / name).write_bytes(b"story")
    yield str(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "jericho"]:
        del sys.modules[name]


def test_a_walkthrough_wins(games):
    world = make_world("jericho", data=games)
    assert world.isolated and world.facts["jericho"] == "0" and len(world.facts["games"]) == 16
    opening = world.reset("jericho_test/zork1")
    assert opening.text.startswith("A dark room.") and opening.task in opening.text
    assert world._game.seeded == 1
    results = [world.step(command) for command in world.solution()]
    assert [r.progress for r in results] == [1 / 3, 1.0] and [r.success for r in results] == [False, True]
    assert results[1].done and results[1].reward == 1.0
    with pytest.raises(RuntimeError, match="over.*reset"):
        world.step("look")


def test_releases_of_a_game_are_told_apart(games):
    ids = ["jericho_all/home", "jericho_test/zork1"]
    first = Jericho(games).fingerprint(ids)
    assert Jericho(games).fingerprint(reversed(ids)) == first
    (Path(games) / "zork1.z5").write_bytes(b"story of another release")
    assert Jericho(games).fingerprint(ids) != first
    with pytest.raises(ValueError, match="unknown task 'jericho_test/home'"):
        Jericho(games).fingerprint(["jericho_test/home"])


def test_splits_and_ids(games, monkeypatch):
    monkeypatch.setenv("JERICHO_GAMES", games)
    world = Jericho()
    assert world.tasks("jericho_all") == ["jericho_all/home", "jericho_all/zork1"]
    assert world.tasks("jericho_test") == ["jericho_test/zork1"]
    for call, name in ((world.tasks, "nosuch"), (world.reset, "nosuch"), (world.reset, "jericho_test/home")):
        with pytest.raises(ValueError, match=name):
            call(name)
    missing = world.left_out("jericho_test")
    assert [*missing] == [f"jericho_test/{name}" for name in GAMES if name != "zork1"] and world.left_out(
        "jericho_all"
    ) == {}
    assert set(missing.values()) == {"no story file"}
    with pytest.raises(
        ValueError, match=r"19 of 20 tasks cannot be played: jericho_test/905 \(no story file\), .*9 more"
    ):
        require_tasks(world, read_panel("jericho_test-20"))
    with pytest.raises(RuntimeError, match="no game yet"):
        world.actions()
    assert read_panel("jericho_test-20") == [f"jericho_test/{name}" for name in GAMES]


@pytest.mark.parametrize("text", ["", " \n", "\x00\ud800", "go " * 500, "quit", "Save game", "RESTART.", "é"])
def test_what_is_not_for_the_game_never_reaches_it(games, text):
    world = Jericho(games)
    world.reset("jericho_all/home")
    result = world.step(text)
    assert not result.valid and not result.done and result.observation and world._game.heard == []


def test_answers(games):
    world = Jericho(games)
    world.reset("jericho_all/home")
    assert not world.step("xyzzy").valid and world.step(" look\n").valid
    assert world._game.heard == ["xyzzy", "look"]  # one line, whatever blanks there were
    assert world.step("a" * LONGEST).observation == "I don't know that word."
    assert world.actions() == ["inventory", "jump", "look", "take lamp"] and "take {object}" in world.commands()
    world.step("take lamp")
    dead = world.step("jump")
    assert dead.done and not dead.success and dead.reward == 0.0 and dead.progress == 1 / 3
    world.reset("jericho_all/home")
    assert world.step("smash").done


def test_it_is_played_in_a_process_of_its_own(games):
    process = WorldProcess(partial(make_world, "jericho", data=games), deadline=60)
    try:
        process.send("reset", "jericho_test/zork1")
        ready([process], timeout=60)
        good, opening = process.answer()
        assert good and opening.task == "score as many of the 3 points of zork1 as you can"
    finally:
        process.kill()


def test_one_is_told_what_is_missing(games, tmp_path, monkeypatch):
    monkeypatch.delenv("JERICHO_GAMES", raising=False)
    with pytest.raises(FileNotFoundError, match=r"needs games, and None holds none.*\$JERICHO_GAMES"):
        Jericho()
    with pytest.raises(FileNotFoundError, match="site' holds none"):
        Jericho(str(tmp_path / "site"))
    (Path(games) / "bad.z5").write_bytes(b"?")
    with pytest.raises(ValueError, match="does not know .*bad.z5"):
        Jericho(games).reset("jericho_all/bad")
    with monkeypatch.context() as hidden, pytest.raises(ImportError, match="needs jericho .*requirements/worlds.txt"):
        hidden.setitem(sys.modules, "jericho", None)
        Jericho(games)


def test_a_compiled_game(tmp_path):
    """The real package on a real story file. It knows TextWorld's games by their names, and not their grammar."""
    pytest.importorskip("jericho")
    textworld = pytest.importorskip("textworld")
    options = textworld.GameOptions()
    options.seeds, options.nb_rooms, options.nb_objects, options.quest_length = 1234, 2, 4, 2
    options.path = str(tmp_path / "tw-home.z8")
    _, game = textworld.make(options)

    def played() -> list:
        world = Jericho(str(tmp_path))
        opening = world.reset("jericho_all/tw-home")
        assert set(world.actions()) >= {"inventory", "look"}
        return [opening, *map(world.step, ("xyzzy", "quit", *game.metadata["walkthrough"]))]

    opening, unknown, refused, *results = first = played()
    assert "Attic" in opening.text and opening.task == "score as many of the 1 points of tw-home as you can"
    assert (unknown.valid, refused.valid) == (False, False) and len(results) == 2
    assert [(r.valid, r.reward, r.success, r.done) for r in results] == [(True, 0, False, False), (True, 1, True, True)]
    assert played() == first
    (tmp_path / "tw-home.z8").rename(tmp_path / "home.z8")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="jericho does not know .*home.z8"):
        Jericho(str(tmp_path)).reset("jericho_all/home")

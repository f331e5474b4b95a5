"""The ALFWorld engine against TextWorld, its quirks by hand on both engines, and the index of games."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from bench.alfworld_engine import Args, Clock, compare
from envs.alfworld import index
from envs.alfworld import world as alfworld
from envs.alfworld.engine import Game, names_of
from envs.alfworld.index import find_games, task_type
from envs.alfworld.world import AlfWorld, other_grammar
from envs.make import make_world
from tests.support.hand_game import GOALS, PLACES, problem, write_game

ROOT = Path(__file__).parents[1]
REAL = os.environ.get("ALFWORLD_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="needs the real games: set ALFWORLD_DATA")
needs_textworld = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("alfworld", "textworld", "fast_downward"))),
    reason="needs the reference: pip install alfworld==0.4.2 (and cmake, g++)",
)
ENGINES = ["ours", pytest.param("textworld", marks=needs_textworld)]
MIDDLE = "You are in the middle of a room. Looking quickly around you, you see"
COUNTERTOP = "On the countertop 1, you see a apple 1, a bread 1, a knife 1, and a plate 1."


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """No test writes an index into the real home."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def play(tmp_path, goal: str, script: list[tuple[str, str]], engine: str, grammar: str = "0.4", start: int = 1):
    """Play a hand-written game, check each answer, return the last result and the world."""
    task_id = write_game(tmp_path, goal, start=start)
    world = AlfWorld(data=str(tmp_path), engine=engine, grammar=grammar)
    world.reset(task_id)
    result = None
    for command, answer in script:
        admissible = command in world.actions()
        result = world.step(command)
        assert (command, result.observation) == (command, answer)
        assert result.valid == admissible == (answer != "Nothing happens.")
    return result, world


def diverging(task_id: str, data: str, steps: int, **args) -> list[str]:
    worlds = [AlfWorld(data=data, engine=e, grammar=args.get("grammar", "0.4")) for e in ("ours", "textworld")]
    return compare(*worlds, task_id, Args(steps=steps, **args), (Clock(), Clock()), tqdm(disable=True))


# ---- against TextWorld on whole games


@pytest.mark.data
@needs_data
@needs_textworld
@pytest.mark.parametrize("kind", ["pick_two_obj", "pick_heat", "look_at_obj"])
def test_real_games_agree_with_textworld(kind):
    ids = [task_id for task_id in AlfWorld().tasks("valid_seen") if kind in task_id]
    task_id = random.Random(kind).choice(ids)
    assert diverging(task_id, REAL, 15, seed=7) == []


@needs_textworld
@pytest.mark.parametrize(("goal", "start", "grammar"), [("heat", 1, "0.4"), ("two", 3, "0.4"), ("look", 1, "0.3")])
def test_hand_games_agree_with_textworld(tmp_path, goal, start, grammar):
    """Many random steps through co-located receptacles, things in two places, and a start in front of a receptacle."""
    task_id = write_game(tmp_path, goal, start=start)
    assert diverging(task_id, str(tmp_path), 60, grammar=grammar, invalid=0.3) == []


@needs_textworld
def test_comparison_notices_a_difference(tmp_path, monkeypatch):
    """The zero of the parity tests means something only if one wrong word is found."""
    task_id = write_game(tmp_path)
    monkeypatch.setattr(Game, "look", lambda self: "You are somewhere.")
    assert diverging(task_id, str(tmp_path), 30, invalid=0.0)


@pytest.mark.data
@needs_data
def test_real_walkthroughs_win_at_their_last_command():
    world = AlfWorld()
    seen = world.tasks("valid_seen")
    train = world.tasks("train")
    for task_id in [*seen, *random.Random(0).sample(list(train), 60)]:
        world.reset(task_id)
        walkthrough = json.loads(Path(REAL, "json_2.1.1", task_id, "game.tw-pddl").read_text())["walkthrough"]
        wins = []
        for command in walkthrough:
            assert command in world.actions(), (task_id, command)
            wins.append(world.step(command).success)
        assert wins == [False] * (len(walkthrough) - 1) + [True], task_id


@pytest.mark.data
@needs_data
def test_real_splits_have_the_published_sizes():
    world = AlfWorld()
    kinds = [task_type(task_id) for task_id in world.tasks("valid_seen")]
    assert [kinds.count(kind) for kind in index.TASK_TYPES] == [35, 27, 16, 25, 13, 24]
    assert len(world.tasks("train")) == 3553


# ---- quirks, each on both engines


@pytest.mark.parametrize("engine", ENGINES)
def test_opening_and_look(tmp_path, engine):
    task_id = write_game(tmp_path)
    opening = AlfWorld(data=str(tmp_path), engine=engine).reset(task_id)
    assert opening.text == (
        f"{MIDDLE} a cabinet 2, a cabinet 1, a countertop 1, a desk 1, a fridge 1, a garbagecan 1, a microwave 1, and "
        "a sinkbasin 1.\n\nYour task is to: put some apple on microwave."
    )
    assert opening.task == "put some apple on microwave"


@pytest.mark.parametrize("engine", ENGINES)
def test_look_away_and_at_colocated_receptacles(tmp_path, engine):
    play(
        tmp_path,
        "place",
        [
            ("look", f"{MIDDLE} nothing."),
            ("examine cabinet 1", "Nothing happens."),
            ("go to cabinet 1", "You arrive at cabinet 1. The cabinet 1 is closed."),
            ("look", "You are facing the cabinet 2, and cabinet 1. Next to it, you see nothing."),
            ("go to cabinet 2", "Nothing happens."),  # the agent stands there already
            ("go to cabinet 1", "Nothing happens."),
            ("examine cabinet 2", "The cabinet 2 is closed."),
            ("open cabinet 1", "You open the cabinet 1. The cabinet 1 is open. In it, you see nothing."),
            ("open cabinet 1", "Nothing happens."),
            ("open cabinet 2", "You open the cabinet 2. The cabinet 2 is open. In it, you see a mug 1."),
            ("take mug 1 from cabinet 2", "You pick up the mug 1 from the cabinet 2."),
            ("move mug 1 to cabinet 1", "You move the mug 1 to the cabinet 1."),
            # TextWorld remembers that the mug was taken out of cabinet 2, and shows it beside the cabinets.
            ("look", "You are facing the cabinet 2, and cabinet 1. Next to it, you see a mug 1."),
            ("close cabinet 1", "You close the cabinet 1."),
            ("take mug 1 from cabinet 1", "Nothing happens."),
        ],
        engine,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_start_in_front_of_a_receptacle(tmp_path, engine):
    task_id = write_game(tmp_path, start=2)
    text = AlfWorld(data=str(tmp_path), engine=engine).reset(task_id).text
    assert text.startswith("You are facing the cabinet 2, and cabinet 1. Next to it, you see nothing.\n\nYour task")


@pytest.mark.parametrize("engine", ENGINES)
def test_examine_only_what_is_held(tmp_path, engine):
    play(
        tmp_path,
        "two",
        [
            ("go to countertop 1", f"You arrive at countertop 1. {COUNTERTOP}"),
            ("examine apple 1", "Nothing happens."),
            ("take apple 1 from countertop 1", "You pick up the apple 1 from the countertop 1."),
            ("inventory", "You are carrying: a apple 1."),
            ("examine apple 1", "There's nothing special about apple 1."),
            ("take bread 1 from countertop 1", "Nothing happens."),  # hands are full
            ("go to sinkbasin 1", "You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing."),
            ("heat apple 1 with sinkbasin 1", "Nothing happens."),
            ("clean apple 1 with sinkbasin 1", "You clean the apple 1 using the sinkbasin 1."),
            ("examine apple 1", "This is a clean apple 1."),
            ("go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed."),
            ("move apple 1 to microwave 1", "Nothing happens."),  # shut
            ("heat apple 1 with microwave 1", "You heat the apple 1 using the microwave 1."),  # shut as well, and yet
            ("examine apple 1", "This is a hot and clean apple 1."),
            ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed."),
            ("cool apple 1 with fridge 1", "You cool the apple 1 using the fridge 1."),
            ("examine apple 1", "This is a cool and clean apple 1."),
            ("inventory", "You are carrying: a apple 1."),
        ],
        engine,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_vessels_cold_things_and_knives(tmp_path, engine):
    play(
        tmp_path,
        "two",
        [
            ("inventory", "You are not carrying anything."),
            ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed."),
            ("open fridge 1", "You open the fridge 1. The fridge 1 is open. In it, you see a apple 2."),
            ("take apple 2 from fridge 1", "You pick up the apple 2 from the fridge 1."),
            ("examine apple 2", "This is a cold apple 2."),  # cool from the start
            ("go to countertop 1", f"You arrive at countertop 1. {COUNTERTOP}"),
            ("move apple 2 to countertop 1", "You move the apple 2 to the countertop 1."),
            ("slice apple 2 with knife 1", "Nothing happens."),  # the knife is not in hand
            ("take knife 1 from countertop 1", "You pick up the knife 1 from the countertop 1."),
            ("slice apple 2 with knife 1", "You sliced the apple 2 with the knife 1."),
            ("slice bread 1 with knife 1", "You sliced the bread 1 with the knife 1."),
            ("move knife 1 to countertop 1", "You move the knife 1 to the countertop 1."),
            ("take bread 1 from countertop 1", "You pick up the bread 1 from the countertop 1."),
            ("examine bread 1", "This is a sliced bread 1."),
            ("move bread 1 to countertop 1", "You move the bread 1 to the countertop 1."),
            ("take apple 2 from countertop 1", "You pick up the apple 2 from the countertop 1."),
            ("examine apple 2", "This is a cool sliced apple 2."),
            ("move apple 2 to countertop 1", "You move the apple 2 to the countertop 1."),
            ("go to cabinet 2", "You arrive at cabinet 2. The cabinet 2 is closed."),
            ("open cabinet 2", "You open the cabinet 2. The cabinet 2 is open. In it, you see a mug 1."),
            ("take mug 1 from cabinet 2", "You pick up the mug 1 from the cabinet 2."),
            ("examine mug 1", "This is a normal mug 1. In it, you see a pencil 1."),
        ],
        engine,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_thing_in_two_receptacles(tmp_path, engine):
    """Real games list some objects twice: taken from one, it still lies in the other."""
    play(
        tmp_path,
        "place",
        [
            ("go to garbagecan 1", "You arrive at garbagecan 1. On the garbagecan 1, you see a plate 1."),
            ("take plate 1 from garbagecan 1", "You pick up the plate 1 from the garbagecan 1."),
            ("examine garbagecan 1", "On the garbagecan 1, you see nothing."),
            ("examine countertop 1", COUNTERTOP),
            ("move plate 1 to garbagecan 1", "Nothing happens."),  # a garbage can holds no plates
            ("move plate 1 to countertop 1", "You move the plate 1 to the countertop 1."),
            ("examine countertop 1", COUNTERTOP),
            ("look", "You are facing the countertop 1, and garbagecan 1. Next to it, you see a plate 1."),
        ],
        engine,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_lamp_stays_on_and_is_part_of_the_goal_only_where_it_stands(tmp_path, engine):
    script = [
        ("use desklamp 1", "Nothing happens."),
        ("go to desk 1", "You arrive at desk 1. On the desk 1, you see a desklamp 1, and a pen 1."),
        ("take desklamp 1 from desk 1", "Nothing happens."),
        ("use desklamp 1", "You turn on the desklamp 1."),
        ("use desklamp 1", "You turn on the desklamp 1."),
        ("take pen 1 from desk 1", "You pick up the pen 1 from the desk 1."),
    ]
    result, _ = play(tmp_path / "at_lamp", "look", script, engine)
    assert result.success and result.done and result.reward == 1.0 == result.progress
    script[3:] = [script[5], ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed.")]
    result, world = play(tmp_path / "away", "look", script, engine)
    assert not result.success
    world.step("go to desk 1")
    assert world.step("use desklamp 1").success


@pytest.mark.parametrize("engine", ENGINES)
def test_two_objects_must_share_one_receptacle(tmp_path, engine):
    fetch = "You pick up the apple {} from the {}."
    result, world = play(
        tmp_path,
        "two",
        [
            ("go to countertop 1", f"You arrive at countertop 1. {COUNTERTOP}"),
            ("take apple 1 from countertop 1", fetch.format(1, "countertop 1")),
            ("go to cabinet 1", "You arrive at cabinet 1. The cabinet 1 is closed."),
            ("open cabinet 1", "You open the cabinet 1. The cabinet 1 is open. In it, you see nothing."),
            ("move apple 1 to cabinet 1", "You move the apple 1 to the cabinet 1."),
            ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed."),
            ("open fridge 1", "You open the fridge 1. The fridge 1 is open. In it, you see a apple 2."),
            ("take apple 2 from fridge 1", fetch.format(2, "fridge 1")),
            ("go to cabinet 2", "You arrive at cabinet 2. The cabinet 2 is closed."),
            ("open cabinet 2", "You open the cabinet 2. The cabinet 2 is open. In it, you see a mug 1."),
            ("move apple 2 to cabinet 2", "You move the apple 2 to the cabinet 2."),
        ],
        engine,
    )
    assert not result.success
    world.step("take apple 2 from cabinet 2")
    assert world.step("move apple 2 to cabinet 1").success


@pytest.mark.parametrize("engine", ENGINES)
def test_heated_means_that_object_in_that_place(tmp_path, engine):
    _, world = play(tmp_path, "heat", [], engine)
    for command in ("go to countertop 1", "take apple 1 from countertop 1", "move apple 1 to garbagecan 1"):
        assert world.step(command).valid and not world.step("look").success  # in place, but cold
    for command in (
        "go to fridge 1",
        "open fridge 1",
        "take apple 2 from fridge 1",
        "go to microwave 1",
        "heat apple 2 with microwave 1",
        "go to fridge 1",
        "cool apple 2 with fridge 1",
        "go to garbagecan 1",
        "move apple 2 to garbagecan 1",
    ):
        assert world.step(command).valid and not world.step("look").success  # hot once, cooled since
    for command in ("take apple 2 from garbagecan 1", "go to microwave 1", "heat apple 2 with microwave 1"):
        assert world.step(command).valid
    world.step("go to countertop 1")
    assert not world.step("move apple 2 to countertop 1").success
    world.step("take apple 2 from countertop 1")
    assert world.step("move apple 2 to garbagecan 1").success


@pytest.mark.parametrize("engine", ENGINES)
def test_help_and_texts_that_are_not_commands(tmp_path, engine):
    result, world = play(
        tmp_path,
        "place",
        [
            (text, "Nothing happens.")
            for text in (
                "",
                "Look",
                "look around",
                "go to desk",
                "go to  desk 1",
                "go to desk 1.",
                "put pen 1 in/on desk 1",
                "examine pencil 1",
                "open desk 1",
                "take",
                "go to loc 1",
                "go to agent1 ",
                "look\nlook",
            )
        ],
        engine,
    )
    before = world.actions()
    assert world.step(" go to desk 1\n").valid  # TextWorld strips a command
    text = world.step("help").observation
    assert text.startswith("Available commands:\n  look:    ") and text.endswith("using a sharp object\n")
    assert text.count("\n") == 14 and "  move (object) to (receptacle):  place an object" in text
    assert before != world.actions() and result.reward == 0.0


@pytest.mark.parametrize("engine", ENGINES)
def test_old_grammar(tmp_path, engine):
    desk = f"loc {7 - PLACES['Desk_bar_1'][0] + 1}"  # locations 1-7 are mentioned and numbered downwards; 8 is not
    result, world = play(
        tmp_path,
        "cool",
        [
            ("help", "Nothing happens."),
            ("go to desk 1", f"You arrive at {desk}. On the desk 1, you see a desklamp 1, and a pen 1."),
            ("take pen 1 from desk 1", "You pick up the pen 1 from the desk 1."),
            ("move pen 1 to desk 1", "Nothing happens."),
            ("put pen 1 in/on desk 1", "You put the pen 1 in/on the desk 1."),
        ],
        engine,
        grammar="0.3",
    )
    assert "take pen 1 from desk 1" in world.actions() and "help" not in world.actions()
    world.step("take pen 1 from desk 1")
    assert "put pen 1 in/on desk 1" in world.actions() and not [a for a in world.actions() if a.startswith("move")]


# ---- progress, names, goals


def test_progress_counts_conditions_and_never_falls(tmp_path):
    _, world = play(tmp_path, "clean", [], "ours")
    assert world.step("go to countertop 1").progress == 0.0
    for command, progress in [
        ("take plate 1 from countertop 1", 0.0),
        ("go to sinkbasin 1", 0.0),
        ("clean plate 1 with sinkbasin 1", 0.5),
        ("go to cabinet 1", 0.5),
        ("open cabinet 1", 0.5),
        ("move plate 1 to cabinet 1", 1.0),
    ]:
        result = world.step(command)
        assert (command, result.progress) == (command, progress)
    _, world = play(tmp_path / "look", "look", [], "ours")
    found = [world.step(c).progress for c in ("go to desk 1", "use desklamp 1", "go to fridge 1", "look")]
    assert found == [0.0, 0.5, 0.5, 0.5]  # the lamp counts only where the agent stands, and yet progress stays


def test_names_are_numbered_downwards_within_a_kind():
    ids = {"mug_bar_1", "mug_bar_2", "sink_bar_1_bar_sinkbasin", "sink_bar_1", "mugtype", "agent1"}
    assert names_of(ids) == {
        "mug_bar_1": "mug 2",
        "mug_bar_2": "mug 1",
        "sink_bar_1": "sink 1",
        "sink_bar_1_bar_sinkbasin": "sinkbasin 1",
    }


def test_each_goal_is_read_as_its_kind():
    for kind in GOALS:
        game = Game({"pddl_problem": problem(kind), "grammar": '{"rhs": "Your task is to: do \\"it\\"."}'})
        assert game.goal.kind == kind and game.goal.objects and bool(game.goal.lamps) == (kind == "look")
        assert game.task == 'do "it"'


def test_foreign_goal_is_refused():
    text = problem("place").replace("receptacleType ?r Microwave", "opened ?r Microwave")
    with pytest.raises(ValueError, match="none of ALFWorld's six"):
        Game({"pddl_problem": text, "grammar": '"Your task is to: x."'})


def test_task_type():
    assert task_type("train/pick_two_obj_and_place-Pen-None-Desk-1/trial_1") == "pick_two_obj_and_place"
    for wrong in ("train/pick_up-Pen-None-Desk-1/trial_1", "pick_two_obj_and_place-Pen", ""):
        with pytest.raises(ValueError, match="expected <split>"):
            task_type(wrong)


# ---- the index of games


def change(text: str, into: str):
    return lambda file: file.write_text(file.read_text().replace(text, into))


LEFT_OUT = {  # (goal, trial): what happened to the game file, and the reason
    ("heat", "trial_1"): (change('"solvable": true', '"solvable": false'), index.UNSOLVABLE),
    ("cool", "trial_movable_1"): (None, index.MOVABLE),
    ("cool", "Sliced"): (None, index.MOVABLE),
    ("look", "trial_1"): (lambda file: file.with_name("traj_data.json").unlink(), index.NO_RECORD),
    ("clean", "trial_1"): (change('"solvable"', '"solved"'), index.UNMARKED),
}


def write_left_out(folder: Path) -> dict[str, str]:
    """Games that are left out, in all ways; {id: reason}."""
    reasons = {}
    for (goal, trial), (happened, reason) in LEFT_OUT.items():
        task_id = write_game(folder, goal, trial=trial)
        reasons[task_id] = reason
        if happened:
            happened(folder / "json_2.1.1" / task_id / "game.tw-pddl")
    return dict(sorted(reasons.items()))


def test_index_lists_what_the_stock_loader_lists_and_why_it_skips_the_others(tmp_path):
    kept = [write_game(tmp_path, "place"), write_game(tmp_path, "two"), write_game(tmp_path, "two", trial="trial_0")]
    reasons = write_left_out(tmp_path)
    (tmp_path / "json_2.1.1" / "hand" / "pick_and_place_simple-x" / "trial_1").mkdir(parents=True)  # no game
    for _ in range(2):  # by the game files, by the index file
        assert find_games(tmp_path / "json_2.1.1", "hand") == (tuple(sorted(kept)), reasons)
    world = AlfWorld(data=str(tmp_path))
    assert world.tasks("hand") == tuple(sorted(kept)) and world.left_out("hand") == reasons
    for task_id, reason in reasons.items():
        with pytest.raises(ValueError, match=f"{task_id}' is left out .{reason}.*unpack the data again"):
            world.reset(task_id)


@pytest.fixture
def reads(monkeypatch):
    """The trials whose game files are read from now on."""
    found, read = [], index._reason
    monkeypatch.setattr(index, "_reason", lambda file: found.append(file.parent.name) or read(file))
    return found


def test_only_games_that_are_new_or_changed_are_read_again(tmp_path, reads):
    root = tmp_path / "json_2.1.1"
    first = write_game(tmp_path, "place")
    find_games(root, "hand")
    assert find_games(root, "hand").playable == (first,) and reads == ["trial_1"]
    times = [(f, f.stat().st_mtime_ns) for f in (root / "hand", (root / first).parent)]
    second = write_game(tmp_path, "place", trial="trial_2")
    for folder, time in times:  # as `tar` does when it unpacks one more trial
        os.utime(folder, ns=(time, time))
    assert find_games(root, "hand").playable == (first, second) and reads == ["trial_1", "trial_2"]
    other = write_game(tmp_path, "two", split="other", trial="trial_3")
    assert find_games(root, "other").playable == (other,) and find_games(root, "hand").playable == (first, second)
    assert reads == ["trial_1", "trial_2", "trial_3"]
    (root / first).rename(tmp_path / "gone")
    assert find_games(root, "hand").playable == (second,) and len(reads) == 3


def test_data_that_arrives_in_two_steps_is_noticed(tmp_path, reads):
    task_id = write_game(tmp_path)
    record = tmp_path / "json_2.1.1" / task_id / "traj_data.json"
    content = record.read_bytes()
    record.unlink()
    assert find_games(tmp_path / "json_2.1.1", "hand") == ((), {task_id: index.NO_RECORD}) and reads == []
    record.write_bytes(content)
    assert find_games(tmp_path / "json_2.1.1", "hand") == ((task_id,), {}) and reads == ["trial_1"]


def test_a_game_rewritten_in_place_is_noticed_even_with_its_old_size_and_time(tmp_path, reads):
    task_id = write_game(tmp_path)
    root, file = tmp_path / "json_2.1.1", tmp_path / "json_2.1.1" / task_id / "game.tw-pddl"
    change('"solvable": true', '"solvable": true ')(file)
    assert find_games(root, "hand").playable == (task_id,)
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of a file system has steps
        change('"solvable": true ', '"solvable": false')(file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    assert find_games(root, "hand") == ((), {task_id: index.UNSOLVABLE}) and len(reads) == 2


def test_a_score_tells_games_of_the_same_name_apart(tmp_path):
    """A newer release, unpacked over an older one, has the same ids and other texts."""
    ids = [write_game(tmp_path, "place"), write_game(tmp_path, "two")]
    world = AlfWorld(data=str(tmp_path))
    first = world.fingerprint(ids)
    assert world.fingerprint(reversed(ids)) == first != world.fingerprint(ids[:1]) and len(first) == 64
    assert AlfWorld(data=str(tmp_path), engine="textworld").fingerprint(ids) == first  # without loading TextWorld
    wrapped = make_world("alfworld", data=str(tmp_path), perturb="P1", tell_commands=True)
    assert wrapped.fingerprint(ids) == first and wrapped.left_out("hand") == {}
    change("in microwave", "in the microwave")(tmp_path / "json_2.1.1" / ids[0] / "game.tw-pddl")
    change("on microwave", "in microwave")(tmp_path / "json_2.1.1" / ids[0] / "game.tw-pddl")
    assert world.fingerprint(ids) != first and world.fingerprint(ids[1:]) == AlfWorld(str(tmp_path)).fingerprint(
        ids[1:]
    )
    with pytest.raises(ValueError, match="unknown task 'hand/no/no'"):
        world.fingerprint(["hand/no/no"])


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 2}', '{"version": 2, "splits": {"hand": 3}}', "[" * 10_000]
    + ['{"version": 1, "splits": {}}', '{"version": 3, "splits": {"hand": {}}}'],
)
def test_corrupt_index_is_rebuilt(tmp_path, content):
    task_id = write_game(tmp_path)
    file = tmp_path / "json_2.1.1" / ".a3t_index.json"
    file.write_text(content)
    assert find_games(tmp_path / "json_2.1.1", "hand").playable == (task_id,)
    assert list(json.loads(file.read_text())["splits"]["hand"]) == [task_id]


def test_index_goes_home_where_the_data_cannot_be_written(tmp_path, reads):
    task_id = write_game(tmp_path)
    root = tmp_path / "json_2.1.1"
    (root / ".a3t_index.json").mkdir()  # stands for a folder that cannot be written: root may write anywhere
    find_games(root, "hand")
    assert len(list((tmp_path / "home" / ".cache" / "a3t").glob("*.json"))) == 1
    assert find_games(root, "hand").playable == (task_id,) and len(reads) == 1


# ---- grammars


PUT, MOVE = "put mug 1 in/on desk 1", "move mug 1 to desk 1"


@pytest.mark.parametrize(
    ("refused", "grammar", "share"),
    [
        ([PUT] * 3 + ["look around"], "0.4", 0.75),
        ([PUT, "look around"], "0.4", 0.5),
        ([MOVE, "go to desk 9"], "0.4", 0.0),
        ([MOVE, "help", " move mug 1 to desk 1 "], "0.3", 1.0),
        ([PUT, "put mug 1 on desk 1", "put" + " in/on " * 9999 + "\n"], "0.3", 0.0),
        ([], "0.4", 0.0),
    ],
)
def test_a_summary_can_say_that_most_refused_commands_are_of_the_other_grammar(refused, grammar, share):
    found, note = other_grammar(refused, grammar)
    assert found == share and bool(note) == (share > 0.5)
    if note:
        other, form = ("0.3", "put {object} in/on") if grammar == "0.4" else ("0.4", "move {object} to")
        assert f"{100 * share:.0f} % of the refused commands are of ALFWorld's grammar {other} ({form}" in note


def test_the_other_grammar_is_what_the_world_refuses(tmp_path):
    """Played, so that the note and the engine cannot drift apart."""
    for grammar, foreign, own in (("0.4", PUT, MOVE), ("0.3", MOVE, PUT)):
        task_id = write_game(tmp_path / grammar, "cool")
        world = AlfWorld(data=str(tmp_path / grammar), grammar=grammar)
        world.reset(task_id)
        for command in ("go to cabinet 2", "open cabinet 2", "take mug 1 from cabinet 2", "go to desk 1"):
            assert world.step(command).valid
        assert not world.step(foreign).valid and other_grammar([foreign], world.facts["grammar"])[0] == 1
        assert world.step(own).valid and other_grammar([own], world.facts["grammar"])[0] == 0


# ---- data and errors


def test_generated_splits_stand_beside_the_given_data(tmp_path, monkeypatch):
    given = write_game(tmp_path / "given")
    made = write_game(tmp_path / "made", split="gen_valid")
    monkeypatch.setattr(alfworld, "generated_root", lambda: tmp_path / "made" / "json_2.1.1")
    world = AlfWorld(data=str(tmp_path / "given"))
    assert world.tasks("hand") == (given,) and world.tasks("gen_valid") == (made,)
    assert world.reset(made) == world.reset(given)
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    assert AlfWorld().tasks("gen_valid") == (made,)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "given"))
    assert AlfWorld().tasks("hand") == (given,)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="json_2.1.1.*alfworld-download"):
        AlfWorld(data=str(tmp_path / "nowhere"))
    task_id = write_game(tmp_path)
    world = AlfWorld(data=str(tmp_path))
    with pytest.raises(ValueError, match="no split 'train'.*hand"):
        world.tasks("train")
    for unknown in ("hand/x/y", "nowhere/x/y", "x", "", "../" + task_id):
        with pytest.raises(ValueError, match="unknown task.*--tasks"):
            world.reset(unknown)
    with pytest.raises(ValueError, match="engine.*'ours'"):
        AlfWorld(data=str(tmp_path), engine="fast")
    with pytest.raises(ValueError, match="grammar.*'0.4'"):
        AlfWorld(data=str(tmp_path), grammar="0.5")


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"pddl_problem": "(:init',
        '{"grammar": "x"}',
        "[]",
        '{"pddl_problem": 3}',
        '{"pddl_problem": "(:init )(:goal )", "grammar": "Your task"}',
        '{"grammar": NaN}',
        '{"pddl_problem": ' + "[" * 10_000,
    ],
)
def test_unreadable_game_is_named(tmp_path, content):
    task_id = write_game(tmp_path)
    world = AlfWorld(data=str(tmp_path))
    world.tasks("hand")
    file = tmp_path / "json_2.1.1" / task_id / "game.tw-pddl"
    file.write_text(content)
    with pytest.raises(ValueError, match="cannot read the game .*game.tw-pddl"):
        world.reset(task_id)


def test_truncated_game_is_no_silent_gap(tmp_path):
    task_id = write_game(tmp_path)
    file = tmp_path / "json_2.1.1" / task_id / "game.tw-pddl"
    file.write_bytes(file.read_bytes()[:500])
    world = AlfWorld(data=str(tmp_path))
    assert world.tasks("hand") == (task_id,)
    with pytest.raises(ValueError, match="cannot read the game .*unpack or generate"):
        world.reset(task_id)


def test_pickle_in_the_middle_of_a_game(tmp_path):
    _, world = play(tmp_path, "place", [], "ours")
    for command in ("go to countertop 1", "take apple 1 from countertop 1", "go to microwave 1"):
        world.step(command)
    copy = pickle.loads(pickle.dumps(world))
    assert copy.actions() == world.actions()
    for command in ("open microwave 1", "move apple 1 to microwave 1"):
        result = copy.step(command)
    assert result.success and not world.step("look").success
    assert len(pickle.dumps(world)) < 20_000


def run_python(code: str, tmp_path: Path, *args: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "ALFWORLD_DATA"} | {"HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_our_engine_imports_nothing_of_alfworld(tmp_path):
    task_id = write_game(tmp_path)
    code = (
        "import sys; from envs.make import make_world; w = make_world('alfworld', data=sys.argv[1]); "
        "w.reset(sys.argv[2]); w.step('look'); print({'alfworld', 'textworld', 'torch', 'jax'} & set(sys.modules))"
    )
    assert run_python(code, tmp_path, str(tmp_path), task_id) == "set()\n"


@needs_textworld
def test_reference_engine_leaves_no_traces(tmp_path):
    task_id = write_game(tmp_path)
    code = (
        "import os, sys; from envs.alfworld.world import AlfWorld; before = dict(os.environ); "
        "AlfWorld(data=sys.argv[1], engine='textworld').reset(sys.argv[2]); print(before == dict(os.environ))"
    )
    assert run_python(code, tmp_path, str(tmp_path), task_id).endswith("True\n")
    assert not (tmp_path / "home" / ".cache" / "alfworld").exists()


def test_missing_reference_engine_says_what_to_install(tmp_path, monkeypatch):
    task_id = write_game(tmp_path)
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(ImportError, match="cmake and g[+][+].*alfworld==0.4.2.*'ours'"):
        AlfWorld(data=str(tmp_path), engine="textworld").reset(task_id)

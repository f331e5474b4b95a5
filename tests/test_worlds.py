"""The contract that every world keeps (`envs/base.py`), and the shell player (`envs/play.py`) over each of them.

A new world adds one line to CASES: how to make it from a temporary folder, and a split of it. ALFWorld is a case under
each perturbation of its wording too (`envs/wording.py`).
"""

from __future__ import annotations

import inspect
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest

from envs.alfworld.index import NO_RECORD
from envs.base import Observation, Result, World
from envs.make import DEFAULTS, WORLDS, make_world, require_base_for, require_world
from envs.panel import default_panels
from envs.wording import PERTURBATIONS, form, numbered
from tests.support.hand_game import GOALS, write_game
from tests.support.hand_shop import write_shop

ROOT = Path(__file__).parents[1]
BAD_TEXTS = ["", " ", "\n", "\x00", "think: I look", "\u2028\u2029", "\ud800", "é" * 3, "go " * 5000, "{0}%s", "[]"]


def hand_written_house(folder: Path) -> dict[str, str]:
    for kind in GOALS:
        write_game(folder, kind)
    return {"data": str(folder)}


def nothing(folder: Path) -> dict[str, str]:
    return {}


def needs(package: str):
    """What makes a world that needs a package: nothing where it is installed, else the case is skipped."""

    def make(folder: Path) -> dict[str, str]:
        pytest.importorskip(package)
        return {}

    return make


CASES = {
    "synthetic": (lambda folder: {}, "syn_easy"),
    "alfworld": (hand_written_house, "hand"),
    "webshop": (write_shop, "small_test"),
    "pddl": (nothing, "pddl_easy"),
    "babyai": (needs("minigrid"), "babyai_easy"),
}
PROCESSES = ("scienceworld", "jericho")  # worlds of others, each in a process of its own, that have tests of their own
WORDS = ("chair", "bench", "red oak", "black tea")  # complete an open action


def complete(action: str, word: str = WORDS[0]) -> str:
    """The action itself, or, where it ends in an opening bracket, one that it stands for."""
    return f"{action}{word}]" if action.endswith("[") else action


@pytest.fixture(params=[*sorted(CASES), *(f"alfworld {name}" for name in PERTURBATIONS)])
def case(request, tmp_path, monkeypatch):
    """(environment name, keyword arguments of make_world, a split)."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    env, _, perturbation = request.param.partition(" ")
    make, split = CASES[env]
    return env, make(tmp_path) | ({"perturb": perturbation} if perturbation else {}), split


@pytest.fixture
def world(case) -> World:
    return make_world(case[0], **case[1])


def random_play(world: World, task_id: str, steps: int, seed: int = 0) -> list[tuple[str, Result]]:
    rng = random.Random(seed)
    world.reset(task_id)
    played = []
    for _ in range(steps):
        action = complete(rng.choice(world.actions()), rng.choice(WORDS))
        action = rng.choice(BAD_TEXTS) if rng.random() < 0.2 else action
        played.append((action, world.step(action)))
        if played[-1][1].done:
            break
    return played


def test_every_world_has_a_case():
    assert {*CASES, *PROCESSES} == set(WORLDS)


@pytest.mark.parametrize("name", ["alfwrld", "alfword", "AlfWorld"])
def test_a_mistyped_world_is_told_the_nearest_name_and_all_others(name):
    for call in (make_world, require_world, lambda env: default_panels("train", env, None)):
        with pytest.raises(ValueError, match=f"unknown world '{name}': did you mean alfworld[?] expected .*, jericho"):
            call(name)
    with pytest.raises(ValueError, match="unknown world 'zork': expected one of alfworld, webshop"):
        make_world("zork")


@pytest.mark.parametrize("env", WORLDS)
def test_every_world_has_a_base_that_can_play_it_and_room_for_an_attempt(env):
    folder = ROOT / DEFAULTS[env].model
    require_base_for(env, folder)
    assert 0 < DEFAULTS[env].context <= json.loads((folder / "config.json").read_text())["max_position_embeddings"]


def test_a_base_made_for_another_world_alone_is_refused_and_foreign_ones_never(tmp_path):
    models = {name: ROOT / "models" / f"tiny-{name}" for name in ("alfworld", "webshop", "neutral")}
    for env in WORLDS:
        require_base_for(env, models["neutral"])
        for name in ({"alfworld", "webshop"}) - {env}:
            with pytest.raises(ValueError, match=f"tiny-{name} was .*on {name} alone.*for {env}, such as models/tiny-"):
                require_base_for(env, models[name])
    for content in (None, "", "{", "[]", '{"args": 3}', '{"command": "x", "args": {"env": "alfworld"}}', "[" * 10_000):
        if content is not None:
            (tmp_path / "training.json").write_text(content)
        require_base_for("webshop", tmp_path)
    require_base_for("webshop", tmp_path / "nowhere")


def test_signatures_are_those_of_the_protocol(world):
    for name in ("tasks", "left_out", "fingerprint", "reset", "step", "actions", "commands"):
        wanted = list(inspect.signature(getattr(World, name)).parameters)[1:]
        assert list(inspect.signature(getattr(world, name)).parameters) == wanted


def test_a_world_says_whether_it_needs_a_process_of_its_own(world):
    assert world.isolated is False  # all that are ours; tests/test_process.py has one that is not


def test_tasks_are_sorted_unique_and_stable(case, world):
    ids = world.tasks(case[2])
    assert len(ids) > 1 and list(ids) == sorted(set(ids))
    assert make_world(case[0], **case[1]).tasks(case[2]) == ids


def test_unknown_split_and_task_are_value_errors_that_name_them(case, world):
    for call in (world.tasks, world.left_out):
        with pytest.raises(ValueError, match="nosuchsplit"):
            call("nosuchsplit")
    for call in (world.reset, lambda task_id: world.fingerprint([task_id])):
        with pytest.raises(ValueError, match="nosuchtask"):
            call("nosuchtask")


def test_a_fingerprint_is_of_tasks_in_any_order_and_needs_no_reset(case, world):
    ids = world.tasks(case[2])
    first = world.fingerprint(ids)
    assert len(first) == 64 and make_world(case[0], **case[1]).fingerprint([*ids, *reversed(ids)]) == first
    assert world.fingerprint(ids[1:]) not in (first, world.fingerprint(ids[:1])) and world.left_out(case[2]) == {}
    random_play(world, ids[0], 5)
    assert world.fingerprint(ids) == first


def test_nothing_but_reset_comes_first(case, world):
    for call in (lambda: world.step("look"), world.actions, world.commands):
        with pytest.raises(RuntimeError, match="reset"):
            call()


def test_opening_states_the_task(case, world):
    for task_id in world.tasks(case[2]):
        opening = world.reset(task_id)
        assert isinstance(opening, Observation) and opening.task and opening.task in opening.text


def test_every_listed_action_is_accepted(case, world):
    world.reset(world.tasks(case[2])[0])
    rng = random.Random(3)
    for _ in range(12):
        actions = world.actions()
        assert actions == sorted(set(actions))
        for action in actions:
            copy = pickle.loads(pickle.dumps(world))
            assert copy.step(complete(action)).valid, action
        if world.step(complete(rng.choice(actions))).done:
            break


def test_every_action_fits_a_command(case, world):
    for task_id in world.tasks(case[2]):
        world.reset(task_id)
        commands = world.commands()
        assert commands and len(set(commands)) == len(commands)
        rng = random.Random(7)
        for _ in range(30):
            actions = [complete(action, rng.choice(WORDS)) for action in world.actions()]
            for action in actions:
                assert any(form(numbered(command)).fullmatch(action) for command in commands), action
            if world.step(rng.choice(actions)).done:
                break
        assert world.commands() == commands


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_bad_text_changes_nothing_and_never_raises(case, world, text):
    world.reset(world.tasks(case[2])[0])
    world.step(complete(world.actions()[0]))
    before, state = world.actions(), pickle.dumps(world)
    result = world.step(text)
    assert not result.valid and not result.done and result.observation
    assert world.actions() == before and pickle.dumps(world) == state


def test_numbers_stay_in_range_and_progress_never_falls(case, world):
    for task_id in world.tasks(case[2]):
        progress = 0.0
        for _, result in random_play(world, task_id, 60):
            assert 0.0 <= result.reward <= 1.0 and progress <= result.progress <= 1.0
            assert not result.success or (result.done and result.progress == 1.0)
            progress = result.progress


def test_same_actions_same_results_whatever_else_is_alive(case, world):
    ids = world.tasks(case[2])
    alone = [random_play(world, task_id, 25) for task_id in ids]
    worlds = [make_world(case[0], **case[1]) for _ in ids]
    for other, task_id in zip(worlds, ids, strict=True):
        other.reset(task_id)
    for turn in range(25):
        for other, played in zip(worlds, alone, strict=True):
            if turn < len(played):
                assert other.step(played[turn][0]) == played[turn][1]


def test_pickle_goes_on_where_it_was(case, world):
    task_id = world.tasks(case[2])[0]
    played = random_play(world, task_id, 20)
    again = make_world(case[0], **case[1])
    again.reset(task_id)
    for action, result in played:
        again = pickle.loads(pickle.dumps(again))
        assert again.step(action) == result
    assert pickle.loads(pickle.dumps(make_world(case[0], **case[1]))).tasks(case[2])  # before any reset too


def test_reset_starts_afresh(case, world):
    task_id = world.tasks(case[2])[0]
    opening, actions = world.reset(task_id), world.actions()
    random_play(world, task_id, 20)
    assert (world.reset(task_id), world.actions()) == (opening, actions)


def solve(world: World, task_id: str) -> list[str]:
    """A solution by long random play, cut at its end; small worlds only."""
    for seed in range(200):
        played = random_play(world, task_id, 400, seed)
        if played[-1][1].success:
            return [action for action, result in played if result.valid]
    raise AssertionError(f"{task_id} was never solved")


def test_after_the_end_only_reset_goes_on(case, world):
    task_id = world.tasks(case[2])[0]
    solution = solve(world, task_id)
    with pytest.raises(RuntimeError, match="over.*reset"):
        world.step(solution[-1])
    world.reset(task_id)
    results = [world.step(action) for action in solution]
    assert [r.success for r in results] == [False] * (len(results) - 1) + [True]
    assert results[-1].done and results[-1].reward == results[-1].progress == 1.0


# ---- the shell player


def shell(*args: str, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "envs.play", *args]
    text = stdin.encode(errors="surrogatepass")
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, timeout=60)


def test_shell_player_says_what_the_world_says(case, world):
    env, options, split = case
    flags = ["--env", env, *[word for key, value in options.items() for word in (f"--{key}", value)]]
    listed = shell(*flags, "--tasks", "--split", split)
    assert listed.stdout.decode().split() == list(world.tasks(split))
    task_id = world.tasks(split)[0]
    actions = [*solve(world, task_id), "look"]
    actions[:0] = ["nonsense \u2028 \ud800", ""]
    done = shell(*flags, "--task", task_id, stdin="\n".join(actions))
    lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
    opening = world.reset(task_id)
    assert lines[0] == {
        "observation": opening.text,
        "reward": 0.0,
        "success": False,
        "done": False,
        "valid": True,
        "actions": world.actions(),
    }
    assert len(lines) == len(actions)  # the opening and every action but the last, which comes after the end
    for action, line in zip(actions, lines[1:], strict=False):
        result = world.step(action)
        assert line == {
            "observation": result.observation,
            "reward": result.reward,
            "success": result.success,
            "done": result.done,
            "valid": result.valid,
            "actions": [] if result.done else world.actions(),
        }
    assert lines[-1]["done"] and done.returncode == 0


def test_shell_player_answers_line_by_line(case, world):
    """A program at the other end waits for each answer, so each must be flushed."""
    env, options, split = case
    flags = [word for key, value in options.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "envs.play", "--env", env, *flags, "--task", world.tasks(split)[0]]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as player:
        first = json.loads(player.stdout.readline())
        player.stdin.write(complete(first["actions"][0]) + "\n")
        player.stdin.flush()
        assert json.loads(player.stdout.readline())["valid"]
        player.stdin.close()
    assert player.returncode == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--task ID"),
        (("--task", "x", "--tasks"), "--task ID"),
        (("--task", "no/such/task"), "unknown task"),
        (("--tasks", "--split", "nosuch"), "no split 'nosuch'"),
        (("--tasks", "--env", "nosuch"), "unknown world"),
        (("--tasks", "--env", "alfwrld"), "did you mean alfworld?"),
        (("--tasks", "--engine", "nosuch"), "unknown engine"),
        (("--tasks", "--data", "nosuch"), "json_2.1.1"),
    ],
)
def test_shell_player_refuses_in_one_sentence(tmp_path, args, message):
    write_game(tmp_path)
    flags = () if "--data" in args else ("--data", str(tmp_path))
    done = shell(*flags, *args)
    error = done.stderr.decode()
    assert done.returncode == 2 and message in error and error.count("\n") == 1 and done.stdout == b""


def test_shell_player_says_what_a_split_leaves_out_and_why(tmp_path):
    kept, left_out = write_game(tmp_path, "place"), write_game(tmp_path, "two")
    (tmp_path / "json_2.1.1" / left_out / "traj_data.json").unlink()
    done = shell("--data", str(tmp_path), "--tasks", "--split", "hand")
    assert done.returncode == 0 and done.stdout.decode() == f"{kept}\n"
    assert done.stderr.decode() == f"1 task of hand left out: {NO_RECORD}\n"


def test_shell_player_survives_a_closed_pipe(tmp_path):
    write_game(tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "envs.play", "--data", str(tmp_path), "--tasks", "--split", "hand"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert done.returncode == 0 and b"Traceback" not in done.stderr

"""Every world keeps the contract (`envs/check.py`), and the shell player (`envs/play.py`) plays each of them.

A new world adds one line to CASES: how to make it from a temporary folder, and a split of it. ALFWorld is a case under
each perturbation of its wording too (`envs/wording.py`).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from envs.alfworld.index import NO_RECORD
from envs.base import World
from envs.check import PROPERTIES, Case, complete, ending
from envs.make import DEFAULTS, WORLDS, make_world, require_base_for, require_world
from envs.panel import default_panels
from envs.wording import PERTURBATIONS
from tests.support.hand_game import GOALS, write_game
from tests.support.hand_shop import write_shop

ROOT = Path(__file__).parents[1]
PLAYS = 200  # of a small world at random, one of which solves it


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


@pytest.mark.parametrize("hold", PROPERTIES, ids=lambda hold: hold.__name__)
def test_every_world_keeps_the_contract(case, hold):
    env, options, split = case
    make = functools.partial(make_world, env, **options)
    tasks = make().tasks(split)
    assert len(tasks) > 1 and make().left_out(split) == {}
    assert hold(Case(make=make, tasks=tasks, plays=PLAYS)) is None  # nothing is wrong, and nothing was left unchecked


def test_our_worlds_need_no_process_of_their_own(world):
    assert world.isolated is False  # tests/test_process.py has one that does


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
    actions = [*ending(world, task_id, PLAYS), "look"]
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

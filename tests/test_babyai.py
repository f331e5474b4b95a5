"""BabyAI in text: what is told is what is there, macro-actions go where they say, missions and milestones."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from envs.panel import read_panel

pytest.importorskip("minigrid", reason="minigrid is not installed (requirements/worlds.txt)")

from minigrid.core.world_object import Ball, Box, Door, Key  # noqa: E402

from envs.babyai import LEVELS, BabyAI, find_routes  # noqa: E402


@pytest.fixture
def world() -> BabyAI:
    return BabyAI()


def put(world: BabyAI, level: str, things: dict, position: tuple[int, int], direction: int) -> BabyAI:
    """A level with its things taken away and others put into it; direction 3 is up, 0 right."""
    world.reset(f"babyai_test/{level}-1234")
    env = world._env
    for x in range(env.width):
        for y in range(env.height):
            if env.grid.get(x, y) is not None and env.grid.get(x, y).type != "wall":
                env.grid.set(x, y, None)
    for place, thing in things.items():
        env.grid.set(*place, thing)
        thing.cur_pos = place
    env.agent_pos, env.agent_dir, env.carrying = position, direction, None
    world._look()
    return world


def test_what_is_told_is_what_is_there(world):
    things = {(3, 1): Ball("red"), (2, 3): Ball("red"), (4, 4): Box("blue"), (5, 6): Key("grey")}
    put(world, "GoToRedBall", things, (3, 5), 3)
    told = world._text
    assert told == (
        "You see: blue box 1, 1 step ahead and 1 to the right; red ball 1, 2 steps ahead and 1 to the "
        "left; red ball 2, 4 steps ahead. Ahead 3 steps are free, then there is a ball. You carry nothing."
    )
    assert "grey key" not in told  # behind the agent
    assert world.step("turn right").valid
    assert world._text.startswith("You see: blue box 1, 1 step ahead and 1 to the left")


def test_a_named_thing_is_walked_to_and_picked_up_and_dropped(world):
    put(world, "PickupLoc", {(3, 1): Ball("red"), (3, 4): Box("blue")}, (3, 5), 3)
    result = world.step("Go to  RED ball 1")
    assert result.valid and tuple(world._env.front_pos) == (3, 1)
    assert world.step("pick up red ball 1").observation.endswith("You carry a red ball.")
    assert not any(action.startswith("pick up") for action in world.actions())  # one thing at a time
    assert "drop" in world.actions() and world.step("drop").observation.endswith("You carry nothing.")
    assert world._env.grid.get(3, 1).type == "ball" and "drop" not in world.actions()


def test_a_locked_door_needs_its_key(world):
    things = {(3, 2): Door("red", is_locked=True), (2, 4): Key("red"), (4, 4): Key("blue")}
    put(world, "Unlock", things, (3, 5), 3)
    assert "locked red door 1, 3 steps ahead" in world._text
    assert not world.step("toggle and go through red door 1").valid
    world.step("pick up blue key 1")
    assert "toggle and go through red door 1" not in world.actions()
    world.step("go to red door 1")
    refused = world.step("toggle")
    assert not refused.valid and refused.observation == "You cannot toggle here."
    put(world, "Unlock", things, (3, 5), 3)
    world.step("pick up red key 1")
    assert world.step("toggle and go through red door 1").valid
    assert tuple(world._env.agent_pos) == (3, 1) and things[3, 2].is_open


def test_routes_are_shortest_and_keep_to_cells_in_sight():
    cells = {(x, y): None for x in range(7) for y in range(3, 7)}
    routes = find_routes(cells)
    assert routes[3, 5] == [] and routes[3, 3] == [2, 2] and routes[4, 6] == [1]
    assert routes[3, 2] == [2, 2, 2] and (3, 1) not in routes
    walled = {cell: Ball("red") if cell[1] == 5 else None for cell in cells}
    assert (3, 4) not in find_routes(walled)


def test_every_listed_command_does_something_in_every_level(world):
    """A random walk through the whole panel: nothing listed is refused, nothing ends it but the mission."""
    rng = random.Random(2)
    for level in LEVELS:
        world.reset(f"babyai_test/{level}-1235")
        for _ in range(10):
            result = world.step(rng.choice(world.actions()))
            assert result.valid and 0 <= result.progress <= 1
            if result.done:
                break


def test_minigrids_bot_followed_by_commands_wins(world):
    lengths = []
    for level in LEVELS:
        task_id = f"babyai_test/{level}-1235"
        world.reset(task_id)
        results = [world.step(command) for command in world.solution()]
        assert results[-1].success and results[-1].reward == results[-1].progress == 1.0, level
        assert not any(result.success for result in results[:-1])
        lengths.append(len(results))
    assert sum(length <= 30 for length in lengths) >= 27  # turns that AgentBoard gives


def test_where_the_bot_fails_is_said(world):
    world.reset("babyai_test/UnlockToUnlock-1234")
    with pytest.raises(ValueError, match="bot does not accomplish 'pick up"):
        world.solution(most=3)


def test_milestones(world):
    put(world, "PickupLoc", {(3, 1): Ball("red"), (1, 4): Box("blue")}, (3, 5), 3)
    world._env.instrs.desc.obj_set = [world._env.grid.get(3, 1)]
    assert world.step("move forward").progress == 0.0
    assert world.step("go to red ball 1").progress == 0.5  # before it
    assert world.step("turn left").progress == 0.5  # at best
    world.reset("babyai_test/OpenRedBlueDoorsDebug-1234")  # open the red door, then open the blue door
    seen = [world.step(command).progress for command in world.solution()]
    assert seen == sorted(seen) and 0.5 in seen and seen[-1] == 1.0


def test_the_panel_is_28_levels_with_4_seeds():
    task_ids = read_panel("babyai_test-112")
    assert len({task_id.rpartition("-")[0] for task_id in task_ids}) == 28
    assert {task_id.rpartition("-")[2] for task_id in task_ids} == {"1234", "1235", "1236", "1237"}


def test_nothing_but_json_is_printed():
    """Minigrid prints which layouts it rejects."""
    command = [sys.executable, "-m", "envs.play", "--env", "babyai", "--task", "babyai_test/GoToSeqS5R2-1234"]
    done = subprocess.run(command, input="turn left\n", capture_output=True, text=True, timeout=60, check=True)
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 2


def test_without_minigrid_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "minigrid", None)
    with pytest.raises(ImportError, match=r"needs minigrid .*: pip install -r requirements/worlds.txt"):
        BabyAI()


def test_levels_of_another_release_of_minigrid_are_told_apart(world, monkeypatch):
    ids = read_panel("babyai_test-112")
    first = world.fingerprint(ids)
    assert BabyAI().fingerprint(reversed(ids)) == first != world.fingerprint(ids[1:])
    monkeypatch.setattr("minigrid.__version__", "3.1.0")
    assert BabyAI().fingerprint(ids) != first

"""ScienceWorld: what can be said without its package, and, where package and Java are installed, the contract."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
import shutil
from functools import partial

import pytest

from envs import scienceworld
from envs.base import World
from envs.make import make_world
from envs.process import WorldProcess, ready
from envs.scienceworld import CHECK, TASKS, UNKNOWN, ScienceWorld

INSTALLED = importlib.util.find_spec("scienceworld") is not None and shutil.which("java") is not None
played = pytest.mark.skipif(not INSTALLED, reason="scienceworld or Java is not installed (requirements/worlds.txt)")
TASK = "scienceworld_test/find-living-thing-0225"


@pytest.fixture
def world():
    world = ScienceWorld()
    yield world
    world.close()


def test_splits_are_the_simulators():
    sizes = [len(scienceworld.ids_of(split)) for split in scienceworld.SPLITS]
    assert sizes == [3592, 1796, 1819] and len(TASKS) == 30
    assert len({task_id for split in scienceworld.SPLITS for task_id in scienceworld.ids_of(split)}) == 7207
    assert {task_id.partition("/")[2].rpartition("-")[0] for task_id in scienceworld.panel_ids()} == set(TASKS)


@pytest.mark.parametrize("missing", ["scienceworld", "Java"])
def test_one_is_told_what_to_install(monkeypatch, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if missing == "scienceworld" else name)
    monkeypatch.setattr(shutil, "which", lambda name: None if missing == "Java" else name)
    with pytest.raises(ImportError, match=f"needs {missing}: pip install -r requirements/worlds.txt.*default-jre"):
        make_world("scienceworld")


def test_what_was_played_is_told_without_a_virtual_machine(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")
    world, ids = ScienceWorld(), scienceworld.panel_ids()
    first = world.fingerprint(ids)
    assert ScienceWorld().fingerprint(reversed(ids)) == first != world.fingerprint(ids[1:]) and world._env is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.4")
    assert ScienceWorld().fingerprint(ids) != first and world.left_out("scienceworld_test") == {}
    with pytest.raises(ValueError, match="unknown task 'scienceworld_test/boil-9999'"):
        world.fingerprint(["scienceworld_test/boil-9999"])


def random_play(world: World, steps: int) -> list:
    rng = random.Random(3)
    played = [world.reset(TASK)]
    for _ in range(steps):
        played.append(world.step(rng.choice(world.actions())))
        if played[-1].done:
            break
    return played


@played
def test_the_table_of_variations_is_the_packages(world):
    world.reset(TASK)
    for task, counts in TASKS.items():
        world._env.load(task, 0, "")
        sets = (world._env.get_variations_train(), world._env.get_variations_dev(), world._env.get_variations_test())
        assert tuple(map(len, sets)) == counts and [*sets[0], *sets[1], *sets[2]] == list(range(sum(counts)))


@played
def test_the_same_task_and_actions_bring_the_same_whatever_was_played_before(world):
    first = random_play(world, 15)
    world.reset("scienceworld_test/boil-0021")
    assert random_play(world, 15) == first
    progress = [result.progress for result in first[1:]]
    assert progress == sorted(progress) and all(0 <= result.reward <= 1 for result in first[1:])


@played
@pytest.mark.parametrize("task", ["chemistry-mix-paint-tertiary-color-0027", "find-animal-0225"])
def test_what_is_played_does_not_depend_on_the_threads_of_the_virtual_machine(monkeypatch, world, task):
    def play() -> list:
        opening = world.reset(f"scienceworld_test/{task}")
        walk = [f"{verb} {place}" for place in ("hallway", "greenhouse") for verb in ("open door to", "go to")]
        results = [world.step(action) for action in [*walk, *["wait1", "look around"] * 5]]
        return [opening, world.actions(), *results, world.actions()]

    first = play()
    others = [option for option in scienceworld.JAVA_OPTIONS if option != "-XX:+UseSerialGC"]
    monkeypatch.setattr(scienceworld, "JAVA_OPTIONS", [*others, "-XX:+UseParallelGC", "-XX:ParallelGCThreads=3"])
    assert play() == first


@played
def test_openings_bad_texts_and_the_contract(world):
    with pytest.raises(RuntimeError, match="no task yet"):
        world.step("look around")
    with pytest.raises(RuntimeError, match="no task yet"):
        world.actions()
    bad = ((world.tasks, "nosuchsplit"), (world.reset, "nosuchtask"), (world.reset, "scienceworld_test/x-1"))
    for call, name in bad:
        with pytest.raises(ValueError, match=name):
            call(name)
    opening = world.reset(TASK)
    assert opening.task in opening.text and opening.task.startswith("find a(n) living thing")
    before = world.actions()
    assert before == sorted(set(before)) and "reset task" not in before and CHECK in before
    for text in ("", " ", "\n", "\x00", "\ud800", "think: I look", "go " * 5000, "reset task", "0"):
        result = world.step(text)
        assert not result.valid and not result.done and result.observation == UNKNOWN
    assert world.actions() == before
    assert "pick up {object}" in world.commands() and "focus on {object}" in world.step(CHECK).observation


@played
def test_the_simulators_own_way_wins_and_then_it_is_over(world):
    world.reset("scienceworld_test/find-plant-0225")
    solution = world.solution()
    results = [world.step(action) for action in solution]
    assert [r.success for r in results] == [False] * (len(results) - 1) + [True]
    assert results[-1].done and results[-1].reward == results[-1].progress == 1.0
    with pytest.raises(RuntimeError, match="over.*reset"):
        world.step("look around")


@played
def test_it_is_played_in_a_process_of_its_own():
    process = WorldProcess(partial(make_world, "scienceworld"), deadline=120)
    try:
        process.send("reset", TASK)
        ready([process], timeout=120)
        good, opening = process.answer()
        assert good and "living thing" in opening.text
    finally:
        process.kill()

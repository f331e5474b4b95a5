"""Planning problems: exact rules against a second, naive reading of the same PDDL; panel, plans and words."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random

import pytest

from envs.panel import read_panel
from envs.pddl.domains import DOMAINS
from envs.pddl.strips import Problem, read_domain, read_expression
from envs.pddl.world import CHECK, LOOK, PROBLEMS, Pddl, draw_task, load_task

OPENINGS = {1: "4ea558dcb963b63f"}  # PROBLEMS: the beginning of the sha256 of the panel's openings


def naive(domain, objects: dict[str, str], state: set) -> dict[tuple, set]:
    """{(operator, objects): the state after it}, by trying every choice of objects on sets of facts."""

    def kinds(kind):
        return {kind} | (kinds(domain.types[kind]) if kind in domain.types else set())

    found = {}
    for one in domain.operators:
        choices = [[o for o in objects if wanted in kinds(objects[o])] for wanted in one.parameters.values()]
        for chosen in itertools.product(*choices):
            named = dict(zip(one.parameters, chosen, strict=True))
            need, forbid, add, delete = (
                {tuple(named.get(word, word) for word in fact) for fact in facts}
                for facts in (one.need, one.forbid, one.add, one.delete)
            )
            if need <= state and not forbid & state:
                found[one.name, chosen] = state - delete | add
    return found


@pytest.mark.parametrize("task_id", [f"{split}/{name}-003" for split in ("pddl_easy", "pddl_test") for name in DOMAINS])
def test_actions_and_their_effects_are_those_of_a_naive_reading(task_id):
    rng = random.Random(1)
    domain, (objects, start, _) = draw_task(task_id)
    task = load_task(task_id)
    problem, state, naive_state, most = task.problem, task.problem.start, set(start), 0
    for _ in range(10):
        assert {*problem.facts_of(state), *problem.fixed} == naive_state
        expected = naive(domain, objects, naive_state)
        actions = [action for action in problem.actions if action.applies(state)]
        assert {(action.name, action.objects) for action in actions} == set(expected)
        commands = [task.command(action) for action in actions]
        assert len(commands) == len(set(commands)), "a command stands for one action at most"
        action = rng.choice(actions)
        state, naive_state = action.apply(state), expected[action.name, action.objects]
        most = max(most, len(actions))
    assert most > 1


def play_solution(world: Pddl, task_id: str) -> int:
    """Number of actions of the scripted player, which must win with the last one."""
    world.reset(task_id)
    results = [world.step(command) for command in world.solution()]
    assert [result.success for result in results] == [False] * (len(results) - 1) + [True]
    assert all(result.valid for result in results) and results[-1].progress == results[-1].reward == 1.0
    return len(results)


def test_easy_problems_take_a_few_actions():
    world = Pddl()
    assert all(play_solution(world, task_id) <= 5 for task_id in world.tasks("pddl_easy"))


@pytest.mark.parametrize("name", DOMAINS)
def test_some_of_the_panel_are_solved_within_30_turns(name):
    world = Pddl()
    chosen = [task_id for task_id in read_panel("pddl_test-60") if name in task_id][6:9]
    assert all(4 <= play_solution(world, task_id) <= 30 for task_id in chosen)


@pytest.mark.slow
def test_all_of_the_panel_are_solved_within_30_turns():
    world = Pddl()
    assert all(play_solution(world, task_id) <= 30 for task_id in read_panel("pddl_test-60"))


def test_the_panel_is_the_split_and_its_problems_are_different_and_the_recorded_ones():
    world = Pddl()
    task_ids = read_panel("pddl_test-60")
    assert task_ids == list(world.tasks("pddl_test"))
    openings = [world.reset(task_id).text for task_id in task_ids]
    assert len(set(openings)) == 60
    digest = hashlib.sha256("\n".join(openings).encode()).hexdigest()[:16]
    assert OPENINGS[PROBLEMS] == digest, "problems have changed: raise PROBLEMS, note it in docs/log.md"


def test_nothing_is_won_at_the_start():
    world = Pddl()
    for task_id in (*world.tasks("pddl_test"), *world.tasks("pddl_easy")):
        world.reset(task_id)
        assert not world.step(LOOK).success


def test_answers_say_what_has_changed_and_what_is_missing():
    world = Pddl()
    world.reset("pddl_easy/barman-000")
    drink = world.reset("pddl_easy/barman-000").task.removeprefix("shot1 contains ")
    refused = world.step(f"fill shot1 with {drink}")
    assert not refused.valid
    why = "it is not so that your left hand holds shot1"
    assert refused.observation == f"You cannot fill shot1 with {drink} now: {why}."
    assert world.step("Grasp  shot1 with LEFT hand.").observation == "Now your left hand holds shot1."
    assert "shot1 is clean" in world.step("look").observation
    assert not world.step("grasp shot9 with left hand").valid
    assert world.step(CHECK).observation == f"You can {', '.join(world.actions())}."
    won = world.step(f"fill shot1 with {drink}")
    assert won.success and won.observation.startswith(f"Now shot1 contains {drink}")
    assert "shot1 is no longer clean" in won.observation


def test_commands_are_templates_that_every_action_fits():
    world = Pddl()
    for name in DOMAINS:
        world.reset(f"pddl_test/{name}-000")
        templates = {template.partition("{")[0] for template in world.commands()}
        assert all(any(action.startswith(start) for start in templates) for action in world.actions())
    assert "stack {block} on {block}" in (world.reset("pddl_test/blocksworld-000"), world.commands())[1]


def test_a_state_without_a_way_out_has_no_solution():
    world = Pddl()
    task_id = next(i for i in world.tasks("pddl_test") if "barman" in i)
    world.reset(task_id)
    world._state = 0
    with pytest.raises(ValueError, match=f"no plan is found in {task_id}"):
        world.solution()


@pytest.mark.parametrize("text", ["(define (domain x)", "(define))", "", "a b", "(a) (b)"])
def test_broken_pddl_is_a_value_error(text):
    with pytest.raises(ValueError, match="brackets"):
        read_expression(text)


def test_a_goal_that_can_never_hold_is_a_value_error():
    types, operators = read_domain(DOMAINS["gripper"].pddl)
    objects = {"room1": "room", "ball1": "ball", "left": "gripper"}
    with pytest.raises(ValueError, match=r"\('at', 'ball1', 'room2'\).*can never hold"):
        Problem(types, operators, objects, [("at", "ball1", "room1")], [("at", "ball1", "room2")])


def test_problems_of_the_same_name_are_told_apart_by_their_content(monkeypatch):
    world, ids = Pddl(), read_panel("pddl_test-60")
    first = world.fingerprint(ids)
    assert Pddl().fingerprint(reversed(ids)) == first != world.fingerprint(ids[1:])
    with monkeypatch.context() as patch:
        patch.setattr("envs.pddl.world.SEED", 1)
        assert world.fingerprint(ids) != first
    reworded = dataclasses.replace(DOMAINS["gripper"], about="Carry balls.")
    monkeypatch.setitem(DOMAINS, "gripper", reworded)
    assert world.fingerprint(ids) != first

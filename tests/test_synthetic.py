"""Sampled worlds: two vocabularies apart, the same world for the same name, rules and their mistakes; and properties of
what the teacher plays in them, whatever the world."""

from __future__ import annotations

import dataclasses
import hashlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrefine.codes import fitting
from agentrefine.player import solve
from agentrefine.teacher import make_script, make_trajectory, make_turns, teach
from agentrefine.verify import read_script, verify
from artifacts.trajectory import parse_line, to_line
from envs.panel import SYNTHETIC, default_panels, read_panel
from envs.synthetic import world as synthetic
from envs.synthetic.rules import State, build_pattern, verification_code
from envs.synthetic.spec import listed, make_spec
from envs.synthetic.words import FUNCTION_WORDS, HELD, TRAIN
from envs.synthetic.world import SPLITS, Synthetic

NUMBERS = st.integers(0, 10**6).map(lambda n: f"{n:05d}")
TASKS = st.one_of(NUMBERS.map("syn_train/{}".format), st.integers(0, 499).map("syn_held/{:05d}".format))


def content(text: str) -> set[str]:
    words = set(re.findall(r"[a-z]+", text.lower())) - FUNCTION_WORDS
    return {word if word.endswith("ss") else word.removesuffix("s") for word in words}


def words_in(value) -> set[str]:
    """The content words of a vocabulary: all words of all its texts, without the s of a plural or a third person."""
    if isinstance(value, str):
        return content(re.sub(r"\{\w+\}", " ", value))
    values = [*value.values()] if isinstance(value, dict) else value
    return set().union(*map(words_in, values))


def test_the_two_vocabularies_have_no_content_word_in_common():
    assert words_in(TRAIN) & words_in(HELD) == set()
    assert set(TRAIN.names.values()) & set(HELD.names.values()) == set()
    assert len(words_in(TRAIN)) > 300 and len(words_in(HELD)) > 100
    assert TRAIN.commands.keys() == HELD.commands.keys() and TRAIN.says.keys() == HELD.says.keys()


def texts_of(split: str, count: int) -> set[str]:
    """Every content word that a player of so many worlds reads or writes, mistakes included."""
    world, found = Synthetic(), set()
    for task_id in world.tasks(split)[:count]:
        opening = world.reset(task_id)
        said = [opening.text, *world.commands(), *world.actions()]
        for turn in teach(task_id, np.random.default_rng(0)):
            if "parameter" not in turn.errors:  # else the world repeats what it was told
                said += [turn.action, turn.observation]
        found |= content(" ".join(said))
    return found


def test_played_worlds_of_the_two_have_no_content_word_in_common():
    train, held = texts_of("syn_train", 400), texts_of("syn_held", 400)
    assert len(train) > 300 and len(held) > 150
    assert train & held == set()
    assert held <= words_in(HELD) | set(HELD.names.values())


def test_a_name_is_always_the_same_world():
    """Where this fails, scores on the panels do not compare any more: raise WORLDS in envs/synthetic/spec.py."""
    specs = [make_spec(task) for name in SYNTHETIC for task in read_panel(name)]
    text = repr([(s.opening, s.lies, s.goals, s.hands, s.commands, s.says) for s in specs])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "75dedc90bda45774"


def test_panels_and_splits():
    assert default_panels("evaluate", "synthetic", None) == tuple(SYNTHETIC)
    with pytest.raises(ValueError, match="no default panel"):
        default_panels("train", "synthetic", None)
    world = Synthetic()
    assert {split: len(world.tasks(split)) for split in SPLITS} == SPLITS
    assert world.reset("syn_train/123456789").text
    for wrong in ("syn_train/7", "syn_train/000007", "syn_valid/00500", "syn_train/", "no/00000", "syn_valid/-0001"):
        with pytest.raises(ValueError, match="unknown task"):
            world.reset(wrong)


def test_articles_and_lists():
    assert listed(["cup"]) == "a cup" and listed(["egg", "cup"]) == "an egg and a cup"
    assert listed(["cup", "egg", "pen"]) == "a cup, an egg and a pen"


# A world with a lock, so with every kind of rule but work: found by name, its parts by role.
LOCKED = next(t for t in Synthetic().tasks("syn_train") if make_spec(t).lock and make_spec(t).repair_tool)


def at(world: Synthetic, **state) -> Synthetic:
    world._state = State(**({"at": "", "lies": world._state.lies} | state))
    return world


@pytest.fixture
def world():
    world = Synthetic()
    world.reset(LOCKED)
    return world


def test_each_kind_of_mistake_is_told_apart(world):
    spec = make_spec(LOCKED)
    box, key = spec.lock
    tool, fixture, repair_at = spec.repair_tool, spec.goals[0].kind, spec.lies[spec.goals[0].kind]
    elsewhere = next(place for place in spec.places if place != box)

    def event(action):
        why = world.refusal(action)
        return why and (why.kind, why.event)

    assert event("dance") == ("parameter", "unknown")
    assert event(spec.command("go", place="moon")) == ("parameter", "no_such")
    assert event(spec.command("open", place=box)) == ("place", "not_there")
    assert event(spec.command("go", place=box)) is None
    at(world, at=elsewhere)
    assert event(spec.command("go", place=elsewhere)) == ("logic", "there")
    at(world, at=box)
    assert event(spec.command("open", place=box)) == ("logic", "locked")
    at(world, at=box, hands=(key,))
    assert event(spec.command("open", place=box)) is None
    at(world, at=box, hands=(key,), opened=frozenset([box]))
    assert event(spec.command("open", place=box)) == ("logic", "opened")
    assert event(spec.command("take", object=key, place=box)) == ("logic", "held")
    at(world, at=repair_at)
    assert event(spec.command("repair", object=fixture, tool=tool)) == ("logic", "needs_tool")
    at(world, at=repair_at, hands=(tool,))
    assert event(spec.command("repair", object=fixture, tool=tool)) is None
    assert event(spec.command("put", object=key, place=repair_at)) == ("logic", "not_held")
    at(world, at=next(p for p in spec.places if p != repair_at), hands=(tool,))
    assert event(spec.command("repair", object=fixture, tool=tool)) == ("place", "not_here")


@pytest.mark.parametrize(("rule", "event"), [("raw", "not_done"), ("order", "too_early")])
def test_a_goal_place_refuses_what_comes_before_its_time(rule, event):
    world = Synthetic()
    task = next(t for t in world.tasks("syn_train") if getattr(make_spec(t), rule))
    world.reset(task)
    spec = make_spec(task)
    place = spec.goals[0].place
    thing = spec.order[2] if spec.order else next(n for n, kind in spec.kinds.items() if kind == spec.goals[0].kind)
    at(world, at=place, hands=(thing,), opened=spec.boxes)
    put = spec.command("put", object=thing, place=place)
    assert world.refusal(put).event == event
    if spec.order:
        at(world, at=place, hands=(thing,), opened=spec.boxes, lies={**spec.lies, spec.order[1]: place})
    else:
        at(world, at=place, hands=(thing,), opened=spec.boxes, worked=frozenset([thing]))
    assert world.refusal(put) is None


def test_worlds_are_about_as_long_as_asked():
    world = Synthetic()
    for split in ("syn_valid", "syn_held"):
        lengths = [len(solve(make_spec(task), world, task)) for task in world.tasks(split)[:200]]
        assert 9 <= np.mean(lengths) <= 12 and max(lengths) <= 20, (split, np.mean(lengths), max(lengths))
        assert np.mean([6 <= length <= 14 for length in lengths]) > 0.8


def test_worlds_differ_in_their_words_rules_and_goals():
    specs = [make_spec(task) for task in Synthetic().tasks("syn_train")[:500]]
    assert len({tuple(sorted(s.commands.values())) for s in specs}) > 450
    assert len({tuple(sorted(s.says.values())) for s in specs}) == 500
    for rule in ("lock", "station", "work_tool", "repair_tool", "raw", "order"):
        assert 20 < sum(bool(getattr(s, rule)) for s in specs) < 400, rule
    assert {s.hands for s in specs} == {1, 2}


# ---- the teacher -----------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(TASKS)
def test_every_world_can_be_solved(task):
    played = solve(make_spec(task), Synthetic(), task)
    assert played[-1][1].success and played[-1][1].reward == 1.0
    assert [result.success for _, result in played[:-1]] == [False] * (len(played) - 1)


@settings(max_examples=200, deadline=None)
@given(TASKS, st.integers(0, 2**32 - 1))
def test_what_the_teacher_plays_is_what_the_world_says(task, seed):
    """Played again: flagged turns are mistakes of that kind and change nothing, others are legal, the goal is reached,
    and two mistakes at least are put right."""
    turns, world = teach(task, np.random.default_rng(seed)), Synthetic()
    world.reset(task)
    for number, turn in enumerate(turns):
        why, before = world.refusal(turn.action), world._state
        result = world.step(turn.action)
        assert result.observation == turn.observation and result.valid == turn.valid
        assert [why.kind if why else None] == (turn.errors or [None])
        assert why is None or (world._state == before and number < len(turns) - 1)
    assert result.success
    assert sum(bool(turn.errors) for turn in turns) >= 2
    for mistake, right in zip(turns, turns[1:], strict=False):
        assert not (mistake.errors and right.errors) and (not mistake.errors or right.thought != mistake.thought)


@settings(max_examples=200, deadline=None)
@given(TASKS, st.integers(0, 2**32 - 1))
def test_the_verifier_takes_what_the_teacher_made(task, seed):
    turns = teach(task, np.random.default_rng(seed))
    script, written = make_script(task), make_turns(task, turns)
    assert verify(script, written).ok
    understood = fitting(read_script(script), [turn.action for turn in turns])  # what the world says too
    assert understood == {index for index, turn in enumerate(turns) if "parameter" not in turn.errors}
    trajectory = make_trajectory(task, turns, 0)
    assert parse_line(to_line(trajectory), "here") == trajectory


def test_the_same_seed_makes_the_same_mistakes_and_another_one_others():
    made = [teach("syn_train/00003", np.random.default_rng(seed)) for seed in (0, 0, 1, 2)]
    assert made[0] == made[1] and made[0] != made[2] and made[2] != made[3]


def test_all_kinds_of_mistakes_are_made():
    kinds = [
        kind
        for number in range(100)
        for turn in teach(f"syn_train/{number:05d}", np.random.default_rng(number))
        for kind in turn.errors
    ]
    for kind in ("parameter", "place", "logic"):
        assert kinds.count(kind) > 40


TEMPLATES = sorted({template for words in (TRAIN, HELD) for each in words.commands.values() for template in each})


@given(st.sampled_from(TEMPLATES), st.lists(st.integers(0, 9)), st.booleans())
def test_a_command_is_understood_as_by_its_verification_code(template, chosen, begins):
    template = template.replace("{verb}", "wash")
    words = [part for part in re.split(r"\{\w+\}", template) if part]
    pieces = [*words, *(part.strip() for part in words), " ", "a", "b c", "\n", "\t", "\u2028"]
    text = words[0] * begins + "".join(pieces[index % len(pieces)] for index in chosen)
    expected, found = re.match(verification_code(template), text), build_pattern(template).match(text)
    assert (found and found.groups()) == (expected and expected.groups())


def test_a_command_takes_linear_time_of_any_text():
    """Quadratic time would be hours."""
    for template in ("take {object} from {place}", "grab {object}", "use {tool} to wash {object}", "push {object} up"):
        for filler in (" ", " from ", "\u2028", " to ", "x", " up"):
            text = template.split("{")[0] + filler * 2**18
            assert not build_pattern(template).match(f"{text}\nx") and not build_pattern(template).match(
                f"\t{text}x\ny"
            )


def test_worlds_of_the_same_name_are_told_apart_by_their_content(monkeypatch):
    world, ids = Synthetic(), read_panel("syn_valid-60")
    first = world.fingerprint(ids)
    assert Synthetic().fingerprint(reversed(ids)) == first != world.fingerprint(ids[1:])
    spec = make_spec(ids[7])
    lies = dict(zip(spec.lies, reversed(spec.lies.values()), strict=True))  # which no text says
    other = dataclasses.replace(spec, lies=lies)
    monkeypatch.setattr(synthetic, "make_spec", lambda task_id: other if task_id == ids[7] else make_spec(task_id))
    assert world.fingerprint(ids) != first
    with pytest.raises(ValueError, match="unknown task 'syn_valid/99999'"):
        world.fingerprint(["syn_valid/99999"])

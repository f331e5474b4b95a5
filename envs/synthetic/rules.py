"""The rules of a synthetic world: how a command is parsed, what it changes, and why it is refused.

`parse` turns a command into a role and its values; `Rules` has a method for each role, which returns the next state.
A refused command is a mistake of one of three kinds: parameter (no command, or a value that it does not take), place
(what it acts on is elsewhere), logic (a condition is not met).
Left out: how events are worded (`Spec.says`), reward and progress (`world.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from envs.synthetic.spec import Spec, make_spec
from envs.synthetic.words import PLAIN

MistakeKind = Literal["parameter", "place", "logic"]


@dataclass(frozen=True)
class State:
    """Where everything is. `lies`: the place of everything that is not in hand."""

    at: str
    lies: dict[str, str]
    hands: tuple[str, ...] = ()
    opened: frozenset[str] = frozenset()
    worked: frozenset[str] = frozenset()


class Refusal(Exception):
    """Why an action is refused: the kind of mistake, and the event that reports it, with its values."""

    def __init__(self, kind: MistakeKind, event: str, **values: str):
        super().__init__(kind, event)
        self.kind, self.event, self.values = kind, event, values


def refuse(when: bool, kind: MistakeKind, event: str, **values: str) -> None:
    if when:
        raise Refusal(kind, event, **values)


class Rules:
    """What each role's command does to a state: returns (state, event, values), or raises Refusal."""

    def __init__(self, spec: Spec):
        self.spec = spec

    def shut(self, state: State, place: str) -> bool:
        return place in self.spec.boxes and place not in state.opened

    def must_be_at(self, state: State, place: str | None) -> None:
        refuse(place is not None and state.at != place, "place", "not_there", place=place or "")

    def go(self, state: State, place: str):
        refuse(state.at == place, "logic", "there", place=place)
        return replace(state, at=place), "arrive", {"place": place}

    def open(self, state: State, place: str):
        self.must_be_at(state, place)
        refuse(place in state.opened, "logic", "opened", place=place)
        if self.spec.lock and self.spec.lock[0] == place:
            refuse(self.spec.lock[1] not in state.hands, "logic", "locked", place=place, tool=self.spec.lock[1])
        return replace(state, opened=state.opened | {place}), "open", {"place": place}

    def take(self, state: State, object: str, place: str | None = None):
        self.must_be_at(state, place)
        refuse(object in state.hands, "logic", "held", object=object)
        refuse(self.shut(state, state.at), "logic", "shut", place=state.at)
        refuse(state.lies.get(object) != state.at, "place", "not_here", object=object)
        refuse(len(state.hands) >= self.spec.hands, "logic", "full")
        lies = {name: where for name, where in state.lies.items() if name != object}
        return replace(state, lies=lies, hands=(*state.hands, object)), "take", {"object": object}

    def put(self, state: State, object: str, place: str | None = None):
        spec, here = self.spec, place or state.at
        self.must_be_at(state, place)
        refuse(not here, "place", "middle", setting=spec.setting)
        refuse(object not in state.hands, "logic", "not_held", object=object)
        refuse(self.shut(state, here), "logic", "shut", place=here)
        goal = spec.goals[0]
        raw = spec.raw and here == goal.place and spec.kinds[object] == goal.kind and object not in state.worked
        refuse(raw, "logic", "not_done", object=object, done=spec.work[1])
        if spec.order and (here, object) == (spec.order[0], spec.order[2]):
            refuse(state.lies.get(spec.order[1]) != here, "logic", "too_early", object=object, other=spec.order[1])
        kept = tuple(name for name in state.hands if name != object)
        return replace(state, lies={**state.lies, object: here}, hands=kept), "put", {"object": object, "place": here}

    def work(self, state: State, object: str, place: str | None = None):
        spec = self.spec
        self.must_be_at(state, spec.station)
        refuse(object not in state.hands, "logic", "not_held", object=object)
        return self.worked(state, object, spec.work_tool)

    def repair(self, state: State, object: str, tool: str | None = None):
        refuse(state.lies[object] != state.at, "place", "not_here", object=object)
        return self.worked(state, object, self.spec.repair_tool)

    def worked(self, state: State, object: str, tool: str | None):
        verb, done = self.spec.words_of(object)
        refuse(object in state.worked, "logic", "done", object=object, done=done)
        refuse(tool is not None and tool not in state.hands, "logic", "needs_tool", tool=tool or "")
        values = {"object": object, "done": done, "verb": verb}
        return replace(state, worked=state.worked | {object}), "work", values

    def look(self, state: State):
        return state, "arrive" if state.at else "middle", {"place": state.at, "setting": self.spec.setting}

    def inventory(self, state: State):
        return state, "carry" if state.hands else "carry_none", {}

    def met(self, state: State) -> tuple[int, int]:
        """(number of the goal's conditions that hold, number of all)"""
        met = total = 0
        for goal in self.spec.goals:
            parts = []
            for name in (name for name, kind in self.spec.kinds.items() if kind == goal.kind):
                there = goal.place is not None and state.lies.get(name) == goal.place
                parts.append(there + (goal.worked and name in state.worked))
            met += sum(sorted(parts, reverse=True)[: goal.count])
            total += goal.count * ((goal.place is not None) + goal.worked)
        return met, total


@lru_cache(maxsize=512)
def build_patterns(task_id: str) -> list[tuple[str, re.Pattern, dict[str, list[str]]]]:
    """(role, pattern of its command, {placeholder: values that it takes}) of each role."""
    spec = make_spec(task_id)
    return [(role, build_pattern(spec.commands[role]), spec.values(role)) for role in spec.commands]


def build_pattern(template: str) -> re.Pattern:
    """Matches what `verification_code` matches, with the same groups, in time linear in the text: a value ends for good
    at the first words that may follow it, and the last one at the last character that is no blank."""
    first, *words = re.split(r"\{\w+\}", template)
    values = [f"(?>(.+?){re.escape(part)})" for part in words[:-1]]
    values += [f"(.+?){re.escape(part)}" if part else r"(.*\S|.)" for part in words[-1:]]
    return re.compile(rf"\s*{re.escape(first)}{''.join(values)}\s*$")


def verification_code(template: str) -> str:
    """A regular expression that matches a command and its own template, as in AgentRefine's scripts."""
    pieces = re.split(r"\{\w+\}", template)
    return rf"^\s*{'(.+?)'.join(map(re.escape, pieces))}\s*$".replace(r"\ ", " ")


def parse(task_id: str, action: str) -> tuple[str, dict[str, str]]:
    """The role and the values of a command. Raises Refusal for any other text."""
    unknown: str | None = None
    for role, pattern, takes in build_patterns(task_id):
        if not (match := pattern.match(action)):
            continue
        values = dict(zip(takes, match.groups(), strict=True))
        wrong = [value for name, value in values.items() if value not in takes[name]]
        if not wrong:
            return role, {PLAIN[name]: value for name, value in values.items()}
        unknown = unknown or wrong[0]
    if unknown and re.fullmatch(r"[\w -]{1,40}", unknown, re.ASCII):
        raise Refusal("parameter", "no_such", name=unknown)
    raise Refusal("parameter", "unknown")

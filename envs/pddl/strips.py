"""Exact PDDL semantics: typed STRIPS with negative preconditions, states as bit sets, and a planner.

A fact is a tuple of words, ("on", "b1", "b2"). A problem numbers its facts, and a state is an int with one bit per true
fact. Only facts and actions that could be reached if no action undid anything are numbered.
Left out: numbers, conditional effects, quantifiers, equality, constants; words for the agent (`world.py`).

Source: the PDDL 1.2 manual (McDermott et al., 1998); `relaxed_plan` is the heuristic of FF (Hoffmann and Nebel, 2001).
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

Fact = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An action schema. `parameters`: {"?x": type}; its facts may contain parameters."""

    name: str
    parameters: dict[str, str]
    need: tuple[Fact, ...]
    forbid: tuple[Fact, ...]
    add: tuple[Fact, ...]
    delete: tuple[Fact, ...]


class Action(NamedTuple):
    """An operator with objects for its parameters; its facts are bit sets."""

    name: str
    objects: tuple[str, ...]
    need: int
    forbid: int
    add: int
    delete: int

    def applies(self, state: int) -> bool:
        return state & self.need == self.need and not state & self.forbid

    def apply(self, state: int) -> int:
        return state & ~self.delete | self.add


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_expression(text: str) -> list:
    """The nested lists of a bracketed expression. Raises ValueError if the brackets do not match."""
    stack: list[list] = [[]]
    for token in re.findall(r"[()]|[^\s()]+", re.sub(";.*", "", text.lower())):
        if token == "(":
            stack.append([])
        elif token != ")":
            stack[-1].append(token)
        elif len(stack) > 1:
            done = stack.pop()
            stack[-1].append(done)
        else:
            raise ValueError("PDDL with an unmatched closing bracket: expected one expression in matching brackets")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError("PDDL with an unclosed bracket or more than one expression: expected one in matching brackets")
    return stack[0][0]


def read_typed(words: list[str]) -> dict[str, str]:
    """{name: type} of `a b - block c - room`."""
    typed, names = {}, []
    tokens = iter(words)
    for word in tokens:
        if word == "-":
            typed |= dict.fromkeys(names, next(tokens))
            names = []
        else:
            names.append(word)
    return typed | dict.fromkeys(names, "object")


def read_condition(expression: list) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """(positive facts, negated facts) of a conjunction."""
    parts = expression[1:] if expression[:1] == ["and"] else [expression] if expression else []
    positive = tuple(tuple(part) for part in parts if part[0] != "not")
    return positive, tuple(tuple(part[1]) for part in parts if part[0] == "not")


def read_domain(text: str) -> tuple[dict[str, str], list[Operator]]:
    """The types, {type: supertype}, and the operators of a domain."""
    types, operators = {}, []
    for part in read_expression(text)[1:]:
        if part[0] == ":types":
            types = read_typed(part[1:])
        elif part[0] == ":action":
            fields = dict(zip(part[2::2], part[3::2], strict=True))
            need, forbid = read_condition(fields.get(":precondition", []))
            add, delete = read_condition(fields[":effect"])
            operators.append(
                Operator(
                    name=part[1],
                    parameters=read_typed(fields[":parameters"]),
                    need=need,
                    forbid=forbid,
                    add=add,
                    delete=delete,
                )
            )
    return types, operators


# ---- a problem -------------------------------------------------------------------------------------------------------


class Problem:
    """A planning problem: objects, an initial state and a goal in a domain.

    `facts`: those that can change, each with the bit of its index. `fixed`: true facts that never change. `actions`:
    all that can be reached. `start`, `goal`: bit sets. `objects`: {object: type}. Raises ValueError for a goal that is
    out of reach even if no action undid anything.
    """

    def __init__(
        self,
        types: dict[str, str],
        operators: Iterable[Operator],
        objects: dict[str, str],
        start: Iterable[Fact],
        goal: Iterable[Fact],
    ):
        operators, start, goal = list(operators), set(start), list(goal)
        changing = {fact[0] for operator in operators for fact in (*operator.add, *operator.delete)}
        left = [each for operator in operators for each in ground(operator, types, objects, start, changing)]
        reached, usable = set(start), []
        while new := [each for each in left if reached.issuperset(each[2])]:
            left = [each for each in left if not reached.issuperset(each[2])]
            usable += new
            reached |= {fact for each in new for fact in each[4]}
        if not reached.issuperset(goal):
            raise ValueError(f"the goal {sorted(set(goal) - reached)} can never hold")
        self.facts = sorted(fact for fact in reached if fact[0] in changing)
        self.bits = {fact: 1 << index for index, fact in enumerate(self.facts)}
        self.actions = [
            Action(
                name=name,
                objects=chosen,
                need=self.bit_set(need),
                forbid=self.bit_set(forbid),
                add=self.bit_set(add),
                delete=self.bit_set(delete),
            )
            for name, chosen, need, forbid, add, delete in sorted(usable)
        ]
        self.fixed = sorted(fact for fact in start if fact[0] not in changing)
        self.start, self.goal = self.bit_set(start), self.bit_set(goal)

    def bit_set(self, facts: Iterable[Fact]) -> int:
        """The state in which these facts are true. Facts that never change or never hold have no bit."""
        state = 0
        for fact in facts:
            state |= self.bits.get(fact, 0)
        return state

    def facts_of(self, state: int) -> list[Fact]:
        """The facts that are true in a state, sorted."""
        return [fact for index, fact in enumerate(self.facts) if state >> index & 1]


def ground(
    operator: Operator, types: dict[str, str], objects: dict[str, str], start: set[Fact], changing: set[str]
) -> Iterator[tuple]:
    """(name, objects, need, forbid, add, delete) for every choice of objects that the unchanging facts allow."""

    def is_a(kind: str | None, wanted: str) -> bool:
        return kind == wanted or (kind is not None and is_a(types.get(kind), wanted))

    choices = [[each for each in objects if is_a(objects[each], wanted)] for wanted in operator.parameters.values()]
    for chosen in itertools.product(*choices):
        named = dict(zip(operator.parameters, chosen, strict=True))
        need, forbid, add, delete = (
            tuple(tuple(named.get(word, word) for word in fact) for fact in facts)
            for facts in (operator.need, operator.forbid, operator.add, operator.delete)
        )
        fixed = all(fact in start for fact in need if fact[0] not in changing)
        if fixed and not any(fact in start for fact in forbid if fact[0] not in changing):
            yield operator.name, chosen, need, forbid, add, delete


# ---- planning --------------------------------------------------------------------------------------------------------


def relaxed_plan(actions: list[Action], state: int, goal: int) -> list[Action] | None:
    """Actions, not always the fewest, that reach the goal if nothing is ever undone; None if none do."""
    reached, left, first = state, actions, {}
    while goal & ~reached:
        usable = [action for action in left if reached & action.need == action.need]
        before = reached
        for action in usable:
            new = action.add & ~reached
            reached |= new
            while new:
                first[new & -new] = action  # a bit, and the action that sets it first
                new &= new - 1
        if reached == before:
            return None
        left = [action for action in left if before & action.need != action.need]
    plan, wanted = {}, goal & ~state
    while wanted:
        action = first[wanted & -wanted]
        plan[action.name, action.objects] = action
        wanted = (wanted | action.need & ~state) & ~action.add
        state |= action.add
    return list(plan.values())


def find_plan(problem: Problem, state: int, max_states: int = 100_000) -> list[Action] | None:
    """Actions that lead from a state to the goal, few but not the fewest; None if none are found.

    Weighted A*: best first by the actions so far plus three times the length of the relaxed plan, which counts one more
    after an action outside it. Expands at most `max_states` states.
    """
    heap, order, seen = [(0, 0, 0, state, None)], itertools.count(1), {state}
    for _ in range(max_states):
        if not heap:
            return None
        _, _, depth, state, path = heapq.heappop(heap)
        if state & problem.goal == problem.goal:
            plan = []
            while path:
                path, action = path
                plan.append(action)
            return plan[::-1]
        relaxed = relaxed_plan(problem.actions, state, problem.goal)
        if relaxed is None:
            continue
        helpful = {(action.name, action.objects) for action in relaxed}
        for action in problem.actions:
            if action.applies(state) and (after := action.apply(state)) not in seen:
                seen.add(after)
                rank = 3 * (len(relaxed) + ((action.name, action.objects) not in helpful)) + depth
                heapq.heappush(heap, (rank, next(order), depth + 1, after, (path, action)))
    return None

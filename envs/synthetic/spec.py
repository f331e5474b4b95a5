"""Specifications of synthetic worlds: what a world contains, how it is drawn from its task id, its task and opening.

A task id seeds one generator, from which `Draw` makes every draw in a fixed order, so an id always stands for the same
world. Changing a draw, or the order of the draws, changes the worlds: raise WORLDS.
Left out: what a command does (`rules.py`), the vocabularies (`words.py`).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from envs.synthetic.words import HELD, PLAIN, TRAIN, Theme, Words

WORLDS = 1  # version of the worlds and part of every seed: raise it whenever an id stands for a different world


class Goal(NamedTuple):
    """`count` things of a `kind` must be at `place`, unless that is None, and worked on, if `worked` is true."""

    kind: str
    place: str | None
    worked: bool
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A sampled world. Its names are those that the player reads and writes."""

    setting: str
    places: tuple[str, ...]
    boxes: frozenset[str]  # places that are containers, closed at the start
    lock: tuple[str, str] | None  # (container, key: has to be in hand to open it)
    lies: dict[str, str]  # thing or fixture -> its initial place
    kinds: dict[str, str]  # thing or fixture -> its kind, the name that goals use
    fixtures: frozenset[str]  # things that cannot be carried
    station: str | None  # the place where work is done
    work: tuple[str, str]  # (verb, participle)
    work_tool: str | None  # has to be in hand for work
    repair: tuple[str, str]  # (verb, participle)
    repair_tool: str | None  # has to be in hand for repairs
    raw: bool  # the goal's place refuses things that still have to be worked on
    order: tuple[str, str, str] | None  # (place, thing that must be there first, thing that comes second)
    hands: int  # how many things can be carried at once
    goals: tuple[Goal, ...]
    commands: dict[str, str]  # role -> template
    says: dict[str, str]  # event -> wording
    task: str
    opening: str

    def words_of(self, name: str) -> tuple[str, str]:
        """(verb, participle) of the work or repair done to a thing."""
        return self.repair if name in self.fixtures else self.work

    def values(self, role: str) -> dict[str, list[str]]:
        """{placeholder: values that it takes} of a role's command, in the command's order."""
        objects = sorted(set(self.lies) - self.fixtures) if role != "repair" else sorted(self.fixtures)
        places = {"open": sorted(self.boxes), "work": [self.station]}.get(role, sorted(self.places))
        takes = {"place": places, "object": objects, "tool": [self.repair_tool]}
        return {name: takes[PLAIN[name]] for name in re.findall(r"\{(\w+)\}", self.commands[role])}

    def command(self, role: str, **values: str) -> str:
        """The command's text; values without a placeholder in its template are dropped."""
        return fill(self.commands[role], values)

    def say(self, event: str, **values: str) -> str:
        return fill(self.says[event], values)


def fill(template: str, values: dict[str, str]) -> str:
    """The template with its placeholders replaced by values; placeholders without a value stay."""
    return re.sub(r"\{(\w+)\}", lambda name: values.get(PLAIN.get(name[1], name[1]), name[0]), template)


def listed(names: Iterable[str]) -> str:
    """a cup; a cup and an egg; a cup, a pen and an egg."""
    *names, last = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    return f"{', '.join(names)} and {last}" if names else last


def make_seed(task_id: str) -> list[int]:
    return [WORLDS, zlib.crc32(task_id.encode())]


@lru_cache(maxsize=512)
def make_spec(task_id: str) -> Spec:
    """The world that a task id stands for."""
    split = task_id.partition("/")[0]
    words, easy = (HELD if "held" in split else TRAIN), split.endswith("easy")
    return Draw(words, easy, np.random.default_rng(make_seed(task_id))).spec()


class Draw:
    """Draws a world from one generator. The order of the draws is part of what an id stands for."""

    def __init__(self, words: Words, easy: bool, rng: np.random.Generator):
        self.words, self.easy, self.rng = words, easy, rng
        self.theme: Theme = self.one(words.themes)
        self.style = self.one(("plain", "numbered", "adjective"))
        self.used: set[str] = set()

    def one(self, options: Sequence):
        return options[self.rng.integers(len(options))]

    def some(self, options: Sequence[str], count: int) -> list[str]:
        """`count` different options, none of them drawn before."""
        left = [option for option in options if option not in self.used]
        drawn = [left[i] for i in self.rng.choice(len(left), count, replace=False)]
        self.used.update(drawn)
        return drawn

    def chance(self, share: float) -> bool:
        """Whether an event of that probability happens; never, and without a draw, in easy worlds."""
        return not self.easy and bool(self.rng.random() < share)

    def named(self, kinds: Sequence[str]) -> dict[str, str]:
        """{name: kind} of things, named in the style of this world."""
        if self.style == "numbered":
            counts: dict[str, int] = {}
            for kind in kinds:
                counts[kind] = counts.get(kind, 0) + 1
            return {f"{kind} {i + 1}": kind for kind in counts for i in range(counts[kind])}
        if self.style == "adjective":
            adjectives = self.rng.permutation(self.words.adjectives)
            return {(name := f"{adjective} {kind}"): name for adjective, kind in zip(adjectives, kinds, strict=False)}
        return {kind: kind for kind in dict.fromkeys(kinds)}

    def commands(self, work: str | None, repair: str | None) -> dict[str, str]:
        """{role: template}, with the vocabulary's names of placeholders; without a role whose verb is None."""
        chosen = {role: self.one(templates) for role, templates in self.words.commands.items()}
        verbs = dict.fromkeys(chosen, "") | {"work": work, "repair": repair}
        return {
            role: re.sub(
                r"\{(\w+)\}", lambda name: f"{{{self.words.names[name[1]]}}}", template.replace("{verb}", verbs[role])
            )
            for role, template in chosen.items()
            if verbs[role] is not None
        }

    def places(self) -> tuple[list[str], list[str]]:
        """(all places in random order, the containers among them)"""
        boxes = self.some(self.theme.boxes, 1 if self.easy else int(self.rng.integers(1, 4)))
        spots = self.some(self.theme.spots, 2 if self.easy else int(self.rng.integers(3, 7 - len(boxes))))
        both = [*boxes, *spots]
        names = {name: f"{name} {self.rng.integers(1, 4)}" if self.style == "numbered" else name for name in both}
        order = [names[both[i]] for i in self.rng.permutation(len(both))]
        return order, [names[box] for box in boxes]

    def goals(self, form: str, wanted: list[str], place: str) -> tuple[list[Goal], tuple[str, str, str] | None]:
        """(goals for the things `wanted`, `Spec.order`)"""
        if form != "two":
            return [Goal(kind=wanted[0], place=place, worked=form == "work")], None
        if self.style == "numbered":
            return [Goal(kind=wanted[0], place=place, worked=False, count=2)], None
        goals = [Goal(kind=kind, place=place, worked=False) for kind in wanted[:2]]
        return goals, (place, wanted[0], wanted[1]) if self.chance(0.6) else None

    def lock(
        self, places: list[str], boxes: list[str], lies: dict[str, str], repair_tool: str | None
    ) -> tuple[str, str]:
        """(locked container, its key). Puts the key into `lies`, and moves the repair tool if it was locked in."""
        [key] = self.some(self.words.keys, 1)
        locked = self.one(boxes)
        outside = [place for place in places if place != locked]
        lies[key] = self.one(outside)
        if lies.get(repair_tool) == locked:  # one errand with something in hand is enough
            lies[repair_tool] = self.one(outside)
        return locked, key

    def spec(self) -> Spec:
        words, rng = self.words, self.rng
        form = "bring" if self.easy else self.one(("bring", "work", "work", "repair", "two", "both"))
        places, boxes = self.places()
        spots = [place for place in places if place not in boxes]
        work, repair = self.one(words.work), self.one(words.repair)
        kinds = self.some(self.theme.things, 2 if self.easy else int(rng.integers(4, 6)))
        if form == "two" or self.chance(0.4):
            kinds.append(kinds[0])  # a second one, which the plain style merges with the first
        things = self.named(kinds)
        goal_place = self.one(places)
        station = self.one([place for place in spots if place != goal_place]) if form == "work" else None
        lies = {thing: self.one([place for place in places if place not in (goal_place, station)]) for thing in things}
        goals, order = self.goals(form, list(dict.fromkeys(things.values())), goal_place)
        tools = self.some(self.theme.tools, 2)
        work_tool = tools[0] if form == "work" and self.chance(0.3) else None
        repair_tool, fixtures = None, []
        if form in ("repair", "both"):
            repair_tool, fixtures = tools[1], self.some(self.theme.fixtures, 1)
            repair_goal = Goal(kind=fixtures[0], place=None, worked=True)
            goals = [repair_goal, *goals] if form == "both" else [repair_goal]
            lies[fixtures[0]] = self.one(spots)
        for tool in filter(None, (work_tool, repair_tool)):
            lies[tool] = self.one([place for place in places if place != goal_place])
        locked = self.chance(0.25) and not work_tool
        lock = self.lock(places, boxes, lies, repair_tool) if locked else None
        spec = Spec(  # hands, raw, commands and says draw in this order
            setting=self.theme.setting,
            places=tuple(places),
            boxes=frozenset(boxes),
            lock=lock,
            lies=lies,
            kinds={**things, **{name: name for name in lies if name not in things}},
            fixtures=frozenset(fixtures),
            station=station,
            work=work,
            work_tool=work_tool,
            repair=repair,
            repair_tool=repair_tool,
            hands=2 if work_tool or lock or self.chance(0.3) else 1,
            raw=form == "work" and self.chance(0.5),
            order=order,
            goals=tuple(goals),
            commands=self.commands(work[0] if station else None, repair[0] if repair_tool else None),
            says={event: self.one(wordings) for event, wordings in words.says.items()},
            task="",
            opening="",
        )
        task, opening = state_task(spec)
        return replace(spec, task=task, opening=opening)


def state_task(spec: Spec) -> tuple[str, str]:
    """(goal in words, opening: the environment and its rules, then the goal as a separate paragraph)"""
    parts = []
    for goal in spec.goals:
        verb, done = spec.words_of(goal.kind)
        numbered = any(name.startswith(f"{goal.kind} ") for name in spec.lies)
        called = f"two {goal.kind}s" if goal.count == 2 else listed([goal.kind]) if numbered else f"the {goal.kind}"
        event = "do_repair" if not goal.place else "work_bring" if goal.worked else "bring"
        called = goal.kind if event == "do_repair" else called
        parts.append(spec.say(event, object=called, place=goal.place or "", verb=verb, done=done))
    task = ", and ".join(parts)
    verb, done = spec.work
    rules = [spec.say("carry_one" if spec.hands == 1 else "carry_two")]
    if spec.station:
        rules.append(spec.say("station", station=spec.station, verb=verb, done=done))
    if spec.work_tool:
        rules.append(spec.say("tool", tool=spec.work_tool))
    if spec.repair_tool:
        verb, done = spec.repair
        rules.append(spec.say("repair", object=spec.goals[0].kind, tool=spec.repair_tool, verb=verb, done=done))
    if spec.lock:
        rules.append(spec.say("lock", place=spec.lock[0], tool=spec.lock[1]))
    if spec.order:
        rules.append(spec.say("first", place=spec.order[0], other=spec.order[1], object=spec.order[2]))
    if spec.raw:
        rules.append(spec.say("raw", place=spec.goals[0].place, object=spec.goals[0].kind, done=spec.work[1]))
    around = spec.say("around", things=listed(spec.places))
    opening = f"{spec.say('setting', setting=listed([spec.setting]))} {around} {' '.join(rules)}"
    return task, f"{opening}\n\n{spec.say('task', task=task)}"

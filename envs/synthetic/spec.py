"""Sampled specifications of synthetic worlds: each task id stands for one world, drawn from the id alone."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from envs.synthetic.words import HELD, TRAIN, Theme, Words

WORLDS = 1  # goes up when a name comes to stand for another world

PLAIN = {called: name for words in (TRAIN, HELD) for name, called in words.names.items()}  # of placeholders


class Goal(NamedTuple):
    """`count` things called `kind` must be `worked` on (if so) and lie at `place` (if there is one)."""

    kind: str
    place: str | None
    worked: bool
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A sampled world. Names are what the player reads and writes."""

    setting: str
    places: tuple[str, ...]
    boxes: frozenset[str]  # places that are closed at the start
    lock: tuple[str, str] | None  # (container, what has to be in hand to open it)
    lies: dict[str, str]  # thing or fixture -> its place at the start
    kinds: dict[str, str]  # thing or fixture -> what the goal calls it
    fixtures: frozenset[str]  # cannot be carried
    station: str | None  # where work is done
    work: tuple[str, str]  # its verb and participle
    work_tool: str | None  # what it needs in hand
    repair: tuple[str, str]
    repair_tool: str | None
    raw: bool  # the goal's place refuses what has to be worked on and is not
    order: tuple[str, str, str] | None  # (place, what must be there before, what)
    hands: int
    goals: tuple[Goal, ...]
    commands: dict[str, str]  # role -> template
    says: dict[str, str]  # event -> wording
    task: str
    opening: str

    def words_of(self, name: str) -> tuple[str, str]:
        """The verb and participle of what is done to a thing."""
        return self.repair if name in self.fixtures else self.work

    def values(self, role: str) -> dict[str, list[str]]:
        """For each placeholder of a role's command, what it takes, in the command's order."""
        objects = sorted(set(self.lies) - self.fixtures) if role != "repair" else sorted(self.fixtures)
        places = {"open": sorted(self.boxes), "work": [self.station]}.get(role, sorted(self.places))
        takes = {"place": places, "object": objects, "tool": [self.repair_tool]}
        return {name: takes[PLAIN[name]] for name in re.findall(r"\{(\w+)\}", self.commands[role])}

    def command(self, role: str, **values: str) -> str:
        """The command's text; values that its template has no place for are left out."""
        return fill(self.commands[role], values)

    def say(self, event: str, **values: str) -> str:
        return fill(self.says[event], values)


def fill(template: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda name: values.get(PLAIN.get(name[1], name[1]), name[0]), template)


def listed(names: Iterable[str]) -> str:
    """a cup; a cup and an egg; a cup, a pen and an egg."""
    *names, last = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    return f"{', '.join(names)} and {last}" if names else last


def seed_of(task_id: str) -> list[int]:
    return [WORLDS, zlib.crc32(task_id.encode())]


@lru_cache(maxsize=512)
def make_spec(task_id: str) -> Spec:
    """The world that a name stands for."""
    split = task_id.partition("/")[0]
    words, easy = (HELD if "held" in split else TRAIN), split.endswith("easy")
    return Draw(words, easy, np.random.default_rng(seed_of(task_id))).spec()


class Draw:
    """Draws a world, part after part, from one generator."""

    def __init__(self, words: Words, easy: bool, rng: np.random.Generator):
        self.words, self.easy, self.rng = words, easy, rng
        self.theme: Theme = self.one(words.themes)
        self.style = self.one(("plain", "numbered", "adjective"))
        self.used: set[str] = set()

    def one(self, options: Sequence):
        return options[self.rng.integers(len(options))]

    def some(self, options: Sequence[str], count: int) -> list[str]:
        """Different ones that were not drawn before."""
        left = [option for option in options if option not in self.used]
        drawn = [left[i] for i in self.rng.choice(len(left), count, replace=False)]
        self.used.update(drawn)
        return drawn

    def chance(self, share: float) -> bool:
        return not self.easy and bool(self.rng.random() < share)

    def named(self, kinds: Sequence[str]) -> dict[str, str]:
        """Names of things, in the style of this world, and the kind of each."""
        if self.style == "numbered":
            counts: dict[str, int] = {}
            for kind in kinds:
                counts[kind] = counts.get(kind, 0) + 1
            return {f"{kind} {i + 1}": kind for kind in counts for i in range(counts[kind])}
        if self.style == "adjective":
            adjectives = self.rng.permutation(self.words.adjectives)
            return {(name := f"{adjective} {kind}"): name for adjective, kind in zip(adjectives, kinds, strict=False)}
        return {kind: kind for kind in dict.fromkeys(kinds)}

    def commands(self, work: str, repair: str) -> dict[str, str]:
        """A template for each role, placeholders called what the vocabulary calls them."""
        chosen = {role: self.one(templates) for role, templates in self.words.commands.items()}
        filled = {
            **chosen,
            "work": chosen["work"].replace("{verb}", work),
            "repair": chosen["repair"].replace("{verb}", repair),
        }
        return {
            role: re.sub(r"\{(\w+)\}", lambda name: f"{{{self.words.names[name[1]]}}}", template)
            for role, template in filled.items()
        }

    def places(self) -> tuple[list[str], list[str]]:
        """(all places in a drawn order, those that are containers)"""
        boxes = self.some(self.theme.boxes, 1 if self.easy else int(self.rng.integers(1, 4)))
        spots = self.some(self.theme.spots, 2 if self.easy else int(self.rng.integers(3, 7 - len(boxes))))
        both = [*boxes, *spots]
        names = {name: f"{name} {self.rng.integers(1, 4)}" if self.style == "numbered" else name for name in both}
        order = [names[both[i]] for i in self.rng.permutation(len(both))]
        return order, [names[box] for box in boxes]

    def spec(self) -> Spec:
        words, rng = self.words, self.rng
        form = "bring" if self.easy else self.one(("bring", "work", "work", "repair", "two", "both"))
        places, boxes = self.places()
        spots = [place for place in places if place not in boxes]
        work, repair = self.one(words.work), self.one(words.repair)
        kinds = self.some(self.theme.things, 2 if self.easy else int(rng.integers(4, 6)))
        if form == "two" or self.chance(0.4):
            kinds.append(kinds[0])  # a second one, which only numbers tell apart
        things = self.named(kinds)
        worked = form == "work"
        goal_place = self.one(places)
        station = self.one([place for place in spots if place != goal_place]) if worked else None
        lies = {thing: self.one([place for place in places if place not in (goal_place, station)]) for thing in things}
        wanted = list(dict.fromkeys(things.values()))
        goals = [Goal(wanted[0], goal_place, worked)]
        order = None
        if form == "two":
            if self.style == "numbered":
                goals = [Goal(wanted[0], goal_place, False, 2)]
            else:
                goals.append(Goal(wanted[1], goal_place, False))
                order = (goal_place, wanted[0], wanted[1]) if self.chance(0.6) else None
        tools = self.some(self.theme.tools, 2)
        work_tool = tools[0] if worked and self.chance(0.3) else None
        repair_tool, fixtures = None, []
        if form in ("repair", "both"):
            repair_tool, fixtures = tools[1], self.some(self.theme.fixtures, 1)
            goals = [Goal(fixtures[0], None, True), *(goals if form == "both" else [])]
            lies[fixtures[0]] = self.one(spots)
        for tool in filter(None, (work_tool, repair_tool)):
            lies[tool] = self.one([place for place in places if place != goal_place])
        lock = None
        if self.chance(0.25) and not work_tool:
            key = self.some(words.keys, 1)[0]
            lock = (self.one(boxes), key)
            lies[key] = self.one([place for place in places if place != lock[0]])
            repair_at = lies.get(repair_tool) == lock[0]
            if repair_at:  # one errand with something in hand is enough
                lies[repair_tool] = self.one([place for place in places if place != lock[0]])
        kinds_of = {**things, **{name: name for name in lies if name not in things}}
        hands = 2 if work_tool or lock or self.chance(0.3) else 1
        drawn = {
            "setting": self.theme.setting,
            "places": tuple(places),
            "boxes": frozenset(boxes),
            "lock": lock,
            "lies": lies,
            "kinds": kinds_of,
            "fixtures": frozenset(fixtures),
            "station": station,
            "work": work,
            "work_tool": work_tool,
            "repair": repair,
            "repair_tool": repair_tool,
            "raw": worked and self.chance(0.5),
            "order": order,
            "hands": hands,
            "goals": tuple(goals),
            "commands": self.commands(work[0], repair[0]),
            "says": {event: self.one(wordings) for event, wordings in words.says.items()},
        }
        for role, there in (("work", station), ("repair", repair_tool)):
            if not there:
                del drawn["commands"][role]
        task, opening = state_task(drawn)
        return Spec(**drawn, task=task, opening=opening)


def state_task(drawn: dict) -> tuple[str, str]:
    """The goal in words, and the opening: the environment, its rules, and in a paragraph of its own the goal."""
    spec = Spec(**drawn, task="", opening="")
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

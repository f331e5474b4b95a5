"""Sampled text worlds, each with places, objects, verbs, wordings and rules of its own.

A task is `<split>/<number>`; its world is drawn from that name alone (`Spec`, envs/synthetic_words.py has the words):
four to six places, some of them closed containers, one perhaps locked; things to find, carry and put somewhere;
perhaps work that is done to them at one place, perhaps with a tool; perhaps something to repair; a limit to what can
be carried; perhaps an order in which things must come. The opening states environment, goal and rules; where things lie
has to be found out. Everything can be undone, so no world can be lost.

| split | what |
|---|---|
| syn_train | to train on; ids of any number are played, `tasks` lists the first 10,000 |
| syn_valid | drawn from the same vocabulary, other worlds |
| syn_held | drawn from the other vocabulary, which has no content word in common with it |
| syn_easy, syn_held_easy | small ones, for tests |

An action that is not accepted is a mistake of one of three kinds (`Synthetic.refusal`): parameter (no command, or a
value that it does not take), place (what is acted on is elsewhere), logic (a condition is not met).

Play one: python -m envs.play --env synthetic --task syn_valid/00000
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from envs.base import Observation, Result, check_split
from envs.synthetic_words import HELD, TRAIN, Theme, Words

WORLDS = 1  # goes up when a name comes to stand for another world
SPLITS = {"syn_train": 10_000, "syn_valid": 500, "syn_held": 500, "syn_easy": 5, "syn_held_easy": 5}
Error = Literal["parameter", "place", "logic"]
PLAIN = {called: name for words in (TRAIN, HELD) for name, called in words.names.items()}  # of placeholders


# ---- what a world is -------------------------------------------------------------------------------------------------


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


# ---- drawing one -----------------------------------------------------------------------------------------------------


def seed_of(task_id: str) -> list[int]:
    return [WORLDS, zlib.crc32(task_id.encode())]


@lru_cache(maxsize=512)
def spec_of(task_id: str) -> Spec:
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


# ---- the rules -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """Where everything is. `lies` has what is not in hand."""

    at: str
    lies: dict[str, str]
    hands: tuple[str, ...] = ()
    opened: frozenset[str] = frozenset()
    worked: frozenset[str] = frozenset()


class Refusal(Exception):
    """Why an action is not accepted: the kind of mistake, and the event that says so with its values."""

    def __init__(self, kind: Error, event: str, **values: str):
        super().__init__(kind, event)
        self.kind, self.event, self.values = kind, event, values


def refuse(when: bool, kind: Error, event: str, **values: str) -> None:
    if when:
        raise Refusal(kind, event, **values)


class Rules:
    """What each role's command does to a state: (state, event, values). Raises Refusal where it does nothing."""

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
        left = tuple(name for name in state.hands if name != object)
        return replace(state, lies={**state.lies, object: here}, hands=left), "put", {"object": object, "place": here}

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
        """How many of the goal's conditions hold, and how many there are."""
        met = total = 0
        for goal in self.spec.goals:
            parts = []
            for name in (name for name, kind in self.spec.kinds.items() if kind == goal.kind):
                there = goal.place is not None and state.lies.get(name) == goal.place
                parts.append(there + (goal.worked and name in state.worked))
            met += sum(sorted(parts, reverse=True)[: goal.count])
            total += goal.count * ((goal.place is not None) + goal.worked)
        return met, total


# ---- the world -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def forms_of(task_id: str) -> list[tuple[str, re.Pattern, dict[str, list[str]]]]:
    """Each role with what its command looks like, and what its placeholders take."""
    spec = spec_of(task_id)
    return [(role, re.compile(verification_code(spec.commands[role])), spec.values(role)) for role in spec.commands]


def verification_code(template: str) -> str:
    """A regular expression for a command and for its own template, as the scripts of AgentRefine have it."""
    pieces = re.split(r"\{\w+\}", template)
    return rf"^\s*{'(.+?)'.join(map(re.escape, pieces))}\s*$".replace(r"\ ", " ")


def parse(task_id: str, action: str) -> tuple[str, dict[str, str]]:
    """The role and the values of a command. Raises Refusal for a text that is none."""
    unknown: str | None = None
    for role, form, takes in forms_of(task_id):
        if not (match := form.match(action)):
            continue
        values = dict(zip(takes, match.groups(), strict=True))
        wrong = [value for name, value in values.items() if value not in takes[name]]
        if not wrong:
            return role, {PLAIN[name]: value for name, value in values.items()}
        unknown = unknown or wrong[0]
    if unknown and re.fullmatch(r"[\w -]{1,40}", unknown, re.ASCII):
        raise Refusal("parameter", "no_such", name=unknown)
    raise Refusal("parameter", "unknown")


class Synthetic:
    """The sampled worlds as a `World`. Reward is 1.0 when the goal holds, else 0.0; progress the largest share of its
    conditions that held at once so far."""

    isolated = False

    def __init__(self):
        self.facts = {"worlds": WORLDS}
        self._task_id, self._state, self._progress, self._done = "", State("", {}), 0.0, False

    def tasks(self, split: str) -> Sequence[str]:
        """Sorted ids. Raises ValueError for an unknown split."""
        check_split(split, SPLITS)
        return [f"{split}/{number:05d}" for number in range(SPLITS[split])]

    def reset(self, task_id: str) -> Observation:
        """Start a task. Raises ValueError for an id of no split, or a number that is not in it (syn_train: any)."""
        split, _, number = task_id.partition("/")
        good = split in SPLITS and re.fullmatch(r"[0-9]{5}|[1-9][0-9]{5,8}", number)
        if not good or (split != "syn_train" and int(number) >= SPLITS[split]):
            raise ValueError(
                f"unknown task {task_id!r}: expected one of {', '.join(SPLITS)}, a slash and a number "
                "of the split with five digits"
            )
        spec = spec_of(task_id)
        self._task_id, self._state = task_id, State("", spec.lies)
        self._progress, self._done = 0.0, False
        return Observation(text=spec.opening, task=spec.task)

    def step(self, action: str) -> Result:
        spec, rules = self._playing()
        if self._done:
            raise RuntimeError("the task is over: call reset(task_id)")
        try:
            self._state, event, values = self._outcome(action)
            valid = True
        except Refusal as why:
            event, values, valid = why.event, why.values, False
        met, total = rules.met(self._state)
        self._progress = max(self._progress, met / total)
        self._done = met == total
        observation = spec.say(event, **values, things=self._things(event), view=self._view(rules))
        return Result(
            observation=observation,
            reward=float(self._done),
            progress=self._progress,
            success=self._done,
            done=self._done,
            valid=valid,
        )

    def actions(self) -> list[str]:
        """Every command that is accepted now, sorted."""
        spec, _ = self._playing()
        found = []
        for role in spec.commands:
            takes = spec.values(role)
            for chosen in itertools.product(*takes.values()):
                text = fill(spec.commands[role], dict(zip(map(PLAIN.get, takes), chosen, strict=True)))
                if not self.refusal(text):
                    found.append(text)
        return sorted(set(found))

    def commands(self) -> list[str]:
        """The templates of this task's commands."""
        return list(self._playing()[0].commands.values())

    def refusal(self, action: str) -> Refusal | None:
        """Why an action would not be accepted now; None for one that would."""
        try:
            self._outcome(action)
        except Refusal as why:
            return why
        return None

    def _outcome(self, action: str) -> tuple[State, str, dict[str, str]]:
        """The state after an action, and the event that it is with its values. Raises Refusal."""
        spec, rules = self._playing()
        role, values = parse(self._task_id, action)
        return getattr(rules, role)(self._state, **values)

    def _playing(self) -> tuple[Spec, Rules]:
        if not self._task_id:
            raise RuntimeError("no task yet: call reset(task_id)")
        spec = spec_of(self._task_id)
        return spec, Rules(spec)

    def _view(self, rules: Rules) -> str:
        state, spec = self._state, rules.spec
        if rules.shut(state, state.at):
            return spec.say("closed", place=state.at)
        here = sorted(name for name, where in state.lies.items() if where == state.at)
        return spec.say("some", things=listed(here)) if here else spec.say("none")

    def _things(self, event: str) -> str:
        return listed(self._state.hands) if event == "carry" else ""

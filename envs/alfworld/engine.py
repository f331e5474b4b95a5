"""One ALFWorld game as a plain state machine, read from its `game.tw-pddl`.

Accepts and prints exactly what TextWorld 1.7.0 does with alfworld 0.4.2's domain and grammar, quirks included, a
thousand times faster: the domain's actions are hand-coded below, so nothing is grounded, planned or rendered.
Left out: other PDDL domains. Only the problem and the task line of a game file are read, not its domain and grammar.

Compare both engines: python -m bench.alfworld_engine
"""

from __future__ import annotations

import json
import re
from bisect import insort
from collections import Counter, defaultdict
from dataclasses import dataclass

NOTHING = "Nothing happens."
GRAMMARS = ("0.4", "0.3")
_FACT = re.compile(r"\(([a-z]+) ([^\s()]+)(?: ([^\s()]+))?\)")
_TASK_LINE = re.compile(r'"Your task is to: ((?:[^"\\]|\\.)*)"')
_MIDDLE = "You are in the middle of a room. Looking quickly around you, you see"
_TOOLS = {"clean": "sinkbasintype", "heat": "microwavetype", "cool": "fridgetype"}
_HELP = """Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""

_COMMANDS = (
    "go to {receptacle}",
    "open {receptacle}",
    "close {receptacle}",
    "take {object} from {receptacle}",
    "move {object} to {receptacle}",
    "clean {object} with {receptacle}",
    "heat {object} with {receptacle}",
    "cool {object} with {receptacle}",
    "use {object}",
    "slice {object} with {object}",
    "examine {something}",
    "look",
    "inventory",
    "help",
)
COMMANDS = {"0.4": _COMMANDS, "0.3": tuple(c.replace("move {object} to", "put {object} in/on") for c in _COMMANDS[:-1])}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One of ALFWorld's six goals. `kind`: place, clean, heat, cool, two or look; the rest: ids that may satisfy it."""

    kind: str
    objects: frozenset[str]
    receptacles: tuple[str, ...] = ()
    lamps: frozenset[str] = frozenset()


def names_of(ids: set[str]) -> dict[str, str]:
    """{id: name}, numbered as by alfworld's Demangler: within a kind, descending along the sorted ids.

    Locations have names too ("loc 12"), which the old wording prints; a location in no fact gets no number.
    """
    kinds = {i: i.split("_bar_", 1)[0] + ("basin" if "basin" in i else "") for i in sorted(ids) if "_bar_" in i}
    left = Counter(kinds.values())
    names = {}
    for i, kind in kinds.items():
        names[i] = f"{kind} {left[kind]}"
        left[kind] -= 1
    return names


def listing(items: list[str]) -> str:
    """Items listed as TextWorld does: `a`, `a, and b`, `a, b, and c`, or `nothing`."""
    if len(items) < 2:
        return items[0] if items else "nothing"
    return ", ".join(items[:-1]) + ", and " + items[-1]


class Game:
    """One running game. Its state is plain sets and lists, so it pickles and copies; ids are the PDDL's, in lower case.

    `text` is the opening (room, blank line, task line) without TextWorld's banner, `task` the goal in words. `act`
    executes commands. Source of the rules: alfworld 0.4.2, data/alfred.pddl and data/alfred.twl2, as TextWorld 1.7.0
    plays them, and for `grammar` "0.3" the alfred.twl2 of alfworld 0.3.5.
    """

    def __init__(self, data: dict[str, str], grammar: str = "0.4"):
        """Reads a game file's JSON. Raises KeyError, IndexError or ValueError if it is not an ALFRED game."""
        problem = str(data["pddl_problem"]).lower()
        start, end = problem.find("(:init"), problem.find("(:goal")
        task_line = _TASK_LINE.search(str(data["grammar"]))
        if start < 0 or end < start or task_line is None:
            raise ValueError("no (:init ...), (:goal ...) or 'Your task is to: ' in the game")
        facts: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for predicate, first, second in _FACT.findall(problem, start, end):
            facts[predicate].append((first, second))
        self.old_wording = grammar == "0.3"
        self._read_facts(facts)
        self.goal = self._read_goal(problem[end:])
        self.task = json.loads(f'"{task_line[1]}"').replace("\\n", "\n").strip()
        everything = listing([f"a {self.names[receptacle]}" for receptacle in self.location])
        room = self.look() if self.here in self.at else f"{_MIDDLE} {everything}."
        self.text = f"{room}\n\nYour task is to: {self.task}"
        self.task = self.task.removesuffix(".")

    def _read_facts(self, facts: dict[str, list[tuple[str, str]]]) -> None:
        self.names = names_of({i for rows in facts.values() for row in rows for i in row})

        def having(predicate: str) -> set[str]:
            return {first for first, _ in facts[predicate]}

        self.openable, self.pickupable = having("openable"), having("pickupable")
        self.toggleable, self.sliceable = having("toggleable"), having("sliceable")
        self.able = {verb: having(f"{verb}able") for verb in _TOOLS}
        self.vessels = having("isreceptacleobject")  # plates, cups, ...: objects that hold objects
        self.object_type, self.receptacle_type = dict(facts["objecttype"]), dict(facts["receptacletype"])
        self.can_contain = set(facts["cancontain"])
        self.location = dict(sorted(facts["receptacleatlocation"]))
        self.at: dict[str, list[str]] = defaultdict(list)
        for receptacle, location in self.location.items():
            self.at[location].append(receptacle)
        self.at = dict(self.at)
        self.named = {name: i for i, name in self.names.items()}
        self.inside: dict[str, list[str]] = defaultdict(list)
        for inner, outer in sorted(facts["inreceptacleobject"]):
            self.inside[outer].append(inner)
        self.inside = dict(self.inside)
        # The state below changes during the game.
        self.here = facts["atlocation"][0][1]
        self.opened = having("opened")
        self.contents: dict[str, list[str]] = {receptacle: [] for receptacle in self.location}
        for thing, receptacle in sorted(set(facts["inreceptacle"])):
            self.contents[receptacle].append(thing)
        self.object_locations = set(facts["objectatlocation"])
        self.taken_from: set[tuple[str, str]] = set()  # facts in TextWorld, which `look` reads
        self.held: str | None = None
        self.state = {name: having(f"is{name}") for name in ("clean", "hot", "cool", "sliced", "toggled")}

    def _read_goal(self, goal: str) -> Goal:
        types = dict(re.findall(r"\(objecttype (\?\w+) (\w+)\)", goal))
        of_type = {kind: frozenset(i for i, t in self.object_type.items() if t == kind) for kind in types.values()}
        if "(istoggled " in goal:
            lamp, thing = (re.findall(rf"\({what} .*?(\?\w+)\)", goal)[0] for what in ("istoggled", "holds"))
            lamps = of_type[types[lamp]] & self.toggleable
            return Goal(kind="look", objects=of_type[types[thing]], lamps=lamps)
        wanted = re.search(r"\(receptacletype \?\w+ (\w+)\)", goal)
        if wanted is None or len(of_type) != 1:
            raise ValueError(f"the goal is none of ALFWorld's six: {' '.join(goal.split())[:200]}")
        (objects,) = of_type.values()
        receptacles = tuple(r for r in self.location if self.receptacle_type.get(r) == wanted[1])
        for kind, changed in (("clean", "isclean"), ("heat", "ishot"), ("cool", "iscool")):
            if f"({changed} " in goal:
                return Goal(kind=kind, objects=objects & self.able[kind], receptacles=receptacles)
        return Goal(kind="two" if "(= " in goal else "place", objects=objects, receptacles=receptacles)

    def conditions(self) -> tuple[int, int]:
        """(conditions of the goal that hold now, for the best choice of objects; the goal's conditions).

        place: an object in the receptacle (1). two: two objects in the same receptacle (2). clean, heat, cool: one
        object changed and in the receptacle (2). look: lamp on with the agent at it, object in hand (2).
        """
        goal = self.goal
        if goal.kind == "look":
            lit = any(
                lamp in self.state["toggled"] and lamp in self.contents[r]
                for lamp in goal.lamps
                for r in self.at.get(self.here, ())
            )
            return lit + (self.held in goal.objects), 2
        counts = [sum(thing in goal.objects for thing in self.contents[r]) for r in goal.receptacles]
        if goal.kind == "two":
            return min(2, max(counts, default=0)), 2
        if goal.kind == "place":
            return int(any(counts)), 1
        changed = self.state[{"clean": "clean", "heat": "hot", "cool": "cool"}[goal.kind]]
        placed = {thing for r in goal.receptacles for thing in self.contents[r]}
        return max(((o in changed) + (o in placed) for o in goal.objects), default=0), 2

    def actions(self) -> list[str]:
        """Every command that `act` accepts now, sorted: TextWorld's admissible commands."""
        names, held, old = self.names, self.held, self.old_wording
        found = [f"go to {names[r]}" for r, location in self.location.items() if location != self.here]
        found += ["inventory", "look"] if old else ["help", "inventory", "look"]
        if held:
            found.append(f"examine {names[held]}")
        for r in self.at.get(self.here, ()):
            name = names[r]
            found.append(f"examine {name}")
            shut = self._shut(r)
            if r in self.openable:
                found.append(f"open {name}" if shut else f"close {name}")
            if not shut and not held:
                found += [f"take {names[o]} from {name}" for o in self.contents[r] if o in self.pickupable]
            found += [f"use {names[o]}" for o in self.contents[r] if o in self.toggleable]
            if held:
                if not shut and self._fits(held, r):
                    found.append(f"put {names[held]} in/on {name}" if old else f"move {names[held]} to {name}")
                found += [
                    f"{verb} {names[held]} with {name}"
                    for verb, tool in _TOOLS.items()
                    if held in self.able[verb] and self.receptacle_type.get(r) == tool
                ]
        if held and self._cuts(held):
            found += [
                f"slice {names[o]} with {names[held]}"
                for o, location in self.object_locations
                if location == self.here and o in self.sliceable
            ]
        return sorted(set(found))

    def act(self, command: str) -> str | None:
        """Executes one command and returns TextWorld's answer; None, with no change, if it is not admissible."""
        match command.split(" "):
            case ["look"]:
                return self.look()
            case ["inventory"]:
                return self._inventory()
            case ["help"] if not self.old_wording:
                return _HELP
            case ["go", "to", a, b]:
                return self._go(self._id(a, b))
            case ["examine", a, b]:
                return self._examine(self._id(a, b))
            case [("open" | "close") as verb, a, b]:
                return self._open_or_close(verb, self._id(a, b))
            case ["use", a, b]:
                return self._use(self._id(a, b))
            case ["take", a, b, "from", c, d]:
                return self._take(self._id(a, b), self._id(c, d))
            case ["move", a, b, "to", c, d] if not self.old_wording:
                return self._put(self._id(a, b), self._id(c, d))
            case ["put", a, b, "in/on", c, d] if self.old_wording:
                return self._put(self._id(a, b), self._id(c, d))
            case [("clean" | "heat" | "cool") as verb, a, b, "with", c, d]:
                return self._change(verb, self._id(a, b), self._id(c, d))
            case ["slice", a, b, "with", c, d]:
                return self._slice(self._id(a, b), self._id(c, d))
        return None

    def look(self) -> str:
        """The answer to `look`: the receptacles at the agent's location, never their contents."""
        if self.here not in self.at:
            return f"{_MIDDLE} nothing."
        # TextWorld lists here the objects once taken out of a receptacle that are now in another at the same location.
        beside = sorted(
            (o, r)
            for o, r in self.taken_from
            if self.location[r] == self.here and (o, self.here) in self.object_locations
        )
        things = listing([f"a {self.names[o]}" for o, _ in beside])
        facing = listing([self.names[r] for r in self.at[self.here]])
        return f"You are facing the {facing}. Next to it, you see {things}."

    def _inventory(self) -> str:
        return f"You are carrying: a {self.names[self.held]}." if self.held else "You are not carrying anything."

    def _id(self, kind: str, number: str) -> str | None:
        return self.named.get(f"{kind} {number}")

    def _here(self, receptacle: str | None) -> bool:
        return receptacle in self.location and self.location[receptacle] == self.here

    def _shut(self, receptacle: str) -> bool:
        return receptacle in self.openable and receptacle not in self.opened

    def _fits(self, thing: str, receptacle: str) -> bool:
        return (self.receptacle_type.get(receptacle), self.object_type.get(thing)) in self.can_contain

    def _cuts(self, thing: str) -> bool:
        return self.object_type.get(thing) in ("knifetype", "butterknifetype")

    def _see(self, receptacle: str) -> str:
        name = self.names[receptacle]
        if self._shut(receptacle):
            return f"The {name} is closed."
        things = listing([f"a {self.names[o]}" for o in self.contents[receptacle]])
        if receptacle in self.openable:
            return f"The {name} is open. In it, you see {things}."
        return f"On the {name}, you see {things}."

    def _go(self, receptacle: str | None) -> str | None:
        # Going to the agent's own location has no effect, so the planner drops it and it is not admissible.
        if receptacle not in self.location or self._here(receptacle):
            return None
        self.here = self.location[receptacle]
        return f"You arrive at {self.names[self.here if self.old_wording else receptacle]}. {self._see(receptacle)}"

    def _open_or_close(self, verb: str, receptacle: str | None) -> str | None:
        if not self._here(receptacle) or receptacle not in self.openable or self._shut(receptacle) != (verb == "open"):
            return None
        if verb == "close":
            self.opened.remove(receptacle)
            return f"You close the {self.names[receptacle]}."
        self.opened.add(receptacle)
        return f"You open the {self.names[receptacle]}. {self._see(receptacle)}"

    def _take(self, thing: str | None, receptacle: str | None) -> str | None:
        if self.held or not self._here(receptacle) or self._shut(receptacle):
            return None
        if thing not in self.contents[receptacle] or thing not in self.pickupable:
            return None
        self.contents[receptacle].remove(thing)
        self.taken_from.add((thing, receptacle))
        self.object_locations.discard((thing, self.here))
        self.held = thing
        return f"You pick up the {self.names[thing]} from the {self.names[receptacle]}."

    def _put(self, thing: str | None, receptacle: str | None) -> str | None:
        if thing is None or thing != self.held or not self._here(receptacle) or self._shut(receptacle):
            return None
        if not self._fits(thing, receptacle):
            return None
        if thing not in self.contents[receptacle]:  # a game may list an object in two receptacles
            insort(self.contents[receptacle], thing)
        self.taken_from.discard((thing, receptacle))
        self.object_locations.add((thing, self.here))
        self.held = None
        if self.old_wording:
            return f"You put the {self.names[thing]} in/on the {self.names[receptacle]}."
        return f"You move the {self.names[thing]} to the {self.names[receptacle]}."

    def _change(self, verb: str, thing: str | None, receptacle: str | None) -> str | None:
        if thing is None or thing != self.held or thing not in self.able[verb] or not self._here(receptacle):
            return None
        if self.receptacle_type.get(receptacle) != _TOOLS[verb]:
            return None
        gained, lost = {"clean": ("clean", ""), "heat": ("hot", "cool"), "cool": ("cool", "hot")}[verb]
        self.state[gained].add(thing)
        if lost:
            self.state[lost].discard(thing)
        return f"You {verb} the {self.names[thing]} using the {self.names[receptacle]}."

    def _use(self, thing: str | None) -> str | None:
        if thing not in self.toggleable or not any(thing in self.contents[r] for r in self.at.get(self.here, ())):
            return None
        self.state["toggled"].add(thing)
        return f"You turn on the {self.names[thing]}."  # the domain never unsets isToggled, so it is never "off"

    def _slice(self, thing: str | None, knife: str | None) -> str | None:
        if knife is None or knife != self.held or not self._cuts(knife):
            return None
        if thing not in self.sliceable or (thing, self.here) not in self.object_locations:
            return None
        self.state["sliced"].add(thing)
        return f"You sliced the {self.names[thing]} with the {self.names[knife]}."

    def _examine(self, thing: str | None) -> str | None:
        if self._here(thing):
            return self._see(thing)
        # The domain's "(?l - location, ?r - receptacle)" parses as an unknown type: only a held object can be examined.
        if thing is None or thing != self.held:
            return None
        name = self.names[thing]
        if thing in self.vessels:
            things = listing([f"a {self.names[o]}" for o in self.inside.get(thing, [])])
            return f"This is a normal {name}. In it, you see {things}."
        clean, hot, cool, sliced, on = (thing in self.state[s] for s in ("clean", "hot", "cool", "sliced", "toggled"))
        if clean and (hot or cool):
            words = f"{'hot' if hot else 'cool'} and clean{' sliced' if sliced else ''}"
        elif sliced and (clean or hot or cool):
            words = f"{'clean' if clean else 'hot' if hot else 'cool'} sliced"
        elif hot or clean or cool:
            words = "hot" if hot else "clean" if clean else "cold"
        elif on:
            return f"This {name} is on."
        elif sliced:
            words = "sliced"
        else:
            return f"There's nothing special about {name}."
        return f"This is a {words} {name}."

"""Rooms and rules for generated ALFWorld games, read from the alfworld wheel's data or from mini_rooms.py.

The wheel (0.4.2) ships 120 rooms with their object types and their receptacles with positions, the table of which
receptacle may hold what, the PDDL domain and the text grammar. From these, `catalogue` builds the input of generate.py:
for each room the text shared by all its games, and for each task type the possible rooms and goals.
Left out: the rooms of the real unseen splits, and sizes (a receptacle holds any number of the objects it may hold).

    python -c "from envs.alfworld import rooms; print(rooms.wheel_folder(), len(rooms.catalogue(rooms.family()).holds))"
"""

from __future__ import annotations

import ast
import importlib.util
import json
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from envs.alfworld import mini_rooms

# Rooms of the real unseen splits, which the real training games do not use.
UNSEEN_SCENES = {9, 10, 29, 215, 219, 226, 308, 315, 325, 404, 424, 425}

# Task type: games in the real training split, their number by room, the two phrases of the task line.
TASKS = {
    "pick_and_place_simple": (
        790,
        {"Kitchen": 79, "LivingRoom": 210, "Bedroom": 237, "Bathroom": 264},
        ("put a {obj} in {recep}.", "put some {obj} on {recep}."),
    ),
    "look_at_obj_in_light": (
        308,
        {"LivingRoom": 51, "Bedroom": 257},
        ("look at {obj} under the desklamp.", "examine the {obj} with the desklamp."),
    ),
    "pick_clean_then_place_in_recep": (
        650,
        {"Kitchen": 501, "Bathroom": 149},
        ("put a clean {obj} in {recep}.", "clean some {obj} and put it in {recep}."),
    ),
    "pick_heat_then_place_in_recep": (
        459,
        {"Kitchen": 459},
        ("put a hot {obj} in {recep}.", "heat some {obj} and put it in {recep}."),
    ),
    "pick_cool_then_place_in_recep": (
        533,
        {"Kitchen": 533},
        ("put a cool {obj} in {recep}.", "cool some {obj} and put it in {recep}."),
    ),
    "pick_two_obj_and_place": (
        813,
        {"Kitchen": 124, "LivingRoom": 216, "Bedroom": 240, "Bathroom": 233},
        ("put two {obj} in {recep}.", "find two {obj} and put them in {recep}."),
    ),
}

# Task type with a state change: the ability the object needs, its new state, the command, the receptacle that does it.
CHANGES = {
    "pick_clean_then_place_in_recep": ("cleanable", "isClean", "clean", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("heatable", "isHot", "heat", "Microwave"),
    "pick_cool_then_place_in_recep": ("coolable", "isCool", "cool", "Fridge"),
}

# Objects that stand on receptacles, most of them fixed: the share of real games with one, and the receptacle types.
FIXTURES = {
    "DeskLamp": (1.0, ("SideTable", "Desk", "Dresser", "Shelf")),
    "HousePlant": (0.84, ("CounterTop", "SideTable", "DiningTable", "Shelf", "CoffeeTable", "Desk", "Dresser")),
    "Television": (0.63, ("Dresser", "TVStand", "CoffeeTable")),
    "PaperTowelRoll": (0.96, ("CounterTop", "DiningTable", "GarbageCan", "Shelf", "Toilet")),
    "TeddyBear": (0.77, ("Bed",)),
    "Sink": (0.14, ("CounterTop", "SinkBasin")),
    "Mirror": (0.06, ("CounterTop", "Dresser")),
    "Window": (0.04, ("CounterTop", "Shelf", "Dresser")),
    "Bathtub": (0.06, ("BathtubBasin",)),
}

ABILITIES = ("cleanable", "heatable", "coolable", "sliceable")
MOVABLE_RECEPTACLES = ("Bowl", "Box", "Cup", "Mug", "Pan", "Plate", "Pot")
OPENABLE = ("Cabinet", "Drawer", "Fridge", "Microwave", "Safe")
HOLDS_ONE = ("CoffeeMachine", "HandTowelHolder", "StoveBurner", "ToiletPaperHanger", "TowelHolder")
NEVER_A_GOAL = ("BathtubBasin", "HandTowelHolder", "LaundryHamper", "SinkBasin", "Toaster", "TowelHolder", "TVStand")
ON_THE_FLOOR = ("BaseballBat", "BasketBall", "Boots", "TennisRacket")  # never in a receptacle in the real games
TASK_SLOT = "Your task is to: UNKNOWN GOAL."  # in the wheel's grammar


@dataclass(frozen=True, kw_only=True)
class Receptacle:
    identifier: str  # as in the PDDL: Cabinet_bar__plus_00_dot_38_bar_...
    kind: str
    location: str
    opens: bool


@dataclass(frozen=True, kw_only=True)
class Scene:
    number: int
    receptacles: tuple[Receptacle, ...]
    object_types: tuple[str, ...]
    objects: str  # PDDL lines shared by all games in this room: the problem's objects
    facts: str  # and its facts: the receptacles' types, contents they may hold, which open, locations


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The ingredients of games, read once from the wheel or from mini_rooms.py."""

    domain: str
    grammar: str
    holds: dict[str, frozenset[str]]  # receptacle type -> object types
    abilities: dict[str, frozenset[str]]  # cleanable, heatable, coolable, sliceable -> object types
    goals: dict[str, dict[str, list[tuple[Scene, dict[str, list[str]]]]]]  # task type, room -> scene, {goal: objects}


def pick(rng: np.random.Generator, options: Sequence, weights: Sequence[float] | None = None):
    """Draws one of `options`. Uses only rng.random(), whose stream is the same in all numpy versions."""
    if weights is None:
        return options[int(rng.random() * len(options))]
    cumulative = list(accumulate(weights))
    return options[bisect(cumulative, rng.random() * cumulative[-1])]


def mangle(text: str) -> str:
    """An identifier of the simulator in its PDDL spelling."""
    for mark, word in (("|", "_bar_"), ("+", "_plus_"), ("-", "_minus_"), (".", "_dot_")):
        text = text.replace(mark, word)
    return text


def somewhere(rng: np.random.Generator, kind: str) -> str:
    """An identifier with a random position, in the simulator's form, Apple|+00.49|-01.20|+02.33, mangled."""
    name = kind.removesuffix("Basin") + "".join(f"|{6 * rng.random() - 3:+06.2f}" for _ in "xyz")
    return mangle(f"{name}|{kind}" if kind.endswith("Basin") else name)


def spot(rng: np.random.Generator) -> str:
    """A random location of the agent: x and z in quarters of a metre, the direction, the camera's angle."""
    x, z = (int(rng.random() * 25) - 12 for _ in "xz")
    return mangle(f"loc|{x}|{z}|{int(rng.random() * 4)}|{pick(rng, (30, 45, 60))}")


def lines(items: Sequence[str]) -> str:
    return "".join(f"        {item}\n" for item in items)


def wheel_folder() -> Path | None:
    """The installed alfworld package, or None. It is located but not imported: importing it makes a cache folder."""
    spec = importlib.util.find_spec("alfworld")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    return folder if (folder / "gen/layouts").is_dir() and (folder / "data/alfred.pddl").is_file() else None


def family() -> str:
    """The prefix of the splits: `gen` with the wheel's data, else `mini`."""
    return "gen" if wheel_folder() else "mini"


@lru_cache(maxsize=2)
def catalogue(name: str) -> Catalogue:
    """The rooms and rules of a family of splits, `gen` or `mini`."""
    if name == "mini":
        note = "These rooms are played by our own engine only; install alfworld for games that TextWorld can play."
        scenes = [mini_scene(room, *mini_rooms.ROOMS[room]) for room in mini_rooms.ROOMS]
        return build_catalogue(scenes, mini_rooms.HOLDS, mini_rooms.ABILITIES, note, f'"rhs": "{TASK_SLOT}" {note}')
    if name != "gen":
        raise ValueError(f"no rooms are called {name!r}: expected gen_* or mini_* splits")
    folder = wheel_folder()
    if folder is None:
        raise FileNotFoundError(
            "the data of the alfworld wheel is not installed, so gen_* games cannot be made. Install it with"
            " `pip install --no-deps alfworld==0.4.2`, or use the mini_* splits."
        )
    tables = literals(folder / "gen/constants.py", ("VAL_RECEPTACLE_OBJECTS", "VAL_ACTION_OBJECTS"))
    holds = {kind: frozenset(types) for kind, types in tables["VAL_RECEPTACLE_OBJECTS"].items()}
    holds |= {kind: holds["TableTop"] for kind in ("DiningTable", "CoffeeTable", "SideTable")}
    unused = (*MOVABLE_RECEPTACLES, "TableTop")  # no object is inside another one, and no goal is sliced
    holds = {k: frozenset(t for t in types if "Sliced" not in t) for k, types in holds.items() if k not in unused}
    able = tables["VAL_ACTION_OBJECTS"].items()
    abilities = {name.lower(): frozenset(t for t in types if "Sliced" not in t) for name, types in able}
    numbers = [number for base in (1, 201, 301, 401) for number in range(base, base + 30)]
    scenes = [wheel_scene(folder / "gen/layouts", number, holds) for number in numbers if number not in UNSEEN_SCENES]
    domain, grammar = ((folder / "data" / name).read_text() for name in ("alfred.pddl", "alfred.twl2"))
    if TASK_SLOT not in grammar:
        raise ValueError(f"{folder}/data/alfred.twl2 has no line {TASK_SLOT!r}; alfworld 0.4.2 is expected")
    return build_catalogue(scenes, holds, abilities, domain, grammar)


def literals(path: Path, names: Sequence[str]) -> dict:
    """{name: value} of literal assignments `name = ...` in a Python file, which is parsed but not executed."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
            found[node.targets[0].id] = ast.literal_eval(node.value)
    if missing := set(names) - set(found):
        raise ValueError(f"{path} does not define {sorted(missing)}; alfworld 0.4.2 is expected")
    return found


def wheel_scene(folder: Path, number: int, holds: dict[str, frozenset[str]]) -> tuple:
    """(number, room type, receptacles, object types) of one of the wheel's rooms.

    The wheel lists the receptacles that the simulator's robot can reach and open. The real games have more: one of each
    other type found in the room (four burners), and a fifth more cabinets and drawers, which do not open.
    """
    types = json.loads((folder / f"FloorPlan{number}-objects.json").read_text())
    receptacles = []
    for key, (x, z, rotation, angle) in json.loads((folder / f"FloorPlan{number}-openable.json").read_text()).items():
        kind = key.split("|")[-1] if key.endswith("Basin") else key.split("|")[0]
        location = mangle(f"loc|{round(4 * x)}|{round(4 * z)}|{rotation // 90}|{angle}")
        opens = kind in OPENABLE
        receptacles.append(Receptacle(identifier=mangle(key), kind=kind, location=location, opens=opens))
    listed = [receptacle.kind for receptacle in receptacles]
    more = {kind: 4 if kind == "StoveBurner" else 1 for kind in sorted(set(types) & set(holds) - set(listed))}
    more |= {kind: round(0.2 * listed.count(kind)) for kind in ("Cabinet", "Drawer")}
    room = {0: "Kitchen", 2: "LivingRoom", 3: "Bedroom", 4: "Bathroom"}[number // 100]
    return number, room, add_receptacles(number, receptacles, more, opens=()), types


def mini_scene(room: str, number: int, counts: dict[str, int], types: Sequence[str]) -> tuple:
    return number, room, add_receptacles(number, [], counts, opens=OPENABLE), types


def add_receptacles(
    number: int, given: list[Receptacle], counts: dict[str, int], opens: Sequence[str]
) -> list[Receptacle]:
    """`given` plus `counts` more of each type at random locations, openable if their type is in `opens`.

    As in the real rooms, burners share a location in pairs, and small machines often share a countertop's location.
    """
    rng = np.random.default_rng(number)
    receptacles = list(given)
    for kind, count in counts.items():
        for index in range(count):
            location = spot(rng)
            tops = [other.location for other in receptacles if other.kind == "CounterTop"]
            if kind == "StoveBurner" and index % 2:
                location = receptacles[-1].location
            elif kind in ("CoffeeMachine", "Toaster") and tops and rng.random() < 0.28:
                location = pick(rng, tops)
            receptacles.append(
                Receptacle(identifier=somewhere(rng, kind), kind=kind, location=location, opens=kind in opens)
            )
    return receptacles


def build_catalogue(rooms: list[tuple], holds: dict, abilities: dict, domain: str, grammar: str) -> Catalogue:
    """The catalogue of `rooms`: the text shared by all games of each room, and the tasks possible in it."""
    goals = {task: {room: [] for room in by_room} for task, (_, by_room, _) in TASKS.items()}
    rtypes = sorted(holds)
    otypes = sorted(set().union(*holds.values(), *abilities.values(), FIXTURES, MOVABLE_RECEPTACLES))
    for number, room, receptacles, types in rooms:
        kinds = {receptacle.kind for receptacle in receptacles}
        lying = [name for name in types if name not in ON_THE_FLOOR and any(name in holds[kind] for kind in kinds)]
        standing = [name for name in types if name in FIXTURES and kinds & set(FIXTURES[name][1])]
        present = sorted({*lying, *standing})
        objects = ["agent1 - agent", *(f"{name} - object" for name in otypes)]
        objects += [*(f"{name}Type - otype" for name in otypes), *(f"{name}Type - rtype" for name in rtypes)]
        objects += [f"{one.identifier} - receptacle" for one in receptacles]
        facts = [f"(receptacleType {one.identifier} {one.kind}Type)" for one in receptacles]
        facts += [f"(canContain {k}Type {o}Type)" for k in sorted(kinds) for o in present if o in holds[k]]
        facts += [f"(openable {one.identifier})" for one in receptacles if one.opens]
        facts += [f"(receptacleAtLocation {one.identifier} {one.location})" for one in receptacles]
        scene = Scene(
            number=number,
            receptacles=tuple(receptacles),
            object_types=tuple(present),
            objects=lines(objects),
            facts=lines(facts),
        )
        for task in goals:
            if room in goals[task] and (choices := possible_goals(task, kinds, lying, standing, holds, abilities)):
                goals[task][room].append((scene, choices))
    return Catalogue(domain=domain, grammar=grammar, holds=holds, abilities=abilities, goals=goals)


def possible_goals(task: str, kinds: set, lying: list, standing: list, holds: dict, abilities: dict) -> dict:
    """{goal receptacle type: object types that can be brought there}; for look_at_obj_in_light {DeskLamp: objects}."""
    if task == "look_at_obj_in_light":
        return {"DeskLamp": lying} if "DeskLamp" in standing else {}
    ability, _, _, tool = CHANGES.get(task, (None, None, None, None))
    if tool and tool not in kinds:
        return {}
    choices = {}
    for goal in sorted(kinds - {*NEVER_A_GOAL, tool}):
        if task == "pick_two_obj_and_place" and goal in HOLDS_ONE:
            continue
        # Without a state change, the object must start outside the goal receptacles.
        starts = kinds - {*HOLDS_ONE} if tool else kinds - {goal, *HOLDS_ONE}
        fitting = [name for name in lying if name in holds[goal] and (not tool or name in abilities[ability])]
        if fitting := [name for name in fitting if any(name in holds[kind] for kind in starts)]:
            choices[goal] = fitting
    return choices

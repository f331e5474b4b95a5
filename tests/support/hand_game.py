"""One small house written by hand, with every oddity that real games have, for tests without the real data.

`write_game(data, goal)` writes it as a game folder that our engine and, where the alfworld wheel is installed, stock
TextWorld can play. Names follow alfworld's numbering, so `Apple_bar_1` is "apple 2" and `Apple_bar_2` is "apple 1".
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

PLACES = {  # receptacle: (location, openable)
    "Cabinet_bar_1": (2, True),
    "Cabinet_bar_2": (2, True),
    "CounterTop_bar_1": (3, False),
    "Desk_bar_1": (4, False),
    "Fridge_bar_1": (5, True),
    "GarbageCan_bar_1": (3, False),
    "Microwave_bar_1": (6, True),
    "Sink_bar_1_bar_SinkBasin": (7, False),
}
CONTENTS = {  # object: the receptacles that list it
    "Apple_bar_1": ["Fridge_bar_1"],
    "Apple_bar_2": ["CounterTop_bar_1"],
    "Bread_bar_1": ["CounterTop_bar_1"],
    "DeskLamp_bar_1": ["Desk_bar_1"],
    "Knife_bar_1": ["CounterTop_bar_1"],
    "Mug_bar_1": ["Cabinet_bar_1"],
    "Pen_bar_1": ["Desk_bar_1"],
    "Plate_bar_1": ["CounterTop_bar_1", "GarbageCan_bar_1"],
}
ABLE = {
    "pickupable": ["Apple_bar_1", "Apple_bar_2", "Bread_bar_1", "Knife_bar_1", "Mug_bar_1", "Pen_bar_1", "Plate_bar_1"],
    "cleanable": ["Apple_bar_1", "Apple_bar_2", "Knife_bar_1", "Mug_bar_1", "Plate_bar_1"],
    "heatable": ["Apple_bar_1", "Apple_bar_2", "Bread_bar_1", "Mug_bar_1"],
    "coolable": ["Apple_bar_1", "Apple_bar_2", "Bread_bar_1", "Mug_bar_1"],
    "sliceable": ["Apple_bar_1", "Apple_bar_2", "Bread_bar_1"],
    "toggleable": ["DeskLamp_bar_1"],
    "isReceptacleObject": ["Mug_bar_1", "Plate_bar_1"],
    "isCool": ["Apple_bar_1"],
}
HOLDS = {  # what may be put where; the pen fits nowhere but the desk
    "Cabinet": ["Apple", "Mug", "Plate"],
    "CounterTop": ["Apple", "Bread", "Knife", "Mug", "Plate"],
    "Desk": ["DeskLamp", "Mug", "Pen"],
    "Fridge": ["Apple", "Mug"],
    "GarbageCan": ["Apple", "Bread"],
    "Microwave": ["Apple", "Mug"],
    "SinkBasin": ["Apple", "Mug", "Plate"],
}
_IN = "(exists (?r - receptacle) (exists (?o - object) (and {} (objectType ?o {}Type) (receptacleType ?r {}Type) {})))"
GOALS = {  # kind: (folder, task line, goal)
    "place": (
        "pick_and_place_simple-Apple-None-Microwave-1",
        "put some apple on microwave.",
        _IN.format("(inReceptacle ?o ?r)", "Apple", "Microwave", ""),
    ),
    "clean": (
        "pick_clean_then_place_in_recep-Plate-None-Cabinet-1",
        "put a clean plate in cabinet.",
        _IN.format("(cleanable ?o)", "Plate", "Cabinet", "(isClean ?o) (inReceptacle ?o ?r)"),
    ),
    "heat": (
        "pick_heat_then_place_in_recep-Apple-None-GarbageCan-1",
        "put a hot apple in garbagecan.",
        _IN.format("(heatable ?o)", "Apple", "GarbageCan", "(isHot ?o) (inReceptacle ?o ?r)"),
    ),
    "cool": (
        "pick_cool_then_place_in_recep-Mug-None-Desk-1",
        "put a cool mug in desk.",
        _IN.format("(coolable ?o)", "Mug", "Desk", "(isCool ?o) (inReceptacle ?o ?r)"),
    ),
    "two": (
        "pick_two_obj_and_place-Apple-None-Cabinet-1",
        "put two apple in cabinet.",
        "(exists (?r - receptacle) (exists (?o1 - object) (and (objectType ?o1 AppleType) "
        "(receptacleType ?r CabinetType) (inReceptacle ?o1 ?r) (exists (?o2 - object) (and (not (= ?o1 ?o2)) "
        "(objectType ?o2 AppleType) (receptacleType ?r CabinetType) (inReceptacle ?o2 ?r))))))",
    ),
    "look": (
        "look_at_obj_in_light-Pen-None-DeskLamp-1",
        "look at pen under the desklamp.",
        "(exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and (objectType ?ot DeskLampType) "
        "(toggleable ?ot) (isToggled ?ot) (receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r))) "
        "(exists (?o - object ?a - agent) (and (objectType ?o PenType) (holds ?a ?o)))",
    ),
}


def kind_of(name: str) -> str:
    return "SinkBasin" if "SinkBasin" in name else name.split("_bar_")[0]


def problem(goal: str, start: int = 1) -> str:
    """The PDDL problem; `start` is the agent's location, 1 being the middle of the room."""
    things = [*CONTENTS, "Pencil_bar_1"]  # in the mug, in no receptacle
    objects = [f"{name} - object" for name in things] + [f"{name} - receptacle" for name in PLACES]
    objects += [f"loc_bar_{n} - location" for n in range(1, 9)] + ["agent1 - agent"]  # no fact mentions location 8
    objects += [f"{kind}Type - otype" for kind in sorted(set(map(kind_of, things)))]
    objects += [f"{kind}Type - rtype" for kind in sorted(set(map(kind_of, PLACES)))]
    facts = [f"(atLocation agent1 loc_bar_{start})", "(inReceptacleObject Pencil_bar_1 Mug_bar_1)"]
    facts += [f"(objectType {name} {kind_of(name)}Type)" for name in things]
    for name, (location, openable) in PLACES.items():
        facts += [f"(receptacleType {name} {kind_of(name)}Type)", f"(receptacleAtLocation {name} loc_bar_{location})"]
        facts += [f"(openable {name})"] if openable else []
    for name, receptacles in CONTENTS.items():
        facts += [f"(inReceptacle {name} {receptacle})" for receptacle in receptacles]
        facts.append(f"(objectAtLocation {name} loc_bar_{PLACES[receptacles[0]][0]})")
    facts += [f"({able} {name})" for able, names in ABLE.items() for name in names]
    facts += [f"(canContain {place}Type {thing}Type)" for place, things in HOLDS.items() for thing in things]
    parts = ["(define (problem hand)", "(:domain alfred)", "(:objects", *objects, ")", "(:init", *facts, ")"]
    return "\n        ".join([*parts, f"(:goal (and {GOALS[goal][2]})))"])


def write_game(data: Path, goal: str = "place", split: str = "hand", trial: str = "trial_1", start: int = 1) -> str:
    """Write the game below `data` and return its task id."""
    name, words, _ = GOALS[goal]
    wheel = importlib.util.find_spec("alfworld")
    folder = data / "json_2.1.1" / split / name / trial
    folder.mkdir(parents=True)
    if wheel:
        files = Path(wheel.origin).parent / "data"
        domain, grammar = (files / "alfred.pddl").read_text(), (files / "alfred.twl2").read_text()
        grammar = grammar.replace("UNKNOWN GOAL.", words)
    else:
        domain, grammar = "", json.dumps({"rhs": f"Your task is to: {words}"})
    game = {"pddl_domain": domain, "grammar": grammar, "pddl_problem": problem(goal, start), "solvable": True}
    (folder / "game.tw-pddl").write_text(json.dumps(game))
    (folder / "traj_data.json").write_text(json.dumps({"task_type": name.split("-")[0]}))
    return f"{split}/{name}/{trial}"

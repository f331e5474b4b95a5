"""Generate ALFWorld games in the format of the real ones, for machines without the game files.

    python -m envs.alfworld.generate --folder data/generated            # gen_train, gen_valid, gen_demo
    ALFWORLD_DATA=data/generated python -m envs.play --env alfworld --tasks --split gen_valid

The alfworld wheel ships no games but all their ingredients: 120 rooms (their object types, and their receptacles with
positions), which receptacle may hold what, the PDDL domain and the text grammar. A game picks one of the six task
types, fills a room with objects at the frequencies of the real training games, and is written as `game.tw-pddl` and
`traj_data.json`, which the stock alfworld and TextWorld load and play. The rooms of the real unseen splits are not
used. Without the wheel, four small rooms (mini_rooms.py) replace its rooms; their splits are named mini_* and only our
engine can play them.

A game is a function of (seed, split, index) and of the rooms; its id ends in a hash of its problem text, so an id
identifies exactly one game.
Left out: objects that are never in a receptacle (light switches, chairs, balls on the floor), objects inside other
objects, sliced goals, and images.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from artifacts.cli import Range, run_main
from envs.alfworld.rooms import (
    ABILITIES,
    CHANGES,
    FIXTURES,
    HOLDS_ONE,
    MOVABLE_RECEPTACLES,
    TASK_SLOT,
    TASKS,
    Receptacle,
    Scene,
    catalogue,
    family,
    lines,
    pick,
    somewhere,
    spot,
)
from envs.base import check_stamp

SEED = 20240403  # the panels in envs/panels use it
FOLDER = Path(__file__).parents[2] / "data/generated"
SPLIT_SIZES = {"train": 600, "valid": 200, "demo": 300}
STAMP = "generated.json"  # in a split's folder: the result of make_stamp

# Weight of one receptacle of a type among all that may hold the same object (CounterTop = 10): the maximum-likelihood
# fit to the placements of all objects in the real training games.
ATTRACTION = {
    "Bed": 36,
    "CoffeeMachine": 22,
    "StoveBurner": 20,
    "DiningTable": 18,
    "BathtubBasin": 17,
    "CoffeeTable": 15,
    "Desk": 14,
    "TVStand": 14,
    "Fridge": 14,
    "Dresser": 14,
    "Sofa": 13,
    "CounterTop": 10,
    "Cart": 9,
    "Toilet": 7,
    "SideTable": 6.7,
    "TowelHolder": 6.3,
    "Ottoman": 5.6,
    "Safe": 5.1,
    "ToiletPaperHanger": 4.5,
    "Microwave": 4.5,
    "SinkBasin": 4.4,
    "ArmChair": 4.4,
    "GarbageCan": 3.8,
    "Shelf": 3.3,
    "Drawer": 1.9,
    "Cabinet": 1.8,
    "HandTowelHolder": 1000,
}

FIXED_ONLY = {"DeskLamp", "HousePlant", "Television", "Sink", "Mirror", "Window", "Bathtub"}  # the rest can be taken

ONE_COPY = ("Box", "HandTowel", "Towel", "WateringCan")
TWO_COPIES = ("Bread", "Kettle", "Laptop", "Pan", "Pillow", "Pot")
TARGET_COPIES = {1: (37, 30, 20, 13), 2: (0, 46, 32, 22)}  # weights of 1, 2, 3, 4 copies, by the number needed


@dataclass(frozen=True, kw_only=True)
class Placed:
    identifier: str
    kind: str
    receptacle: Receptacle


def place_objects(
    rng: np.random.Generator, scene: Scene, holds: dict, task: str, target: str, goal: str
) -> list[Placed]:
    """Objects of every type that can occur in the room, each in a receptacle that may hold it."""
    placed, full = [], set()
    for kind in scene.object_types:
        options = [one for one in scene.receptacles if kind in holds[one.kind]]
        if kind in FIXTURES:
            chance, kinds = FIXTURES[kind]
            options = [one for one in scene.receptacles if one.kind in kinds]
            copies = int(rng.random() < chance)
        elif kind == target:
            copies = 1 + pick(rng, range(4), TARGET_COPIES[2 if task == "pick_two_obj_and_place" else 1])
            if task not in CHANGES:  # otherwise the task could be solved at the start
                options = [one for one in options if one.kind != goal]
        else:
            copies = 1 + int(rng.random() * (1 if kind in ONE_COPY else 2 if kind in TWO_COPIES else 3))
        for _ in range(copies):
            options = [one for one in options if one.identifier not in full]
            if options:
                receptacle = pick(rng, options, [ATTRACTION.get(one.kind, 1) for one in options])
                placed.append(Placed(identifier=somewhere(rng, kind), kind=kind, receptacle=receptacle))
                if receptacle.kind in HOLDS_ONE:
                    full.add(receptacle.identifier)
    return placed


def goal_text(task: str, target: str, goal: str) -> str:
    """The goal in PDDL."""
    if task == "look_at_obj_in_light":
        lamp = f"(objectType ?ot {goal}Type) (toggleable ?ot) (isToggled ?ot)"
        nearby = "(receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r)"
        return (
            f"(and (exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and {lamp} {nearby}))"
            f" (exists (?o - object ?a - agent) (and (objectType ?o {target}Type) (holds ?a ?o))))"
        )
    typed = f"(objectType ?{{0}} {target}Type) (receptacleType ?r {goal}Type) (inReceptacle ?{{0}} ?r)"
    if task == "pick_two_obj_and_place":
        second = f"(exists (?o2 - object) (and (not (= ?o1 ?o2)) {typed.format('o2')}))"
        return f"(and (exists (?r - receptacle) (exists (?o1 - object) (and {typed.format('o1')} {second}))))"
    ability, state, _, _ = CHANGES.get(task, ("", "", "", ""))
    changed = f"({ability} ?o) ({state} ?o) " if ability else ""
    return f"(and (exists (?r - receptacle) (exists (?o - object) (and {changed}{typed.format('o')}))))"


def names(identifiers: Sequence[str]) -> dict[str, str]:
    """{identifier: name in the text}. As in alfworld, the alphabetically first id of a kind has the highest number."""
    named, counts = {}, {}
    for identifier in sorted(identifiers, key=str.lower, reverse=True):
        name = identifier.lower().split("_bar_")[0] + ("basin" if identifier.endswith("Basin") else "")
        counts[name] = counts.get(name, 0) + 1
        named[identifier] = f"{name} {counts[name]}"
    return named


def walkthrough(scene: Scene, placed: list[Placed], task: str, target: str, goal: str) -> list[str]:
    """Commands that win the game from the agent's start, which is at no receptacle."""
    called = names([*(one.identifier for one in scene.receptacles), *(one.identifier for one in placed)])
    commands, opened, here = [], set(), None

    def visit(receptacle: Receptacle, inside: bool) -> str:
        nonlocal here
        name = called[receptacle.identifier]
        if receptacle.location != here:  # going to the current location is not admissible
            commands.append(f"go to {name}")
            here = receptacle.location
        if inside and receptacle.opens and name not in opened:
            commands.append(f"open {name}")
            opened.add(name)
        return name

    targets = sorted((one for one in placed if one.kind == target), key=lambda one: one.receptacle.opens)
    for one in targets[: 2 if task == "pick_two_obj_and_place" else 1]:
        thing = called[one.identifier]
        commands.append(f"take {thing} from {visit(one.receptacle, True)}")
        if task == "look_at_obj_in_light":
            lamp = next(other for other in placed if other.kind == goal)
            visit(lamp.receptacle, False)
            return [*commands, f"use {called[lamp.identifier]}"]
        if task in CHANGES:
            _, _, verb, tool = CHANGES[task]
            machine = next(other for other in scene.receptacles if other.kind == tool)
            commands.append(f"{verb} {thing} with {visit(machine, False)}")
        end = next(other for other in scene.receptacles if other.kind == goal)
        commands.append(f"move {thing} to {visit(end, True)}")
    return commands


def problem_text(
    rng: np.random.Generator, scene: Scene, abilities: dict, placed: list[Placed], task: str, target: str, goal: str
) -> str:
    """The PDDL problem, with the same kinds of facts as the real ones, object by object."""
    facts, start = [], spot(rng)
    taken = {receptacle.location for receptacle in scene.receptacles}
    while start in taken:
        start = spot(rng)
    for one in placed:
        name, receptacle = one.identifier, one.receptacle
        facts.append(f"(objectType {name} {one.kind}Type)")
        facts.append(f"(inReceptacle {name} {receptacle.identifier})")
        facts.append(f"(objectAtLocation {name} {receptacle.location})")
        if one.kind not in FIXED_ONLY:
            facts.append(f"(pickupable {name})")
        if one.kind in MOVABLE_RECEPTACLES:
            facts.append(f"(isReceptacleObject {name})")
        if one.kind == "DeskLamp":
            facts.append(f"(toggleable {name})")
        facts += [f"({ability} {name})" for ability in ABILITIES if one.kind in abilities[ability]]
        # As in the real games, an object in the fridge is cold unless it is the one to be cooled.
        if one.kind == target and receptacle.kind == "Fridge" and task != "pick_cool_then_place_in_recep":
            facts.append(f"(isCool {name})")
    things = lines([f"{one.identifier} - object" for one in placed])
    locations = lines([f"{location} - location" for location in sorted(taken | {start})])
    return (
        f"\n(define (problem plan_generated)\n(:domain alfred)\n(:objects\n{scene.objects}{things}{locations})\n"
        f"(:init\n{scene.facts}        (atLocation agent1 {start})\n{lines(facts)})\n"
        f"(:goal\n    {goal_text(task, target, goal)}\n)\n)\n"
    )


def generate_game(seed: int, split: str, index: int) -> tuple[str, dict, dict]:
    """Game `index` of a split: (task id, contents of game.tw-pddl, contents of traj_data.json).

    Raises ValueError for a split that is neither gen_* nor mini_*, FileNotFoundError for gen_* without the alfworld
    wheel.
    """
    known = catalogue(split.partition("_")[0])
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    while True:
        task = pick(rng, tuple(TASKS), [weight for weight, _, _ in TASKS.values()])
        _, by_room, phrases = TASKS[task]
        rooms = [room for room in by_room if known.goals[task][room]]
        scene, choices = pick(rng, known.goals[task][pick(rng, rooms, [by_room[room] for room in rooms])])
        goal = pick(rng, tuple(choices))
        target = pick(rng, choices[goal])
        placed = place_objects(rng, scene, known.holds, task, target, goal)
        kinds = [one.kind for one in placed]
        lamp_missing = task == "look_at_obj_in_light" and goal not in kinds
        if kinds.count(target) >= (2 if task == "pick_two_obj_and_place" else 1) and not lamp_missing:
            break
    problem = problem_text(rng, scene, known.abilities, placed, task, target, goal)
    phrase = pick(rng, phrases).format(obj=target.lower(), recep=goal.lower())
    game = {
        "pddl_domain": known.domain,
        "grammar": known.grammar.replace(TASK_SLOT, f"Your task is to: {phrase}"),
        "pddl_problem": problem,
        "solvable": True,
        "walkthrough": walkthrough(scene, placed, task, target, goal),
    }
    parent, lamp = ("", goal) if task == "look_at_obj_in_light" else (goal, "")
    trial = f"trial_{index:06d}_{hashlib.sha256((phrase + problem).encode()).hexdigest()[:10]}"
    parameters = {
        "object_target": target,
        "parent_target": parent,
        "toggle_target": lamp,
        "mrecep_target": "",
        "object_sliced": False,
    }
    record = {
        "task_id": trial,
        "task_type": task,
        "pddl_params": parameters,
        "scene": {"floor_plan": f"FloorPlan{scene.number}", "scene_num": scene.number},
        "turk_annotations": {"anns": []},
    }
    return f"{split}/{task}-{target}-None-{goal}-{scene.number}/{trial}", game, record


def generate_games(seed: int, split: str, count: int, start: int = 0) -> Iterator[tuple[str, dict, dict]]:
    """Games start .. start + count - 1 of a split, as returned by generate_game; writes nothing."""
    for index in range(start, start + count):
        yield generate_game(seed, split, index)


# ---- games in files --------------------------------------------------------------------------------------------------


def make_stamp(split: str, seed: int, count: int) -> dict:
    """The settings that a split's folder was made with. The first game's id identifies the generator's version."""
    return {"seed": seed, "count": count, "first": generate_game(seed, split, 0)[0]}


def write_split(folder: Path, split: str, seed: int, count: int) -> None:
    """Writes <folder>/json_2.1.1/<split> atomically: it is built in a temporary folder and then renamed."""
    final = folder / "json_2.1.1" / split
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f"building-{split}-", dir=folder)
    building = Path(temporary, split)
    try:
        games = generate_games(seed, split, count)
        for task_id, game, record in tqdm(games, total=count, desc=f"generating {split}", unit="game"):
            trial = building / task_id.removeprefix(f"{split}/")
            trial.mkdir(parents=True)
            (trial / "game.tw-pddl").write_text(json.dumps(game))
            (trial / "traj_data.json").write_text(json.dumps(record))
        (building / STAMP).write_text(json.dumps(make_stamp(split, seed, count)))
        os.replace(building, final)
    except OSError:
        if not (final / STAMP).is_file():  # otherwise another process has just written the same games
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def ensure_generated(
    folder: Path = FOLDER, seed: int = SEED, demo_games: int = SPLIT_SIZES["demo"], splits: Sequence[str] = ()
) -> Path:
    """The folder that contains json_2.1.1, once it has the train, valid and demo splits of this machine's family.

    Existing splits are kept. `splits`: make these instead of the family's three. Folders named building-* are left by
    killed runs; they are never read and may be deleted. Raises ValueError if a split was made with another seed, number
    of games or version of the generator.
    """
    folder = Path(folder)
    for split in splits or [f"{family()}_{name}" for name in SPLIT_SIZES]:
        name = split.partition("_")[2]
        if name not in SPLIT_SIZES:
            raise ValueError(f"split {split!r} is unknown: expected gen_ or mini_ and one of {', '.join(SPLIT_SIZES)}")
        count = demo_games if name == "demo" else SPLIT_SIZES[name]
        stamp = make_stamp(split, seed, count)
        final = folder / "json_2.1.1" / split
        if not final.exists():
            write_split(folder, split, seed, count)
        check_stamp(final, STAMP, stamp)
    return folder


@dataclass(frozen=True, kw_only=True)
class Args:
    folder: Path = FOLDER
    """Output folder of json_2.1.1. To play the games, set ALFWORLD_DATA to it."""
    seed: Annotated[int, Range(0)] = SEED
    """Seed of the games. The panels in envs/panels need the default."""
    demo_games: Annotated[int, Range(1, 100_000)] = SPLIT_SIZES["demo"]
    """Number of games in the demo split, for demonstrations."""
    splits: tuple[str, ...] = ()
    """Splits to make: gen_train gen_valid gen_demo, or their mini_ versions (default: all three, gen_ if the alfworld
    wheel is installed, else mini_)."""


def main(args: Args) -> None:
    folder = ensure_generated(args.folder, args.seed, args.demo_games, args.splits)
    for split in sorted(path for path in (folder / "json_2.1.1").iterdir()):
        print(f"{split}: {sum(1 for _ in split.glob('*/*/game.tw-pddl'))} games")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

"""The four planning domains: rules in PDDL, words for the agent, and functions that draw any number of problems.

The rules are the standard ones of Blocksworld, Gripper, Barman (2011 planning competition, without action costs and
dispensers) and Tyreworld; texts and problems are ours. Every problem is solvable by construction: each drawing function
says how, and tests/test_pddl.py plans it.

To add a domain: a Domain in DOMAINS and a function that draws its problems.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from envs.pddl.strips import Fact, Operator, read_domain

Drawn = tuple[dict[str, str], list[Fact], list[Fact]]  # {object: type}, initial facts, goal


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A domain in PDDL and in words.

    `about`: the rules as the agent reads them. `actions`: {operator: command with its parameters in braces}; operators
    may share a command if at most one of them applies at a time. `says`: {predicate: (wording of a fact that is true,
    of one that no longer is)}; empty wordings and absent predicates are not mentioned. `draw(rng, easy)`: a problem.
    """

    pddl: str
    about: str
    actions: dict[str, str]
    says: dict[str, tuple[str, str]]
    draw: Callable[[np.random.Generator, bool], Drawn]
    types: dict[str, str] = field(init=False)
    operators: list[Operator] = field(init=False)

    def __post_init__(self):
        types, operators = read_domain(self.pddl)
        object.__setattr__(self, "types", types)
        object.__setattr__(self, "operators", operators)


# ---- problems --------------------------------------------------------------------------------------------------------


def draw_stacks(rng: np.random.Generator, blocks: list[str]) -> dict[str, str]:
    """{block: what it is on}, randomly stacked."""
    order, under = list(rng.permutation(blocks)), {}
    for below, block in zip([None, *order], order, strict=False):
        under[str(block)] = str(below) if below is not None and rng.random() < 0.6 else "table"
    return under


def draw_blocks(rng: np.random.Generator, easy: bool) -> Drawn:
    """Stacks to rearrange; no part of the goal is true at the start.

    Putting all blocks on the table and stacking them again takes at most 4 (n - 1) actions for n blocks.
    """
    blocks = [f"b{index + 1}" for index in range(2 if easy else rng.integers(4, 8))]
    while True:
        now, then = draw_stacks(rng, blocks), draw_stacks(rng, blocks)
        goal = [("on", block, below) for block, below in then.items() if below != "table"]
        if goal and (easy or len(goal) > 1) and not any(now[block] == below for _, block, below in goal):
            break
    start = [("on", block, below) for block, below in now.items() if below != "table"]
    start += [("ontable", block) for block, below in now.items() if below == "table"]
    start += [("clear", block) for block in blocks if block not in now.values()]
    return dict.fromkeys(blocks, "block"), [*start, ("handempty",)], sorted(goal)


def draw_gripper(rng: np.random.Generator, easy: bool) -> Drawn:
    """Balls to bring to other rooms: one at a time takes at most 4 actions per ball."""
    rooms = [f"room{index + 1}" for index in range(2 if easy else rng.integers(2, 5))]
    balls = [f"ball{index + 1}" for index in range(1 if easy else rng.integers(3, 7))]
    routes = {ball: rng.permutation(rooms)[:2].tolist() for ball in balls}
    start = [("at", ball, here) for ball, (here, _) in routes.items()]
    start += [("robot-in", str(rng.choice(rooms))), ("free", "left"), ("free", "right")]
    objects = dict.fromkeys(rooms, "room") | dict.fromkeys(balls, "ball") | {"left": "gripper", "right": "gripper"}
    return objects, start, [("at", ball, there) for ball, (_, there) in routes.items()]


INGREDIENTS = ("rum", "gin", "vodka", "lime", "mint", "tonic")
COCKTAILS = ("sunrise", "breeze", "comet", "glacier")


def draw_barman(rng: np.random.Generator, easy: bool) -> Drawn:
    """One or two drinks, each in its own shot glass.

    A spare glass carries the ingredients. The only dead end is an unshaken mixture of the wrong ingredients.
    """
    shots = [f"shot{index + 1}" for index in range(2 if easy else rng.integers(3, 5))]
    ingredients = rng.permutation(INGREDIENTS)[: 1 if easy else rng.integers(3, 6)].tolist()
    cocktails = [] if easy else rng.permutation(COCKTAILS)[: rng.integers(1, 4)].tolist()
    start = [("ontable", cup) for cup in (*shots, "shaker")] + [("handempty", hand) for hand in ("left", "right")]
    start += [(state, cup) for cup in (*shots, "shaker") for state in ("clean", "empty")]
    start += [("filled", "shaker", "l0"), ("bottom", "shaker", "l0"), ("next", "l0", "l1"), ("next", "l1", "l2")]
    pairs = rng.permutation(list(itertools.combinations(ingredients, 2))).tolist()
    start += [("recipe", cocktail, *pair) for cocktail, pair in zip(cocktails, pairs, strict=False)]
    wanted = ingredients[:1] if easy else [str(rng.choice(cocktails)), str(rng.choice([*cocktails, *ingredients]))]
    goal = [("contains", shot, drink) for shot, drink in zip(shots, wanted, strict=False)]
    goal = goal[: 1 if easy else rng.integers(1, 3)]
    objects = dict.fromkeys(shots, "shot") | {"shaker": "shaker", "left": "hand", "right": "hand"}
    objects |= dict.fromkeys(ingredients, "ingredient") | dict.fromkeys(cocktails, "cocktail")
    return objects | dict.fromkeys(("l0", "l1", "l2"), "level"), start, goal


def draw_tyreworld(rng: np.random.Generator, easy: bool) -> Drawn:
    """Up to three hubs with a job each, at most two of them wheel replacements; some tools in hand, some tidying up.

    A replacement takes 8 actions and its spare wheel 2 more; each thing taken from or put into the boot takes 1.
    """
    jobs = ["replace", str(rng.choice(["replace", "inflate", "tighten"])), str(rng.choice(["inflate", "tighten"]))]
    jobs = ["inflate"] if easy else jobs[: rng.integers(2, 4)]
    tidy = [("in", tool, "boot") for tool in ("wrench", "jack", "pump")]
    start: list[Fact] = [fact if easy or rng.random() < 0.7 else ("have", fact[1]) for fact in tidy]
    start.append(("closed", "boot") if rng.random() < 0.8 else ("opened", "boot"))
    objects, goal = {"wrench": "wrench", "jack": "jack", "pump": "pump", "boot": "container"}, []
    for number, job in enumerate(jobs, 1):
        hub, nut, wheel, spare = (f"{part}{number}" for part in ("hub", "nut", "wheel", "spare"))
        objects |= {hub: "hub", nut: "nut", wheel: "wheel"}
        start += [("on", wheel, hub), ("fastened", hub), ("on-ground", hub), ("flat", wheel)]
        start.append(("loose" if job == "tighten" else "tight", nut, hub))
        if job == "replace":
            objects |= {spare: "wheel"}
            start += [("in", spare, "boot"), ("intact", spare), (str(rng.choice(["flat", "inflated"])), spare)]
            goal += [("on", spare, hub), ("tight", nut, hub), ("inflated", spare)]
            tidy.append(("in", wheel, "boot"))
        elif job == "inflate":
            start.append(("intact", wheel))
            goal.append(("inflated", wheel))
        else:
            goal.append(("tight", nut, hub))
    spare_time = 0 if easy else 5 - 2 * jobs.count("replace")
    chosen = sorted(rng.permutation(len(tidy))[: rng.integers(0, spare_time + 1)])
    return objects, start, goal + [tidy[index] for index in chosen]


# ---- rules and words -------------------------------------------------------------------------------------------------

BLOCKSWORLD = Domain(
    pddl="""(define (domain blocksworld) (:requirements :strips :typing) (:types block)
    (:predicates (on ?x - block ?y - block) (ontable ?x - block) (clear ?x - block) (handempty) (holding ?x - block))
    (:action pick-up :parameters (?block - block)
      :precondition (and (clear ?block) (ontable ?block) (handempty))
      :effect (and (not (ontable ?block)) (not (clear ?block)) (not (handempty)) (holding ?block)))
    (:action put-down :parameters (?block - block)
      :precondition (holding ?block)
      :effect (and (not (holding ?block)) (clear ?block) (handempty) (ontable ?block)))
    (:action stack :parameters (?block - block ?below - block)
      :precondition (and (holding ?block) (clear ?below))
      :effect (and (not (holding ?block)) (not (clear ?below)) (clear ?block) (handempty) (on ?block ?below)))
    (:action unstack :parameters (?block - block ?below - block)
      :precondition (and (on ?block ?below) (clear ?block) (handempty))
      :effect (and (holding ?block) (clear ?below) (not (clear ?block)) (not (handempty))
        (not (on ?block ?below)))))""",
    about="You have a table with blocks on it, some stacked, and one hand. You can move one block at a time, and only "
    "one that has nothing on it. A block can be put on the table, or on a block that has nothing on it.",
    actions={
        "pick-up": "pick up {block}",
        "put-down": "put down {block}",
        "stack": "stack {block} on {below}",
        "unstack": "unstack {block} from {below}",
    },
    says={
        "on": ("{} is on {}", ""),
        "ontable": ("{} is on the table", ""),
        "clear": ("{} has nothing on it", ""),
        "handempty": ("your hand is empty", ""),
        "holding": ("you hold {}", ""),
    },
    draw=draw_blocks,
)

GRIPPER = Domain(
    pddl="""(define (domain gripper) (:requirements :strips :typing :negative-preconditions) (:types room ball gripper)
    (:predicates (robot-in ?r - room) (at ?b - ball ?r - room) (free ?g - gripper) (carry ?b - ball ?g - gripper))
    (:action move :parameters (?from - room ?room - room)
      :precondition (and (robot-in ?from) (not (robot-in ?room)))
      :effect (and (robot-in ?room) (not (robot-in ?from))))
    (:action pick :parameters (?ball - ball ?room - room ?gripper - gripper)
      :precondition (and (at ?ball ?room) (robot-in ?room) (free ?gripper))
      :effect (and (carry ?ball ?gripper) (not (at ?ball ?room)) (not (free ?gripper))))
    (:action drop :parameters (?ball - ball ?room - room ?gripper - gripper)
      :precondition (and (carry ?ball ?gripper) (robot-in ?room))
      :effect (and (at ?ball ?room) (free ?gripper) (not (carry ?ball ?gripper)))))""",
    about="You are a robot with a left and a right gripper, each of which carries one ball. You can go to any room, "
    "pick up a ball of the room that you are in, and drop there what you carry.",
    actions={
        "move": "move to {room}",
        "pick": "pick up {ball} with {gripper} gripper",
        "drop": "drop {ball} in {room}",
    },
    says={
        "robot-in": ("you are in {}", ""),
        "at": ("{} is in {}", "{} is no longer in {}"),
        "free": ("your {} gripper is free", ""),
        "carry": ("you carry {} in your {} gripper", ""),
    },
    draw=draw_gripper,
)

BARMAN = Domain(
    pddl="""(define (domain barman) (:requirements :strips :typing)
    (:types hand level beverage cup - object ingredient cocktail - beverage shot shaker - cup)
    (:predicates (ontable ?c - cup) (holding ?h - hand ?c - cup) (handempty ?h - hand) (empty ?c - cup)
      (contains ?c - cup ?b - beverage) (clean ?c - cup) (used ?c - cup ?b - beverage) (unshaken ?s - shaker)
      (shaken ?s - shaker) (filled ?s - shaker ?l - level) (bottom ?s - shaker ?l - level) (next ?l - level ?m - level)
      (recipe ?c - cocktail ?i - ingredient ?j - ingredient))
    (:action grasp :parameters (?hand - hand ?cup - cup)
      :precondition (and (ontable ?cup) (handempty ?hand))
      :effect (and (not (ontable ?cup)) (not (handempty ?hand)) (holding ?hand ?cup)))
    (:action leave :parameters (?hand - hand ?cup - cup)
      :precondition (holding ?hand ?cup)
      :effect (and (not (holding ?hand ?cup)) (handempty ?hand) (ontable ?cup)))
    (:action fill :parameters (?shot - shot ?ingredient - ingredient ?hand - hand ?other - hand)
      :precondition (and (holding ?hand ?shot) (handempty ?other) (empty ?shot) (clean ?shot))
      :effect (and (not (empty ?shot)) (contains ?shot ?ingredient) (not (clean ?shot)) (used ?shot ?ingredient)))
    (:action refill :parameters (?shot - shot ?ingredient - ingredient ?hand - hand ?other - hand)
      :precondition (and (holding ?hand ?shot) (handempty ?other) (empty ?shot) (used ?shot ?ingredient))
      :effect (and (not (empty ?shot)) (contains ?shot ?ingredient)))
    (:action empty-shot :parameters (?hand - hand ?shot - shot ?drink - beverage)
      :precondition (and (holding ?hand ?shot) (contains ?shot ?drink))
      :effect (and (not (contains ?shot ?drink)) (empty ?shot)))
    (:action clean-shot :parameters (?shot - shot ?drink - beverage ?hand - hand ?other - hand)
      :precondition (and (holding ?hand ?shot) (handempty ?other) (empty ?shot) (used ?shot ?drink))
      :effect (and (not (used ?shot ?drink)) (clean ?shot)))
    (:action pour-first
      :parameters (?shot - shot ?drink - ingredient ?shaker - shaker ?hand - hand ?l - level ?m - level)
      :precondition (and (holding ?hand ?shot) (contains ?shot ?drink) (empty ?shaker) (clean ?shaker)
        (filled ?shaker ?l) (next ?l ?m))
      :effect (and (not (contains ?shot ?drink)) (empty ?shot) (contains ?shaker ?drink) (not (empty ?shaker))
        (not (clean ?shaker)) (unshaken ?shaker) (not (filled ?shaker ?l)) (filled ?shaker ?m)))
    (:action pour-more
      :parameters (?shot - shot ?drink - ingredient ?shaker - shaker ?hand - hand ?l - level ?m - level)
      :precondition (and (holding ?hand ?shot) (contains ?shot ?drink) (unshaken ?shaker) (filled ?shaker ?l)
        (next ?l ?m))
      :effect (and (not (contains ?shot ?drink)) (empty ?shot) (contains ?shaker ?drink) (not (filled ?shaker ?l))
        (filled ?shaker ?m)))
    (:action empty-shaker :parameters (?hand - hand ?shaker - shaker ?drink - cocktail ?l - level ?m - level)
      :precondition (and (holding ?hand ?shaker) (contains ?shaker ?drink) (shaken ?shaker) (filled ?shaker ?l)
        (bottom ?shaker ?m))
      :effect (and (not (shaken ?shaker)) (not (filled ?shaker ?l)) (filled ?shaker ?m) (not (contains ?shaker ?drink))
        (empty ?shaker)))
    (:action clean-shaker :parameters (?hand - hand ?other - hand ?shaker - shaker)
      :precondition (and (holding ?hand ?shaker) (handempty ?other) (empty ?shaker))
      :effect (clean ?shaker))
    (:action shake
      :parameters (?drink - cocktail ?i - ingredient ?j - ingredient ?shaker - shaker ?hand - hand ?other - hand)
      :precondition (and (holding ?hand ?shaker) (handempty ?other) (contains ?shaker ?i) (contains ?shaker ?j)
        (recipe ?drink ?i ?j) (unshaken ?shaker))
      :effect (and (not (unshaken ?shaker)) (not (contains ?shaker ?i)) (not (contains ?shaker ?j)) (shaken ?shaker)
        (contains ?shaker ?drink)))
    (:action serve :parameters (?drink - beverage ?shot - shot ?hand - hand ?shaker - shaker ?l - level ?m - level)
      :precondition (and (holding ?hand ?shaker) (shaken ?shaker) (empty ?shot) (clean ?shot) (contains ?shaker ?drink)
        (filled ?shaker ?l) (next ?m ?l))
      :effect (and (not (clean ?shot)) (not (empty ?shot)) (contains ?shot ?drink) (used ?shot ?drink)
        (not (filled ?shaker ?l)) (filled ?shaker ?m))))""",
    about="You are a barman with two hands, shot glasses and a shaker. To fill or clean a cup, or to shake, hold it in "
    "one hand and keep the other empty. A shot glass must be clean and empty before another drink goes into it, and "
    "the shaker before the first ingredient. A cocktail is made by pouring its two ingredients into the shaker and "
    "shaking; it is served into a clean shot glass.",
    actions={
        "grasp": "grasp {cup} with {hand} hand",
        "leave": "leave {cup} on the table",
        "fill": "fill {shot} with {ingredient}",
        "refill": "fill {shot} with {ingredient}",
        "empty-shot": "empty {shot}",
        "clean-shot": "clean {shot}",
        "pour-first": "pour {shot} into {shaker}",
        "pour-more": "pour {shot} into {shaker}",
        "empty-shaker": "empty {shaker}",
        "clean-shaker": "clean {shaker}",
        "shake": "shake {shaker} to make {drink}",
        "serve": "serve {shaker} into {shot}",
    },
    says={
        "ontable": ("{} is on the table", ""),
        "holding": ("your {} hand holds {}", ""),
        "handempty": ("your {} hand is empty", ""),
        "empty": ("{} is empty", ""),
        "contains": ("{} contains {}", "{} no longer contains {}"),
        "clean": ("{} is clean", "{} is no longer clean"),
        "used": ("{} has had {} in it", ""),
        "unshaken": ("{} is to be shaken", ""),
        "shaken": ("{} is shaken", ""),
        "recipe": ("{} is made of {} and {}", ""),
    },
    draw=draw_barman,
)

TYREWORLD = Domain(
    pddl="""(define (domain tyreworld) (:requirements :strips :typing)
    (:types container hub nut thing - object wheel nut tool - thing wrench jack pump - tool)
    (:predicates (opened ?c - container) (closed ?c - container) (in ?x - thing ?c - container) (have ?x - thing)
      (tight ?n - nut ?h - hub) (loose ?n - nut ?h - hub) (on-ground ?h - hub) (raised ?h - hub) (fastened ?h - hub)
      (unfastened ?h - hub) (free ?h - hub) (on ?w - wheel ?h - hub) (flat ?w - wheel) (inflated ?w - wheel)
      (intact ?w - wheel))
    (:action open :parameters (?container - container)
      :precondition (closed ?container) :effect (and (opened ?container) (not (closed ?container))))
    (:action close :parameters (?container - container)
      :precondition (opened ?container) :effect (and (closed ?container) (not (opened ?container))))
    (:action fetch :parameters (?thing - thing ?container - container)
      :precondition (and (in ?thing ?container) (opened ?container))
      :effect (and (have ?thing) (not (in ?thing ?container))))
    (:action put-away :parameters (?thing - thing ?container - container)
      :precondition (and (have ?thing) (opened ?container))
      :effect (and (in ?thing ?container) (not (have ?thing))))
    (:action loosen :parameters (?nut - nut ?hub - hub ?wrench - wrench)
      :precondition (and (have ?wrench) (tight ?nut ?hub) (on-ground ?hub))
      :effect (and (loose ?nut ?hub) (not (tight ?nut ?hub))))
    (:action tighten :parameters (?nut - nut ?hub - hub ?wrench - wrench)
      :precondition (and (have ?wrench) (loose ?nut ?hub) (on-ground ?hub))
      :effect (and (tight ?nut ?hub) (not (loose ?nut ?hub))))
    (:action jack-up :parameters (?hub - hub ?jack - jack)
      :precondition (and (on-ground ?hub) (have ?jack))
      :effect (and (raised ?hub) (not (on-ground ?hub)) (not (have ?jack))))
    (:action jack-down :parameters (?hub - hub ?jack - jack)
      :precondition (raised ?hub)
      :effect (and (on-ground ?hub) (have ?jack) (not (raised ?hub))))
    (:action undo :parameters (?nut - nut ?hub - hub ?wrench - wrench)
      :precondition (and (raised ?hub) (fastened ?hub) (have ?wrench) (loose ?nut ?hub))
      :effect (and (have ?nut) (unfastened ?hub) (not (fastened ?hub)) (not (loose ?nut ?hub))))
    (:action do-up :parameters (?nut - nut ?hub - hub ?wrench - wrench)
      :precondition (and (have ?wrench) (unfastened ?hub) (raised ?hub) (have ?nut))
      :effect (and (loose ?nut ?hub) (fastened ?hub) (not (unfastened ?hub)) (not (have ?nut))))
    (:action remove :parameters (?wheel - wheel ?hub - hub)
      :precondition (and (raised ?hub) (on ?wheel ?hub) (unfastened ?hub))
      :effect (and (have ?wheel) (free ?hub) (not (on ?wheel ?hub))))
    (:action put-on :parameters (?wheel - wheel ?hub - hub)
      :precondition (and (have ?wheel) (free ?hub) (unfastened ?hub) (raised ?hub))
      :effect (and (on ?wheel ?hub) (not (free ?hub)) (not (have ?wheel))))
    (:action inflate :parameters (?wheel - wheel ?pump - pump)
      :precondition (and (have ?pump) (flat ?wheel) (intact ?wheel))
      :effect (and (inflated ?wheel) (not (flat ?wheel)))))""",
    about="You are to mend a car. Tools and spare wheels belong in the boot. Nuts are loosened and tightened with the "
    "wrench while their hub is on the ground, and undone and done up, loosely, while it is raised by the jack. A wheel "
    "can be taken off a raised hub whose nut is undone. A flat wheel that is intact is inflated with the pump.",
    actions={
        "open": "open {container}",
        "close": "close {container}",
        "fetch": "fetch {thing} from {container}",
        "put-away": "put {thing} into {container}",
        "loosen": "loosen {nut} on {hub}",
        "tighten": "tighten {nut} on {hub}",
        "jack-up": "jack up {hub}",
        "jack-down": "jack down {hub}",
        "undo": "undo {nut} on {hub}",
        "do-up": "do up {nut} on {hub}",
        "remove": "remove {wheel} from {hub}",
        "put-on": "put {wheel} on {hub}",
        "inflate": "inflate {wheel}",
    },
    says={
        "opened": ("{} is open", ""),
        "closed": ("{} is closed", ""),
        "in": ("{} is in {}", ""),
        "have": ("you have {}", ""),
        "tight": ("{} is tight on {}", ""),
        "loose": ("{} is loose on {}", ""),
        "on-ground": ("{} is on the ground", ""),
        "raised": ("{} is raised", ""),
        "fastened": ("{} is fastened", ""),
        "unfastened": ("{} is unfastened", ""),
        "free": ("{} has no wheel", ""),
        "on": ("{} is on {}", ""),
        "flat": ("{} is flat", ""),
        "inflated": ("{} is inflated", ""),
        "intact": ("{} is intact", ""),
    },
    draw=draw_tyreworld,
)

DOMAINS = {"barman": BARMAN, "blocksworld": BLOCKSWORLD, "gripper": GRIPPER, "tyreworld": TYREWORLD}

"""A player that solves synthetic worlds (envs/synthetic/) from the text they show.

`SyntheticPlayer` knows the commands, the rules in the opening and how the world words its replies; everything else it
finds out by looking. `solve` plays a whole world with it.

Left out: mistakes (mistakes.py) and playing with them (teacher.py).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from envs.base import Result
from envs.synthetic.spec import Goal, Spec, listed
from envs.synthetic.world import Synthetic

MAX_STEPS = 30


class Step(NamedTuple):
    """The next action of a player, as a role with its values, and the thought behind it."""

    thought: str
    role: str
    values: dict[str, str]


class SyntheticPlayer:
    """Solves one world. decide() -> Step; observe(step, observation) after each step."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.at = ""
        self.hands: list[str] = []
        self.found: dict[str, str] = {}  # thing -> place where it was seen or put down
        self.seen: set[str] = set()  # places already searched
        self.opened: set[str] = set()
        self.worked: set[str] = set()

    def observe(self, step: Step, observation: str) -> None:
        """Updates the state from the observation after an accepted step."""
        role, values = step.role, step.values
        if role == "go":
            self.at = values["place"]
        if role == "open":
            self.opened.add(self.at)
        if role in ("go", "open") and not self.shut(self.at):
            self.seen.add(self.at)
            for name in self.named(observation):
                self.found[name] = self.at
        elif role == "take":
            self.found.pop(values["object"])
            self.hands.append(values["object"])
        elif role == "put":
            self.hands.remove(values["object"])
            self.found[values["object"]] = self.at
        elif role in ("work", "repair"):
            self.worked.add(values["object"])

    def named(self, observation: str) -> list[str]:
        """The things that a text names, longest names first (a "gold key" is not a "key")."""
        left, names = f" {observation} ", []
        for name in sorted(self.spec.lies, key=len, reverse=True):
            if any(f" {name}{end}" in left for end in (".", ",", " ")):
                names.append(name)
                left = left.replace(f" {name}", " ")
        return names

    def shut(self, place: str) -> bool:
        return place in self.spec.boxes and place not in self.opened

    def decide(self) -> Step:
        """The next step. Raises RuntimeError if nothing is left to do."""
        for goal in self.goals():
            if step := self.repair(goal) if goal.kind in self.spec.fixtures else self.bring(goal):
                return step
        raise RuntimeError("nothing is left to do")

    def goals(self) -> list[Goal]:
        """The goals in an order in which they can be reached."""
        order = self.spec.order
        return sorted(self.spec.goals, key=lambda goal: order is not None and goal.kind == order[2])

    # ---- subgoals: each returns its next step, or None once it is reached --------------------------------------------

    def repair(self, goal: Goal) -> Step | None:
        spec, tool = self.spec, self.spec.repair_tool
        if goal.kind in self.worked:
            return None
        verb, _ = spec.repair
        if step := self.have(tool, f"I need the {tool} to {verb} the {goal.kind}."):
            return step
        if goal.kind not in self.found:
            return self.search(f"I have the {tool}. I need the {goal.kind}.")
        where = self.found[goal.kind]
        return self.reach(where, f"I have the {tool}, and the {goal.kind} is at the {where}. I go there.") or Step(
            thought=f"I {verb} the {goal.kind} with the {tool}.",
            role="repair",
            values={"object": goal.kind, "tool": tool},
        )

    def bring(self, goal: Goal) -> Step | None:
        spec = self.spec
        ready = [
            name
            for name, where in self.found.items()
            if spec.kinds[name] == goal.kind and where == goal.place and (name in self.worked or not goal.worked)
        ]
        if len(ready) >= goal.count:
            return None
        held = next((name for name in self.hands if spec.kinds[name] == goal.kind), None)
        if held is None:
            known = [name for name in self.found if spec.kinds[name] == goal.kind and name not in ready]
            called = f"another {goal.kind}" if ready else listed([goal.kind])
            if not known:
                return self.search(f"I need {called}.")
            return self.have(known[0], f"I need {called}.")
        if goal.worked and held not in self.worked:
            return self.work(held)
        done = f"The {held} is {spec.work[1]}." if held in self.worked else f"I have the {held}."
        return self.reach(goal.place, f"{done} I bring it to the {goal.place}.") or Step(
            thought=f"I put the {held} in the {goal.place}.",
            role="put",
            values={"object": held, "place": goal.place},
        )

    def work(self, held: str) -> Step:
        spec = self.spec
        if spec.work_tool and (step := self.have(spec.work_tool, f"I need the {spec.work_tool} too.")):
            return step
        verb, _ = spec.work
        return self.reach(spec.station, f"I have the {held}. I {verb} it at the {spec.station}.") or Step(
            thought=f"I {verb} the {held} at the {spec.station}.",
            role="work",
            values={"object": held, "place": spec.station},
        )

    def have(self, name: str, need: str) -> Step | None:
        """The next step towards holding a thing."""
        if name in self.hands:
            return None
        if name not in self.found:
            return self.search(need)
        where = self.found[name]
        if self.at == where and not self.shut(where) and len(self.hands) >= self.spec.hands:
            return self.drop()
        return self.reach(where, f"{need[:-1]}, and the {name} is at the {where}. I go there.") or Step(
            thought=f"{need[:-1]}, and the {name} is here. I take it.",
            role="take",
            values={"object": name, "place": where},
        )

    def drop(self) -> Step:
        """Frees a hand by putting down the thing needed least."""
        keep = (self.spec.work_tool, *(name for name in self.hands if self.spec.kinds[name] in self.kinds()))
        name = next((name for name in self.hands if name not in keep), self.hands[0])
        return Step(
            thought=f"I need a free hand. I leave the {name} here.",
            role="put",
            values={"object": name, "place": self.at},
        )

    def kinds(self) -> set[str]:
        return {goal.kind for goal in self.spec.goals}

    def reach(self, where: str, thought: str) -> Step | None:
        """The next step towards being at a place that is open."""
        lock = self.spec.lock
        if self.shut(where) and lock and lock[0] == where and lock[1] not in self.hands:
            return self.have(lock[1], f"The {where} is locked. I need the {lock[1]}.")
        if self.at != where:
            return Step(thought=thought, role="go", values={"place": where})
        if self.shut(where):
            return Step(thought=f"The {where} is closed. I open it.", role="open", values={"place": where})
        return None

    def search(self, need: str) -> Step:
        """The next step of a search: this place first, then the others in the opening's order, locked ones last."""
        lock = self.spec.lock
        left = [place for place in self.spec.places if place not in self.seen]
        locked = [p for p in left if lock and lock[0] == p and lock[1] not in self.hands]
        places = sorted(left, key=lambda p: (p != self.at, p in locked))
        if not places:
            raise RuntimeError("everything has been seen")
        follows = (self.at, places[0]) in itertools.pairwise(self.spec.places)
        after = f"After the {self.at} comes the {places[0]}. " if follows else ""
        return self.reach(places[0], f"{need} {after}I check the {places[0]}.")


def solve(spec: Spec, world: Synthetic, task_id: str) -> list[tuple[Step, Result]]:
    """The player's steps without mistakes, each with its result; the last one succeeds. Raises RuntimeError if the
    player fails."""
    player, played = SyntheticPlayer(spec), []
    world.reset(task_id)
    while len(played) < MAX_STEPS:
        step = player.decide()
        result = world.step(spec.command(step.role, **step.values))
        if not result.valid:
            raise RuntimeError(f"{task_id}: {step} was refused: {result.observation}")
        played.append((step, result))
        if result.done:
            return played
        player.observe(step, result.observation)
    raise RuntimeError(f"{task_id}: not solved in {MAX_STEPS} steps")

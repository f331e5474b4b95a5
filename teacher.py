"""The procedural teacher: plays synthetic worlds with staged mistakes, each of which the next turn corrects.

The player reads what the opening states (envs/synthetic.py) and finds out where things lie by going there. Now and then
it does what it should not do yet, or names what is not there; the world refuses, and the next thought begins with what
the world said. Mistakes are executed, so a flag is what the world's own rules say, and everything else is legal.

Left out: who judges the result (verify.py), the stage (refine.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from envs.synthetic import Rules, Spec, State, Synthetic, spec_of, verification_code
from envs.wording import told_commands
from stage import generator
from trajectory import Trajectory, Turn
from verify import COMPLETED

MISTAKES = (2, 3, 4)  # of a trajectory, which draws one of them: the paper keeps what has two or more
MOST_TURNS = 40  # a plan is shorter; a mistake each turn would not be
FLAGS = ("parameter", "place", "logic")


class Step(NamedTuple):
    """A thought, the command that it leads to, and the command that it is done for (the same where it is the aim)."""

    thought: str
    role: str
    values: dict[str, str]
    aim: tuple[str, dict[str, str]]


class Player:
    """Decides turn by turn. `seen`: where things lie, as far as their places were looked into."""

    def __init__(self, spec: Spec):
        self.spec, self.rules = spec, Rules(spec)
        self.seen: dict[str, str] = {}
        self.looked: set[str] = set()

    def notice(self, state: State) -> None:
        """Takes in what can be seen from where it stands."""
        if state.at and not self.rules.shut(state, state.at):
            self.looked.add(state.at)
            here = {name for name, place in state.lies.items() if place == state.at}
            self.seen = {name: place for name, place in self.seen.items() if place != state.at and name in state.lies}
            self.seen |= dict.fromkeys(here, state.at)

    def decide(self, state: State) -> Step:
        """The next right step."""
        for goal in self.spec.goals:
            named = sorted(name for name, kind in self.spec.kinds.items() if kind == goal.kind)
            done = [name for name in named if self.fulfils(state, name, goal)]
            if len(done) < goal.count:
                left = [name for name in named if name not in done]
                name = min(left, key=lambda name: (name not in state.hands, name not in self.seen))
                return self.serve(state, name, goal)
        raise ValueError("the goal is reached: there is nothing to decide")

    def fulfils(self, state: State, name: str, goal) -> bool:
        placed = goal.place is None or state.lies.get(name) == goal.place
        return placed and (not goal.worked or name in state.worked)

    def serve(self, state: State, name: str, goal) -> Step:
        """The next step for one thing of a goal."""
        spec = self.spec
        if name in spec.fixtures:
            aim = ("repair", {"object": name, "tool": spec.repair_tool})
            if spec.repair_tool not in state.hands:
                return self.fetch(state, spec.repair_tool, aim)
            if name not in self.seen:
                return self.search(state, name, aim)
            return self.there(state, self.seen[name], aim) or Step(f"I {spec.repair[0]} the {name}.", *aim, aim)
        if goal.worked and name not in state.worked:
            aim = ("work", {"object": name, "place": spec.station})
            for needed in filter(None, (spec.work_tool, name)):
                if needed not in state.hands:
                    return self.fetch(state, needed, aim)
            return self.there(state, spec.station, aim) or Step(f"I {spec.work[0]} the {name}.", *aim, aim)
        aim = ("put", {"object": name, "place": goal.place})
        if name not in state.hands:
            return self.fetch(state, name, aim)
        step = self.reach(state, goal.place, aim)
        return step or Step(f"I put the {name} in its place.", *aim, aim)

    def fetch(self, state: State, name: str, aim) -> Step:
        """The next step to have a thing in hand."""
        place = self.seen.get(name)
        if place is None:
            return self.search(state, name, aim)
        take = ("take", {"object": name, "place": place})
        if step := self.reach(state, place, take):
            return step
        if len(state.hands) >= self.spec.hands:
            return self.lay_down(state, take)
        return Step(f"I need the {name}. It is here.", *take, take)

    def search(self, state: State, name: str, aim) -> Step:
        """The next step to find a thing: into the nearest place that was not looked into."""
        locked = self.spec.lock and self.spec.lock[1] not in state.hands and self.spec.lock[0]
        left = [place for place in self.spec.places if place not in self.looked]
        place = min(left, key=lambda place: (place == locked, place != state.at, left.index(place)))
        if place == locked:
            return self.reach(state, place, aim)
        step = self.there(state, place, aim, f"I need the {name}. I look at the {place}.")
        return step or self.opened(state, place, aim)

    def reach(self, state: State, place: str, aim) -> Step | None:
        """The step to an open place: first to what unlocks it, then there, then opening it; none where that is so."""
        lock = self.spec.lock
        if lock and lock[0] == place and self.rules.shut(state, place) and lock[1] not in state.hands:
            return self.fetch(state, lock[1], ("open", {"place": place}))
        return self.there(state, place, aim) or self.opened(state, place, aim)

    def there(self, state: State, place: str, aim, thought: str = "") -> Step | None:
        """The step to a place, unless it is there."""
        if state.at == place:
            return None
        thing = aim[1].get("object", "")
        thought = thought or f"I need the {thing} at the {place}." if aim[0] != "take" else thought
        return Step(thought or f"The {thing} is at the {place}.", "go", {"place": place}, aim)

    def opened(self, state: State, place: str, aim) -> Step | None:
        """The step that opens a place; none where it is open."""
        if not self.rules.shut(state, place):
            return None
        return Step(f"The {place} is closed. I open it.", "open", {"place": place}, aim)

    def lay_down(self, state: State, aim) -> Step:
        """Frees a hand: of a tool or a key that was used before anything else."""
        tools = {self.spec.work_tool, self.spec.repair_tool, self.spec.lock and self.spec.lock[1]}
        name = min(state.hands, key=lambda name: (name not in tools, name))
        return Step(f"My hands are full. I leave the {name} here.", "put", {"object": name, "place": state.at}, aim)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def mistakes(spec: Spec, state: State, step: Step, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(thought, action) of what may go wrong here: the aim before its time, what is so, a wrong name or form."""
    found = []
    role, values = step.aim
    if step.aim != (step.role, step.values):
        found.append((f"I try to {spec.command(role, **values)}.", spec.command(role, **values)))
    if state.at:
        for early in ("go", "open"):
            found.append((f"I need the {state.at}.", spec.command(early, place=state.at)))
    for name, value in step.values.items():
        if value:
            wrong = f"{value.rpartition(' ')[0] or value} {rng.integers(4, 9)}"
            found.append((step.thought, spec.command(step.role, **step.values | {name: wrong})))
    words = spec.command(step.role, **step.values).split(" ")
    if len(words) > 2:
        found.append((step.thought, " ".join([words[0], *words[2:]])))
        found.append((step.thought, " ".join([*words[1:], words[0]])))
    return found


def play(task_id: str, seed: int) -> tuple[Trajectory, dict[str, Any], list[dict[str, Any]]]:
    """One trajectory, its script and its turns in AgentRefine's form. RuntimeError where the plan finds no end."""
    spec, world = spec_of(task_id), Synthetic()
    rng = generator(seed, "teacher", task_id)
    opening = world.reset(task_id)
    first = told_commands(opening.text, world.commands())
    player, turns, said = Player(spec), [], ""
    left = int(rng.choice(MISTAKES))
    result = None
    while not (result and result.done):
        if len(turns) == MOST_TURNS:
            raise RuntimeError(f"{task_id}: not solved after {MOST_TURNS} turns")
        step = player.decide(world.state)
        thought, action = step.thought, spec.command(step.role, **step.values)
        slip = left > 0 and not (turns and turns[-1].errors) and rng.random() < 0.5
        if slip and (made := stage(spec, world, step, rng)):
            thought, action, left = *made, left - 1
        result = world.step(action)
        errors = [world.error] if world.error else []
        turns.append(Turn(f"{said}{thought}", action, result.observation, "teacher", "teacher", result.valid, errors))
        said = f"{result.observation} " if errors else ""
        player.notice(world.state)
    turns[-1].observation += f" {COMPLETED}."
    trajectory = Trajectory(
        env="synthetic", split=task_id.split("/")[0], task_id=task_id, task=opening.task, trial=0, round=0, seed=seed,
        source="refine", first_observation=first, turns=turns, reward=1.0, progress=1.0, success=True, end="success",
    )  # fmt: skip
    return trajectory, script_of(spec), spoken(first, turns)


def stage(spec: Spec, world: Synthetic, step: Step, rng: np.random.Generator) -> tuple[str, str] | None:
    """A mistake that the world refuses here, of a kind drawn among those that there are; None if there is none."""
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for thought, action in mistakes(spec, world.state, step, rng):
        if kind := world.refuses(action):
            by_kind.setdefault(kind, []).append((thought, action))
    if not by_kind:
        return None
    options = by_kind[sorted(by_kind)[rng.integers(len(by_kind))]]
    return options[rng.integers(len(options))]


# ---- in the paper's form ---------------------------------------------------------------------------------------------


def script_of(spec: Spec) -> dict[str, Any]:
    """The world as AgentRefine's script."""
    return {
        "Environment": {"setting": spec.setting, "places": list(spec.places), "things": dict(spec.lies)},
        "Goal": spec.task,
        "Completion Conditions": [goal._asdict() for goal in spec.goals],
        "Available Actions": {
            template: {"verification code": verification_code(template), "parameters": spec.values(role)}
            for role, template in spec.commands.items()
        },
    }


def spoken(first: str, turns: list[Turn]) -> list[dict[str, Any]]:
    """The turns as DM and Player say them."""

    def master(number: int, observation: str, errors: list[str]) -> dict[str, Any]:
        flags = {f"{flag}_error": flag in errors for flag in FLAGS}
        return {"turn": number, "role": "DM", "Thought": "", "Observation": observation, **flags}

    said = [master(0, first, [])]
    for turn in turns:
        said.append({"turn": len(said), "role": "Player", "Thought": turn.thought, "Action": turn.action})
        said.append(master(len(said), turn.observation, turn.errors))
    return said

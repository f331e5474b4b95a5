"""The procedural teacher of AgentRefine's trajectories: plays a sampled world, with mistakes and their corrections.

`Player` solves a world of envs/synthetic/ from what it is told: it knows the commands, the rules of the opening and
how this world words its answers, and finds out the rest by looking. `teach` lets it play, and before some of its steps
does what a hasty player would do instead: writes the command in another form or with a wrong name (parameter), acts on
what is elsewhere (place), or skips a condition (logic). The world refuses, and the next thought says why and goes on.
A mistake changes nothing, so the steps are those of the play without mistakes.

Left out: records and files (refine.py), whether a trajectory is good enough (verify.py).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from artifacts.trajectory import Trajectory, Turn
from envs.base import Result
from envs.synthetic.rules import verification_code
from envs.synthetic.spec import Goal, Spec, fill, listed, spec_of
from envs.synthetic.words import HELD, TRAIN
from envs.synthetic.world import Synthetic
from envs.wording import told_commands
from verify import COMPLETED

MAX_STEPS = 30
FLAGS = ("parameter_error", "place_error", "logic_error")


class Step(NamedTuple):
    """What a player wants to do next, and why."""

    thought: str
    role: str
    values: dict[str, str]


class Mistake(NamedTuple):
    """An action that will be refused, the kind of mistake that it is, and what is thought before and after it."""

    kind: str
    thought: str
    action: str
    lesson: str


class Player:
    """Solves a world. decide() -> Step; observe(step, observation) after each."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.at = ""
        self.hands: list[str] = []
        self.found: dict[str, str] = {}  # thing -> where it was seen, or put down
        self.seen: set[str] = set()  # places that have been looked into
        self.opened: set[str] = set()
        self.worked: set[str] = set()

    def observe(self, step: Step, observation: str) -> None:
        """Takes in the answer to a step that was accepted."""
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
        """The things that a text names, the longest names first ("gold key" is no "key")."""
        left, names = f" {observation} ", []
        for name in sorted(self.spec.lies, key=len, reverse=True):
            if any(f" {name}{end}" in left for end in (".", ",", " ")):
                names.append(name)
                left = left.replace(f" {name}", " ")
        return names

    def shut(self, place: str) -> bool:
        return place in self.spec.boxes and place not in self.opened

    def decide(self) -> Step:
        """The next step. Raises RuntimeError where nothing is left to do."""
        for goal in self.goals():
            if step := self.repair(goal) if goal.kind in self.spec.fixtures else self.bring(goal):
                return step
        raise RuntimeError("nothing is left to do")

    def goals(self) -> list[Goal]:
        """The goals in the order in which they can be reached."""
        order = self.spec.order
        return sorted(self.spec.goals, key=lambda goal: order is not None and goal.kind == order[2])

    # ---- parts of a plan: each gives its next step, or None where it is done -----------------------------------------

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
            f"I {verb} the {goal.kind} with the {tool}.", "repair", {"object": goal.kind, "tool": tool}
        )

    def bring(self, goal: Goal) -> Step | None:
        spec = self.spec
        ready = [
            n
            for n, where in self.found.items()
            if spec.kinds[n] == goal.kind and where == goal.place and (n in self.worked or not goal.worked)
        ]
        if len(ready) >= goal.count:
            return None
        held = next((name for name in self.hands if spec.kinds[name] == goal.kind), None)
        if held is None:
            known = [n for n in self.found if spec.kinds[n] == goal.kind and n not in ready]
            called = f"another {goal.kind}" if ready else listed([goal.kind])
            if not known:
                return self.search(f"I need {called}.")
            return self.have(known[0], f"I need {called}.")
        if goal.worked and held not in self.worked:
            return self.work(held)
        done = f"The {held} is {spec.work[1]}." if held in self.worked else f"I have the {held}."
        return self.reach(goal.place, f"{done} I bring it to the {goal.place}.") or Step(
            f"I put the {held} in the {goal.place}.", "put", {"object": held, "place": goal.place}
        )

    def work(self, held: str) -> Step:
        spec = self.spec
        if spec.work_tool and (step := self.have(spec.work_tool, f"I need the {spec.work_tool} too.")):
            return step
        verb, _ = spec.work
        return self.reach(spec.station, f"I have the {held}. I {verb} it at the {spec.station}.") or Step(
            f"I {verb} the {held} at the {spec.station}.", "work", {"object": held, "place": spec.station}
        )

    def have(self, name: str, need: str) -> Step | None:
        """Towards having a thing in hand."""
        if name in self.hands:
            return None
        if name not in self.found:
            return self.search(need)
        where = self.found[name]
        if self.at == where and not self.shut(where) and len(self.hands) >= self.spec.hands:
            return self.drop()
        return self.reach(where, f"{need[:-1]}, and the {name} is at the {where}. I go there.") or Step(
            f"{need[:-1]}, and the {name} is here. I take it.", "take", {"object": name, "place": where}
        )

    def drop(self) -> Step:
        """Makes a hand free of what is needed least."""
        keep = (self.spec.work_tool, *(name for name in self.hands if self.spec.kinds[name] in self.kinds()))
        name = next((name for name in self.hands if name not in keep), self.hands[0])
        return Step(f"I need a free hand. I leave the {name} here.", "put", {"object": name, "place": self.at})

    def kinds(self) -> set[str]:
        return {goal.kind for goal in self.spec.goals}

    def reach(self, where: str, thought: str) -> Step | None:
        """Towards standing at a place that is open."""
        lock = self.spec.lock
        if self.shut(where) and lock and lock[0] == where and lock[1] not in self.hands:
            return self.have(lock[1], f"The {where} is locked. I need the {lock[1]}.")
        if self.at != where:
            return Step(thought, "go", {"place": where})
        if self.shut(where):
            return Step(f"The {where} is closed. I open it.", "open", {"place": where})
        return None

    def search(self, need: str) -> Step:
        """Looks into the next place: first here, then those that can be entered as they are, in the opening's order."""
        lock = self.spec.lock
        left = [place for place in self.spec.places if place not in self.seen]
        locked = [p for p in left if lock and lock[0] == p and lock[1] not in self.hands]
        places = sorted(left, key=lambda p: (p != self.at, p in locked))
        if not places:
            raise RuntimeError("everything has been seen")
        follows = (self.at, places[0]) in itertools.pairwise(self.spec.places)
        after = f"After the {self.at} comes the {places[0]}. " if follows else ""
        return self.reach(places[0], f"{need} {after}I check the {places[0]}.")


def play(spec: Spec, world: Synthetic, task_id: str) -> list[tuple[Step, Result]]:
    """The steps of the player alone, each with its result; the last one is a success. RuntimeError where it fails."""
    player, played = Player(spec), []
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


# ---- mistakes --------------------------------------------------------------------------------------------------------

LESSONS = {  # what a refusal teaches
    "unknown": "That is no command here. The form is: {form}.",
    "no_such": "There is no {name} for that. I mean the {right}.",
    "not_there": "I am not at the {place}.",
    "not_here": "The {object} is not here.",
    "middle": "I am at no place yet.",
    "shut": "The {place} is closed.",
    "opened": "The {place} is open already.",
    "there": "I am at the {place} already.",
    "locked": "The {place} is locked. I need the {tool}.",
    "full": "My hands are full.",
    "not_held": "I do not have the {object}.",
    "held": "I have the {object} already.",
    "fixed": "The {object} cannot be moved.",
    "needs_tool": "I need the {tool} for that.",
    "not_done": "The {object} must be {done} before that.",
    "too_early": "The {other} comes before the {object}.",
    "done": "The {object} is {done} already.",
}


def mistakes(spec: Spec, player: Player, world: Synthetic, step: Step, after: Step | None, rng) -> list[Mistake]:
    """What could go wrong before `step`, which `after` follows: each is refused by the world as it stands."""
    candidates = [(kind, step.thought, text, right) for kind, text, right in misspelt(spec, step, rng)]
    candidates += [
        (kind, thought, spec.command(role, **values), "")
        for kind, thought, role, values in misplaced(spec, player, step, after)
    ]
    found = []
    for kind, thought, action, right in candidates:
        why = world.refusal(action)
        if why and why.kind == kind:
            lesson = fill(LESSONS[why.event], {**why.values, "right": right})
            if why.event == "unknown":
                lesson = lesson.replace("{form}", spec.commands[step.role])
            thought_after = step.thought if step.thought.startswith(lesson) else f"{lesson} {step.thought}"
            found.append(Mistake(kind, thought, action, thought_after))
    return found


def misspelt(spec: Spec, step: Step, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Parameter mistakes: the step's command in another form, or with a name that is not known: (kind, text, name)."""
    texts = []
    words = HELD if spec.setting in {theme.setting for theme in HELD.themes} else TRAIN
    values = {**step.values, "verb": spec.repair[0] if step.role == "repair" else spec.work[0]}
    forms = [fill(form, values) for form in words.commands[step.role]]
    texts += [("parameter", form, "") for form in forms if "{" not in form]
    parts = spec.commands[step.role].split()
    texts += [
        ("parameter", fill(" ".join(parts[:i] + parts[i + 1 :]), step.values), "")
        for i, part in enumerate(parts)
        if "{" not in part and len(parts) > 2
    ]
    for name, value in step.values.items():
        kind, _, number = value.rpartition(" ")
        if number.isdigit():
            wrong = {f"{kind} {int(number) + rng.integers(1, 4)}", f"{kind} {rng.integers(1, 9)}"}
        else:
            others = [thing for theme in words.themes for thing in theme.things]
            wrong = {value.split()[-1], value.removesuffix("s"), others[rng.integers(len(others))]}
        texts += [
            ("parameter", spec.command(step.role, **{**step.values, name: other}), value) for other in sorted(wrong)
        ]
    return texts


def misplaced(spec: Spec, player: Player, step: Step, after: Step | None) -> list[tuple[str, str, str, dict[str, str]]]:
    """Place and logic mistakes: (kind, thought, role, values). `mistakes` drops those that the world would accept."""
    found, here, values = [], player.at, step.values
    seen_here = sorted(name for name, where in player.found.items() if where == here)
    wanted = [goal.kind for goal in spec.goals if goal.kind not in spec.fixtures] + [spec.repair_tool, spec.work_tool]
    wanted = [name if name in spec.lies else f"{name} 1" for name in wanted if name]
    unseen = [name for name in wanted if name not in player.found and name not in player.hands and name in step.thought]
    if step.role == "go" and after and after.role in ("put", "work", "repair", "open", "take"):
        known = after.values.get("object", "")
        if after.role in ("open", "put", "work") or known in player.found:
            what = f"the {known or values['place']}"
            verb = {"work": spec.work[0], "repair": spec.repair[0]}.get(after.role, after.role)
            carry = f"I have {what}. I put it in the {values['place']}."
            thought = carry if after.role == "put" else f"I {verb} {what}."
            found.append(("place", thought, after.role, after.values))
    if step.role == "go" and here:
        found += [
            ("place", f"I need the {name}. I take it here.", "take", {"object": name, "place": here}) for name in unseen
        ]
        if len(player.hands) >= spec.hands:
            found += [
                ("logic", f"I see the {name}. I take it too.", "take", {"object": name, "place": here})
                for name in seen_here
            ]
    if step.role == "open":
        found += [
            (
                "logic",
                f"I need the {name}. It may be in the {here}. I take it.",
                "take",
                {"object": name, "place": here},
            )
            for name in unseen
        ]
        if after and after.role == "put":
            found.append(("logic", after.thought, "put", after.values))
    if step.role in ("take", "open", "put", "work", "repair"):
        found.append(("logic", f"I go to the {here}.", "go", {"place": here}))
    if step.role != "open" and here in player.opened:
        found.append(("logic", f"I open the {here}.", "open", {"place": here}))
    for name in player.hands:
        found.append(("logic", f"I take the {name}.", "take", {"object": name, "place": here}))
        if name in player.worked and step.role != "work":
            found.append(("logic", f"I {spec.work[0]} the {name}.", "work", {"object": name, "place": here}))
    if spec.repair_tool and spec.repair_tool not in player.hands:
        fixture = spec.goals[0].kind
        found.append(
            ("logic", f"I {spec.repair[0]} the {fixture}.", "repair", {"object": fixture, "tool": spec.repair_tool})
        )
    return found


def stage_mistakes(options: list[list[Mistake]], count: int, rng: np.random.Generator) -> dict[int, Mistake]:
    """Chooses `count` mistakes, one before a step at most, as different in kind as they can be; {} where too few are
    possible."""
    chosen: dict[int, Mistake] = {}
    kinds = [str(kind) for kind in rng.permutation(["parameter", "place", "logic"])]
    for number in range(count):
        wanted = kinds[number % 3]
        for kind in (wanted, *kinds):
            places = [i for i, there in enumerate(options) if i not in chosen and any(m.kind == kind for m in there)]
            if places:
                place = int(rng.choice(places))
                fitting = [mistake for mistake in options[place] if mistake.kind == kind]
                chosen[place] = fitting[rng.integers(len(fitting))]
                break
    return chosen if len(chosen) == count else {}


def teach(task_id: str, rng: np.random.Generator) -> list[Turn]:
    """Plays a world with two or three mistakes (none where so many are not possible); its turns, the last of which
    reaches the goal. Raises RuntimeError for a world that the player does not solve."""
    spec, world = spec_of(task_id), Synthetic()
    steps = [step for step, _ in play(spec, world, task_id)]
    world.reset(task_id)
    player, options = Player(spec), []
    for number, step in enumerate(steps):
        after = steps[number + 1] if number + 1 < len(steps) else None
        options.append(mistakes(spec, player, world, step, after, rng))
        player.observe(step, world.step(spec.command(step.role, **step.values)).observation)
    staged = stage_mistakes(options, int(rng.choice([2, 2, 3])), rng)
    world.reset(task_id)
    turns = []
    for number, step in enumerate(steps):
        thought = step.thought
        if mistake := staged.get(number):
            result = world.step(mistake.action)
            turns.append(
                Turn(
                    mistake.thought,
                    mistake.action,
                    result.observation,
                    "teacher",
                    "teacher",
                    result.valid,
                    [mistake.kind],
                )
            )
            thought = mistake.lesson
        action = spec.command(step.role, **step.values)
        result = world.step(action)
        turns.append(Turn(thought, action, result.observation, "teacher", "teacher", result.valid))
    return turns


# ---- as a script, as turns, as a record ------------------------------------------------------------------------------


def told(task_id: str) -> str:
    """The opening with the commands at its end, as the player is told them."""
    spec = spec_of(task_id)
    return told_commands(spec.opening, spec.commands.values())


def script_of(task_id: str) -> dict:
    """The world as AgentRefine's scripts describe one (verify.py)."""
    spec = spec_of(task_id)
    places = {
        place: {"closed": place in spec.boxes, "holds": sorted(n for n, p in spec.lies.items() if p == place)}
        for place in spec.places
    }
    conditions = []
    for goal in spec.goals:
        _, done = spec.words_of(goal.kind)
        conditions += [f"{goal.count} x {goal.kind}: {done}"] * goal.worked
        conditions += [f"{goal.count} x {goal.kind}: at {goal.place}"] * bool(goal.place)
    actions = {
        template: {"verification code": verification_code(template), "parameters": spec.values(role)}
        for role, template in spec.commands.items()
    }
    return {
        "Environment": {"setting": spec.setting, "opening": spec.opening, "places": places},
        "Goal": spec.task,
        "Completion Conditions": conditions,
        "Available Actions": actions,
    }


def turns_of(task_id: str, turns: list[Turn]) -> list[dict]:
    """Turns as the master and the player would have written them; the last answer says that the task is completed."""

    def master(number: int, observation: str, kinds: list[str]) -> dict:
        thought = f"The action is refused: {kinds[0]}." if kinds else "This is as it should be."
        flags = {flag: flag.partition("_")[0] in kinds for flag in FLAGS}
        return {"turn": number, "role": "DM", "Thought": thought, "Observation": observation, **flags}

    written = [master(0, told(task_id), [])]
    for number, turn in enumerate(turns):
        last = number == len(turns) - 1
        written.append({"turn": len(written), "role": "Player", "Thought": turn.thought, "Action": turn.action})
        written.append(master(len(written), f"{turn.observation}{f' {COMPLETED}.' * last}", turn.errors))
    return written


def trajectory_of(task_id: str, turns: list[Turn], seed: int) -> Trajectory:
    """The record of what `teach` played."""
    return Trajectory(
        env="synthetic",
        split=task_id.split("/")[0],
        task_id=task_id,
        task=spec_of(task_id).task,
        trial=0,
        round=0,
        seed=seed,
        source="refine",
        first_observation=told(task_id),
        turns=turns,
        reward=1.0,
        progress=1.0,
        success=True,
        end="success",
    )

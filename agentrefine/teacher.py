"""The procedural teacher of AgentRefine's trajectories: plays a sampled world, with mistakes and their corrections.

`SyntheticPlayer` solves a world of envs/synthetic/ from what it is told: it knows the commands, the rules of the
opening and how this world words its answers, and finds out the rest by looking. `teach` lets it play, and before some
of its steps does what a hasty player would do: writes the command in another form or with a wrong name (parameter), acts
on what is elsewhere (place), or skips a condition (logic). The world refuses, and the next thought says why and goes on.
A mistake changes nothing, so the steps are those of the play without mistakes.

Left out: records and files (refine.py), whether a trajectory is good enough (agentrefine/verify.py).
"""

from __future__ import annotations

import numpy as np

from agentrefine.mistakes import mistakes, stage_mistakes
from agentrefine.player import SyntheticPlayer, play
from agentrefine.verify import COMPLETED
from artifacts.trajectory import Trajectory, Turn
from envs.synthetic.rules import verification_code
from envs.synthetic.spec import make_spec
from envs.synthetic.world import Synthetic
from envs.wording import told_commands

FLAGS = ("parameter_error", "place_error", "logic_error")


# ---- mistakes --------------------------------------------------------------------------------------------------------


def teach(task_id: str, rng: np.random.Generator) -> list[Turn]:
    """Plays a world with two or three mistakes (none where so many are not possible); its turns, the last of which
    reaches the goal. Raises RuntimeError for a world that the player does not solve."""
    spec, world = make_spec(task_id), Synthetic()
    steps = [step for step, _ in play(spec, world, task_id)]
    world.reset(task_id)
    player, options = SyntheticPlayer(spec), []
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
    spec = make_spec(task_id)
    return told_commands(spec.opening, spec.commands.values())


def make_script(task_id: str) -> dict:
    """The world as AgentRefine's scripts describe one (agentrefine/verify.py)."""
    spec = make_spec(task_id)
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


def make_turns(task_id: str, turns: list[Turn]) -> list[dict]:
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


def make_trajectory(task_id: str, turns: list[Turn], seed: int) -> Trajectory:
    """The record of what `teach` played."""
    return Trajectory(
        env="synthetic",
        split=task_id.split("/")[0],
        task_id=task_id,
        task=make_spec(task_id).task,
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

"""The procedural teacher of AgentRefine's trajectories: plays a sampled world with mistakes and their corrections.

`teach` replays a solution (player.py) and inserts two or three mistakes (mistakes.py) before some of its steps. The
world refuses each one, and the next thought says why and continues. Mistakes do not change the world, so the other
steps are those of the solution. `make_script`, `make_turns` and `make_trajectory` convert the result.

Left out: files (refine.py), judging whether a trajectory is good enough (verify.py).
"""

from __future__ import annotations

import numpy as np

from agentrefine.mistakes import mistakes, stage_mistakes
from agentrefine.player import SyntheticPlayer, solve
from agentrefine.verify import COMPLETED
from artifacts.trajectory import Trajectory, Turn
from envs.synthetic.rules import verification_code
from envs.synthetic.spec import make_spec
from envs.synthetic.world import Synthetic
from envs.wording import told_commands

FLAGS = ("parameter_error", "place_error", "logic_error")


def teach(task_id: str, rng: np.random.Generator) -> list[Turn]:
    """Plays a world with two or three mistakes (none if that many are not possible). Returns the turns; the last one
    reaches the goal. Raises RuntimeError if the player does not solve the world."""
    spec, world = make_spec(task_id), Synthetic()
    steps = [step for step, _ in solve(spec, world, task_id)]
    world.reset(task_id)
    player, options = SyntheticPlayer(spec), []
    for index, step in enumerate(steps):
        after = steps[index + 1] if index + 1 < len(steps) else None
        options.append(mistakes(spec, player, world, step, after, rng))
        player.observe(step, world.step(spec.command(step.role, **step.values)).observation)
    staged = stage_mistakes(options, int(rng.choice([2, 2, 3])), rng)
    world.reset(task_id)
    turns = []
    for index, step in enumerate(steps):
        thought = step.thought
        if mistake := staged.get(index):
            turns.append(play_turn(world, mistake.thought, mistake.action, [mistake.kind]))
            thought = mistake.lesson
        turns.append(play_turn(world, thought, spec.command(step.role, **step.values), []))
    return turns


def play_turn(world: Synthetic, thought: str, action: str, errors: list[str]) -> Turn:
    result = world.step(action)
    return Turn(
        thought=thought,
        action=action,
        observation=result.observation,
        thought_by="teacher",
        action_by="teacher",
        valid=result.valid,
        errors=errors,
    )


# ---- conversion to a script, to DM and Player turns, to a trajectory -------------------------------------------------


def told(task_id: str) -> str:
    """The opening followed by the commands, as shown to the player."""
    spec = make_spec(task_id)
    return told_commands(spec.opening, spec.commands.values())


def make_script(task_id: str) -> dict:
    """The world as a script of AgentRefine (verify.py)."""
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
    """The turns in the JSON form of DM and Player turns (verify.py); the last reply says that the task is completed."""

    def dm_turn(index: int, observation: str, kinds: list[str]) -> dict:
        thought = f"The action is refused: {kinds[0]}." if kinds else "This is as it should be."
        flags = {flag: flag.partition("_")[0] in kinds for flag in FLAGS}
        return {"turn": index, "role": "DM", "Thought": thought, "Observation": observation, **flags}

    written = [dm_turn(0, told(task_id), [])]
    for index, turn in enumerate(turns):
        last = index == len(turns) - 1
        written.append({"turn": len(written), "role": "Player", "Thought": turn.thought, "Action": turn.action})
        written.append(dm_turn(len(written), f"{turn.observation}{f' {COMPLETED}.' * last}", turn.errors))
    return written


def make_trajectory(task_id: str, turns: list[Turn], seed: int) -> Trajectory:
    """The trajectory of what `teach` played."""
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

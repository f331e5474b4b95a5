"""Writes the example that stands before a session: one for the agent, one for ActRe, the same demonstration in both.

A3T prompts with one example and no instruction; its own are ReAct's public demonstrations. Ours of ALFWorld is a
generated game of the same kind, "put", played by our demonstrator in today's grammar: the first one that took from 6 to
8 turns. In ActRe's example the thought stands after the action that it was for.

    python -m prompts.make     # prompts/<world>_react.txt, prompts/<world>_actre.txt
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from agent import Job, Play, play
from envs.base import make_world
from policy import DemonstratorScript, ScriptedPolicy
from trajectory import Trajectory, actre_segments, react_segments, text_of

HERE = Path(__file__).parent


class Shown(NamedTuple):
    """Where a world's example is looked for: among the tasks whose ids begin with `kind`, as `script` plays them."""

    kind: str
    script: Callable[[str], object]
    turns: tuple[int, int]  # how many the example has, at least and at most


SHOWN = {"alfworld": Shown("gen_train/pick_and_place_simple-", DemonstratorScript, (6, 8))}


def demonstrations(env: str) -> list[Trajectory]:
    """The first tasks of the kind, as they are played."""
    shown = SHOWN[env]
    tasks = [task for task in make_world(env).tasks(shown.kind.split("/")[0]) if task.startswith(shown.kind)][:40]
    settings = Play(env=env, stage="prompts", round=0, seed=0, max_turns=shown.turns[1], patience=0, temperature=0.0)
    played: list[Trajectory] = []
    play([Job(task, 0) for task in tasks], settings, lambda: make_world(env), ScriptedPolicy(shown.script), None,
         lambda trajectory: played.append(trajectory) or (), total=len(tasks))  # fmt: skip
    return sorted(played, key=lambda trajectory: trajectory.key)


def examples(env: str = "alfworld") -> dict[str, str]:
    """The text of each role's file, with the empty line that parts it from the session."""
    shown = next(t for t in demonstrations(env) if t.success and len(t.turns) >= SHOWN[env].turns[0])
    return {"react": text_of(react_segments(shown)) + "\n", "actre": text_of(actre_segments(shown)) + "\n"}


if __name__ == "__main__":
    for env in SHOWN:
        for role, text in examples(env).items():
            (HERE / f"{env}_{role}.txt").write_text(text)
            print(f"prompts/{env}_{role}.txt: {len(text)} characters")

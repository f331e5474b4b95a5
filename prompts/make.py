"""Writes the example that stands before a session: one for the agent, one for ActRe, the same demonstration in both.

A3T prompts with one example and no instruction; its own are ReAct's public demonstration of "put". Ours is a generated
game of the same kind, played by our demonstrator in today's grammar of ALFWorld: the first one that took from 6 to 8
turns. In ActRe's example the thought stands after the action that it was for.

    python -m prompts.make     # prompts/alfworld_react.txt, prompts/alfworld_actre.txt
"""

from pathlib import Path

from agent import Job, Play, play
from envs.alfworld import AlfWorld
from policy import DemonstratorScript, ScriptedPolicy
from trajectory import Trajectory, actre_segments, react_segments, text_of

HERE = Path(__file__).parent
KIND = "gen_train/pick_and_place_simple-"


def demonstrations() -> list[Trajectory]:
    """The first generated games of the kind, as the demonstrator plays them."""
    tasks = [task for task in AlfWorld().tasks("gen_train") if task.startswith(KIND)][:40]
    settings = Play(env="alfworld", stage="prompts", round=0, seed=0, max_turns=8, patience=0, temperature=0.0)
    played: list[Trajectory] = []
    play([Job(task, 0) for task in tasks], settings, AlfWorld, ScriptedPolicy(DemonstratorScript), None,
         lambda trajectory: played.append(trajectory) or (), total=len(tasks))  # fmt: skip
    return sorted(played, key=lambda trajectory: trajectory.key)


def examples() -> dict[str, str]:
    """The text of each file, with the empty line that parts it from the session."""
    shown = next(t for t in demonstrations() if t.success and len(t.turns) >= 6)
    return {"react": text_of(react_segments(shown)) + "\n", "actre": text_of(actre_segments(shown)) + "\n"}


if __name__ == "__main__":
    for role, text in examples().items():
        (HERE / f"alfworld_{role}.txt").write_text(text)
        print(f"prompts/alfworld_{role}.txt: {len(text)} characters")

"""Writes the example that stands before a session: one for the agent, one for ActRe, the same demonstration in both.

A3T prompts with one example and no instruction; its own are ReAct's public demonstrations. Ours are of the same kinds,
played by our demonstrators: in ALFWorld a generated game of the kind "put", in today's grammar; in WebShop a product of
the generated catalogue, searched for, read about and bought with its options; the first of each that took from 6 to 8
turns. In ActRe's example the thought stands after the action that it was for.

    python -m prompts.make     # prompts/<world>_react.txt, prompts/<world>_actre.txt
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from agent.attempt import AttemptSettings, Job
from agent.loop import PlayLoop
from agent.scripted import DemonstratorScript, ScriptedPolicy
from artifacts.render import actre_segments, react_segments, text_of
from artifacts.trajectory import Trajectory
from envs.alfworld.world import AlfWorld
from envs.base import World
from envs.webshop import demonstrator as webshop_demonstrator
from envs.webshop.generate import ensure_catalogue
from envs.webshop.world import WebShop

HERE = Path(__file__).parent
FEWEST, MOST = 6, 8  # turns of an example


class Shown(NamedTuple):
    """Where a world's example is looked for: among the tasks whose ids begin with `kind`, as `script` plays them."""

    world: Callable[[], World]
    kind: str
    script: Callable[[str], DemonstratorScript]


SHOWN = {
    "alfworld": Shown(AlfWorld, "gen_train/pick_and_place_simple-", DemonstratorScript),
    "webshop": Shown(
        lambda: WebShop(str(ensure_catalogue())),
        "gen_demo/",
        functools.partial(DemonstratorScript, player=webshop_demonstrator.Demonstrator),
    ),
}


def demonstrations(env: str) -> list[Trajectory]:
    """The first tasks of the kind, as they are played."""
    make_world, kind, script = SHOWN[env]
    tasks = [task for task in make_world().tasks(kind.split("/")[0]) if task.startswith(kind)][:40]
    settings = AttemptSettings(env=env, stage="prompts", round=0, seed=0, max_turns=MOST, patience=0, temperature=0.0)
    loop = PlayLoop([Job(task, 0) for task in tasks], settings, make_world, ScriptedPolicy(script))
    return sorted(loop, key=lambda trajectory: trajectory.key)


def examples(env: str) -> dict[str, str]:
    """The text of each role's file, with the empty line that parts it from the session."""
    shown = next(t for t in demonstrations(env) if t.success and len(t.turns) >= FEWEST)
    return {"react": text_of(react_segments(shown)) + "\n", "actre": text_of(actre_segments(shown)) + "\n"}


if __name__ == "__main__":
    for env in SHOWN:
        for role, text in examples(env).items():
            (HERE / f"{env}_{role}.txt").write_text(text)
            print(f"prompts/{env}_{role}.txt: {len(text)} characters")

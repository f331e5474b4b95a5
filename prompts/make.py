"""Writes the one-shot prompts: the same demonstration in two forms, one for the agent and one for ActRe.

A3T prompts with one example and no instruction, taken from ReAct's public demonstrations. Ours are of the same kinds,
played by our demonstrators: in ALFWorld a generated game of the kind "put", in the current grammar; in WebShop a
product of the generated catalogue that is searched for, read about and bought with its options; in both the first one
that takes 6 to 8 turns. In ActRe's example each thought follows the action that it explains.

    python -m prompts.make     # prompts/<world>_react.txt, prompts/<world>_actre.txt
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from agent.attempt import AttemptSettings, Job
from agent.loop import PlayLoop
from agent.scripted import DemonstratorScript, ScriptedPolicy
from artifacts.atomic import atomic_write
from artifacts.cli import run_main
from artifacts.render import actre_segments, react_segments, text_of
from artifacts.trajectory import Trajectory
from envs.alfworld.world import AlfWorld
from envs.base import World
from envs.webshop import demonstrator as webshop_demonstrator
from envs.webshop.generate import ensure_catalogue
from envs.webshop.world import WebShop

MIN_TURNS, MAX_TURNS = 6, 8


class Shown(NamedTuple):
    """Source of a world's example: tasks whose ids begin with `kind`, played by `script`."""

    world: Callable[[], World]
    kind: str
    script: Callable[[str], DemonstratorScript]


SHOWN = {
    "alfworld": Shown(world=AlfWorld, kind="gen_train/pick_and_place_simple-", script=DemonstratorScript),
    "webshop": Shown(
        world=lambda: WebShop(str(ensure_catalogue())),
        kind="gen_demo/",
        script=functools.partial(DemonstratorScript, player=webshop_demonstrator.Demonstrator),
    ),
}


def demonstrations(env: str) -> list[Trajectory]:
    """Trajectories of the first 40 tasks of the world's kind."""
    make_world, kind, script = SHOWN[env]
    tasks = [task for task in make_world().tasks(kind.split("/")[0]) if task.startswith(kind)][:40]
    settings = AttemptSettings(
        env=env, stage="prompts", round=0, seed=0, max_turns=MAX_TURNS, patience=0, temperature=0.0
    )
    loop = PlayLoop([Job(task, 0) for task in tasks], settings, make_world, ScriptedPolicy(script))
    return sorted(loop, key=lambda trajectory: trajectory.key)


def examples(env: str) -> dict[str, str]:
    """The text of each role's file, with the empty line that separates it from the session."""
    shown = next(t for t in demonstrations(env) if t.success and len(t.turns) >= MIN_TURNS)
    return {"react": text_of(react_segments(shown)) + "\n", "actre": text_of(actre_segments(shown)) + "\n"}


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = Path("prompts")
    """Folder to write the prompts to."""


def main(args: Args) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    for env in SHOWN:
        for role, text in examples(env).items():
            path = args.out / f"{env}_{role}.txt"
            with atomic_write(path) as temporary:
                temporary.write_text(text)
            print(f"{path}: {len(text)} characters")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

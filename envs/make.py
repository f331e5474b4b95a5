"""Make a world by name. The only file in `envs/` that knows every world.

Each world is imported on demand, so that playing one does not require another's packages.
"""

from __future__ import annotations

from envs.base import World
from envs.wording import Perturbed, TellCommands

WORLDS = ("alfworld", "webshop", "synthetic", "pddl", "babyai", "scienceworld", "jericho")


def make_world(env: str, *, perturb: str = "none", tell_commands: bool = False, **how: str | None) -> World:
    """The world named `env` (plain_world describes `how`), optionally perturbed or listing its commands (wording.py).

    Raises ValueError for an unknown name, FileNotFoundError if the world's data is missing.
    """
    world = plain_world(env, **how)
    world = world if perturb == "none" else Perturbed(world, perturb)
    return TellCommands(world) if tell_commands else world


def plain_world(
    env: str, *, data: str | None = None, engine: str = "ours", grammar: str = "0.4", mode: str = "text"
) -> World:
    """The world in its own wording. `engine` and `grammar` belong to ALFWorld, `mode` to WebShop; see their classes."""
    if env == "alfworld":
        from envs.alfworld.world import AlfWorld

        return AlfWorld(data=data, engine=engine, grammar=grammar)
    if env == "webshop":
        from envs.webshop.world import WebShop

        return WebShop(data=data, mode=mode)
    if env == "synthetic":
        from envs.synthetic.world import Synthetic

        return Synthetic()
    if env == "pddl":
        from envs.pddl.world import Pddl

        return Pddl()
    if env == "babyai":
        from envs.babyai import BabyAI

        return BabyAI()
    if env == "scienceworld":
        from envs.scienceworld import ScienceWorld

        return ScienceWorld()
    if env == "jericho":
        from envs.jericho import Jericho

        return Jericho(data=data)
    raise ValueError(f"unknown world {env!r}: expected one of {', '.join(WORLDS)}")

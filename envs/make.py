"""Makes a world by its name. The only file of `envs/` that knows every world.

Each world is imported on demand, so that one does not need another's packages."""

from __future__ import annotations

from envs.base import World

WORLDS = ("alfworld", "webshop", "synthetic", "pddl", "babyai", "scienceworld", "jericho")


def make_world(env: str, *, perturb: str = "none", tell_commands: bool = False, **how: str | None) -> World:
    """Make the world called `env` (see plain_world for `how`), perturbed or with its commands told (envs/wording.py).

    Raises ValueError for an unknown name, FileNotFoundError where the world's data is missing.
    """
    from envs.wording import Perturbed, TellCommands

    world = plain_world(env, **how)
    world = world if perturb == "none" else Perturbed(world, perturb)
    return TellCommands(world) if tell_commands else world


def plain_world(
    env: str, *, data: str | None = None, engine: str = "ours", grammar: str = "0.4", mode: str = "text"
) -> World:
    """The world as it is; `data`, `engine`, `grammar` (ALFWorld) and `mode` (WebShop) mean what it says."""
    if env == "alfworld":
        from envs.alfworld.world import AlfWorld  # on demand: one world must not need another's packages

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

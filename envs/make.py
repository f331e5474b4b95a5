"""Make a world by name. The only file in `envs/` that knows every world.

Each world is imported on demand, so that playing one does not require another's packages.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

import msgspec

from artifacts.json_io import read_json
from envs.base import World
from envs.wording import Perturbed, TellCommands


class Defaults(NamedTuple):
    """What plays a world unless told otherwise: the base model's folder, and the tokens of an attempt."""

    model: Path
    context: int


UNSEEN = Defaults(model=Path("models/tiny-neutral"), context=1536)
DEFAULTS = {
    "alfworld": Defaults(model=Path("models/tiny-alfworld"), context=1024),
    "webshop": Defaults(model=Path("models/tiny-webshop"), context=3072),  # pages are long
    "synthetic": UNSEEN,
    "pddl": UNSEEN,
    "babyai": UNSEEN,
    "scienceworld": UNSEEN,
    "jericho": UNSEEN,
}
WORLDS = tuple(DEFAULTS)


def require_world(env: str) -> None:
    """Raises ValueError unless a world has that name."""
    if env not in DEFAULTS:
        near = [f"did you mean {name}? " for name in difflib.get_close_matches(env, WORLDS, n=1)]
        raise ValueError(f"unknown world {env!r}: {''.join(near)}expected one of {', '.join(WORLDS)}")


class Training(msgspec.Struct):
    """The training.json of a base from models/pretrain.py. Without an `env` in `args`, that was alfworld."""

    command: str
    args: dict[str, str]
    parameters: int


def require_base_for(env: str, model: Path) -> None:
    """Raises ValueError for a base that models/pretrain.py trained from scratch on another world alone: it knows no
    words but that world's. Other models, which have no such training.json, may play any world."""
    try:
        trained_on = read_json(model / "training.json", Training).args.get("env", "alfworld")
    except (OSError, ValueError):
        return
    if trained_on in DEFAULTS and trained_on != env:
        raise ValueError(
            f"{model} was trained from scratch on {trained_on} alone (its training.json) and knows no other words: "
            f"expected another --model for {env}, such as {DEFAULTS[env].model}"
        )


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
    require_world(env)
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
    from envs.jericho import Jericho

    return Jericho(data=data)

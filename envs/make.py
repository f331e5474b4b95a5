"""Make a world by name, or an own one by the address of its class. The only file in `envs/` that knows every world.

    make_world("alfworld")
    make_world("~/keys/world.py:Keys")     # FILE.py:CLASS or package.module:CLASS (own.py)
    make_world("keys")                     # an entry point `keys` of the group a3t.worlds, in an installed package

Each world is imported on demand, so that playing one does not require another's packages.
"""

from __future__ import annotations

import functools
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import msgspec

from artifacts.json_io import read_json
from envs.base import World
from envs.own import Own, load_own, make_own, nearest
from envs.wording import Perturbed, TellCommands

GROUP = "a3t.worlds"  # of the entry points by which installed packages offer worlds


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


@functools.cache
def own_world(env: str) -> Own | None:
    """The class of an own world; None for one of the project's. Raises ValueError for an unknown name, for an address
    as load_own does, and for a class whose `name` cannot stand for it in records and folders."""
    if env in DEFAULTS:
        return None
    address = ":" in env or env.endswith(".py")
    offered = {} if address else {point.name: point.value for point in entry_points(group=GROUP)}
    if not address and env not in offered:
        known = (*WORLDS, *sorted(offered))
        raise ValueError(
            f"unknown world {env!r}: {nearest(env, known)}expected one of {', '.join(known)}, or FILE.py:CLASS for one "
            "of your own (docs/your-own-world.md)"
        )
    own = load_own(offered.get(env, env), World)
    name = getattr(own.cls, "name", None)
    if not (isinstance(name, str) and re.fullmatch("[a-z][a-z0-9-]*", name)) or name in DEFAULTS:
        raise ValueError(
            f"the class of {env} has the name {name!r}; expected `name = ...` with lower-case letters, digits and "
            f"hyphens, and none of {', '.join(WORLDS)}: records and folders are called by it"
        )
    return own


def require_world(env: str) -> None:
    """Raises ValueError unless `env` names a world, as own_world does."""
    own_world(env)


def world_name(env: str) -> str:
    """What records, folders and run.json call a world: its name, which an own one's class states."""
    own = own_world(env)
    return own.cls.name if own else env


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
            f"expected another --model for {env}, such as {DEFAULTS.get(env, UNSEEN).model}"
        )


def make_world(env: str, *, perturb: str = "none", tell_commands: bool = False, **how: str | None) -> World:
    """The world named `env` (plain_world describes `how`), optionally perturbed or listing its commands (wording.py).

    Raises ValueError for an unknown name, FileNotFoundError if the world's data is missing.
    """
    world = plain_world(env, **how)
    world = world if perturb == "none" else Perturbed(world, perturb)
    return TellCommands(world) if tell_commands else world


def plain_world(
    env: str,
    *,
    data: str | None = None,
    engine: str = "ours",
    grammar: str = "0.4",
    mode: str = "text",
    file: str | None = None,
) -> World:
    """The world in its own wording. `engine` and `grammar` belong to ALFWorld, `mode` to WebShop; see their classes.
    `file`: the sha256 that an own world's file must still have (default: any)."""
    if own := own_world(env):
        return make_own(own, data, file)
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

"""Play any world from the shell, or list its tasks: one action a line on stdin, one JSON object a line on stdout.

The first object is the reset: {"observation", "reward", "success", "done", "valid", "actions"}, where `observation` is
the whole opening and `actions` what may be done next (empty once the task is done); then one object per action. Reading
ends with the input or with the task. An empty line is an action too: the world says what it makes of it. A bad argument
gets one sentence on stderr and exit status 2.
Left out: turn limits and thoughts.

Run:  python -m envs.play --env alfworld --tasks --split valid_seen
      python -m envs.play --env webshop --tasks --split gen_valid
      printf 'look\\ninventory\\n' | python -m envs.play --env alfworld --task valid_seen/<task>/<trial>
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from artifacts.cli import parse
from envs.base import World
from envs.make import make_world


@dataclass(frozen=True, kw_only=True)
class Args:
    env: str = "alfworld"
    """World to play."""
    task: str | None = None
    """Id of the task to play."""
    list_tasks: Annotated[bool, tyro.conf.arg(name="tasks"), tyro.conf.FlagCreatePairsOff] = False
    """List the ids of --split, one a line, instead of playing."""
    split: str = "valid_seen"
    """Split that --tasks lists."""
    data: str | None = None
    """Data folder. ALFWorld: the one that holds json_2.1.1 (default: $ALFWORLD_DATA, else generated games). WebShop:
    the one that holds items_shuffle.json, or a product file (default: $WEBSHOP_DATA, else a generated catalogue).
    Jericho: the one with the story files (default: $JERICHO_GAMES)."""
    engine: str = "ours"
    """ALFWorld: ours, or textworld (the reference)."""
    grammar: str = "0.4"
    """ALFWorld: wording of alfworld 0.4 or 0.3."""
    mode: str = "text"
    """WebShop: text (parts joined by [SEP]) or text_rich (a line each, buttons marked)."""
    perturb: str = "none"
    """Wording of the commands: none (the world's own) or one of P1 to P5 (envs/wording.py)."""
    tell_commands: bool = False
    """List the commands at the end of the opening."""


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def play(world: World, task_id: str) -> None:
    """Play `task_id`, actions from stdin, until the input or the task ends."""
    opening = world.reset(task_id)
    say(observation=opening.text, reward=0.0, success=False, done=False, valid=True, actions=world.actions())
    for line in open(sys.stdin.fileno(), encoding="utf-8", errors="replace", closefd=False):  # any bytes are an action
        result = world.step(line.rstrip("\r\n"))
        actions = [] if result.done else world.actions()
        say(
            observation=result.observation,
            reward=result.reward,
            success=result.success,
            done=result.done,
            valid=result.valid,
            actions=actions,
        )
        if result.done:
            return


def main(args: Args) -> int:
    """Exit status: 0, or 2 with a sentence on stderr for a bad argument."""
    try:
        if args.list_tasks == bool(args.task):
            raise ValueError("expected either --task ID (play it) or --tasks (list the ids of --split)")
        world = make_world(
            args.env,
            data=args.data,
            engine=args.engine,
            grammar=args.grammar,
            mode=args.mode,
            perturb=args.perturb,
            tell_commands=args.tell_commands,
        )
        if args.list_tasks:
            print("\n".join(world.tasks(args.split)), flush=True)
        else:
            play(world, args.task)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"envs.play: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(parse(Args, __doc__)))

"""Play any world from the shell, or list its tasks: one action per line on stdin, one JSON object per line on stdout.
With --human it is played by a person: text, the admissible commands by number, and `quit`.

The first object is the reset, then one follows per action: {"observation", "reward", "success", "done", "valid",
"actions"}. The first `observation` is the whole opening; `actions` are the next actions, none once the task is done. An
empty line is an action too. Reading stops at the end of the input or of the task. With --tasks, tasks of the split that
cannot be played are counted on stderr, with the reason. A bad argument prints one sentence to stderr and exits with
status 2.
Left out: turn limits and thoughts.

Run:  python -m envs.play --env alfworld --tasks --split valid_seen
      python -m envs.play --env webshop --tasks --split gen_valid
      printf 'look\\ninventory\\n' | python -m envs.play --env alfworld --task valid_seen/<task>/<trial>
      python -m envs.play --human --env webshop
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import json
import re
import shutil
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import tyro

from artifacts.cli import run_main
from envs.base import Result, World, ask
from envs.make import make_world, own_world
from envs.own import explained


@dataclass(frozen=True, kw_only=True)
class Args:
    env: str = "alfworld"
    """World to play: a name, or FILE.py:CLASS for one of your own (docs/your-own-world.md)."""
    task: str | None = None
    """Id of the task to play."""
    human: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Play by hand at a terminal; without --task, the first task of --split."""
    list_tasks: Annotated[bool, tyro.conf.arg(name="tasks"), tyro.conf.FlagCreatePairsOff] = False
    """List the task ids of --split, one per line, instead of playing."""
    split: str | None = None
    """Split that --tasks lists (default: valid_seen), and whose first task --human plays (default: of the panel that
    evaluate.py would play)."""
    data: str | None = None
    """(ALFWorld) Folder with json_2.1.1 (default: $ALFWORLD_DATA, else generated games). (WebShop) Folder with
    items_shuffle.json, or a product file (default: $WEBSHOP_DATA, else a generated catalogue). (Jericho) Folder with
    the story files (default: $JERICHO_GAMES)."""
    engine: str = "ours"
    """(ALFWorld) Game engine: ours, or textworld, the slow reference."""
    grammar: str = "0.4"
    """(ALFWorld) Wording of alfworld 0.4 or 0.3."""
    mode: str = "text"
    """(WebShop) Form of pages: text (parts joined by [SEP]) or text_rich (one part a line, buttons marked)."""
    perturb: str = "none"
    """Perturbation of the commands: P1 to P5 (envs/wording.py), or none for the world's own wording."""
    tell_commands: bool = False
    """Append the list of the world's commands to the opening."""

    def check(self) -> None:
        if self.list_tasks == bool(self.task or self.human):
            raise ValueError(
                "expected --task ID (play it), --human (play by hand) or --tasks (list the ids of --split)"
            )


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def play(world: World, task_id: str) -> None:
    """Play `task_id` with actions from stdin until the input or the task ends."""
    opening = ask(world, "reset", task_id)
    say(observation=opening.text, reward=0.0, success=False, done=False, valid=True, actions=ask(world, "actions"))
    for line in open(
        sys.stdin.fileno(), encoding="utf-8", errors="replace", closefd=False
    ):  # any bytes are valid input
        result = ask(world, "step", line.rstrip("\r\n"))
        actions = [] if result.done else ask(world, "actions")
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


def play_by_hand(world: World, task_id: str) -> None:
    """Play `task_id` with what a person types, until `quit` or the end of the input or the task."""
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    print(f"{task_id} (type a command, its number, or quit)\n\n{ask(world, 'reset', task_id).text}")
    results: list[Result] = []
    while not (results and results[-1].done) and (action := choose(ask(world, "actions"))) is not None:
        results.append(ask(world, "step", action))
        print(f"\n{results[-1].observation}{'' if results[-1].valid else ' (not accepted)'}")
    if results:
        last = results[-1]
        how = "Solved" if last.success else "Over, not solved" if last.done else "Left, not solved"
        print(f"\n{how}: reward {last.reward:g}, progress {last.progress:g}, commands {len(results)}.")


def choose(actions: list[str]) -> str | None:
    """Lists the commands and returns what a person types: one by its number, or any words. None for `quit`, or at the
    end of the input."""
    # Blanks within a command do not break.
    commands = [f"{number} {action}".replace(" ", "\xa0") for number, action in enumerate(actions, 1)]
    print("\n" + textwrap.fill("   ".join(commands), shutil.get_terminal_size().columns).replace("\xa0", " "))
    while True:
        typed = read("> ")
        if typed in (None, "quit"):
            return None
        if re.fullmatch("[0-9]{1,6}", typed) and typed not in actions:
            if not 1 <= int(typed) <= len(actions):
                print(f"{typed} is no command's number; expected 1 to {len(actions)}, a command in words, or quit")
                continue
            typed = actions[int(typed) - 1]
        if typed in actions and typed.endswith("["):
            words = read(f"{typed} ")
            typed = f"{typed}{words.removesuffix(']')}]" if words else ""
        if typed:
            return typed


def read(prompt: str) -> str | None:
    """A line without blanks around it; None at the end of the input."""
    try:
        return input(prompt).strip()
    except EOFError:
        print()
        return None


def list_tasks(world: World, split: str) -> None:
    """Print the ids of a split, and on stderr how many tasks are left out and why."""
    for task_id in world.tasks(split):
        print(task_id)
    for reason, count in Counter(world.left_out(split).values()).items():
        tasks = f"{count} task{'' if count == 1 else 's'}"
        print(f"{tasks} of {split} left out: {reason}", file=sys.stderr)


def main(args: Args) -> None:
    world = make_world(
        args.env,
        data=args.data,
        engine=args.engine,
        grammar=args.grammar,
        mode=args.mode,
        perturb=args.perturb,
        tell_commands=args.tell_commands,
    )
    with explained(own_world(args.env)):
        if args.list_tasks:
            list_tasks(world, args.split or "valid_seen")
        elif args.human:
            play_by_hand(world, args.task or first_task(world, args))
        else:
            play(world, args.task)


def first_task(world: World, args: Args) -> str:
    """The first task of --split, or of the panel that evaluate.py would play, which may be a split too."""
    # On demand: a program that plays a task needs no panel.
    from envs.panel import NAMES, default_panels, read_panel

    split = args.split or default_panels("evaluate", args.env, args.data)[0]
    if not args.split and split in NAMES:
        return read_panel(split)[0]
    try:
        tasks = list(world.tasks(split))
    except ValueError as error:
        raise ValueError(f"{error}; choose one with --split, or a task with --task") from error
    if not tasks:
        raise ValueError(f"the split {split} has no task; choose another with --split, or a task with --task")
    return tasks[0]


if __name__ == "__main__":
    run_main(main, Args, __doc__)

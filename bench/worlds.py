"""Claim: the held-out worlds are as exact as the stock packages, and fast enough not to be waited for.

For each world that is installed: a random agent and the scripted one on its panel, 30 turns a task, and steps/s of the
random agent, list of actions included, beside what the stock package does in the same run. PDDL problems are given to
pddlgym as files: along random walks its states and actions must be ours. BabyAI is timed beside minigrid's own steps
with their image, of which one command makes several.
Left out: memory; worlds whose packages are not installed are named and passed over.

Run: pip install -r requirements-worlds.txt pddlgym==0.0.7    (pddlgym brings matplotlib, scikit-image and an old gym)
     python -m bench.worlds    (two minutes; --worlds scienceworld --limit 30 takes fifteen)
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
import re
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from envs.base import World, make_world
from envs.panel import HELD_OUT, pick_tasks


@dataclass(frozen=True, kw_only=True)
class Args:
    worlds: tuple[str, ...] = ("pddl", "babyai")
    """Worlds to measure: pddl, babyai, scienceworld."""
    limit: int | None = None
    """Play only so many tasks of each panel, spread evenly over it."""
    turns: int = 30
    """Turns after which a task ends (AgentBoard: 30)."""
    seed: int = 0
    """Seed of the random agent, together with the task."""


# ---- agents ----------------------------------------------------------------------------------------------------------


def rng_of(seed: int, task_id: str) -> random.Random:
    return random.Random(zlib.crc32(f"{seed} {task_id}".encode()))


def play_random(world: World, task_id: str, args: Args) -> tuple[bool, float, int]:
    """Success, progress and turns of an agent that takes any listed action."""
    rng, turns, result = rng_of(args.seed, task_id), 0, None
    while turns < args.turns and not (result and result.done):
        result = world.step(rng.choice(world.actions()))
        turns += 1
    return result.success, result.progress, turns


def play_scripted(world: World, task_id: str, args: Args) -> tuple[bool, float, int]:
    """The same of the world's own solution, finding it included; where there is none, nothing is done."""
    try:
        solution = world.solution()[: args.turns]
    except ValueError:
        return False, 0.0, 0
    turns, result = 0, None
    while turns < len(solution) and not (result and result.done):
        result = world.step(solution[turns])
        turns += 1
    return result.success, result.progress, turns


def measure(world: World, task_ids: list[str], agent: Callable, args: Args) -> dict[str, float]:
    rows, seconds = [], 0.0
    for task_id in tqdm(task_ids, desc=agent.__name__, unit="task"):
        world.reset(task_id)
        start = time.perf_counter()
        rows.append(agent(world, task_id, args))
        seconds += time.perf_counter() - start
    success, progress, turns = (sum(column) for column in zip(*rows, strict=True))
    return {"success": success, "n": len(rows), "progress": round(progress / len(rows), 4),
            "turns": round(turns / len(rows), 2), "turns_per_s": round(turns / seconds)}  # fmt: skip


def start_progress(world: World, task_ids: list[str]) -> float:
    """Mean progress of doing nothing: what holds at the start."""
    total = 0.0
    for task_id in task_ids:
        world.reset(task_id)
        total += world.step("no such action").progress
    return round(total / len(task_ids), 4)


# ---- stock packages --------------------------------------------------------------------------------------------------


def write_problem(folder: Path, task_id: str) -> None:
    """domain.pddl and problems/problem.pddl of a task."""
    from envs.pddl import draw_task

    domain, (objects, start, goal) = draw_task(task_id)
    name = domain.pddl.split("(domain ")[1].split(")")[0]
    facts = [" ".join(f"({' '.join(fact)})" for fact in each) for each in (start, goal)]
    typed = " ".join(f"{thing} - {kind}" for thing, kind in objects.items())
    (folder / "problems").mkdir()
    rules = re.sub(r"\(:types[^)]*\)", lambda part: re.sub(r"( - \w+)", "\\1 \n ", part[0]), domain.pddl)  # wants lines
    (folder / "domain.pddl").write_text(rules)
    (folder / "problems" / "problem.pddl").write_text(
        f"(define (problem p) (:domain {name}) (:objects {typed}) (:init {facts[0]}) (:goal (and {facts[1]})))")


def plain(literal: Any) -> tuple[str, ...]:
    """("on", "b1", "b2") of pddlgym's on(b1:block,b2:block)."""
    return (literal.predicate.name, *(one.name for one in literal.variables))


def beside_pddlgym(task_ids: list[str], args: Args) -> dict[str, float]:
    """The same random walks in both; all states and lists of actions are compared. Listing and stepping is timed."""
    from pddlgym.core import PDDLEnv

    from envs.pddl import load_task

    world = make_world("pddl")
    ours = theirs = 0.0
    steps = different = 0
    for task_id in tqdm(task_ids, desc="beside pddlgym", unit="task"):
        task = load_task(task_id)
        problem, state, rng = task.problem, task.problem.start, rng_of(args.seed, task_id)
        world.reset(task_id)
        with tempfile.TemporaryDirectory() as folder:
            write_problem(Path(folder), task_id)
            peer = PDDLEnv(f"{folder}/domain.pddl", f"{folder}/problems", operators_as_actions=True,
                           dynamic_action_space=True)  # fmt: skip
            seen, _ = peer.reset()
            for _ in range(args.turns):
                start = time.perf_counter()
                world.actions()
                ours += time.perf_counter() - start
                start = time.perf_counter()
                listed = {plain(each): each for each in peer.action_space.all_ground_literals(seen)}
                theirs += time.perf_counter() - start
                actions = {(one.name, *one.objects): one for one in problem.actions if one.applies(state)}
                facts = {plain(each) for each in seen.literals}
                different += facts != {*problem.facts_of(state), *problem.fixed} or set(listed) != set(actions)
                chosen = rng.choice(sorted(actions))
                state = actions[chosen].apply(state)
                start = time.perf_counter()
                result = world.step(task.command(actions[chosen]))
                ours += time.perf_counter() - start
                start = time.perf_counter()
                seen, _, done, _, _ = peer.step(listed[chosen])
                theirs += time.perf_counter() - start
                steps += 1
                different += done != result.done
                if done or result.done:
                    break
    return {"peer": "pddlgym", "steps": steps, "different": different, "ours_steps_per_s": round(steps / ours),
            "peer_steps_per_s": round(steps / theirs, 1), "ratio": round(theirs / ours, 2)}  # fmt: skip


def beside_minigrid(task_ids: list[str], args: Args) -> dict[str, float]:
    """Random actions of the same 112 levels, here commands with their texts, there single actions with their images."""
    import gymnasium

    world = make_world("babyai")
    ours = theirs = 0.0
    commands = moves = steps = 0
    for task_id in tqdm(task_ids, desc="beside minigrid", unit="task"):
        rng = rng_of(args.seed, task_id)
        world.reset(task_id)
        start = time.perf_counter()
        commands += play_random(world, task_id, args)[2]
        ours += time.perf_counter() - start
        moves += world._env.step_count
        peer = gymnasium.make(world._env.spec.id).unwrapped
        with contextlib.redirect_stdout(io.StringIO()):
            peer.reset(seed=int(task_id.rpartition("-")[2]))
        start = time.perf_counter()
        for _ in range(args.turns):
            steps += 1
            if peer.step(rng.randrange(6))[2]:
                break
        theirs += time.perf_counter() - start
    return {"peer": "minigrid", "commands": commands, "moves": moves, "ours_commands_per_s": round(commands / ours),
            "ours_moves_per_s": round(moves / ours), "peer_moves_per_s": round(steps / theirs),
            "ratio": round(moves / ours * theirs / steps, 2)}  # fmt: skip


def beside_scienceworld(task_ids: list[str], args: Args) -> dict[str, float]:
    """The same actions, drawn in our world, by our step and by the package's own, which is timed whole.

    Answers and scores are compared with its own (`different_with_listing`) and with those of its step without the list
    of actions (`different`): that list draws by chance and so changes what comes after.
    """
    from scienceworld import scienceworld

    from envs.scienceworld import CHECK, ScienceWorld, simplifications

    world = ScienceWorld()
    ours = theirs = 0.0
    steps, different = 0, {True: 0, False: 0}
    for task_id in tqdm(task_ids, desc="beside scienceworld", unit="task"):
        rng, played = rng_of(args.seed, task_id), []
        world.reset(task_id)
        templates = [one for one in world.commands() if "{" not in one and one != CHECK]
        for _ in range(args.turns):
            action = rng.choice(templates)
            start = time.perf_counter()
            result = world.step(action)
            ours += time.perf_counter() - start
            played.append((action, result))
            if result.done:
                break
        world.close()
        task, _, variation = task_id.partition("/")[2].rpartition("-")
        for listing in (True, False):
            peer = scienceworld.ScienceWorldEnv()  # with our options for Java, which the module has from our world
            if not listing:
                peer.get_valid_action_object_combinations = list
            peer.load(task, int(variation), simplifications(task))
            peer.reset()
            start = time.perf_counter()
            answers = [peer.step(action) for action, _ in played]
            theirs += (time.perf_counter() - start) * listing
            for (text, _, _, info), (_, result) in zip(answers, played, strict=True):
                different[listing] += text != result.observation or max(0, info["score"]) != round(100 * result.reward)
            peer.close()
        steps += len(played)
    return {"peer": "scienceworld", "steps": steps, "different": different[False],
            "different_with_listing": different[True], "ours_steps_per_s": round(steps / ours, 1),
            "peer_steps_per_s": round(steps / theirs, 1), "ratio": round(theirs / ours, 1)}  # fmt: skip


PEERS = {"pddl": ("pddlgym", beside_pddlgym), "babyai": ("minigrid", beside_minigrid),
         "scienceworld": ("scienceworld", beside_scienceworld)}  # fmt: skip


def main(args: Args) -> None:
    """Print a line per agent and world, the peers, and, last, one JSON object."""
    found: dict[str, Any] = {"bench": "worlds", "turns": args.turns, "seed": args.seed}
    for name in args.worlds:
        try:
            world = make_world(name)
        except (ImportError, FileNotFoundError) as error:
            print(f"{name}: passed over: {error}")
            continue
        task_ids, _ = pick_tasks(HELD_OUT[name], args.limit)
        found[name] = {"start_progress": start_progress(world, task_ids)}
        print(f"{name}: progress before the first action {found[name]['start_progress']:.3f}")
        for agent in (play_random, play_scripted):
            one = found[name][agent.__name__] = measure(world, task_ids, agent, args)
            print(f"{name}, {agent.__name__}: success {one['success']}/{one['n']}, progress {one['progress']:.3f}, "
                  f"turns {one['turns']:.1f}, turns/s {one['turns_per_s']}")
        package, compare = PEERS[name]
        if importlib.util.find_spec(package) is None:
            print(f"{name}: not compared, {package} is not installed")
        else:
            found[name]["peer"] = compare(task_ids, args)
            print(f"{name} beside {package}: {found[name]['peer']}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""Claim: the held-out worlds are as exact as the stock packages, and fast enough not to be waited for.

For each world that is installed: a random agent and the scripted one on its panel, 30 turns a task, and steps/s of the
random agent, list of actions included, beside what the stock package does in the same run. PDDL problems are given to
pddlgym as files: along random walks its states and actions must be ours. BabyAI is timed beside minigrid's own steps
with their image, of which one command makes several. Jericho's games are those of $JERICHO_GAMES, or else twenty that
TextWorld compiles.
Left out: memory; worlds whose packages are not installed are named and passed over.

Run: pip install -r requirements/worlds.txt pddlgym==0.0.7    (pddlgym brings matplotlib, scikit-image and an old gym)
     python -m bench.worlds    (two minutes; --worlds scienceworld takes 45)
     pip install -r requirements/test.txt    (brings TextWorld, for --worlds jericho: two minutes)
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import random
import re
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from artifacts.cli import parse
from envs.base import Observation, Result, World
from envs.jericho import Jericho
from envs.make import make_world
from envs.panel import HELD_OUT, pick_tasks


@dataclass(frozen=True, kw_only=True)
class Args:
    worlds: tuple[str, ...] = ("pddl", "babyai")
    """Worlds to measure: pddl, babyai, scienceworld, jericho."""
    limit: int | None = None
    """Play only so many tasks of each panel, spread evenly over it."""
    turns: int = 30
    """Turns after which a task ends (AgentBoard: 30)."""
    seed: int = 0
    """Seed of the random agent, together with the task."""


# ---- Jericho's games -------------------------------------------------------------------------------------------------


class Compiled(Jericho):
    """Twenty games that TextWorld compiles into `folder`. It is played beside them, as it knows what jericho does not:
    which commands are admissible, and a walkthrough."""

    def __init__(self, folder: str):
        import textworld

        self._folder, self._walkthroughs = Path(folder), {}
        for number in tqdm(range(20), desc="compiling", unit="game"):
            options = textworld.GameOptions()
            options.seeds, options.nb_rooms, options.nb_objects, options.quest_length = number, 4, 8, 5
            options.path = str(self._folder / f"tw-{number:02}.z8")  # jericho knows games by their names
            self._walkthroughs[f"tw-{number:02}"] = textworld.make(options)[1].metadata["walkthrough"]
        super().__init__(folder)

    def reset(self, task_id: str) -> Observation:
        import textworld

        self._name = task_id.partition("/")[2]
        wanted = textworld.EnvInfos(admissible_commands=True)
        self._beside = textworld.start(str(self._folder / f"{self._name}.z8"), wanted)
        self._state = self._beside.reset()
        return super().reset(task_id)

    def step(self, action: str) -> Result:
        self._state, _, _ = self._beside.step(action)
        return super().step(action)

    def actions(self) -> list[str]:
        return sorted(self._state["admissible_commands"])

    def solution(self) -> list[str]:
        return self._walkthroughs[self._name]


# ---- agents ----------------------------------------------------------------------------------------------------------


def make_rng(seed: int, task_id: str) -> random.Random:
    return random.Random(zlib.crc32(f"{seed} {task_id}".encode()))


def play_random(world: World, task_id: str, args: Args) -> tuple[bool, float, int]:
    """Success, progress and turns of an agent that takes any listed action."""
    rng, turns, result = make_rng(args.seed, task_id), 0, None
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
    return {
        "success": success,
        "n": len(rows),
        "progress": round(progress / len(rows), 4),
        "turns": round(turns / len(rows), 2),
        "turns_per_s": round(turns / seconds),
    }


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
    from envs.pddl.world import draw_task

    domain, (objects, start, goal) = draw_task(task_id)
    name = domain.pddl.split("(domain ")[1].split(")")[0]
    facts = [" ".join(f"({' '.join(fact)})" for fact in each) for each in (start, goal)]
    typed = " ".join(f"{thing} - {kind}" for thing, kind in objects.items())
    (folder / "problems").mkdir()
    rules = re.sub(r"\(:types[^)]*\)", lambda part: re.sub(r"( - \w+)", "\\1 \n ", part[0]), domain.pddl)  # wants lines
    (folder / "domain.pddl").write_text(rules)
    (folder / "problems" / "problem.pddl").write_text(
        f"(define (problem p) (:domain {name}) (:objects {typed}) (:init {facts[0]}) (:goal (and {facts[1]})))"
    )


def plain(literal: Any) -> tuple[str, ...]:
    """("on", "b1", "b2") of pddlgym's on(b1:block,b2:block)."""
    return (literal.predicate.name, *(one.name for one in literal.variables))


def beside_pddlgym(world: World, task_ids: list[str], args: Args) -> dict[str, float]:
    """The same random walks in both; all states and lists of actions are compared. Listing and stepping is timed."""
    from pddlgym.core import PDDLEnv

    from envs.pddl.world import load_task

    ours = theirs = 0.0
    steps = different = 0
    for task_id in tqdm(task_ids, desc="beside pddlgym", unit="task"):
        task = load_task(task_id)
        problem, state, rng = task.problem, task.problem.start, make_rng(args.seed, task_id)
        world.reset(task_id)
        with tempfile.TemporaryDirectory() as folder:
            write_problem(Path(folder), task_id)
            peer = PDDLEnv(
                f"{folder}/domain.pddl", f"{folder}/problems", operators_as_actions=True, dynamic_action_space=True
            )
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
    return {
        "peer": "pddlgym",
        "steps": steps,
        "different": different,
        "ours_steps_per_s": round(steps / ours),
        "peer_steps_per_s": round(steps / theirs, 1),
        "ratio": round(theirs / ours, 2),
    }


def beside_minigrid(world: World, task_ids: list[str], args: Args) -> dict[str, float]:
    """Random actions of the same 112 levels, here commands with their texts, there single actions with their images."""
    import gymnasium

    ours = theirs = 0.0
    commands = moves = steps = 0
    for task_id in tqdm(task_ids, desc="beside minigrid", unit="task"):
        rng = make_rng(args.seed, task_id)
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
    return {
        "peer": "minigrid",
        "commands": commands,
        "moves": moves,
        "ours_commands_per_s": round(commands / ours),
        "ours_moves_per_s": round(moves / ours),
        "peer_moves_per_s": round(steps / theirs),
        "ratio": round(moves / ours * theirs / steps, 2),
    }


def beside_scienceworld(world: World, task_ids: list[str], args: Args) -> dict[str, float]:
    """The same actions, drawn in our world, by our step and by the package's own, which is timed whole.

    Answers and scores are compared with its own (`different_with_listing`) and with those of its step without the list
    of actions (`different`): that list draws by chance and so changes what comes after.
    """
    from scienceworld import scienceworld

    from envs.scienceworld import CHECK, simplifications

    ours = theirs = 0.0
    steps, different = 0, {True: 0, False: 0}
    world.close()  # a virtual machine remembers what was played in it
    for task_id in tqdm(task_ids, desc="beside scienceworld", unit="task"):
        rng, played = make_rng(args.seed, task_id), []
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
    return {
        "peer": "scienceworld",
        "steps": steps,
        "different": different[False],
        "different_with_listing": different[True],
        "ours_steps_per_s": round(steps / ours, 1),
        "peer_steps_per_s": round(steps / theirs, 1),
        "ratio": round(theirs / ours, 1),
    }


def beside_jericho(world: Jericho, task_ids: list[str], args: Args) -> dict[str, float]:
    """The same random actions by our step and by jericho's own, whose answers and scores must be the same."""
    import jericho

    ours = theirs = 0.0
    steps = different = 0
    for task_id in tqdm(task_ids, desc="beside jericho", unit="task"):
        rng, chosen, played, result = make_rng(args.seed, task_id), [], [], None
        world.reset(task_id)
        while len(chosen) < args.turns and not (result and result.done):
            chosen.append(rng.choice(world.actions()))
            result = world.step(chosen[-1])
        world.reset(task_id)
        for action in chosen:
            start = time.perf_counter()
            played.append((action, Jericho.step(world, action)))  # without TextWorld beside it
            ours += time.perf_counter() - start
        peer = jericho.FrotzEnv(str(world._files[task_id.partition("/")[2]]))
        peer.seed(peer.bindings.get("seed") or 1)
        peer.reset()
        for action, result in played:
            start = time.perf_counter()
            text, _, _, info = peer.step(action)
            theirs += time.perf_counter() - start
            different += text.strip() != result.observation
            different += max(0, info["score"]) != round(result.reward * peer.get_max_score())
        steps += len(played)
    return {
        "peer": "jericho",
        "steps": steps,
        "different": different,
        "ours_steps_per_s": round(steps / ours),
        "peer_steps_per_s": round(steps / theirs),
        "ratio": round(theirs / ours, 2),
    }


PEERS = {
    "pddl": ("pddlgym", beside_pddlgym),
    "babyai": ("minigrid", beside_minigrid),
    "scienceworld": ("scienceworld", beside_scienceworld),
    "jericho": ("jericho", beside_jericho),
}


def world_and_tasks(name: str, folder: str, args: Args) -> tuple[World, list[str]]:
    """The world and the tasks to play. Raises ImportError or FileNotFoundError where something is not installed."""
    if name != "jericho":
        return make_world(name), pick_tasks(HELD_OUT[name], args.limit)[0]
    world = make_world(name) if os.environ.get("JERICHO_GAMES") else Compiled(folder)
    return world, list(world.tasks("jericho_all"))[: args.limit]


def main(args: Args) -> None:
    """Print a line per agent and world, the peers, and, last, one JSON object."""
    found: dict[str, Any] = {"bench": "worlds", "turns": args.turns, "seed": args.seed}
    for name in args.worlds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                world, task_ids = world_and_tasks(name, folder, args)
            except (ImportError, FileNotFoundError) as error:
                print(f"{name}: passed over: {error}")
                continue
            found[name] = {"start_progress": start_progress(world, task_ids)}
            print(f"{name}: progress before the first action {found[name]['start_progress']:.3f}")
            for agent in (play_random, play_scripted):
                one = found[name][agent.__name__] = measure(world, task_ids, agent, args)
                print(
                    f"{name}, {agent.__name__}: success {one['success']}/{one['n']}, progress {one['progress']:.3f}, "
                    f"turns {one['turns']:.1f}, turns/s {one['turns_per_s']}"
                )
            package, compare = PEERS[name]
            if importlib.util.find_spec(package) is None:
                print(f"{name}: not compared, {package} is not installed")
            else:
                found[name]["peer"] = compare(world, task_ids, args)
                print(f"{name} beside {package}: {found[name]['peer']}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(parse(Args, __doc__))

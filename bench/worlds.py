"""Claim: the held-out worlds behave exactly like the stock packages and are fast enough not to be a bottleneck.

For each installed world: a random and a scripted agent on its panel, 30 turns per task, and steps/s of the random
agent including listing actions, compared with the stock package in the same run. pddlgym gets PDDL problems as files:
along random walks its states and actions must equal ours. BabyAI is timed against minigrid's own steps with their
images; one of our commands makes several of them. Jericho's games are those of $JERICHO_GAMES, or else twenty compiled
by TextWorld.
Left out: memory. Worlds whose packages are not installed are reported and skipped.

Run: pip install -r requirements/worlds.txt pddlgym==0.0.7    (pddlgym brings matplotlib, scikit-image and an old gym)
     python -m bench.worlds    (two minutes; --worlds scienceworld takes 45)
     pip install -r requirements/test.txt    (brings TextWorld, for --worlds jericho: two minutes)
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

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

from artifacts.cli import run_main
from envs.base import Observation, Result, World
from envs.jericho import Jericho
from envs.make import make_world
from envs.panel import HELD_OUT, pick_tasks


@dataclass(frozen=True, kw_only=True)
class Args:
    worlds: tuple[str, ...] = ("pddl", "babyai")
    """Worlds to measure: pddl, babyai, scienceworld, jericho."""
    limit: int | None = None
    """Maximum tasks per panel, spread evenly over it (default: all)."""
    turns: int = 30
    """Maximum turns per task (AgentBoard: 30)."""
    seed: int = 0
    """Seed of the random agent, combined with the task id."""


# ---- Jericho's games -------------------------------------------------------------------------------------------------


class Compiled(Jericho):
    """Twenty games that TextWorld compiles into `folder`. TextWorld runs in parallel, because it provides what jericho
    does not: the admissible commands and a walkthrough."""

    def __init__(self, folder: str):
        import textworld

        self._folder, self._walkthroughs = Path(folder), {}
        for seed in tqdm(range(20), desc="compiling", unit="game"):
            options = textworld.GameOptions()
            options.seeds, options.nb_rooms, options.nb_objects, options.quest_length = seed, 4, 8, 5
            options.path = str(self._folder / f"tw-{seed:02}.z8")  # jericho identifies games by file name
            self._walkthroughs[f"tw-{seed:02}"] = textworld.make(options)[1].metadata["walkthrough"]
        super().__init__(folder)

    def reset(self, task_id: str) -> Observation:
        import textworld

        self._name = task_id.partition("/")[2]
        infos = textworld.EnvInfos(admissible_commands=True)
        self._textworld = textworld.start(str(self._folder / f"{self._name}.z8"), infos)
        self._state = self._textworld.reset()
        return super().reset(task_id)

    def step(self, action: str) -> Result:
        self._state, _, _ = self._textworld.step(action)
        return super().step(action)

    def actions(self) -> list[str]:
        return sorted(self._state["admissible_commands"])

    def solution(self) -> list[str]:
        return self._walkthroughs[self._name]


# ---- agents ----------------------------------------------------------------------------------------------------------


def make_rng(seed: int, task_id: str) -> random.Random:
    return random.Random(zlib.crc32(f"{seed} {task_id}".encode()))


def play_random(world: World, task_id: str, args: Args) -> tuple[bool, float, int]:
    """Success, progress and turns of an agent that takes random listed actions."""
    rng, turns, result = make_rng(args.seed, task_id), 0, None
    while turns < args.turns and not (result and result.done):
        result = world.step(rng.choice(world.actions()))
        turns += 1
    return result.success, result.progress, turns


def play_scripted(world: World, task_id: str, args: Args) -> tuple[bool, float, int]:
    """Success, progress and turns of the world's own solution; zeros if there is none. Finding it is timed too."""
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
    """Mean progress without acting: the share of the goal that holds at the start."""
    total = 0.0
    for task_id in task_ids:
        world.reset(task_id)
        total += world.step("no such action").progress
    return round(total / len(task_ids), 4)


# ---- stock packages --------------------------------------------------------------------------------------------------


def write_problem(folder: Path, task_id: str) -> None:
    """Writes domain.pddl and problems/problem.pddl of a task."""
    from envs.pddl.world import draw_task

    domain, (objects, start, goal) = draw_task(task_id)
    name = domain.pddl.split("(domain ")[1].split(")")[0]
    facts = [" ".join(f"({' '.join(fact)})" for fact in each) for each in (start, goal)]
    typed = " ".join(f"{thing} - {kind}" for thing, kind in objects.items())
    (folder / "problems").mkdir()
    rules = re.sub(
        r"\(:types[^)]*\)", lambda part: re.sub(r"( - \w+)", "\\1 \n ", part[0]), domain.pddl
    )  # one type per line
    (folder / "domain.pddl").write_text(rules)
    (folder / "problems" / "problem.pddl").write_text(
        f"(define (problem p) (:domain {name}) (:objects {typed}) (:init {facts[0]}) (:goal (and {facts[1]})))"
    )


def to_tuple(literal: Any) -> tuple[str, ...]:
    """("on", "b1", "b2") of pddlgym's on(b1:block,b2:block)."""
    return (literal.predicate.name, *(variable.name for variable in literal.variables))


def compare_pddlgym(world: World, task_ids: list[str], args: Args) -> dict[str, float]:
    """The same random walks in both: compares all states and lists of actions, times listing and stepping."""
    from pddlgym.core import PDDLEnv

    from envs.pddl.world import load_task

    ours = theirs = 0.0
    steps = different = 0
    for task_id in tqdm(task_ids, desc="compare pddlgym", unit="task"):
        task = load_task(task_id)
        problem, state, rng = task.problem, task.problem.start, make_rng(args.seed, task_id)
        world.reset(task_id)
        with tempfile.TemporaryDirectory() as folder:
            write_problem(Path(folder), task_id)
            peer = PDDLEnv(
                f"{folder}/domain.pddl", f"{folder}/problems", operators_as_actions=True, dynamic_action_space=True
            )
            peer_state, _ = peer.reset()
            for _ in range(args.turns):
                start = time.perf_counter()
                world.actions()
                ours += time.perf_counter() - start
                start = time.perf_counter()
                peer_actions = {to_tuple(each): each for each in peer.action_space.all_ground_literals(peer_state)}
                theirs += time.perf_counter() - start
                actions = {(a.name, *a.objects): a for a in problem.actions if a.applies(state)}
                facts = {to_tuple(each) for each in peer_state.literals}
                same_state = facts == {*problem.facts_of(state), *problem.fixed}
                different += not (same_state and set(peer_actions) == set(actions))
                chosen = rng.choice(sorted(actions))
                state = actions[chosen].apply(state)
                start = time.perf_counter()
                result = world.step(task.command(actions[chosen]))
                ours += time.perf_counter() - start
                start = time.perf_counter()
                peer_state, _, done, _, _ = peer.step(peer_actions[chosen])
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


def compare_minigrid(world: World, task_ids: list[str], args: Args) -> dict[str, float]:
    """Random actions in the same 112 levels: our commands with their texts, minigrid's single actions with images."""
    import gymnasium

    ours = theirs = 0.0
    commands = moves = steps = 0
    for task_id in tqdm(task_ids, desc="compare minigrid", unit="task"):
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


def compare_scienceworld(world: World, task_ids: list[str], args: Args) -> dict[str, float]:
    """Runs actions sampled in our world through our step and the package's own step, which is timed in full.

    Compares observations and scores with those of the package's step (`different_with_listing`) and of its step without
    listing actions (`different`): listing draws random numbers and so changes what follows.
    """
    from scienceworld import scienceworld

    from envs.scienceworld import CHECK, simplifications

    ours = theirs = 0.0
    steps, different = 0, {True: 0, False: 0}
    world.close()  # a virtual machine keeps state from earlier tasks
    for task_id in tqdm(task_ids, desc="compare scienceworld", unit="task"):
        rng, played = make_rng(args.seed, task_id), []
        world.reset(task_id)
        commands = [command for command in world.commands() if "{" not in command and command != CHECK]
        for _ in range(args.turns):
            action = rng.choice(commands)
            start = time.perf_counter()
            result = world.step(action)
            ours += time.perf_counter() - start
            played.append((action, result))
            if result.done:
                break
        world.close()
        task, _, variation = task_id.partition("/")[2].rpartition("-")
        for listing in (True, False):
            peer = scienceworld.ScienceWorldEnv()  # with our Java options, which our world set in the module
            if not listing:
                peer.get_valid_action_object_combinations = list
            peer.load(task, int(variation), simplifications(task))
            peer.reset()
            start = time.perf_counter()
            peer_results = [peer.step(action) for action, _ in played]
            theirs += (time.perf_counter() - start) * listing
            for (text, _, _, info), (_, result) in zip(peer_results, played, strict=True):
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


def compare_jericho(world: Jericho, task_ids: list[str], args: Args) -> dict[str, float]:
    """The same random actions through our step and jericho's own; observations and scores must be equal."""
    import jericho

    ours = theirs = 0.0
    steps = different = 0
    for task_id in tqdm(task_ids, desc="compare jericho", unit="task"):
        rng, chosen, played, result = make_rng(args.seed, task_id), [], [], None
        world.reset(task_id)
        while len(chosen) < args.turns and not (result and result.done):
            chosen.append(rng.choice(world.actions()))
            result = world.step(chosen[-1])
        world.reset(task_id)
        for action in chosen:
            start = time.perf_counter()
            played.append((action, Jericho.step(world, action)))  # without TextWorld running in parallel
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
    "pddl": ("pddlgym", compare_pddlgym),
    "babyai": ("minigrid", compare_minigrid),
    "scienceworld": ("scienceworld", compare_scienceworld),
    "jericho": ("jericho", compare_jericho),
}


def world_and_tasks(name: str, folder: str, args: Args) -> tuple[World, list[str]]:
    """The world and the tasks to play. Raises ImportError or FileNotFoundError if something is not installed."""
    if name != "jericho":
        return make_world(name), pick_tasks(HELD_OUT[name], args.limit)[0]
    world = make_world(name) if os.environ.get("JERICHO_GAMES") else Compiled(folder)
    return world, list(world.tasks("jericho_all"))[: args.limit]


def main(args: Args) -> None:
    """Prints a line per agent and world, the comparisons and, on the last line, one JSON object."""
    results: dict[str, Any] = {"bench": "worlds", "turns": args.turns, "seed": args.seed}
    for name in args.worlds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                world, task_ids = world_and_tasks(name, folder, args)
            except (ImportError, FileNotFoundError) as error:
                print(f"{name}: skipped: {error}")
                continue
            results[name] = {"start_progress": start_progress(world, task_ids)}
            print(f"{name}: progress before the first action {results[name]['start_progress']:.3f}")
            for agent in (play_random, play_scripted):
                row = results[name][agent.__name__] = measure(world, task_ids, agent, args)
                print(
                    f"{name}, {agent.__name__}: success {row['success']}/{row['n']}, progress {row['progress']:.3f}, "
                    f"turns {row['turns']:.1f}, turns/s {row['turns_per_s']}"
                )
            package, compare = PEERS[name]
            if importlib.util.find_spec(package) is None:
                print(f"{name}: not compared: {package} is not installed")
            else:
                results[name]["peer"] = compare(world, task_ids, args)
                print(f"{name} against {package}: {results[name]['peer']}")
    print(json.dumps(results))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

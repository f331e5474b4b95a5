"""Claim: our ALFWorld engine gives exactly TextWorld's output, at least 500 times faster.

Both play the same seeded commands in the same games: admissible ones (drawn by verb first, so that `go to` does not
crowd out rare verbs) and a share of inadmissible ones. After each step the observation, the ordered list of admissible
commands and `won` are compared. A step is timed together with its admissible list; loading and resetting are timed
separately. A game that is won early is restarted.
Left out: memory, concurrent games.

Run: python -m bench.alfworld_engine [--games 40 --steps 40 --seed 0 --split valid_seen]    (about 4 minutes)
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import json
import os
import random
import time
import zlib
from dataclasses import dataclass

from tqdm import tqdm

from artifacts.cli import run_main
from envs.alfworld.world import AlfWorld

GARBAGE = (
    "",
    "go to",
    "go to nowhere 1",
    "xyzzy",
    "take",
    "look around",
    "Look",
    "open fridge 99",
    "put mug 1 in/on desk 1",
)


@dataclass(frozen=True, kw_only=True)
class Args:
    games: int = 40
    """Games to play, drawn without replacement."""
    steps: int = 40
    """Commands per game."""
    seed: int = 0
    """Seed of the choice of games and of every command."""
    split: str = ""
    """Split to draw from (default: valid_seen with real data, else gen_valid)."""
    data: str | None = None
    """Folder that holds json_2.1.1 (default: $ALFWORLD_DATA, else generated games)."""
    invalid: float = 0.2
    """Share of commands drawn without checking that they are admissible."""
    grammar: str = "0.4"
    """Grammar of alfworld 0.4 or 0.3."""


@dataclass
class Clock:
    """Seconds spent by one engine."""

    stepping: float = 0.0
    resetting: float = 0.0


def draw_command(rng: random.Random, admissible: list[str], seen: list[str], invalid: float) -> str:
    """A command: mostly admissible, else garbage, one admissible earlier (`seen`), or a mixture of two such."""
    if rng.random() < invalid:
        form = rng.randrange(3)
        if form == 0:
            return rng.choice(GARBAGE)
        command = rng.choice(seen)
        if form == 1:
            return command
        one, other = command.split(" "), rng.choice(seen).split(" ")
        return " ".join(one[:-2] + other[-2:])
    verbs = sorted({command.split(" ")[0] for command in admissible})
    verb = rng.choice(verbs)
    return rng.choice([command for command in admissible if command.split(" ")[0] == verb])


def timed_reset(world: AlfWorld, task_id: str, clock: Clock) -> tuple[str, list[str]]:
    start = time.perf_counter()
    text = world.reset(task_id).text
    clock.resetting += time.perf_counter() - start
    return text, world.actions()


def timed_step(world: AlfWorld, command: str, clock: Clock) -> tuple[str, bool, bool, list[str]]:
    start = time.perf_counter()
    result = world.step(command)
    admissible = world.actions()
    clock.stepping += time.perf_counter() - start
    return result.observation, result.success, result.valid, admissible


def difference(result: tuple, expected: tuple) -> str:
    """The parts in which two results differ."""
    return "; ".join(
        f"{one!r}, expected {other!r}" for one, other in zip(result, expected, strict=True) if one != other
    )


def compare(
    ours: AlfWorld, reference: AlfWorld, task_id: str, args: Args, clocks: tuple[Clock, Clock], bar: tqdm
) -> list[str]:
    """Plays one game on both engines; returns one line per divergence."""
    rng = random.Random(zlib.crc32(f"{args.seed} {task_id}".encode()))
    divergences, seen, over = [], [], True
    for step in range(args.steps):
        if over:
            opening, expected = timed_reset(ours, task_id, clocks[0]), timed_reset(reference, task_id, clocks[1])
            if opening != expected:
                divergences.append(f"{task_id} opening: {difference(opening, expected)}")
            admissible = expected[1]
        seen += admissible
        command = draw_command(rng, admissible, seen, args.invalid)
        result, expected = timed_step(ours, command, clocks[0]), timed_step(reference, command, clocks[1])
        if result != expected:
            divergences.append(f"{task_id} step {step} {command!r}: {difference(result, expected)}")
        over, admissible = expected[1], expected[3]
        bar.update()
        if result[1] != expected[1]:
            break  # only one of the games is over
    return divergences


def main(args: Args) -> None:
    """Prints ours | TextWorld | ratio and, on the last line, one JSON object."""
    real = bool(args.data or os.environ.get("ALFWORLD_DATA"))
    split = args.split or ("valid_seen" if real else "gen_valid")
    ours = AlfWorld(data=args.data, grammar=args.grammar)
    reference = AlfWorld(data=args.data, grammar=args.grammar, engine="textworld")
    task_ids = ours.tasks(split)
    chosen = random.Random(args.seed).sample(list(task_ids), min(args.games, len(task_ids)))
    clocks, divergences = (Clock(), Clock()), []
    with tqdm(total=len(chosen) * args.steps, unit="step") as bar:
        for task_id in chosen:
            divergences += compare(ours, reference, task_id, args, clocks, bar)
        steps = bar.n
    for line in divergences[:10]:
        print(line)
    rates = [steps / clock.stepping for clock in clocks]
    resets = [1e3 * clock.resetting / len(chosen) for clock in clocks]
    print(f"split {split}, {len(chosen)} games, {steps} steps, grammar {args.grammar}, divergences {len(divergences)}")
    print("                          ours | TextWorld |   ratio")
    print(f"steps/s             {rates[0]:10.0f} | {rates[1]:9.1f} | {rates[0] / rates[1]:7.0f}")
    print(f"load + reset, ms    {resets[0]:10.2f} | {resets[1]:9.0f} | {resets[1] / resets[0]:7.0f}")
    print(
        json.dumps(
            {
                "bench": "alfworld_engine",
                "divergences": len(divergences),
                "games": len(chosen),
                "steps": steps,
                "ours_steps_per_s": round(rates[0]),
                "textworld_steps_per_s": round(rates[1], 2),
                "ratio": round(rates[0] / rates[1], 1),
            }
        )
    )


if __name__ == "__main__":
    run_main(main, Args, __doc__)

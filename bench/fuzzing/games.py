"""Cases of bench/fuzz.py: actions in worlds, and files of trajectories."""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import train_pg
from agent.attempt import AttemptSettings, Job
from agent.loop import PlayLoop
from agent.scripted import DemonstratorScript, ScriptedPolicy
from agentrefine.teacher import make_trajectory, teach
from artifacts.packing import Example
from artifacts.render import react_segments, text_of
from artifacts.seeds import generator
from artifacts.tokens import read_codec, tokens_of
from artifacts.trajectory import FAULTS, Trajectory, Turn, Writer, parse_line, read_trajectories, to_line
from bench.fuzzing.demands import LIMIT, SLOW, accepted, require
from bench.fuzzing.mutations import STRANGE, choose, spoil_bytes, spoil_json, spoil_text
from envs.alfworld.generate import ensure_generated
from envs.alfworld.rooms import family
from envs.make import make_world
from envs.webshop.generate import ensure_catalogue
from envs.wording import PERTURBATIONS
from lora.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
ACTIONS = 20  # of one case
ARGS = (train_pg.Args(), train_pg.Args(fractional=True, threshold=0.0))  # ways to select


# ---- actions ---------------------------------------------------------------------------------------------------------


class Actions:
    """Walks through worlds. `what`, here and below, describes the case at hand."""

    clock, limit, what = time.process_time, LIMIT * ACTIONS, ""

    def __init__(self, folder: Path):
        self.worlds = (
            ("alfworld", f"{family()}_train", {"data": str(ensure_generated())}),
            ("alfworld", f"{family()}_valid", {"data": str(ensure_generated()), "grammar": "0.3"}),
            ("webshop", "gen_test", {"data": str(ensure_catalogue())}),
            ("webshop", "gen_train", {"data": str(ensure_catalogue()), "mode": "text_rich"}),
            ("synthetic", "syn_train", {}),
            ("synthetic", "syn_held", {}),
            ("pddl", "pddl_test", {}),
        )
        for env, split, how in self.worlds:  # what is loaded or prepared only once does not count
            world = make_world(env, **how)
            world.reset(world.tasks(split)[0])

    def __call__(self, rng: np.random.Generator) -> Counter[str]:
        env, split, how = choose(rng, self.worlds)
        perturb, tells = choose(rng, ("none", *PERTURBATIONS)), bool(rng.random() < 0.3)
        world = make_world(env, perturb=perturb, tell_commands=tells, **how)
        self.what = f"{env} {how}, {perturb}"
        count, turns, opening = Counter({"actions": ACTIONS, f"actions_{env}": ACTIONS}), [], None
        for _ in range(ACTIONS):
            if opening is None:
                task, turns = choose(rng, world.tasks(split)), []
                opening = world.reset(task)
            listed = accepted("perturbation", world.actions) or []
            action = self.action(listed, world.commands(), rng)
            started = time.process_time()
            result = world.step(action)
            seconds = time.process_time() - started
            require(seconds < LIMIT, f"{SLOW}{seconds:.1f} s for {action[:80]!r}")
            turns.append(self.turn(action, result))
            count["refused_actions"] += not result.valid
            if not result.valid:
                after = accepted("perturbation", world.actions) or []
                require(after == listed, f"{action[:80]!r} was refused and changed the list of actions")
            self.check(env, task, opening, turns, result)
            opening = None if result.done else opening
        return count

    def action(self, listed: list[str], commands: list[str], rng: np.random.Generator) -> str:
        """An action that is listed, nearly listed, or strange."""
        known = [*listed, *commands] or ["look"]
        text = choose(rng, listed or known)
        text += "mug]" * text.endswith("[")
        how = rng.random()
        return text if how < 0.4 else spoil_text(text, known, rng) if how < 0.85 else choose(rng, STRANGE)

    def turn(self, action: str, result: Any) -> Turn:
        return Turn(
            thought="",
            action=action,
            observation=result.observation,
            thought_by="react",
            action_by="react",
            valid=result.valid,
        )

    def check(self, env: str, task: str, opening: Any, turns: list[Turn], result: Any) -> None:
        """Demands of a result, and of the record of all turns so far."""
        require(0 <= result.reward <= 1 and 0 <= result.progress <= 1, f"reward or progress of {result}")
        require(result.done or not result.success, "a success that is not the end")
        row = Trajectory(
            env=env,
            split=task.split("/")[0],
            task_id=task,
            task=opening.task,
            trial=0,
            round=0,
            seed=0,
            source="react",
            first_observation=opening.text,
            turns=turns,
            reward=result.reward,
            progress=result.progress,
            success=result.success,
            end="finished",
        )
        line = to_line(row)
        require(line.count(b"\n") == 1 and parse_line(line, "row:1") == row, "a record does not come back")
        lines = [segment.text for segment in react_segments(row) if segment.agent]
        require(all(text.find("\n") == len(text) - 1 for text in lines), "an action of several lines")


# ---- records ---------------------------------------------------------------------------------------------------------


def played_records() -> list[Trajectory]:
    """Three games that the demonstrator plays, as if the model had sampled its lines; each won, lost and faulty."""
    codec, split = read_codec(ROOT / "models/tiny-alfworld"), f"{family()}_train"
    make = functools.partial(make_world, "alfworld", data=str(ensure_generated()))
    settings = AttemptSettings(env="alfworld", stage="fuzz", round=1, seed=0, max_turns=12, patience=0, temperature=0.0)
    found = []
    for row in PlayLoop(
        [Job(t, 0) for t in make().tasks(split)[:3]], settings, make, ScriptedPolicy(DemonstratorScript)
    ):
        pieces = [(codec.encode(s.text, i == 0), s.agent) for i, s in enumerate(react_segments(row))]
        ids = [token for piece, _ in pieces for token in piece]
        sampled = [int(agent) for piece, agent in pieces for _ in piece]
        lost = {"reward": 0.0, "success": False}
        for trial, changes in enumerate(({}, lost | {"end": "stuck"}, lost | {"end": "timeout"})):
            found.append(msgspec.structs.replace(row, ids=ids, sampled=sampled, trial=trial, **changes))
    return sorted(found, key=lambda row: row.key)


class Records:
    """Files of trajectories with one change."""

    clock, limit, what = time.process_time, LIMIT, ""

    def __init__(self, folder: Path):
        base, self.path = ROOT / "models/tiny-alfworld", folder / "trajectories.jsonl"
        self.codec, self.tokenizer = read_codec(base), load_tokenizer(base)
        tasks = [f"syn_train/{number:05d}" for number in range(3)]
        taught = [make_trajectory(task, teach(task, generator(0, "fuzz", task)), 0) for task in tasks]
        self.rows = played_records() + taught

    def __call__(self, rng: np.random.Generator) -> Counter[str]:
        rows = [self.rows[i] for i in sorted(rng.permutation(len(self.rows))[:5])]
        lines = list(map(to_line, rows))
        index = int(rng.integers(len(lines)))
        how = choose(rng, ("bytes", "json", "json", "ids", "ids", "end", "end", "number", "twice", "cut"))
        changed = getattr(self, how)(rows[index], rng)
        start = len(os.path.commonprefix([lines[index], changed]))
        self.what = f"{how} of row {index}: {changed[max(0, start - 40) : start + 80]!r}"
        data = b"".join([*lines[:index], changed, *lines[index + 1 :]])
        self.path.write_bytes(data)
        found = accepted(f"{self.path}:", lambda: list(read_trajectories(self.path)))
        self.reopen(found)
        if found is None:
            return Counter(records=1, refused_records=1)
        require(len(found) == len(data.split(b"\n")) - 1, f"{len(found)} rows are read of another number of lines")
        trained = [self.train(found, args) for args in ARGS]
        return Counter(records=1, packed_records=sum(trained))

    def bytes(self, row: Trajectory, rng: np.random.Generator) -> bytes:
        return spoil_bytes(to_line(row), rng)

    def json(self, row: Trajectory, rng: np.random.Generator) -> bytes:
        return spoil_json(to_line(row).decode(), rng).encode(errors="replace") + b"\n"

    def ids(self, row: Trajectory, rng: np.random.Generator) -> bytes:
        """Other ids or flags."""
        record = json.loads(to_line(row))
        ids, flags = record["ids"] or [5, 6, 7], record["sampled"] or [0, 1, 1]
        at, to = sorted(int(i) for i in rng.integers(0, len(ids), 2))
        values = (-5, 10**30, 2**31 - 1, 2**31, 0, int(rng.integers(2048)), None)
        record["ids"], record["sampled"] = choose(
            rng,
            [
                (ids[:at] + ids[at:to][::-1] + ids[to:], flags),
                (ids[:at] + [choose(rng, values)] + ids[at + 1 :], flags),
                (ids[:at], flags[:at]),
                (ids[:at] + ids[to:], flags[:at] + flags[to:]),
                (ids + ids[at:to], flags + flags[at:to]),
                (ids[:at], flags),
                (ids, [1 - flag for flag in flags]),
                (ids, [1] * len(flags)),
            ],
        )
        return json.dumps(record).encode() + b"\n"

    def end(self, row: Trajectory, rng: np.random.Generator) -> bytes:
        """A fault, or another end, that has a reward all the same."""
        end = choose(rng, (*FAULTS, *FAULTS, "context_full", "won"))
        return json.dumps(json.loads(to_line(row)) | {"end": end, "reward": 1.0, "success": True}).encode() + b"\n"

    def number(self, row: Trajectory, rng: np.random.Generator) -> bytes:
        """Another number."""
        name = choose(rng, ("reward", "reward", "progress", "trial", "round", "seed", "schema"))
        number = choose(rng, ("-1", "0", "2", "0.5", "1e30", "1e308", "-1e308", "1e400", "1" + "0" * 30))
        return re.sub(rf'("{name}"):[^,]+', rf"\1:{number}", to_line(row).decode(), count=1).encode()

    def twice(self, row: Trajectory, rng: np.random.Generator) -> bytes:
        return to_line(row) * 2

    def cut(self, row: Trajectory, rng: np.random.Generator) -> bytes:
        return to_line(row)[:-1]

    def reopen(self, found: list[Trajectory] | None) -> None:
        """A stage that resumes on the file keeps all rows but faults, or refuses the file and changes no whole line."""
        before = self.path.read_bytes()
        writer = accepted(str(self.path), Writer, self.path)
        if writer is None:
            after = self.path.read_bytes()
            require(before.startswith(after) and b"\n" not in before[len(after) :], "a refused file was changed")
            return
        writer.close()
        kept = list(read_trajectories(self.path))
        if found is not None:
            require(kept == [row for row in found if row.end not in FAULTS], "rows were lost")

    def train(self, found: list[Trajectory], args: train_pg.Args) -> int:
        """Selects and packs as train_pg.py does. Returns how many rows were packed."""
        rows = [Example(trajectory=row, weight=0.0, file="F", line=line) for line, row in enumerate(found, 1)]
        examples = train_pg.select(rows, args)
        require(not any(e.trajectory.end in FAULTS for e in examples), "a fault was selected to train on")
        packed = accepted("", train_pg.pack_examples, examples, args, self.codec)
        if packed is None:
            return 0
        require(bool(np.isfinite(packed.weights_NL).all()), "a weight that is not finite")
        for example in examples:
            row = example.trajectory
            spelled = self.tokenizer.decode(tokens_of(row, self.codec).ids, skip_special_tokens=False)
            text = text_of(react_segments(row))
            same = text.strip() == spelled.strip() or (row.ids and text.strip().startswith(spelled.strip()))
            require(bool(same), f"the ids of {row.key} spell another text")
        return len(examples)

"""Synthesises worlds and trajectories in them with mistakes and their corrections (AgentRefine).

    python refine.py                                  # 600 of the procedural teacher -> runs/refine/refine
    python refine.py --server.url URL --server.model NAME --count 40       # a language model as the teacher
    python refine.py --verify FILE                    # judge a JSONL of {"script", "turns"}, one verdict a line

The procedural teacher (agentrefine/) samples worlds and plays them by their rules. A language model is given a persona,
writes a script, an environment with a goal and actions, and then plays it as both DM and Player. Whoever wrote it, only
what the verifier accepts is kept: at least two mistakes that are followed by another try, and the goal.
What a model got right before its first fault is kept, and it goes on from there, within a number of calls per persona.
Writes <run>/refine/trajectories.jsonl, in which `errors` of a turn says what it did wrong; train_pg.py --inputs trains
on it, agentrefine/conversations.py exports it.
Left out: worlds that are scored (envs/synthetic/world.py), the judgement of mistakes by a second model.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from agent.policy import Ask
from agent.server import Server, ServerPolicy
from agentrefine.teacher import make_script, make_trajectory, make_turns, teach
from agentrefine.verify import main_over, to_trajectory, verified_prefix, verify
from artifacts.cli import parse
from artifacts.seeds import draw_seed, generator
from artifacts.stage import Stage, run_main, sha256
from artifacts.trajectory import Trajectory, Writer, sort_file
from envs.synthetic.spec import WORLDS

PROMPTS = Path(__file__).parent / "prompts"
SEEDS_APART = 100_000  # worlds between those of two seeds
OF_SCRIPT = ("json", "keys", "regex_invalid", "regex_self")


@dataclass(frozen=True, kw_only=True)
class Args:
    run: Path = Path("runs/refine")
    """The run's directory."""
    count: int = 600
    """Trajectories to keep (procedural teacher), or personas to ask (a server)."""
    server: Server = Server(max_tokens=4096)
    """A language model that writes worlds and plays them (default: the procedural teacher)."""
    personas: Path = PROMPTS / "personas.txt"
    """File with a persona a line, for the server; each is asked as often as it takes to reach the count."""
    calls: int = 4
    """Calls per persona at most, for its script and its turns together (paper: 4)."""
    temperature: float = 1.0
    """Sampling temperature of the server."""
    seed: int = 0
    """Seeds worlds, mistakes and requests."""
    verify: Path | None = None
    """Judge this JSONL file of {"script", "turns"} and do nothing else."""


# ---- the procedural teacher ------------------------------------------------------------------------------------------


def taught(args: Args) -> Iterator[tuple[str, Trajectory | None]]:
    """(what the verifier says, the trajectory that it accepts) of one world after the other, without an end."""
    for number in itertools.count(args.seed * SEEDS_APART):
        task_id = f"syn_train/{number:05d}"
        turns = teach(task_id, generator(args.seed, "refine", task_id))
        verdict = verify(make_script(task_id), make_turns(task_id, turns))
        yield verdict.rule or "accepted", make_trajectory(task_id, turns, args.seed) if verdict.ok else None


def keep_taught(args: Args, writer: Writer, bar: tqdm) -> Counter[str]:
    """Keeps trajectories of the procedural teacher up to the count. Returns what the verifier said, and how often."""
    verdicts: Counter[str] = Counter()
    for verdict, trajectory in taught(args):
        verdicts[verdict] += 1
        if trajectory:
            if trajectory.key not in writer.known:
                writer.write(trajectory)
            bar.update()
        if verdicts["accepted"] == args.count:
            return verdicts


# ---- a language model as the teacher ---------------------------------------------------------------------------------


def objects_in(text: str) -> list[dict[str, Any]]:
    """The JSON objects that stand one after the other in a text, whatever is between them, up to one that is cut."""
    decoder, found, place = json.JSONDecoder(), [], text.find("{")
    while place != -1:
        try:
            value, end = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError):
            break
        found.append(value)
        place = text.find("{", end)
    return found


def write_one(args: Args, persona: str) -> Generator[str, str | None, tuple[str, Any, list]]:
    """Asks for a script and its turns: yields prompts, is sent replies (None: there was none), returns the last
    verdict, the script and the turns."""
    ask_script, ask_turns = ((PROMPTS / f"refine_{name}.txt").read_text() for name in ("script", "play"))
    script, turns, verdict = None, [], "no script"
    for _ in range(args.calls):
        if script is None:
            found = objects_in((yield ask_script.replace("{persona}", persona)) or "")
            script = found[0] if found else None
            verdict = verify(script, []).rule if found else "json"
            if verdict in OF_SCRIPT:
                script = None
            continue
        told = json.dumps(script, ensure_ascii=False)
        so_far = "\n".join(json.dumps(turn, ensure_ascii=False) for turn in turns)
        reply = yield ask_turns.replace("{script}", told).replace("{turns}", so_far)
        tried = turns + objects_in(reply or "")
        found = verify(script, tried)
        if found.ok:
            return "accepted", script, tried
        turns, verdict = tried[: verified_prefix(script, tried)], found.rule
    return verdict, script, turns


def ask_server(args: Args, writer: Writer, bar: tqdm, directory: Path) -> tuple[Counter[str], dict[str, int]]:
    """Asks for the count of personas, several at once. Returns the verdicts and what was asked."""
    author = ServerPolicy(args.server, directory / "replies.sqlite", whole=True)
    personas = [line.strip() for line in args.personas.read_text().splitlines() if line.strip()]
    if not personas:
        raise ValueError(f"{args.personas} has no persona: expected one a line")
    waiting = iter(range(args.count))
    verdicts: Counter[str] = Counter()
    under_way: dict[int, tuple[int, int, Generator]] = {}  # session -> persona's number, call, what it is part of

    def go_on(number: int, call: int, course: Generator, reply: str | None) -> None:
        try:
            prompt = course.send(reply)
        except StopIteration as end:
            verdict, script, turns = end.value
            verdicts[verdict] += 1
            bar.update()
            task_id = f"personas/{number:05d}"
            if verdict == "accepted" and (task_id, 0) not in writer.known:
                writer.write(to_trajectory(script, turns, split="personas", task_id=task_id, seed=args.seed))
            return
        session = author.open(prompt)
        author.submit(Ask(session, args.temperature, draw_seed(args.seed, "refine", number, call)))
        under_way[session] = number, call + 1, course

    while True:
        while len(under_way) < author.slots and (number := next(waiting, None)) is not None:
            go_on(number, 0, write_one(args, personas[number % len(personas)]), None)
        if not under_way:
            return verdicts, author.counts
        for session, text in author.poll():
            course = under_way.pop(session)
            author.close(session)
            go_on(*course, text if isinstance(text, str) else None)


# ---- the stage -------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    if args.verify:
        return main_over(args.verify)
    if min(args.count, args.calls) < 1:
        raise ValueError(f"--count {args.count} and --calls {args.calls} must be at least 1")
    directory = args.run / "refine"
    prompts = [args.personas, PROMPTS / "refine_script.txt", PROMPTS / "refine_play.txt"] if args.server.url else []
    stage = Stage(directory, args, {"worlds": WORLDS, "prompts": [sha256(path) for path in prompts]})
    if stage.finished:
        return None
    started, path, asked = time.monotonic(), directory / "trajectories.jsonl", {}
    with Writer(path) as writer, tqdm(total=args.count, desc="refine", unit="trajectory") as bar:
        if args.server.url:
            verdicts, asked = ask_server(args, writer, bar, directory)
        else:
            verdicts = keep_taught(args, writer, bar)
    kept = sort_file(path)
    mistakes = Counter(error for trajectory in kept for turn in trajectory.turns for error in turn.errors)
    made, per_hour = verdicts.total(), 3600 * verdicts.total() / max(1e-9, time.monotonic() - started)
    stage.finish(
        {
            "trajectories": len(kept),
            "made": made,
            "acceptance": round(verdicts["accepted"] / made, 4),
            "verdicts": dict(verdicts),
            "mistakes": dict(mistakes),
            "made_per_hour": round(per_hour, 1),
            "asked": asked,
        }
    )
    print(
        f"refine: {len(kept)} of {made} accepted ({100 * verdicts['accepted'] / made:.1f} %), {per_hour:.0f} made an "
        f"hour; rejected: {dict(verdicts - Counter(accepted=made)) or 'none'} -> {path}"
    )
    return None


if __name__ == "__main__":
    run_main(main, parse(Args, __doc__))

"""Synthesises worlds, and trajectories that contain mistakes and their corrections (AgentRefine).

    python refine.py                                  # 600 trajectories, procedural teacher -> runs/refine/refine
    python refine.py --server.url URL --server.model NAME --count 40       # a language model as the teacher
    python refine.py --verify FILE                    # judge a JSONL of {"script", "turns"}, one verdict per line

The procedural teacher (agentrefine/) samples worlds and plays them by their rules. A language model receives a persona,
writes a script (environment, goal, actions) and then plays it as both game master (DM) and player. From either teacher
only what the verifier accepts is kept: at least two mistakes, each followed by another attempt, and the goal reached.
When a model's reply has a fault, the turns before it are kept and the next request continues from there, up to --calls
requests per persona.
Writes <run>/refine/trajectories.jsonl, where `errors` of a turn lists its kinds of mistake; train_pg.py --inputs trains
on it, agentrefine/conversations.py exports it.
Left out: scoring worlds (envs/synthetic/world.py), a second model to judge mistakes.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import itertools
import json
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from agent.policy import Ask, NoReply
from agent.server import Server, ServerPolicy
from agentrefine.teacher import make_script, make_trajectory, make_turns, teach
from agentrefine.verify import main_over, to_trajectory, verified_prefix, verify
from artifacts.cli import Range
from artifacts.json_io import parse_json
from artifacts.seeds import draw_seed, generator
from artifacts.stage import Stage, run_stage, sha256
from artifacts.trajectory import Trajectory, Writer, sort_file
from envs.synthetic.spec import WORLDS, fill

PROMPTS = Path(__file__).parent / "prompts"
WORLDS_PER_SEED = 100_000  # seed s starts at world s * WORLDS_PER_SEED
SCRIPT_RULES = ("json", "keys", "regex_invalid", "regex_self")


@dataclass(frozen=True, kw_only=True)
class Args:
    run: Path = Path("runs/refine")
    """Directory of the run."""
    count: Annotated[int, Range(1, 10**8)] = 600
    """Trajectories to keep (procedural teacher), or personas to request (server)."""
    server: Server = Server(max_tokens=4096)
    """A language model that writes worlds and plays them (default: the procedural teacher)."""
    personas: Path = Path("prompts/personas.txt")
    """File with one persona per line, for the server; they are reused in order until the count is reached."""
    calls: Annotated[int, Range(1, 1000)] = 4
    """Maximum requests per persona, script and turns together (paper: 4)."""
    temperature: Annotated[float, Range(0, 10)] = 1.0
    """Sampling temperature of the server."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of worlds, mistakes and requests."""
    verify: Path | None = None
    """Only judge this JSONL file of {"script", "turns"}; nothing is synthesised."""

    def check(self) -> None:
        if self.server.api == "tokens":
            raise ValueError("--server.api is tokens; expected chat or completions: the teacher writes text")


# ---- the procedural teacher ------------------------------------------------------------------------------------------


def generate(args: Args) -> Iterator[tuple[str, Trajectory | None]]:
    """Yields (verdict, trajectory if accepted) for one world after another, endlessly."""
    for index in itertools.count(args.seed * WORLDS_PER_SEED):
        task_id = f"syn_train/{index:05d}"
        turns = teach(task_id, generator(args.seed, "refine", task_id))
        verdict = verify(make_script(task_id), make_turns(task_id, turns))
        yield verdict.rule or "accepted", make_trajectory(task_id, turns, args.seed) if verdict.ok else None


def run_procedural_teacher(args: Args, writer: Writer, bar: tqdm) -> Counter[str]:
    """Writes accepted trajectories until there are --count of them. Returns the number of worlds per verdict."""
    verdicts: Counter[str] = Counter()
    for verdict, trajectory in generate(args):
        verdicts[verdict] += 1
        if trajectory:
            if trajectory.key not in writer.known:
                writer.write(trajectory)
            bar.update()
        if verdicts["accepted"] == args.count:
            return verdicts


# ---- a language model as the teacher ---------------------------------------------------------------------------------


def extract_objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in a text, skipping what is between them; stops at the first that is cut or cannot be read, as
    for NaN, half an emoji, thousands of digits or levels."""
    decoder, objects, start = json.JSONDecoder(), [], text.find("{")
    while start != -1:
        try:
            _, end = decoder.raw_decode(text, start)
            objects.append(parse_json(text[start:end]))
        except (ValueError, RecursionError):
            break
        start = text.find("{", end)
    return objects


def request_trajectory(args: Args, persona: str) -> Generator[str, str | None, tuple[str, Any, list]]:
    """Requests a script and its turns: yields prompts, receives replies (None if there was none), returns the last
    verdict, the script and the turns."""
    script_prompt, turns_prompt = ((PROMPTS / f"refine_{name}.txt").read_text() for name in ("script", "play"))
    script, turns, rule = None, [], "no script"
    for _ in range(args.calls):
        if script is None:
            objects = extract_objects((yield script_prompt.replace("{persona}", persona)) or "")
            script = objects[0] if objects else None
            rule = verify(script, []).rule if objects else "json"
            if rule in SCRIPT_RULES:
                script = None
            continue
        script_json = json.dumps(script, ensure_ascii=False)
        turns_json = "\n".join(json.dumps(turn, ensure_ascii=False) for turn in turns)
        reply = yield fill(turns_prompt, {"script": script_json, "turns": turns_json})
        candidate = turns + extract_objects(reply or "")
        verdict = verify(script, candidate)
        if verdict.ok:
            return "accepted", script, candidate
        turns, rule = candidate[: verified_prefix(verdict, candidate)], verdict.rule
    return rule, script, turns


def run_server_teacher(args: Args, writer: Writer, bar: tqdm, directory: Path) -> tuple[Counter[str], dict[str, int]]:
    """Processes --count personas, several concurrently. Returns the number of personas per verdict, and the policy's
    request counts."""
    policy = ServerPolicy(args.server, directory / "replies.sqlite", whole=True)
    personas = [line.strip() for line in args.personas.read_text().splitlines() if line.strip()]
    if not personas:
        raise ValueError(f"{args.personas} has no persona; expected one per line")
    waiting = iter(range(args.count))
    verdicts: Counter[str] = Counter()
    pending: dict[int, tuple[int, int, Generator]] = {}  # session -> index of the persona, next call, its dialogue

    def advance(index: int, call: int, dialogue: Generator, reply: str | None) -> None:
        try:
            prompt = dialogue.send(reply)
        except StopIteration as end:
            verdict, script, turns = end.value
            verdicts[verdict] += 1
            bar.update()
            task_id = f"personas/{index:05d}"
            if verdict == "accepted" and (task_id, 0) not in writer.known:
                writer.write(to_trajectory(script, turns, split="personas", task_id=task_id, seed=args.seed))
            return
        session, seed = policy.open(prompt), draw_seed(args.seed, "refine", index, call)
        policy.submit(Ask(session=session, temperature=args.temperature, seed=seed))
        pending[session] = index, call + 1, dialogue

    while True:
        while len(pending) < policy.slots and (index := next(waiting, None)) is not None:
            advance(index, 0, request_trajectory(args, personas[index % len(personas)]), None)
        if not pending:
            return verdicts, policy.counts
        for session, reply in policy.poll():
            state = pending.pop(session)
            policy.close(session)
            if isinstance(reply, NoReply):
                tqdm.write(f"persona {state[0]}: {reply}")
            advance(*state, reply if isinstance(reply, str) else None)


# ---- the stage -------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    if args.verify:
        return main_over(args.verify)
    prompts = [args.personas, PROMPTS / "refine_script.txt", PROMPTS / "refine_play.txt"] if args.server.url else []
    facts = {"worlds": WORLDS, "prompts": [sha256(path) for path in prompts]}
    with Stage(args.run / "refine", args, facts) as stage:
        if not stage.finished:
            synthesise(args, stage)
    return None


def synthesise(args: Args, stage: Stage) -> None:
    """Makes what is missing, and finishes the stage."""
    started, path, requests = time.monotonic(), stage.directory / "trajectories.jsonl", {}
    with Writer(path) as writer, tqdm(total=args.count, desc="refine", unit="trajectory") as bar:
        if args.server.url:
            verdicts, requests = run_server_teacher(args, writer, bar, stage.directory)
        else:
            verdicts = run_procedural_teacher(args, writer, bar)
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
            "asked": requests,
        }
    )
    print(
        f"refine: {len(kept)} of {made} accepted ({100 * verdicts['accepted'] / made:.1f} %), {per_hour:.0f} made per "
        f"hour; rejected: {dict(verdicts - Counter(accepted=made)) or 'none'} -> {path}"
    )


if __name__ == "__main__":
    run_stage(main, Args, __doc__)

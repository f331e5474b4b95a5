"""Retries the agent's failed tasks with sampled actions, each with a reason that ActRe writes after the fact (A3T).

The policy retries every task that this round's rollout did not solve. At each step, with the given --probability (and
after --max-invalid invalid ones in a row), a sampled admissible action replaces its own; ActRe, given observation and
action, then writes the reason: the frozen base, or with --actre-adapter the base tuned to it (train_pg.py --form
actre). Round 0 composes nothing and leaves an empty file, since the paper keeps only the prompted agent's successes.

    python actre.py                          # the current round of runs/a3t
    python actre.py --reason empty           # compose without ActRe

Writes <run>/round_<k>/actre/trajectories.jsonl, failed compositions included (train_pg.py drops them).
Left out: training.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import dataclasses
import functools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from agent.args import (
    PlayArgs,
    Player,
    agent_facts,
    explain_faults,
    fit_memory,
    make_policy,
    make_settings,
    require_file,
    resolve,
    run_identity,
    sampler,
    world_identity,
    world_maker,
)
from agent.attempt import Compose, Job
from agent.loop import PlayLoop
from agent.server import Server
from artifacts.cli import Range
from artifacts.json_io import read_json
from artifacts.scores import closing_notes
from artifacts.shards import adopt, finish_shards, open_shard, share
from artifacts.stage import (
    Stage,
    adapter_of_round,
    adapter_sha,
    current_round,
    joined_identity,
    require_done,
    round_directory,
    run_stage,
    sha256,
)
from artifacts.track import track_rounds
from artifacts.trajectory import FAULTS, Trajectory, Writer, read_trajectories, sort_file
from envs.base import World
from envs.make import world_name
from envs.panel import require_tasks
from lora.checkpoint import adapter_weights, base_facts
from lora.sharding import play_together


@dataclass(frozen=True, kw_only=True)
class Args(PlayArgs):
    run: Path = Path("runs/a3t")
    """Directory of the run."""
    round: Annotated[int, Range(0, 10_000)] | None = None
    """Round to compose for (default: the first untrained round)."""
    actre_server: Server = Server()
    """An OpenAI-compatible server as ActRe, in place of the local base; its model may differ from the agent's (default:
    the base on the agent's server, if that takes token ids)."""
    actre_adapter: Path | None = None
    """Adapter of ActRe, in PEFT's layout (default: none, the frozen base)."""
    actre_prompt: Path | None = None
    """File with a few-shot example that precedes every session of ActRe (prompts/; paper: always)."""
    probability: Annotated[float, Range(0, 1)] = 0.1
    """p, the probability of a sampled action at each step (the paper's value is not recoverable)."""
    max_invalid: Annotated[int, Range(0, 10_000)] = 3
    """Also sample an action after this many invalid ones of the agent in a row (paper: 3); 0: never, so that with
    --probability 0 a failed task is merely tried again."""
    sample: Literal["commands", "verbs"] = "commands"
    """Sample uniformly over admissible commands, or first over verbs and then over the verb's commands."""
    reason: Literal["actre", "template", "empty"] = "actre"
    """Reason of a sampled action: written by ActRe, a fixed sentence, or none."""
    budget: Annotated[int, Range(1, 10_000)] = 3
    """Maximum compositions per failed task (paper: 40 on ALFWorld, 20 on WebShop)."""
    force: Annotated[int, Range(1, 10_000)] = 1
    """Minimum compositions per failed task, made even after a success (paper: the whole budget on ALFWorld, 3 on
    WebShop)."""
    temperature: Annotated[float, Range(0, 10)] = 1.0
    """Sampling temperature of the agent's own turns; 0 is greedy (not stated in the paper)."""

    def check(self) -> None:
        super().check()
        if self.actre_adapter is not None:
            if explaining_server(self).takes_text:
                raise ValueError("--actre-adapter: expected ActRe to be the base, not a server of text")
            adapter_weights(self.actre_adapter)  # raises if it is none


def explaining_server(args: Args) -> Server:
    """The server that ActRe is; without a URL, ActRe is the local base."""
    shared = args.actre_server.url is None and args.server.api == "tokens"
    return args.server if shared else args.actre_server


def next_trials(args: Args, done: dict[int, bool]) -> list[int]:
    """Trials of a task to start, given the finished ones {trial: success}: all of `force` at once, then one at a time
    until a success or the end of the budget. A resumed run starts the same trials."""
    force = min(args.force, args.budget)
    if not done:
        return list(range(force))
    missing = [trial for trial in range(force) if trial not in done]
    if missing or any(done.values()):
        return missing
    return [trial for trial in range(args.budget) if trial not in done][:1]


def failed_tasks(played: Path) -> list[str]:
    """Tasks that the rollout did not solve, without those whose every attempt ended in a fault."""
    by_task: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in read_trajectories(played):
        by_task[trajectory.task_id].append(trajectory)
    return [
        task
        for task, attempts in by_task.items()
        if not any(t.success for t in attempts) and any(t.end not in FAULTS for t in attempts)
    ]


def compose(args: Args, round_index: int, failed: list[str], writer: Writer, adapter: Path | None) -> dict[str, Any]:
    """Composes for all failed tasks, resuming from the writer's file. Returns counts for done.json."""
    finished: dict[str, dict[int, bool]] = {task: {} for task in failed}
    for trajectory in read_trajectories(writer.path):
        finished[trajectory.task_id][trajectory.trial] = trajectory.success
    jobs = [Job(task, trial) for task in failed for trial in next_trials(args, finished[task])]
    if not jobs:
        return {"asked": {}, "rates": {}}
    folder = writer.path.parent
    player = Player(args.server, adapter, args.prompt)
    explainers = [Player(explaining_server(args), args.actre_adapter, args.actre_prompt)] * (args.reason == "actre")
    args = fit_memory(args, player, *explainers)
    react, explainer = make_policy(args, player, folder / "replies.sqlite"), None
    for each in explainers:
        explainer = make_policy(args, each, folder / "replies_actre.sqlite", beside=react)
    rule = Compose(probability=args.probability, max_invalid=args.max_invalid, sample=args.sample, reason=args.reason)
    loop = PlayLoop(jobs, make_settings(args, "actre", round_index, compose=rule), world_maker(args), react, explainer)
    started = set(jobs)
    for trajectory in loop:
        writer.write(trajectory)
        task, trials = trajectory.task_id, finished[trajectory.task_id]
        trials[trajectory.trial] = trajectory.success
        more = [job for trial in next_trials(args, trials) if (job := Job(task, trial)) not in started]
        started.update(more)
        loop.add(more)
    asked = {"react": react.counts, "actre": explainer.counts if explainer else {}}
    return {"asked": asked, "rates": loop.rates.summary(), "sampler": sampler(args)}


@explain_faults
def main(args: Args) -> None:
    args = resolve(args)
    require_file("--actre-prompt", args.actre_prompt)
    round_index = current_round(args.run) if args.round is None else args.round
    joined_identity(args.run, {"env": world_name(args.env)})  # before tasks of another world are looked for
    adapter = adapter_of_round(args.run, round_index)
    rollout = round_directory(args.run, round_index) / "rollout"
    require_done(rollout, f"python rollout.py --run {args.run} --round {round_index}")
    played = rollout / "trajectories.jsonl"
    world, identity = world_maker(args)(), run_identity(args)
    panel = read_json(rollout / "config.json", dict[str, Any])["facts"].get("panel")
    if panel is not None:  # else demonstrations, on games that nobody plays again (models/demonstrations.py)
        tasks = sorted({trajectory.task_id for trajectory in read_trajectories(played)})
        require_tasks(world, tasks)
        identity = world_identity(args, world, panel, tasks)
    explains = args.reason == "actre" and not args.actre_server.takes_text
    facts = {
        "rollout": sha256(played),
        "world": world.facts,
        **agent_facts(args, adapter, prompt=args.prompt, actre_prompt=args.actre_prompt),
        "explainer": base_facts(args.model) if explains else None,
        "actre_adapter": adapter_sha(args.actre_adapter) if explains else None,
    }
    whole = round_directory(args.run, round_index) / "actre"
    with open_shard(whole, args, facts, identity) as stage:
        if not stage.finished:
            compose_all(args, round_index, world, played, adapter, stage)
    finish_shards(whole, args.shard, lambda: main(dataclasses.replace(args, round=round_index, shard=None)))
    if not args.shard:
        track_rounds(args.run, args.track)


def compose_all(args: Args, round_index: int, world: World, played: Path, adapter: Path | None, stage: Stage) -> None:
    """Composes what is missing for the failed tasks of the rollout `played`, and finishes the stage."""
    path = stage.directory / "trajectories.jsonl"
    failed = share(failed_tasks(played), args.shard) if round_index else []
    with Writer(path) as writer:
        shards = {} if args.shard else adopt(stage, writer)
        counts = compose(args, round_index, failed, writer, adapter)
    composed = sort_file(path)
    won = [t for t in composed if t.success]
    solved = {t.task_id for t in won}
    stage.finish(
        {
            "round": round_index,
            "failed_tasks": len(failed),
            "composed": len(composed),
            "success": len(won),
            "solved_tasks": len(solved),
            "positives_per_failed_task": round(len(won) / len(failed), 2) if failed else None,
            "composed_success_rate": round(len(won) / len(composed), 4) if composed else None,
            "sampled_turns": sum(turn.action_by == "sampled" for t in composed for turn in t.turns),
            **counts,
            **shards,
        }
    )
    why = " (round 0 keeps the agent's own successes only)" if round_index == 0 else ""
    shard = f" shard {args.shard}" if args.shard else ""
    print(
        f"actre round {round_index}{shard}: {len(won)}/{len(composed)} compositions won, "
        f"{len(solved)}/{len(failed)} failed tasks solved{why} -> {path}"
        f"{closing_notes(composed, stage.directory, world.facts.get('grammar'))}"
    )


if __name__ == "__main__":
    run_stage(functools.partial(play_together, main), Args, __doc__)

"""Plays every task of a panel with the ReAct agent: round k uses the adapter of round k - 1, round 0 the base.

    python rollout.py                        # the current round of runs/a3t
    python rollout.py --run runs/x --panel train-600 --temperature 0.7
    python rollout.py --run runs/x --env world.py:World --script player.py:Player     # demonstrations of a world

Writes <run>/round_<k>/rollout/trajectories.jsonl. A killed run resumes with the same command, and retries attempts that
ended as env_error, llm_error or timeout.
Left out: sampled actions and ActRe (actre.py), training (train_pg.py), scores on held-out tasks (evaluate.py).
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from agent.args import (
    PlayArgs,
    Player,
    agent_facts,
    explain_faults,
    fit_memory,
    make_policy,
    make_settings,
    resolve,
    sampler,
    world_identity,
    world_maker,
)
from agent.attempt import Job
from agent.loop import PlayLoop
from agent.scripted import DemonstratorScript, ScriptedPolicy
from artifacts.cli import Range
from artifacts.scores import closing_notes, success_by_type
from artifacts.shards import adopt, finish_shards, open_shard, share
from artifacts.stage import Stage, adapter_of_round, current_round, round_directory, run_stage
from artifacts.track import track_rounds
from artifacts.trajectory import Writer, sort_file
from envs.base import World
from envs.own import Script, load_own
from envs.panel import default_panels, panel_name, pick_tasks, require_tasks, require_trainable
from lora.sharding import play_together


@dataclass(frozen=True, kw_only=True)
class Args(PlayArgs):
    run: Path = Path("runs/a3t")
    """Directory of the run."""
    round: Annotated[int, Range(0, 10_000)] | None = None
    """Round to play (default: the first untrained round)."""
    panel: str | None = None
    """Panel of training tasks: one that `python -m envs.panel` lists, a file FILE.txt with sorted task ids, one per
    line, or a split of the world (default: the one made for the world's data, such as train-600 or gen_train-120; for
    a world of your own the split train)."""
    limit: Annotated[int, Range(1)] | None = None
    """Play at most this many tasks, spread evenly over the panel (default: all)."""
    trials: Annotated[int, Range(1, 10_000)] = 1
    """Attempts per task (paper: 1)."""
    script: str | None = None
    """A scripted player in place of the model, FILE.py:CLASS (docs/your-own-world.md): demonstrations, of which
    train_pg.py keeps the successes."""

    def check(self) -> None:
        super().check()
        if self.script and (self.server.url or self.prompt):
            raise ValueError(f"--script {self.script} plays without a model; expected no --server.url and no --prompt")
        if self.script:
            load_own(self.script, Script)  # raises if it is none


@explain_faults
def main(args: Args) -> None:
    args = resolve(args)
    round_index = current_round(args.run) if args.round is None else args.round
    adapter = None if args.script else adapter_of_round(args.run, round_index)
    panel = args.panel or default_panels("train", args.env, args.data)[0]
    world = world_maker(args)()
    tasks, panel_hash = pick_tasks(panel, args.limit, world)
    require_trainable(panel, args.env, tasks)
    require_tasks(world, tasks)
    panel = panel_name(panel)
    identity = world_identity(args, world, panel, tasks)
    facts = {
        "panel": panel,
        "panel_sha256": panel_hash,
        "tasks": len(tasks),
        "content": identity["content"],
        "world": world.facts,
        "script": load_own(args.script, Script).facts if args.script else None,
        **agent_facts(args, adapter, prompt=args.prompt),
    }
    whole = round_directory(args.run, round_index) / "rollout"
    with open_shard(whole, args, facts, identity) as stage:
        if not stage.finished:
            play(args, round_index, world, tasks, adapter, stage)
    finish_shards(whole, args.shard, lambda: main(dataclasses.replace(args, round=round_index, shard=None)))
    if not args.shard:
        track_rounds(args.run, args.track)


def play(args: Args, round_index: int, world: World, tasks: list[str], adapter: Path | None, stage: Stage) -> None:
    """Plays what is missing, and finishes the stage."""
    path, counts = stage.directory / "trajectories.jsonl", {"asked": {}, "rates": {}}
    with Writer(path) as writer:
        shards = {} if args.shard else adopt(stage, writer)
        jobs = [Job(task, trial) for task in share(tasks, args.shard) for trial in range(args.trials)]
        if jobs := [job for job in jobs if job not in writer.known]:
            if args.script:
                script = load_own(args.script, Script).cls
                react = ScriptedPolicy(functools.partial(DemonstratorScript, player=script), args.slots or 64)
            else:
                player = Player(args.server, adapter, args.prompt)
                args = fit_memory(args, player)
                react = make_policy(args, player, stage.directory / "replies.sqlite")
            how = make_settings(args, "rollout", round_index, player="demo" if args.script else "react")
            loop = PlayLoop(jobs, how, world_maker(args), react)
            for trajectory in loop:
                writer.write(trajectory)
            counts = {"asked": react.counts, "rates": loop.rates.summary(), "sampler": sampler(args)}
    trajectories = sort_file(path)
    won = sum(t.success for t in trajectories)
    turns = sum(len(t.turns) for t in trajectories) / max(1, len(trajectories))
    stage.finish(
        {
            "round": round_index,
            "trajectories": len(trajectories),
            "success": won,
            "reward": round(sum(t.reward for t in trajectories) / max(1, len(trajectories)), 4),
            "types": success_by_type(trajectories),
            "mean_turns": round(turns, 2),
            "ids": sum(len(t.ids) for t in trajectories),
            **counts,
            **shards,
        }
    )
    shard = f" shard {args.shard}" if args.shard else ""
    print(
        f"rollout round {round_index}{shard}: {won}/{len(trajectories)} won, {turns:.1f} turns each -> {path}"
        f"{closing_notes(trajectories, stage.directory, world.facts.get('grammar'))}"
    )


if __name__ == "__main__":
    run_stage(functools.partial(play_together, main), Args, __doc__)

"""The ReAct agent plays every task of a panel once, alone: round k with the adapter trained in round k - 1.

    python rollout.py                        # the current round of runs/a3t
    python rollout.py --run runs/x --panel train-600 --temperature 0.7

Writes <run>/round_<k>/rollout/trajectories.jsonl. Left out: sampled actions and ActRe (actre.py), training
(train_pg.py), scores on held-out tasks (evaluate.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from agent import Job, Play, play, require_tasks
from envs.base import make_world
from envs.panel import default_panels, pick_tasks
from evaluate import success_by_type
from lora.checkpoint import base_sha
from policy import make_policy, prompt_facts
from server import Server
from stage import Stage, adapter_of_round, adapter_sha, current_round, round_directory, run_main
from trajectory import Trajectory, Writer, sort_file


@dataclass(frozen=True, kw_only=True)
class Args:
    run: Path = Path("runs/a3t")
    """The run's directory."""
    round: int | None = None
    """Round to play (default: the first one that is not trained yet)."""
    env: str = "alfworld"
    """World."""
    data: str | None = None
    """The world's data (default: $ALFWORLD_DATA, or generated games where it is not set)."""
    engine: Literal["ours", "textworld"] = "ours"
    """Engine of the world; textworld is the slow reference."""
    panel: str | None = None
    """Panel of training tasks (default: train-600 with real games, gen_train-120 with generated ones)."""
    limit: int | None = None
    """Play only so many tasks, spread evenly over the panel."""
    trials: int = 1
    """Attempts at each task (paper: 1)."""
    model: Path = Path("models/tiny-alfworld")
    """Base model, a Hugging Face folder."""
    weights: Literal["nf4", "fp32"] = "nf4"
    """How the base is held."""
    server: Server = Server()
    """Where to ask instead of the local model."""
    prompt: Path | None = None
    """File with an example that stands before every session (prompts/; paper: in round 0). Adapters are trained on the
    sessions alone."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy (not stated in the paper; ReAct's own harness is greedy)."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that have this share together; 1: from all."""
    max_turns: int = 20
    """Turns after which an attempt ends; a thought and its action are one turn (not stated in the paper)."""
    patience: int = 3
    """An attempt ends as stuck when the same action has had the same answer so many times again; 0: never (not in the
    paper)."""
    deadline: float | None = None
    """Seconds after which an attempt ends as timeout, which is never a failure of the agent (default: none)."""
    slots: int = 64
    """Attempts played at once."""
    context: int = 1024
    """Tokens that a session can hold; an attempt that needs more ends as context_full."""
    seed: int = 0
    """Seeds every draw, together with round, task, trial and turn."""


def main(args: Args) -> None:
    number = current_round(args.run) if args.round is None else args.round
    adapter = adapter_of_round(args.run, number)
    panel = args.panel or default_panels("train", args.env, args.data)[0]
    tasks, panel_hash = pick_tasks(panel, args.limit)
    directory = round_directory(args.run, number) / "rollout"
    facts = {"panel": panel, "panel_sha256": panel_hash, "base": base_sha(args.model), "adapter": adapter_sha(adapter),
             **prompt_facts(args.prompt)}  # fmt: skip
    stage = Stage(directory, args, facts)
    if stage.finished:
        return
    world = make_world(args.env, data=args.data, engine=args.engine)
    require_tasks(world, tasks)
    settings = Play(env=args.env, stage="rollout", round=number, seed=args.seed, max_turns=args.max_turns,
                    patience=args.patience, temperature=args.temperature,
                    deadline=args.deadline)  # fmt: skip
    react = make_policy(args.server, directory / "replies.sqlite", args.model, adapter,
                        prompt=args.prompt, top_p=args.top_p, weights=args.weights, slots=args.slots,
                        context=args.context)  # fmt: skip
    path = directory / "trajectories.jsonl"
    with Writer(path) as writer:

        def on_done(trajectory: Trajectory) -> Iterable[Job]:
            writer.write(trajectory)
            return ()

        jobs = [Job(task, trial) for task in tasks for trial in range(args.trials)]
        play(
            [job for job in jobs if job not in writer.known], settings,
            lambda: make_world(args.env, data=args.data, engine=args.engine), react, None, on_done, total=len(jobs),
        )  # fmt: skip
    trajectories = sort_file(path)
    won = sum(t.success for t in trajectories)
    turns = sum(len(t.turns) for t in trajectories) / len(trajectories)
    stage.finish({"round": number, "trajectories": len(trajectories), "success": won,
                  "types": success_by_type(trajectories), "mean_turns": round(turns, 2),
                  "ids": sum(len(t.ids) for t in trajectories), "asked": react.counts})  # fmt: skip
    print(f"rollout round {number}: {won}/{len(trajectories)} won, {turns:.1f} turns each -> {path}")


if __name__ == "__main__":
    run_main(main, tyro.cli(Args, description=__doc__))

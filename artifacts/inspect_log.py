"""Writes a run's trajectories as logs of Inspect, whose viewer shows each attempt as a conversation.

    python -m artifacts.inspect_log --run runs/a3t
    inspect view --log-dir runs/a3t/inspect

One log per trajectories.jsonl, <run>/inspect/round_0_rollout.eval, written anew each time; a sample per trajectory, its
epoch is the trial. The world speaks as the user, the agent as the assistant: a thought is its reasoning, an action its
text. A message's metadata say what the agent did not do by itself or not well: a thought or an action that is not its
own (of a sampled action, the source is input too), an action that the world refused, a marked mistake. Scores: success,
reward, progress; an attempt that ended in a fault is a sample with an error and has none.
Left out: token ids.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from artifacts.cli import run_main
from artifacts.json_io import read_json
from artifacts.scores import mean
from artifacts.stage import sha256
from artifacts.stats import name_of
from artifacts.trackers import require_package
from artifacts.trajectory import FAULTS, Trajectory, Turn, read_trajectories, trajectory_files

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalResults, EvalSample
    from inspect_ai.model import ChatMessage

MEASURES = ("success", "reward", "progress")


@dataclass(frozen=True, kw_only=True)
class Args:
    run: Path = Path("runs/a3t")
    """Directory of the run, or of one stage."""

    def check(self) -> None:
        require_package("artifacts.inspect_log", "inspect-ai")


def exchange(turn: Turn) -> list[ChatMessage]:
    """The agent's message and the world's answer."""
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ContentReasoning, ContentText

    thought = [ContentReasoning(reasoning=turn.thought)] if turn.thought else []
    usual = {"thought_by": "react", "action_by": "react", "valid": True, "errors": []}
    marks = {name: getattr(turn, name) for name, value in usual.items() if getattr(turn, name) != value}
    source = "generate" if turn.action_by == "react" else "input"
    return [
        ChatMessageAssistant(content=[*thought, ContentText(text=turn.action)], source=source, metadata=marks or None),
        ChatMessageUser(content=turn.observation),
    ]


def sample(trajectory: Trajectory) -> EvalSample:
    """One trajectory as a sample."""
    from inspect_ai.log import EvalError, EvalSample
    from inspect_ai.model import ChatMessageUser
    from inspect_ai.scorer import Score

    fault = trajectory.end in FAULTS
    facts = msgspec.structs.asdict(trajectory)
    left_out = ("schema", "first_observation", "turns", "ids", "sampled", *MEASURES)
    return EvalSample(
        id=trajectory.task_id,
        epoch=trajectory.trial + 1,
        input=trajectory.first_observation,
        target="",
        messages=[
            ChatMessageUser(content=trajectory.first_observation, source="input"),
            *(message for turn in trajectory.turns for message in exchange(turn)),
        ],
        scores=None if fault else {name: Score(value=float(facts[name])) for name in MEASURES},
        error=EvalError(message=trajectory.end, traceback="", traceback_ansi="") if fault else None,
        metadata={name: value for name, value in facts.items() if name not in left_out}
        | {
            "turns": len(trajectory.turns),
            "refused_actions": sum(not turn.valid for turn in trajectory.turns),
            "sampled_actions": sum(turn.action_by == "sampled" for turn in trajectory.turns),
            "mistakes": sum(bool(turn.errors) for turn in trajectory.turns),
        },
    )


def results(trajectories: Sequence[Trajectory]) -> EvalResults:
    """Means of the scores, without faults."""
    from inspect_ai.log import EvalMetric, EvalResults, EvalScore

    scored = [trajectory for trajectory in trajectories if trajectory.end not in FAULTS]
    means = {name: mean(getattr(trajectory, name) for trajectory in scored) for name in MEASURES}
    return EvalResults(
        total_samples=len(trajectories),
        completed_samples=len(scored),
        scores=[
            EvalScore(name=name, scorer=name, metrics={"mean": EvalMetric(name="mean", value=value)})
            for name, value in means.items()
        ],
    )


def player(config: dict[str, Any]) -> str:
    """Who played, by a config.json: the base or the server's model, with the adapter's hash."""
    args, adapter = config.get("args", {}), config.get("facts", {}).get("adapter")
    server = args.get("server") or {}
    name = server.get("model") if server.get("url") else Path(args.get("model") or "").name
    return (name or "unknown") + (f"+{adapter[:8]}" if adapter else "")


def make_log(path: Path, name: str) -> EvalLog:
    """The log of one trajectories.jsonl; a line that is still being written is left out. Raises ValueError, with
    file:line, for one that is no trajectory."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalRevision, EvalSpec, EvalStats

    settings = path.with_name("config.json")
    config = read_json(settings, dict[str, Any]) if settings.exists() else {}
    trajectories = list(read_trajectories(path, partial=True))
    done = path.with_name("done.json")
    ended = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    began = ended - timedelta(seconds=read_json(done, dict[str, Any]).get("seconds", 0) if done.exists() else 0)
    tasks, trials = len({t.task_id for t in trajectories}), max((t.trial for t in trajectories), default=0) + 1
    even = len(trajectories) == tasks * trials  # else the viewer would show fractions of samples
    commit, digest = config.get("git", {}).get("commit"), sha256(path)[:22]
    return EvalLog(
        status="success" if done.exists() else "started",
        eval=EvalSpec(
            created=began.isoformat(timespec="seconds"),
            eval_id=digest,
            run_id=digest,
            task_id=digest,
            task=name,
            model=player(config),
            dataset=EvalDataset(name=name, samples=tasks if even else len(trajectories)),
            config=EvalConfig(epochs=trials if even else 1),
            revision=EvalRevision(type="git", origin="", commit=commit) if commit else None,
            metadata=config.get("facts", {}),
        ),
        results=results(trajectories),
        stats=EvalStats(started_at=began.isoformat(), completed_at=ended.isoformat()),
        samples=[sample(trajectory) for trajectory in trajectories],
    )


def main(args: Args) -> None:
    from inspect_ai.log import write_eval_log

    if not args.run.is_dir():
        raise ValueError(f"no such run: {args.run}")
    files = [path for path in trajectory_files(args.run) if path.stat().st_size]
    if not files:
        raise ValueError(f"{args.run} holds no trajectories; expected the directory of a run or of a stage")
    folder = args.run / "inspect"
    folder.mkdir(exist_ok=True)
    for path in files:
        name = name_of(path, args.run)
        write_eval_log(make_log(path, name), folder / f"{name.replace('/', '_')}.eval", format="eval")
    print(f"{len(files)} logs -> {folder}; to look: inspect view --log-dir {folder}")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

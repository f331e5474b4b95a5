"""The play loop: a ReAct session, and beside it an ActRe session with the sampling rule of A3T.

One attempt is a generator: it plays its world, and yields an Ask whenever it needs a line from a model. `play` drives
many attempts at once, collects their asks by policy and answers each batch with one call, so that an attempt reads top
to bottom while the model sees full batches. Used by rollout.py, actre.py and evaluate.py.

Left out: what becomes of a trajectory (the stages), text and tokens (trajectory.py, policy.py).
"""

from __future__ import annotations

import itertools
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from envs.base import Observation, World
from policy import Ask, Line, NoReply, Policy
from stage import draw_seed, generator
from trajectory import (
    OK,
    REASON,
    Trajectory,
    Turn,
    act_line,
    actre_turn_text,
    last_observation_text,
    observation_text,
    opening_text,
    parse_reason,
    parse_reply,
    think_line,
)

MAX_THOUGHTS = 3  # think lines in one turn; a further one is taken for the (invalid) action of the turn
FORCE_AFTER = 3  # invalid actions of the policy's own in a row, after which A3T forces a sampled action


@dataclass(frozen=True, kw_only=True)
class Compose:
    """A3T's sampling rule: when the agent's action is replaced by a sampled one, and who writes the reason."""

    probability: float
    sample: Literal["commands", "verbs"] = "commands"
    reason: Literal["actre", "template", "empty"] = "actre"


@dataclass(frozen=True, kw_only=True)
class Play:
    """What all attempts of a stage share; (seed, stage, round) with task, trial and turn address every draw."""

    env: str
    stage: str
    round: int
    seed: int
    max_turns: int
    patience: int  # repetitions of a turn, action and answer alike, that end an attempt as stuck; 0: none does
    temperature: float
    deadline: float | None = None  # seconds after which an attempt ends as timeout
    compose: Compose | None = None


class Job(NamedTuple):
    task_id: str
    trial: int


class Waiting(NamedTuple):
    """What an attempt waits for: a line from that policy."""

    policy: Policy
    ask: Ask


Attempt = Generator[Waiting, str | None, Trajectory]


class Running(NamedTuple):
    """An attempt under way, in its world, since a time of the monotonic clock."""

    attempt: Attempt
    world: World
    job: Job
    start: float


class ContextFull(Exception):
    """A session has no room for another line."""


class WorldFailed(Exception):
    """A world raised; the trajectory ends as env_error."""


class Overdue(Exception):
    """An attempt has taken longer than it may; the trajectory ends as timeout."""


def guarded(method: Callable, *args):
    """What a world's method returns; whatever a third-party world raises becomes WorldFailed with its traceback."""
    try:
        return method(*args)
    except Exception as error:  # the one blanket except: the boundary to worlds that are not ours
        raise WorldFailed(traceback.format_exc()) from error


def require_tasks(world: World, task_ids: Iterable[str]) -> None:
    """Raises ValueError unless the world has every task: a panel is played whole or not at all."""
    task_ids = list(task_ids)
    known = {task for split in {task.split("/")[0] for task in task_ids} for task in world.tasks(split)}
    missing = [task for task in task_ids if task not in known]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(task_ids)} tasks are not in the data, {missing[0]} the first; "
            "give the data that the panel was made from (--data or $ALFWORLD_DATA)"
        )


def sample_action(actions: list[str], how: str, rng: np.random.Generator) -> str:
    """One admissible action: uniform over commands, or over verbs first and then over that verb's commands."""
    if how == "verbs":
        verb = rng.choice(sorted({a.split(" ", 1)[0] for a in actions}))
        actions = [a for a in actions if a.split(" ", 1)[0] == verb]
    return str(rng.choice(actions))


def template_reason(action: str) -> str:
    """The reason of the ablation without ActRe: the same words whatever the situation."""
    return f"I try to {action}."


def repetitions(turns: list[Turn]) -> int:
    """How many turns just before the last one had its action and its observation."""
    last = turns[-1]
    alike = itertools.takewhile(lambda t: (t.action, t.observation) == (last.action, last.observation), turns[-2::-1])
    return sum(1 for _ in alike)


def attempt(job: Job, settings: Play, world: World, react: Policy, actre: Policy | None) -> Attempt:
    """Plays one task to its end and returns the trajectory. Yields Waiting, is sent the line (None: context full).

    With settings.compose, each action is sampled with that probability, or always after FORCE_AFTER invalid actions in
    a row; the reason then comes from `actre`'s own session over the same trajectory.
    """
    place = (settings.seed, settings.stage, settings.round, job.task_id, job.trial)
    turns: list[Turn] = []
    result, progress, end, invalid_in_row = None, 0.0, "max_turns", 0

    def recorded(opening: Observation, ids: list[int], sampled: list[int]) -> Trajectory:
        return Trajectory(
            env=settings.env, split=job.task_id.split("/")[0], task_id=job.task_id, task=opening.task, trial=job.trial,
            round=settings.round, seed=settings.seed, source="actre" if settings.compose else "react",
            first_observation=opening.text, turns=turns, reward=result.reward if result else 0.0, progress=progress,
            success=bool(result and result.success), end=end, ids=ids, sampled=sampled,
        )  # fmt: skip

    try:
        opening = guarded(world.reset, job.task_id)
    except WorldFailed as failure:
        tqdm.write(f"{job.task_id} trial {job.trial}: the world did not start\n{failure}")
        end = "env_error"
        return recorded(Observation(text="", task=""), [], [])
    first = opening_text(opening.text, opening.task)
    session = react.open(first)
    explains = settings.compose is not None and settings.compose.reason == "actre"
    reasons = actre.open(first) if explains else None

    def own_turn(number: int):
        """The agent's own thoughts and action: (thought, action)."""
        thoughts: list[str] = []
        while True:
            line = yield Waiting(react, Ask(session, settings.temperature, draw_seed(*place, number, len(thoughts))))
            if line is None:
                raise ContextFull
            said, text = parse_reply(line)
            if said == "act" or len(thoughts) == MAX_THOUGHTS:
                return "\n".join(thoughts), text
            thoughts.append(text)
            react.extend(session, OK)

    def composed_turn(rng: np.random.Generator):
        """A sampled action and the reason written for it: (thought, action)."""
        action = sample_action(guarded(world.actions), settings.compose.sample, rng)
        reason = template_reason(action) if settings.compose.reason == "template" else ""
        if explains:
            actre.extend(reasons, act_line(action) + REASON)
            line = yield Waiting(actre, Ask(reasons, 0.0, 0))
            if line is None:
                raise ContextFull
            reason = parse_reason(line)
        if reason:
            react.extend(session, think_line(reason))
            react.extend(session, OK)
        react.extend(session, act_line(action))
        return reason, action

    try:
        for number in range(settings.max_turns):
            rng = generator(*place, number, "explore")
            force = invalid_in_row >= FORCE_AFTER
            sampled = settings.compose is not None and (rng.random() < settings.compose.probability or force)
            thought, action = yield from (composed_turn(rng) if sampled else own_turn(number))
            result = guarded(world.step, action)
            progress = max(progress, result.progress)
            by = ("actre", "sampled") if sampled else ("react", "react")
            turns.append(Turn(thought, action, result.observation, *by, result.valid))
            invalid_in_row = 0 if result.valid else invalid_in_row + (not sampled)
            stuck = 0 < settings.patience <= repetitions(turns)
            last = result.done or stuck or number == settings.max_turns - 1
            text = (last_observation_text if last else observation_text)(result.observation)
            react.extend(session, text)
            if result.done or stuck:
                end = "success" if result.success else "finished" if result.done else "stuck"
                break
            if explains:
                actre.extend(reasons, text if sampled else actre_turn_text(turns[-1]) + text)
    except ContextFull:
        end = "context_full"
    except WorldFailed as failure:
        tqdm.write(f"{job.task_id} trial {job.trial}: the world failed\n{failure}")
        end = "env_error"
    except NoReply as failure:
        tqdm.write(f"{job.task_id} trial {job.trial}: no reply from the model\n{failure}")
        end = "llm_error"
    except Overdue:
        end = "timeout"
    ids, flags = react.close(session)
    if explains:
        actre.close(reasons)
    return recorded(opening, ids, flags)


def play(
    jobs: Iterable[Job],
    settings: Play,
    make_world: Callable[[], World],
    react: Policy,
    actre: Policy | None,
    on_done: Callable[[Trajectory], Iterable[Job]],
    *,
    total: int | None = None,
) -> None:
    """Plays all jobs, as many at once as `react` has slots; on_done(trajectory) may add further jobs.

    Nobody waits for the slowest: each pass goes on with whatever lines have come, and where none has, with the policy
    that most attempts wait for. The order in which trajectories end depends on that; what is in them does not. A world
    that failed is not used again, and its job is played once more, with the same draws, in a new one.
    """
    pending, worlds, again = deque(jobs), [], set()
    active: dict[tuple[int, int], Running] = {}  # by policy and session that the attempt waits for
    policies = [policy for policy in (react, actre) if policy is not None]
    done = won = 0
    with tqdm(total=total, desc=f"{settings.stage} round {settings.round}", unit="trajectory") as bar:

        def finish(running: Running, trajectory: Trajectory) -> None:
            nonlocal done, won
            if trajectory.end != "env_error":
                worlds.append(running.world)
            elif running.job not in again:
                again.add(running.job)
                pending.append(running.job)
                return
            pending.extend(on_done(trajectory))
            done, won = done + 1, won + trajectory.success
            bar.set_postfix(success=f"{won}/{done}", refresh=False)
            bar.update()

        def advance(running: Running, line: Line | Overdue) -> None:
            try:
                send = running.attempt.throw if isinstance(line, Exception) else running.attempt.send
                waiting = send(line)
                waiting.policy.ask(waiting.ask)
                active[policies.index(waiting.policy), waiting.ask.session] = running
            except StopIteration as stop:
                finish(running, stop.value)

        while pending or active:
            while pending and len(active) < react.slots:
                job, world = pending.popleft(), worlds.pop() if worlds else make_world()
                running = Running(attempt(job, settings, world, react, actre), world, job, time.monotonic())
                advance(running, None)
            waiting = [index for index, _ in active]
            came = [(index, *each) for index in set(waiting) for each in policies[index].lines(wait=False)]
            if waiting and not came:
                busiest = max(set(waiting), key=lambda index: (waiting.count(index), -index))
                came = [(busiest, *each) for each in policies[busiest].lines()]
            for index, session, line in came:
                running = active.pop((index, session))
                late = settings.deadline is not None and time.monotonic() - running.start > settings.deadline
                advance(running, Overdue() if late else line)

"""One attempt at one task: a ReAct session and, with A3T's sampling rule, a parallel ActRe session.

An attempt is a generator. It yields what it waits for, a request to a policy or a world in a subprocess, and is resumed
with the result, so that it reads top to bottom while many attempts run concurrently (loop.py).

Left out: policies (policy.py), uses of the trajectory (the stages), text and tokens (artifacts/).
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from agent.policy import Ask, NoReply, Policy
from artifacts.render import (
    OK,
    REASON,
    act_line,
    actre_turn_text,
    last_observation_text,
    observation_text,
    opening_text,
    parse_reason,
    parse_reply,
    think_line,
)
from artifacts.seeds import draw_seed, generator
from artifacts.trajectory import End, Trajectory, Turn
from envs.base import Observation, Result, World
from envs.process import WorldProcess, call

MAX_THOUGHTS = 3  # think lines per turn; a further one counts as the (invalid) action of the turn


@dataclass(frozen=True, kw_only=True)
class Compose:
    """A3T's sampling rule: when a sampled action replaces the agent's, and who writes its reason."""

    probability: float
    max_invalid: int = 3  # after so many invalid actions of the agent in a row one is sampled; 0: never
    sample: Literal["commands", "verbs"] = "commands"
    reason: Literal["actre", "template", "empty"] = "actre"


@dataclass(frozen=True, kw_only=True)
class AttemptSettings:
    """Settings shared by all attempts of a stage (see PlayArgs). Each draw is addressed by (seed, stage, round) with
    task, trial and turn."""

    env: str
    stage: str
    round: int
    seed: int
    max_turns: int
    patience: int
    temperature: float
    deadline: float | None = None
    turn_deadline: float = 60.0
    processes: int | None = None
    compose: Compose | None = None
    player: Literal["react", "demo"] = "react"  # demo: a script


# ---- the sampling rule -----------------------------------------------------------------------------------------------


def sample_action(actions: list[str], how: str, rng: np.random.Generator, task: str) -> str:
    """Samples an admissible action: uniformly over commands, or first over verbs and then over that verb's commands.

    An open action, `search[`, is completed with one to six words of the task, in the task's order.
    """
    if how == "verbs":
        verbs = [re.split(r"[ \[]", action)[0] for action in actions]
        verb = rng.choice(sorted(set(verbs)))
        actions = [action for action, other in zip(actions, verbs, strict=True) if other == verb]
    action = str(rng.choice(actions))
    if not action.endswith("["):
        return action
    words = re.findall(r"[a-z0-9]+", task.lower())
    indices = rng.choice(len(words), rng.integers(1, min(6, len(words)) + 1), replace=False)
    return f"{action}{' '.join(words[index] for index in sorted(indices))}]"


def template_reason(action: str) -> str:
    """The reason in the ablation without ActRe: a fixed sentence, whatever the situation."""
    return f"I try to {action}."


def repetitions(turns: list[Turn]) -> int:
    """How many consecutive turns just before the last have the same action and observation."""
    last = turns[-1]
    alike = itertools.takewhile(lambda t: (t.action, t.observation) == (last.action, last.observation), turns[-2::-1])
    return sum(1 for _ in alike)


# ---- the attempt -----------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    task_id: str
    trial: int


class Waiting(NamedTuple):
    """A request that an attempt waits for, and the policy it goes to."""

    policy: Policy
    ask: Ask


class ContextFull(Exception):
    """A session has no room for another reply."""


class WorldFailed(Exception):
    """A world raised, died, or did not answer in time."""


class Overdue(Exception):
    """An attempt is past its deadline."""


ENDS: dict[type[Exception], End] = {
    ContextFull: "context_full",
    WorldFailed: "env_error",
    NoReply: "llm_error",
    Overdue: "timeout",
}
Course = Generator[Waiting | WorldProcess, Any, Any]


class Attempt:
    """One attempt at one task: `course` plays it and returns the trajectory; the other fields are its state.

    With settings.compose, each action is sampled with that probability, and always after max_invalid invalid ones in a
    row; its reason then comes from a session of `actre` over the same trajectory.
    """

    def __init__(
        self, job: Job, settings: AttemptSettings, world: World | WorldProcess, react: Policy, actre: Policy | None
    ):
        self.job, self.settings, self.world, self.react, self.actre = job, settings, world, react, actre
        self.address = (settings.seed, settings.stage, settings.round, job.task_id, job.trial)
        self.explains = settings.compose is not None and settings.compose.reason == "actre"
        self.opening = Observation(text="", task="")
        self.session: int | None = None
        self.actre_session: int | None = None
        self.turns: list[Turn] = []
        self.result: Result | None = None
        self.progress, self.invalid_in_row = 0.0, 0
        self.asked: Waiting | None = None  # the request whose reply is still due
        self.why = ""  # what went wrong, if anything did
        self.broken = False  # a call of the world is pending or failed
        self.started = time.monotonic()
        self.seconds_in_world = 0.0  # only in a world of this process
        self.sampled: list[list[int]] = []  # per session: 1 where the model sampled the id
        self.course = self.play()

    def play(self) -> Course:
        """Plays the task to the end and returns the trajectory."""
        end: End = "max_turns"
        try:
            self.opening = yield from self.call_world("reset", self.job.task_id)
            first = opening_text(self.opening.text, self.opening.task)
            self.session = self.react.open(first)
            if self.explains:
                self.actre_session = self.actre.open(first)
            for index in range(self.settings.max_turns):
                ended = yield from self.turn(index)
                if ended:
                    end = ended
                    break
        except tuple(ENDS) as why:
            end, self.why = ENDS[type(why)], str(why)
            if self.why:
                tqdm.write(f"{self.job.task_id} trial {self.job.trial}: {end}\n{why}")
        return self.record(end)

    def turn(self, index: int) -> Course:
        """Plays one turn. Returns how the attempt ended, or None if it continues."""
        settings, rng, compose = self.settings, generator(*self.address, index, "explore"), self.settings.compose
        force = compose is not None and 0 < compose.max_invalid <= self.invalid_in_row
        sampled = compose is not None and (rng.random() < compose.probability or force)
        thought, action = yield from (self.composed_turn(rng) if sampled else self.own_turn(index))
        result = self.result = yield from self.call_world("step", action)
        self.progress = max(self.progress, result.progress)
        turn = Turn(
            thought=thought,
            action=action,
            observation=result.observation,
            thought_by="actre" if sampled else settings.player,
            action_by="sampled" if sampled else settings.player,
            valid=result.valid,
        )
        self.turns.append(turn)
        self.invalid_in_row = 0 if result.valid else self.invalid_in_row + (not sampled)
        stuck = 0 < settings.patience <= repetitions(self.turns)
        last = result.done or stuck or index == settings.max_turns - 1
        text = (last_observation_text if last else observation_text)(result.observation)
        self.react.extend(self.session, text)
        if self.explains and not last:
            self.actre.extend(self.actre_session, text if sampled else actre_turn_text(turn) + text)
        if result.done:
            return "success" if result.success else "finished"
        return "stuck" if stuck else None

    def own_turn(self, index: int) -> Course:
        """Returns the agent's own (thought, action)."""
        thoughts: list[str] = []
        while True:
            seed = draw_seed(*self.address, index, len(thoughts))
            ask = Ask(session=self.session, temperature=self.settings.temperature, seed=seed)
            kind, text = parse_reply((yield from self.line(self.react, ask)))
            if kind == "act" or len(thoughts) == MAX_THOUGHTS:
                return "\n".join(thoughts), text
            thoughts.append(text)
            self.react.extend(self.session, OK)

    def composed_turn(self, rng: np.random.Generator) -> Course:
        """Returns (thought, action) for a sampled action; the thought is the reason written for it."""
        compose = self.settings.compose
        actions = yield from self.call_world("actions")
        action = sample_action(actions, compose.sample, rng, self.opening.task)
        reason = template_reason(action) if compose.reason == "template" else ""
        if self.explains:
            self.actre.extend(self.actre_session, act_line(action) + REASON)
            line = yield from self.line(self.actre, Ask(session=self.actre_session, temperature=0.0, seed=0))
            reason = parse_reason(line)
        if reason:
            self.react.extend(self.session, think_line(reason))
            self.react.extend(self.session, OK)
        self.react.extend(self.session, act_line(action))
        return reason, action

    def line(self, policy: Policy, ask: Ask) -> Course:
        """Returns one line from a policy. Raises ContextFull; the play loop throws in NoReply and Overdue."""
        self.asked = Waiting(policy, ask)
        line = yield self.asked
        if line is None:
            raise ContextFull
        return line

    def call_world(self, method: str, *args) -> Course:
        """Calls a method of the world, here or in its subprocess. Raises WorldFailed with what went wrong."""
        self.broken = True
        if isinstance(self.world, WorldProcess):
            self.world.send(method, *args)
            good, value = yield self.world
        else:
            start = time.monotonic()
            good, value = call(self.world, method, args)
            self.seconds_in_world += time.monotonic() - start
        if not good:
            raise WorldFailed(value)
        self.broken = False
        return value

    def record(self, end: End) -> Trajectory:
        """Ends the sessions and returns the trajectory, without ids if the agent's reply is still due."""
        ids, flags = self.close(self.react, self.session)
        self.close(self.actre, self.actre_session)
        return Trajectory(
            env=self.settings.env,
            split=self.job.task_id.split("/")[0],
            task_id=self.job.task_id,
            task=self.opening.task,
            trial=self.job.trial,
            round=self.settings.round,
            seed=self.settings.seed,
            source="actre" if self.settings.compose else self.settings.player,
            first_observation=self.opening.text,
            turns=self.turns,
            reward=self.result.reward if self.result else 0.0,
            progress=self.progress,
            success=bool(self.result and self.result.success),
            end=end,
            ids=ids,
            sampled=flags,
        )

    def close(self, policy: Policy | None, session: int | None) -> tuple[list[int], list[int]]:
        """Ends a session, if there is one and no reply is due; otherwise PlayLoop ends it after the reply."""
        asked = self.asked is not None and (self.asked.policy, self.asked.ask.session) == (policy, session)
        if session is None or asked:
            return [], []
        ids, flags = policy.close(session)
        if not policy.remote:  # a server reports itself what its cache saved
            self.sampled.append(flags)
        return ids, flags

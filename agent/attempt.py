"""One attempt at one task: a ReAct session, and beside it an ActRe session with the sampling rule of A3T.

An attempt is a generator: it yields what it waits for, an ask of a policy or a world in a process of its own, and is
sent what has come, so that it reads top to bottom while many others are played beside it (agent/loop.py).

Left out: who answers (policy.py), what becomes of the trajectory (the stages), text and tokens (artifacts/).
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

MAX_THOUGHTS = 3  # think lines in one turn; a further one is taken for the (invalid) action of the turn
FORCE_AFTER = 3  # invalid actions of the policy's own in a row, after which A3T forces a sampled action


@dataclass(frozen=True, kw_only=True)
class Compose:
    """A3T's sampling rule: when the agent's action is replaced by a sampled one, and who writes the reason."""

    probability: float
    sample: Literal["commands", "verbs"] = "commands"
    reason: Literal["actre", "template", "empty"] = "actre"


@dataclass(frozen=True, kw_only=True)
class AttemptSettings:
    """What all attempts of a stage share (see PlayArgs); (seed, stage, round) with task, trial and turn address every
    draw."""

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


# ---- the sampling rule -----------------------------------------------------------------------------------------------


def sample_action(actions: list[str], how: str, rng: np.random.Generator, task: str) -> str:
    """One admissible action: uniform over commands, or over verbs first and then over that verb's commands.

    An open action, `search[`, is completed with one to six words of the task, in their order there.
    """
    if how == "verbs":
        verbs = [re.split(r"[ \[]", action)[0] for action in actions]
        verb = rng.choice(sorted(set(verbs)))
        actions = [action for action, its in zip(actions, verbs, strict=True) if its == verb]
    action = str(rng.choice(actions))
    if not action.endswith("["):
        return action
    words = re.findall(r"[a-z0-9]+", task.lower())
    places = rng.choice(len(words), rng.integers(1, min(6, len(words)) + 1), replace=False)
    return f"{action}{' '.join(words[place] for place in sorted(places))}]"


def template_reason(action: str) -> str:
    """The reason of the ablation without ActRe: the same words whatever the situation."""
    return f"I try to {action}."


def repetitions(turns: list[Turn]) -> int:
    """How many turns just before the last one had its action and its observation."""
    last = turns[-1]
    alike = itertools.takewhile(lambda t: (t.action, t.observation) == (last.action, last.observation), turns[-2::-1])
    return sum(1 for _ in alike)


# ---- the attempt -----------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    task_id: str
    trial: int


class Waiting(NamedTuple):
    """What an attempt waits for: a line from that policy."""

    policy: Policy
    ask: Ask


class ContextFull(Exception):
    """A session has no room for another line."""


class WorldFailed(Exception):
    """A world raised, died, or did not answer in time."""


class Overdue(Exception):
    """An attempt has taken longer than it may."""


ENDS: dict[type[Exception], End] = {
    ContextFull: "context_full",
    WorldFailed: "env_error",
    NoReply: "llm_error",
    Overdue: "timeout",
}
Course = Generator[Waiting | WorldProcess, Any, Any]


class Attempt:
    """One attempt at one task. `course` plays it, and returns the trajectory; the rest is where it stands.

    With settings.compose, each action is sampled with that probability, or always after FORCE_AFTER invalid actions in
    a row; the reason then comes from `actre`'s own session over the same trajectory.
    """

    def __init__(
        self, job: Job, settings: AttemptSettings, world: World | WorldProcess, react: Policy, actre: Policy | None
    ):
        self.job, self.settings, self.world, self.react, self.actre = job, settings, world, react, actre
        self.place = (settings.seed, settings.stage, settings.round, job.task_id, job.trial)
        self.explains = settings.compose is not None and settings.compose.reason == "actre"
        self.opening = Observation(text="", task="")
        self.session: int | None = None
        self.reasons: int | None = None  # ActRe's session
        self.turns: list[Turn] = []
        self.result: Result | None = None
        self.progress, self.invalid_in_row = 0.0, 0
        self.asked: Waiting | None = None  # a line that is still to come
        self.why = ""  # what went wrong, where something did
        self.broken = False  # the world has not given its last answer
        self.started = time.monotonic()
        self.seconds_in_world = 0.0  # seconds in a world that is stepped here
        self.sampled: list[list[int]] = []  # of each session, which ids the model sampled
        self.course = self.play()

    def play(self) -> Course:
        """Plays the task to its end and returns the trajectory."""
        end: End = "max_turns"
        try:
            self.opening = yield from self.call_world("reset", self.job.task_id)
            first = opening_text(self.opening.text, self.opening.task)
            self.session = self.react.open(first)
            if self.explains:
                self.reasons = self.actre.open(first)
            for number in range(self.settings.max_turns):
                ended = yield from self.turn(number)
                if ended:
                    end = ended
                    break
        except tuple(ENDS) as why:
            end, self.why = ENDS[type(why)], str(why)
            if self.why:
                tqdm.write(f"{self.job.task_id} trial {self.job.trial}: {end}\n{why}")
        return self.record(end)

    def turn(self, number: int) -> Course:
        """Plays a turn; returns how the attempt ended with it, or None."""
        settings, rng = self.settings, generator(*self.place, number, "explore")
        force = self.invalid_in_row >= FORCE_AFTER
        sampled = settings.compose is not None and (rng.random() < settings.compose.probability or force)
        thought, action = yield from (self.composed_turn(rng) if sampled else self.own_turn(number))
        result = self.result = yield from self.call_world("step", action)
        self.progress = max(self.progress, result.progress)
        by = ("actre", "sampled") if sampled else ("react", "react")
        self.turns.append(Turn(thought, action, result.observation, *by, result.valid))
        self.invalid_in_row = 0 if result.valid else self.invalid_in_row + (not sampled)
        stuck = 0 < settings.patience <= repetitions(self.turns)
        last = result.done or stuck or number == settings.max_turns - 1
        text = (last_observation_text if last else observation_text)(result.observation)
        self.react.extend(self.session, text)
        if self.explains and not last:
            self.actre.extend(self.reasons, text if sampled else actre_turn_text(self.turns[-1]) + text)
        if result.done:
            return "success" if result.success else "finished"
        return "stuck" if stuck else None

    def own_turn(self, number: int) -> Course:
        """The agent's own thoughts and action: (thought, action)."""
        thoughts: list[str] = []
        while True:
            seed = draw_seed(*self.place, number, len(thoughts))
            line = yield from self.line(self.react, Ask(self.session, self.settings.temperature, seed))
            said, text = parse_reply(line)
            if said == "act" or len(thoughts) == MAX_THOUGHTS:
                return "\n".join(thoughts), text
            thoughts.append(text)
            self.react.extend(self.session, OK)

    def composed_turn(self, rng: np.random.Generator) -> Course:
        """A sampled action and the reason written for it: (thought, action)."""
        compose = self.settings.compose
        actions = yield from self.call_world("actions")
        action = sample_action(actions, compose.sample, rng, self.opening.task)
        reason = template_reason(action) if compose.reason == "template" else ""
        if self.explains:
            self.actre.extend(self.reasons, act_line(action) + REASON)
            reason = parse_reason((yield from self.line(self.actre, Ask(self.reasons, 0.0, 0))))
        if reason:
            self.react.extend(self.session, think_line(reason))
            self.react.extend(self.session, OK)
        self.react.extend(self.session, act_line(action))
        return reason, action

    def line(self, policy: Policy, ask: Ask) -> Course:
        """One line from a model. Raises ContextFull; NoReply and Overdue are thrown in by `play`."""
        self.asked = Waiting(policy, ask)
        line = yield self.asked
        if line is None:
            raise ContextFull
        return line

    def call_world(self, method: str, *args) -> Course:
        """What a method of the world returns, here or in its process. Raises WorldFailed with what went wrong."""
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
        """Ends the sessions; the trajectory. It has no ids where the agent's line is still to come."""
        ids, flags = self.close(self.react, self.session)
        self.close(self.actre, self.reasons)
        return Trajectory(
            env=self.settings.env,
            split=self.job.task_id.split("/")[0],
            task_id=self.job.task_id,
            task=self.opening.task,
            trial=self.job.trial,
            round=self.settings.round,
            seed=self.settings.seed,
            source="actre" if self.settings.compose else "react",
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
        """Ends a session, if there is one and it is not asked: then `Player` ends it when its line has come."""
        asked = self.asked is not None and (self.asked.policy, self.asked.ask.session) == (policy, session)
        if session is None or asked:
            return [], []
        ids, flags = policy.close(session)
        self.sampled.append(flags)
        return ids, flags

"""The play loop: runs many attempts (attempt.py) concurrently, for rollout.py, actre.py and evaluate.py.

    loop = PlayLoop(jobs, settings, make_world, react)
    for trajectory in loop:
        writer.write(trajectory)
    loop.rates.summary()

Each pass collects finished replies and world steps, resumes the attempts waiting for them, and blocks only when nothing
can progress. So the model gets full batches, and no attempt waits for another.
Left out: the steps of one attempt (attempt.py), uses of a trajectory (the stages).
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from agent.attempt import Attempt, AttemptSettings, Job, Overdue
from agent.policy import Line, NoReply, Policy
from agent.reply import has_form
from artifacts.trajectory import Trajectory
from envs.base import World
from envs.process import WorldProcess, Worlds, ready

HOPELESS = 20  # failed resets after which the loop gives up, if no world has started yet
MOMENT = 0.1  # seconds between deadline checks while only worlds are pending
FIRST = 8  # attempts after which the loop gives up, if a server has written no line that can be played
NO_ROOM = "the context is full before the first line; shorten --prompt or lower --server.max-tokens"


class Rates:
    """Throughput, waiting times, and the savings of the models' prefix caches."""

    def __init__(self, policies: Sequence[Policy]):
        self.policies, self.started, self.stopped = policies, time.monotonic(), None
        self.before = [dict(policy.counts) for policy in policies]
        self.done = self.won = self.sent = self.kept = 0
        self.waited = {"worlds": 0.0, "model": 0.0}  # seconds in which no attempt could progress

    def stop(self) -> None:
        """Ends the time that the rates refer to: what a stage does with its trajectories does not count."""
        self.stopped = time.monotonic()

    def count(self, trajectory: Trajectory) -> None:
        self.done += 1
        self.won += trajectory.success

    def count_session(self, sampled: list[int]) -> None:
        """Adds a session to the prefix reuse. A client without a cache would send the whole session with each request,
        which starts where a run of sampled ids does; ours computes other ids once, and sampled ids while sampling."""
        asks = [index for index, (before, flag) in enumerate(itertools.pairwise([0, *sampled])) if flag > before]
        if asks:
            self.sent += sum(asks)
            self.kept += sum(asks) - (asks[-1] - sum(sampled[: asks[-1]]))

    def summary(self) -> dict[str, float | None]:
        """For done.json: trajectories_per_hour; tokens_per_second (sampled); waiting_for_worlds and waiting_for_model,
        the shares of time in which every attempt was blocked on a world or the model; tokens_per_step, sampled by a row
        of the local model (more than 1 with drafts); prefix_reuse, the share of ids that a client without a cache would
        have sent and that were not recomputed (for a server: that it reports as cached)."""
        elapsed = max(1e-9, (self.stopped or time.monotonic()) - self.started)
        counts = [
            Counter({name: count - before.get(name, 0) for name, count in policy.counts.items()})
            for policy, before in zip(self.policies, self.before, strict=True)
        ]
        cached = [each for each in counts if "cached_tokens" in each]
        sent = self.sent + sum(each["prompt_tokens"] for each in cached)
        kept = self.kept + sum(each["cached_tokens"] for each in cached)
        local = [each for each in counts if each["steps"]]
        steps = sum(each["steps"] for each in local)
        return {
            "trajectories_per_hour": round(3600 * self.done / elapsed, 1),
            "tokens_per_second": round(sum(each["completion_tokens"] for each in counts) / elapsed, 1),
            "waiting_for_worlds": round(self.waited["worlds"] / elapsed, 4),
            "waiting_for_model": round(self.waited["model"] / elapsed, 4),
            "tokens_per_step": round(sum(each["completion_tokens"] for each in local) / steps, 3) if steps else None,
            "prefix_reuse": round(kept / sent, 4) if sent else None,
        }

    def line(self) -> str:
        """The text of the progress bar."""
        now = self.summary()
        reuse = "" if now["prefix_reuse"] is None else f", reuse {now['prefix_reuse']:.0%}"
        return (
            f"won {self.won}/{self.done}, {now['trajectories_per_hour']:.0f}/h, "
            f"{now['tokens_per_second']:.0f} tokens/s, waits: worlds {now['waiting_for_worlds']:.0%} "
            f"model {now['waiting_for_model']:.0%}{reuse}"
        )


class PlayLoop:
    """Plays jobs concurrently, as many at once as `react` has slots, and yields trajectories as they finish.

    The order of trajectories depends on timing; their content does not. `add` queues more jobs during iteration. A
    world that fails (raises, dies, or is isolated and misses settings.turn_deadline) is not reused, and its job is
    retried once, with the same draws, in a new one. Isolated worlds (envs/base.py) run in subprocesses, for which
    `make_world` must be picklable.
    The first attempts of a server are held back until one of its lines has the form of a thought or a command, or is
    a valid action without it. If none has, no failure is scored: ValueError shows a reply.
    """

    def __init__(
        self,
        jobs: Iterable[Job],
        settings: AttemptSettings,
        make_world: Callable[[], World],
        react: Policy,
        actre: Policy | None = None,
    ):
        self.pending, self.retried = deque(jobs), set[Job]()
        self.settings, self.make_world, self.react, self.actre = settings, make_world, react, actre
        self.policies = [policy for policy in (react, actre) if policy is not None]
        self.rates = Rates(self.policies)
        self.asked: dict[tuple[int, int], Attempt] = {}  # (policy index, session) -> the attempt waiting for its reply
        self.stepping: dict[WorldProcess, Attempt] = {}
        self.any_world_started = False
        self.late: set[tuple[int, int]] = set()  # sessions of finished attempts whose reply is still due
        self.playable = not react.remote  # whether lines of the agent can be played
        self.held: list[Trajectory] = []  # until that is known
        self.line, self.why = "", NO_ROOM  # a line of the agent, and why there was none

    def add(self, jobs: Iterable[Job]) -> None:
        """Queues more jobs; call it between two trajectories."""
        jobs = list(jobs)
        self.pending.extend(jobs)
        self.bar.total += len(jobs)

    def __iter__(self) -> Iterator[Trajectory]:
        settings = self.settings
        title = f"{settings.stage} round {settings.round}"
        with (
            Worlds(self.make_world, settings.turn_deadline, settings.processes) as self.worlds,
            tqdm(total=len(self.pending), desc=title, unit="trajectory") as self.bar,
        ):
            while self.pending or self.asked or self.stepping or self.held:
                while self.pending and self.worlds.room() and self.playing() < self.react.slots:
                    yield from self.start(self.pending.popleft())
                if self.pending and not self.playing():
                    raise ValueError(
                        f"no attempt can be played in {self.react.slots} slots and "
                        f"{settings.processes} processes; expected at least one of each"
                    )
                for attempt, event in self.collect():
                    yield from self.advance(attempt, event)
                if self.held and not (self.pending or self.asked or self.stepping):
                    yield from self.release()
        self.rates.stop()

    def start(self, job: Job) -> list[Trajectory]:
        """Starts an attempt. Returns its trajectory if it is over already."""
        return self.advance(Attempt(job, self.settings, self.worlds.take(), self.react, self.actre), None)

    def playing(self) -> int:
        return len(self.asked) + len(self.stepping) + len(self.late)

    def advance(self, attempt: Attempt, event: Any) -> list[Trajectory]:
        """Resumes an attempt with what it was waiting for, until it waits again; its trajectory if it finishes."""
        finished = []
        try:
            course = attempt.course
            wanted = course.throw(event) if isinstance(event, Exception) else course.send(event)
            if isinstance(wanted, WorldProcess):
                self.stepping[wanted] = attempt
            else:
                wanted.policy.submit(wanted.ask)
                self.asked[self.policies.index(wanted.policy), wanted.ask.session] = attempt
        except StopIteration as stop:
            finished = self.finish(attempt, stop.value)
        self.any_world_started |= bool(attempt.opening.text)
        return finished

    def finish(self, attempt: Attempt, trajectory: Trajectory) -> list[Trajectory]:
        """Frees the attempt's world. Returns its trajectory, and those held back before; or nothing, if the world
        failed and the job is retried, or if the trajectory is held back.

        Raises ValueError if no world starts at all, or no line can be played.
        """
        (self.worlds.drop if attempt.broken else self.worlds.give_back)(attempt.world)
        self.rates.waited["worlds"] += attempt.seconds_in_world
        for sampled in attempt.sampled:
            self.rates.count_session(sampled)
        if trajectory.end == "env_error" and attempt.job not in self.retried:
            self.retried.add(attempt.job)
            self.pending.append(attempt.job)
            if len(self.retried) == HOPELESS and not self.any_world_started:
                raise ValueError(f"no world starts: {HOPELESS} attempts failed at the reset, the last:\n{attempt.why}")
            return []
        self.rates.count(trajectory)
        self.bar.set_postfix_str(self.rates.line(), refresh=False)
        self.bar.update()
        own = [turn for turn in trajectory.turns if turn.action_by == "react"]
        self.playable |= any(turn.valid for turn in own)
        if not (self.playable or own or trajectory.end in ("llm_error", "context_full")):
            return [trajectory]  # it says nothing of the agent's lines
        self.held.append(trajectory)
        return self.release() if self.playable or len(self.held) == FIRST else []

    def release(self) -> list[Trajectory]:
        """Returns what was held back. Raises ValueError if no line of the agent, in earlier runs too, can be played."""
        if not (self.playable or self.react.knows_the_form()):
            first = f"the first {len(self.held)} attempts" if len(self.held) > 1 else "the first attempt"
            if not self.line:
                raise ValueError(f"{first} got no line from the agent: {self.why}")
            raise ValueError(
                f"no line of {first} has the form think[...] or act[...] or is a valid action, so nothing is scored. "
                f"One of them: {self.line[:300].strip()!r}. Show the agent the form by --prompt (prompts/), choose "
                "--server.api to suit the model, or take a model that follows it"
            )
        self.playable = True
        released, self.held = self.held, []
        return released

    def collect(self) -> list[tuple[Attempt, Any]]:
        """Attempts that can be resumed, each with its reply, world answer or Overdue.

        If there are none it blocks: on the policy with the most attempts waiting, else briefly on the worlds.
        """
        waiting = Counter(index for index, _ in (*self.asked, *self.late))
        events = [event for index in waiting for event in self.replies(index, wait=False)] + self.answers(0)
        if not events and waiting:
            busiest = max(waiting, key=lambda index: (waiting[index], -index))
            events = self.replies(busiest, wait=True)
        elif not events and self.stepping:
            events = self.answers(MOMENT)
        events = [(attempt, Overdue() if self.overdue(attempt) else event) for attempt, event in events]
        return events + self.overdue_attempts()

    def replies(self, index: int, wait: bool) -> list[tuple[Attempt, Line]]:
        """Finished replies of a policy. A late reply only closes its session. Lines of the agent tell whether it knows
        their form."""
        start, policy, events = time.monotonic(), self.policies[index], []
        replies = policy.poll(wait)
        self.rates.waited["model"] += time.monotonic() - start
        for session, line in replies:
            if (index, session) in self.late:
                self.late.remove((index, session))
                policy.close(session)
            else:
                attempt = self.asked.pop((index, session))
                attempt.asked = None
                events.append((attempt, line))
                if index == 0 and isinstance(line, str):
                    self.playable |= has_form(line)
                    self.line = self.line or line
                elif index == 0 and isinstance(line, NoReply):
                    self.why = str(line)
        return events

    def answers(self, timeout: float) -> list[tuple[Attempt, tuple[bool, Any]]]:
        """Finished steps of worlds in subprocesses, waiting at most `timeout` seconds for the first."""
        if not self.stepping:
            return []
        start = time.monotonic()
        worlds = ready(self.stepping, timeout)
        self.rates.waited["worlds"] += time.monotonic() - start
        return [(self.stepping.pop(world), world.answer()) for world in worlds]

    def overdue(self, attempt: Attempt) -> bool:
        deadline = self.settings.deadline
        return deadline is not None and time.monotonic() - attempt.started > deadline

    def overdue_attempts(self) -> list[tuple[Attempt, Overdue]]:
        """Attempts past their deadline, no longer waiting for a reply or a world. A server's session ends at once; in a
        local model it ends, and frees its slot, with the reply."""
        asked = [key for key, attempt in self.asked.items() if self.overdue(attempt)]
        stepping = [world for world, attempt in self.stepping.items() if self.overdue(attempt)]
        for index, session in asked:
            if self.policies[index].remote:
                self.policies[index].close(session)
            else:
                self.late.add((index, session))
        return [(attempt, Overdue()) for attempt in (*map(self.asked.pop, asked), *map(self.stepping.pop, stepping))]

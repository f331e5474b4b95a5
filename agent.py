"""The play loop: many attempts (attempt.py) at once, for rollout.py, actre.py and evaluate.py.

`play` collects what has come, lines of the models and answers of worlds in processes of their own, goes on with the
attempts that waited for it, begins others where there is room, and waits only where nobody can go on. So the model sees
full batches, and no attempt waits for another one.

Left out: an attempt's course (attempt.py), what becomes of a trajectory (the stages).
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from artifacts.trajectory import Trajectory
from attempt import Attempt, Compose, Job, Overdue, Play
from envs.base import World
from envs.make import make_world
from envs.process import WorldProcess, Worlds, ready
from policy import Line, Policy, make_policy
from server import Server

HOPELESS = 20  # attempts in worlds that did not start, after which a stage stops in which none has started
MOMENT = 0.1  # seconds between two looks at the deadlines while only worlds are waited for


# ---- settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlayArgs:
    """What every stage that plays can be told."""

    run: Path = Path("runs/a3t")
    """The run's directory."""
    env: str = "alfworld"
    """World: alfworld, webshop, synthetic, pddl, babyai, scienceworld, jericho."""
    data: str | None = None
    """The world's data (default: $ALFWORLD_DATA, $WEBSHOP_DATA or $JERICHO_GAMES; what is generated where it is not
    set)."""
    engine: Literal["ours", "textworld"] = "ours"
    """Engine of ALFWorld; textworld is the slow reference."""
    mode: Literal["text", "text_rich"] = "text"
    """How WebShop's pages are written: parts joined by [SEP], or a line each with buttons marked."""
    tell_commands: bool = False
    """List the world's commands at the end of the opening, for agents that do not know the world (envs/wording.py)."""
    model: Path = Path("models/tiny-alfworld")
    """Base model, of the agent and of ActRe, a Hugging Face folder."""
    weights: Literal["nf4", "fp32"] = "nf4"
    """The base's values: rounded to NF4, as they are trained on, or as the folder has them."""
    rollout_weights: Literal["fp32", "bf16", "nf4"] | None = None
    """How the base lies while it samples: dense in float32 with the adapter added to it, dense in bfloat16 with the
    adapter beside it, or in NF4 (default: fp32 on a CPU, bf16 on an accelerator)."""
    max_new_tokens: int = 64
    """Most tokens of a line of the local model."""
    server: Server = Server()
    """Where the agent asks instead of the local model."""
    prompt: Path | None = None
    """File with an example that stands before every session of the agent (prompts/; paper: in round 0). Adapters are
    trained on the sessions alone."""
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
    turn_deadline: float = 60.0
    """Seconds that a world which is not ours may take for one answer; then its process is killed and the attempt played
    once more in a new one, before it ends as env_error."""
    processes: int | None = None
    """Worlds that are not ours, each in a process of its own, at once (default: two a core)."""
    slots: int = 64
    """Attempts played at once."""
    context: int = 1024
    """Tokens that a session can hold; an attempt that needs more ends as context_full."""
    seed: int = 0
    """Seeds every draw, together with round, task, trial and turn."""


def settings_of(args: PlayArgs, stage: str, number: int, compose: Compose | None = None) -> Play:
    return Play(
        env=args.env,
        stage=stage,
        round=number,
        seed=args.seed,
        max_turns=args.max_turns,
        patience=args.patience,
        temperature=args.temperature,
        deadline=args.deadline,
        turn_deadline=args.turn_deadline,
        processes=args.processes,
        compose=compose,
    )


def world_of(args: PlayArgs, perturb: str = "none") -> Callable[[], World]:
    """What makes the worlds of a stage, here or in another process."""
    return functools.partial(
        make_world,
        args.env,
        data=args.data,
        engine=args.engine,
        mode=args.mode,
        perturb=perturb,
        tell_commands=args.tell_commands,
    )


def policy_of(args: PlayArgs, server: Server, replies: Path, adapter: Path | None, prompt: Path | None) -> Policy:
    """The base with an adapter or alone, or the server's model, whose replies are kept in the file `replies`."""
    return make_policy(
        server,
        replies,
        args.model,
        adapter,
        prompt=prompt,
        top_p=args.top_p,
        weights=args.weights,
        rollout_weights=args.rollout_weights,
        slots=args.slots,
        context=args.context,
        max_new_tokens=args.max_new_tokens,
    )


def require_tasks(world: World, task_ids: Iterable[str]) -> None:
    """Raises ValueError unless the world has every task: a panel is played whole or not at all."""
    task_ids = list(task_ids)
    known = {task for split in {task.split("/")[0] for task in task_ids} for task in world.tasks(split)}
    missing = [task for task in task_ids if task not in known]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(task_ids)} tasks are not in the data, {missing[0]} the first; "
            "give the data that the panel was made from (--data, or $ALFWORLD_DATA or $WEBSHOP_DATA)"
        )


# ---- many attempts ---------------------------------------------------------------------------------------------------


class Rates:
    """How fast it goes, what is waited for, and what the models' caches save."""

    def __init__(self, policies: Sequence[Policy]):
        self.policies, self.started = policies, time.monotonic()
        self.before = [dict(policy.counts) for policy in policies]
        self.done = self.won = self.sent = self.kept = 0
        self.waited = {"worlds": 0.0, "model": 0.0}  # seconds in which nobody went on

    def count(self, trajectory: Trajectory) -> None:
        self.done += 1
        self.won += trajectory.success

    def count_session(self, sampled: list[int]) -> None:
        """A client that keeps nothing would send the whole session with each ask, that is where sampled ids begin; ours
        computes the ids of others once, and sampled ones when they are sampled."""
        asks = [place for place, (before, flag) in enumerate(itertools.pairwise([0, *sampled])) if flag > before]
        if asks:
            self.sent += sum(asks)
            self.kept += sum(asks) - (asks[-1] - sum(sampled[: asks[-1]]))

    def summary(self) -> dict[str, float | None]:
        """For done.json: trajectories_per_hour; tokens_per_second (sampled); waiting_for_worlds and waiting_for_model,
        shares of the time in which nobody could go on before a world or the model had answered; prefix_reuse, the share
        of ids that a client which keeps nothing would have sent and that were not computed again (of a server: that it
        says to have had in its cache)."""
        elapsed = max(1e-9, time.monotonic() - self.started)
        counts = [
            Counter({name: count - before.get(name, 0) for name, count in policy.counts.items()})
            for policy, before in zip(self.policies, self.before, strict=True)
        ]
        cached = [each for each in counts if "cached_tokens" in each]
        sent = self.sent + sum(each["prompt_tokens"] for each in cached)
        kept = self.kept + sum(each["cached_tokens"] for each in cached)
        return {
            "trajectories_per_hour": round(3600 * self.done / elapsed, 1),
            "tokens_per_second": round(sum(each["completion_tokens"] for each in counts) / elapsed, 1),
            "waiting_for_worlds": round(self.waited["worlds"] / elapsed, 4),
            "waiting_for_model": round(self.waited["model"] / elapsed, 4),
            "prefix_reuse": round(kept / sent, 4) if sent else None,
        }

    def line(self) -> str:
        """For the progress bar."""
        now = self.summary()
        reuse = "" if now["prefix_reuse"] is None else f", reuse {now['prefix_reuse']:.0%}"
        return (
            f"won {self.won}/{self.done}, {now['trajectories_per_hour']:.0f}/h, "
            f"{now['tokens_per_second']:.0f} tokens/s, waits: worlds {now['waiting_for_worlds']:.0%} "
            f"model {now['waiting_for_model']:.0%}{reuse}"
        )


class Player:
    """Drives attempts: `start` begins new ones, `collect` says what has come for whom, `advance` goes on with one."""

    def __init__(
        self,
        jobs: Iterable[Job],
        settings: Play,
        worlds: Worlds,
        react: Policy,
        actre: Policy | None,
        on_done: Callable[[Trajectory], Iterable[Job]],
        bar: tqdm,
    ):
        self.pending, self.again = deque(jobs), set[Job]()
        self.settings, self.worlds, self.react, self.actre = settings, worlds, react, actre
        self.on_done, self.bar = on_done, bar
        self.policies = [policy for policy in (react, actre) if policy is not None]
        self.rates = Rates(self.policies)
        self.asked: dict[tuple[int, int], Attempt] = {}  # by policy and session of the line that is waited for
        self.stepping: dict[WorldProcess, Attempt] = {}
        self.began = False  # some world has given its first observation
        self.late: set[tuple[int, int]] = set()  # sessions of attempts that are over, whose line is still to come

    def start(self) -> None:
        """Begins as many attempts as there is room for. Raises ValueError if there is room for none at all."""
        while self.pending and self.worlds.room() and self.playing() < self.react.slots:
            job = self.pending.popleft()
            self.advance(Attempt(job, self.settings, self.worlds.take(), self.react, self.actre), None)
        if self.pending and not self.playing():
            raise ValueError(
                f"no attempt can be played in {self.react.slots} slots and "
                f"{self.settings.processes} processes; expected one of each at least"
            )

    def playing(self) -> int:
        return len(self.asked) + len(self.stepping) + len(self.late)

    def advance(self, attempt: Attempt, came: Any) -> None:
        """Goes on with an attempt, given what it has waited for, until it waits again or is over."""
        try:
            wanted = attempt.course.throw(came) if isinstance(came, Exception) else attempt.course.send(came)
            if isinstance(wanted, WorldProcess):
                self.stepping[wanted] = attempt
            else:
                wanted.policy.ask(wanted.ask)
                self.asked[self.policies.index(wanted.policy), wanted.ask.session] = attempt
        except StopIteration as stop:
            self.finish(attempt, stop.value)
        self.began |= bool(attempt.opening.text)

    def finish(self, attempt: Attempt, trajectory: Trajectory) -> None:
        """Hands a trajectory on. A world that failed is not used again, and its job is once played in another one.

        Raises ValueError where no world starts at all.
        """
        (self.worlds.drop if attempt.broken else self.worlds.give_back)(attempt.world)
        self.rates.waited["worlds"] += attempt.in_world
        for sampled in attempt.sampled:
            self.rates.count_session(sampled)
        if trajectory.end == "env_error" and attempt.job not in self.again:
            self.again.add(attempt.job)
            self.pending.append(attempt.job)
            if len(self.again) == HOPELESS and not self.began:
                raise ValueError(f"no world starts: {HOPELESS} attempts failed at the reset, the last:\n{attempt.why}")
            return
        more = list(self.on_done(trajectory))
        self.pending.extend(more)
        self.rates.count(trajectory)
        if self.bar.total is not None:
            self.bar.total += len(more)
        self.bar.set_postfix_str(self.rates.line(), refresh=False)
        self.bar.update()

    def collect(self) -> list[tuple[Attempt, Any]]:
        """Attempts that can go on, each with what has come for it. Waits where there is nothing: for the policy that
        most attempts wait for, else for worlds, a moment at most."""
        waiting = Counter(index for index, _ in (*self.asked, *self.late))
        came = [each for index in waiting for each in self.lines(index, wait=False)] + self.answers(0)
        if not came and waiting:
            busiest = max(waiting, key=lambda index: (waiting[index], -index))
            came = self.lines(busiest, wait=True)
        elif not came and self.stepping:
            came = self.answers(MOMENT)
        return [(attempt, Overdue() if self.overdue(attempt) else what) for attempt, what in came] + self.overdue_ones()

    def lines(self, index: int, wait: bool) -> list[tuple[Attempt, Line]]:
        start, policy, came = time.monotonic(), self.policies[index], []
        lines = policy.lines(wait)
        self.rates.waited["model"] += time.monotonic() - start
        for session, line in lines:
            if (index, session) in self.late:
                self.late.remove((index, session))
                policy.close(session)
            else:
                attempt = self.asked.pop((index, session))
                attempt.asked = None
                came.append((attempt, line))
        return came

    def answers(self, timeout: float) -> list[tuple[Attempt, tuple[bool, Any]]]:
        if not self.stepping:
            return []
        start = time.monotonic()
        worlds = ready(self.stepping, timeout)
        self.rates.waited["worlds"] += time.monotonic() - start
        return [(self.stepping.pop(world), world.answer()) for world in worlds]

    def overdue(self, attempt: Attempt) -> bool:
        deadline = self.settings.deadline
        return deadline is not None and time.monotonic() - attempt.started > deadline

    def overdue_ones(self) -> list[tuple[Attempt, Overdue]]:
        """Attempts that have waited too long, and wait no more: for a line, which nobody takes, or for a world."""
        asked = [key for key, attempt in self.asked.items() if self.overdue(attempt)]
        stepping = [world for world, attempt in self.stepping.items() if self.overdue(attempt)]
        self.late.update(asked)
        return [(attempt, Overdue()) for attempt in (*map(self.asked.pop, asked), *map(self.stepping.pop, stepping))]


def play(
    jobs: Iterable[Job],
    settings: Play,
    make_world: Callable[[], World],
    react: Policy,
    actre: Policy | None,
    on_done: Callable[[Trajectory], Iterable[Job]],
    *,
    total: int | None = None,
) -> dict[str, float | None]:
    """Plays all jobs, as many at once as `react` has slots; on_done(trajectory) may add further jobs. Returns the rates
    (see Rates.summary).

    Nobody waits for the slowest: each pass goes on with whatever lines and worlds' answers have come. The order in
    which trajectories end depends on that; what is in them does not. A world that fails (raises, dies, or is not ours
    and does not answer within settings.turn_deadline) is not used again, and its job is played once more, with the same
    draws, in a new one. Isolated worlds (envs/base.py) live in processes, for which `make_world` must be picklable.
    """
    with (
        Worlds(make_world, settings.turn_deadline, settings.processes) as worlds,
        tqdm(total=total, desc=f"{settings.stage} round {settings.round}", unit="trajectory") as bar,
    ):
        player = Player(jobs, settings, worlds, react, actre, on_done, bar)
        while player.pending or player.asked or player.stepping:
            player.start()
            for attempt, came in player.collect():
                player.advance(attempt, came)
    return player.rates.summary()

"""Worlds in processes of their own: slow, hanging, raising and dying ones, deadlines, and that no process is left."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.attempt import AttemptSettings, Compose, Job
from agent.loop import PlayLoop
from agent.scripted import DemonstratorScript, ReplayScript, ScriptedPolicy
from envs import process
from envs.alfworld.rooms import family
from envs.alfworld.world import AlfWorld
from envs.make import make_world
from tests.support.hand_game import GOALS, write_game
from tests.support.rooms import TASK, Apart, Room, Unruly, processes

ROOT = Path(__file__).parent.parent
BAD = f"{TASK}bad"
WIN = [" act[wave]\n", " act[win]\n"]


def settings(**changes) -> AttemptSettings:
    fields = {"env": "alfworld", "stage": "test", "round": 1, "seed": 0, "max_turns": 6, "patience": 0}
    return AttemptSettings(**({"temperature": 0.0, "processes": 2, "turn_deadline": 20.0} | fields | changes))


def run(world, jobs, lines=WIN, on_done=lambda trajectory: None, **changes) -> list:
    """Plays and returns the trajectories in the order in which they ended."""
    done = []
    policy = ScriptedPolicy(lambda opening: ReplayScript(lines))
    for trajectory in PlayLoop(jobs, settings(**changes), world, policy):
        done.append(trajectory)
        on_done(trajectory)
    return done


def gone(pid: int, seconds: float = 0.0) -> bool:
    """Whether a process is no more, within so many seconds."""
    limit = time.monotonic() + seconds
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)


def good_jobs(number: int) -> list[Job]:
    return [Job(TASK, trial) for trial in range(number)]


FAILURES = [
    ("hang", "reset"),
    ("hang", "step"),
    ("work", "step"),
    ("start", "step"),
    ("raise", "reset"),
    ("raise", "step"),
    ("die", "reset"),
    ("die", "step"),
]


@pytest.mark.parametrize(("what", "method"), FAILURES)
def test_what_fails_is_played_again_in_a_new_process_and_others_go_on(tmp_path, what, method):
    world = functools.partial(Unruly, tmp_path, what, method, times=1)
    deadline = 3.0 if what in ("hang", "work", "start") else 20.0
    done = run(world, [Job(BAD, 0), *good_jobs(3)], processes=1, turn_deadline=deadline)
    assert len(done) == 4 and all(t.end == "success" and len(t.turns) == 2 for t in done)
    assert done[-1].task_id == BAD  # it came back last
    pids = processes(tmp_path)
    assert len(pids) == (3 if what == "start" else 2) and all(gone(pid, 5) for pid in pids)


WHY = {"hang": "has not answered in 3 s", "raise": "OSError: the server is gone", "die": "exit status 3"}


@pytest.mark.parametrize(("what", "why"), WHY.items())
def test_what_fails_twice_is_evidence(tmp_path, capsys, what, why):
    world = functools.partial(Unruly, tmp_path, what, "step", times=99)
    done = run(world, [Job(BAD, 0), *good_jobs(2)], turn_deadline=3.0 if what == "hang" else 20.0)
    ends = {t.key: (t.end, len(t.turns)) for t in done}
    assert ends == {(BAD, 0): ("env_error", 0), (TASK, 0): ("success", 2), (TASK, 1): ("success", 2)}
    assert why in capsys.readouterr().out
    assert all(gone(pid, 5) for pid in processes(tmp_path))


def test_where_no_world_starts_the_stage_stops(tmp_path):
    """After some attempts, of hundreds."""
    world = functools.partial(Unruly, tmp_path, "raise", "reset", times=999)
    with pytest.raises(ValueError, match="no world starts: 20 attempts"):
        run(world, [Job(BAD, trial) for trial in range(300)])
    assert len(processes(tmp_path)) <= 24 and all(gone(pid, 5) for pid in processes(tmp_path))


def test_nobody_waits_for_a_slow_world(tmp_path):
    """The bad one steps until all others are done, which it would never do if they waited for it."""
    world = functools.partial(Unruly, tmp_path, "wait", "step", times=99)

    def on_done(trajectory):
        count.append(trajectory)
        if len(count) == 5:
            (tmp_path / "go").touch()
        return ()

    count = []
    done = run(world, [Job(BAD, 0), *good_jobs(5)], on_done=on_done)
    assert [t.task_id for t in done] == [TASK] * 5 + [BAD] and all(t.success for t in done)


def test_processes_are_bounded_used_again_and_replaced_in_time(tmp_path, monkeypatch):
    assert len(run(functools.partial(Unruly, tmp_path), good_jobs(9), processes=3)) == 9
    assert 1 <= len(processes(tmp_path)) <= 3
    monkeypatch.setattr(process, "ATTEMPTS", 2)
    (tmp_path / "more").mkdir()
    assert len(run(functools.partial(Unruly, tmp_path / "more"), good_jobs(5), processes=1)) == 5
    assert len(processes(tmp_path / "more")) == 3
    with pytest.raises(ValueError, match="64 slots and 0 processes"):
        run(functools.partial(Unruly, tmp_path), good_jobs(1), processes=0)


def test_the_deadline_of_an_attempt_ends_its_wait_for_a_world(tmp_path):
    world = functools.partial(Unruly, tmp_path, "hang", "step", times=99)
    start = time.monotonic()
    done = run(world, [Job(BAD, 0), *good_jobs(2)], deadline=5.0, turn_deadline=1000.0)
    assert {t.task_id: t.end for t in done} == {BAD: "timeout", TASK: "success"} and len(done) == 3
    assert time.monotonic() - start < 60  # the world would hang forever
    assert all(gone(pid, 5) for pid in processes(tmp_path))


def test_a_stage_that_breaks_leaves_no_process(tmp_path):
    def on_done(trajectory):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world = functools.partial(Unruly, tmp_path, "work", "step", times=99)
        run(world, [Job(BAD, 0), *good_jobs(1)], on_done=on_done)
    assert processes(tmp_path) and all(gone(pid, 5) for pid in processes(tmp_path))


def test_a_world_that_cannot_be_sent_is_an_error_at_once():
    with pytest.raises(Exception, match="[Pp]ickle"):
        run(lambda: Apart(), good_jobs(1))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_program_takes_its_worlds_along(tmp_path, number):
    code = (
        "import functools, pathlib, sys; from tests.test_process import *; folder = pathlib.Path(sys.argv[1])\n"
        "run(functools.partial(Unruly, folder, 'work', 'step', times=99), [Job(BAD, 0)])"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    )
    while not processes(tmp_path) and program.poll() is None:
        time.sleep(0.05)
    (pid,) = processes(tmp_path)
    folder = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0TMPDIR=")[1].split(b"\0")[0]
    assert not gone(pid) and os.path.isdir(folder)
    program.send_signal(number)
    program.wait(60)
    assert gone(pid, 20) and not os.path.exists(folder)


def test_a_world_plays_the_same_here_and_in_a_process():
    """Whatever the number of processes and the order; composed, so that `actions` is asked too."""
    jobs = [Job(task, trial) for task in AlfWorld().tasks(f"{family()}_valid")[:4] for trial in range(2)]
    played = []
    for world, order, limit in ((AlfWorld, 1, 1), (Apart, 1, 3), (Apart, -1, 1)):
        how = settings(compose=Compose(probability=0.3, reason="template"), max_turns=25, processes=limit)
        loop = PlayLoop(jobs[::order], how, world, ScriptedPolicy(DemonstratorScript))
        played.append(sorted(loop, key=lambda t: t.key))
    assert len(played[0]) == 8 and played[0] == played[1] == played[2]


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("alfworld", "textworld", "fast_downward"))),
    reason="TextWorld is not installed",
)
def test_textworld_lives_in_processes_and_says_what_our_engine_says(tmp_path):
    for kind in GOALS:
        write_game(tmp_path, kind)
    played, compose = [], Compose(probability=1.0, reason="empty")
    for engine in ("ours", "textworld"):
        world = functools.partial(make_world, "alfworld", data=str(tmp_path), engine=engine)
        assert world().isolated == (engine == "textworld")
        jobs = [Job(task, 0) for task in world().tasks("hand")]
        done = run(world, jobs, [], compose=compose, turn_deadline=120.0)
        played.append({t.key: (t.first_observation, t.task, t.turns, t.success, t.end) for t in done})
    assert len(played[0]) == len(GOALS) and played[0] == played[1]


def test_a_process_knows_what_the_world_says(tmp_path):
    world = process.WorldProcess(Room, 20.0)
    pid = world._process.pid
    try:
        for sent, good, start in (
            (("step", "win"), True, None),
            (("step", "break"), False, "Traceback"),
            (("step", "look"), True, None),
        ):
            world.send(*sent)
            assert process.ready([world], 20.0) == [world]
            came, answer = world.answer()
            assert came == good and (answer.startswith(start) if start else answer == Room().step(sent[1]))
    finally:
        world.kill()
    assert gone(pid)

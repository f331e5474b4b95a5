"""Small worlds for the play loop, well-behaved and not, that a process of their own can import quickly."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from envs.alfworld.world import AlfWorld
from envs.base import Observation, Result

OPENING = (
    "You are in the middle of a room. Looking quickly around you, you see a desk 1, and a shelf 1.\n\n"
    "Your task is to: put a mug in desk."
)
TASK = "gen_train/pick_and_place_simple-Mug-None-Desk-1/trial_1"


class Room:
    """ "win" wins, "break" raises, "wave" and "look" are valid, the rest is not."""

    isolated = False

    def left_out(self, split):
        return {}

    def tasks(self, split):
        return [TASK]

    def reset(self, task_id):
        return Observation(text=OPENING, task="put a mug in desk")

    def step(self, action):
        if action == "break":
            raise OSError("the server is gone")
        won, valid = action == "win", action in ("win", "wave", "look")
        return Result(
            observation="Yes." if valid else "Nothing happens.",
            reward=float(won),
            progress=float(won),
            success=won,
            done=won,
            valid=valid,
        )

    def actions(self):
        return ["look", "wave"]


class Unruly(Room):
    """A room in a process of its own, which leaves a file named by its number in `folder`.

    In the first `times` of these processes `method` of tasks that end in "bad" does `what`: hangs (asleep or at work),
    raises, dies, starts a process and hangs, or waits until there is a file called go.
    """

    isolated = True

    def __init__(self, folder: Path, what: str = "", method: str = "", times: int = 0):
        self.folder, self.what, self.method, self.times = folder, what, method, times

    def reset(self, task_id):
        (self.folder / str(os.getpid())).touch()
        self.bad = task_id.endswith("bad") and len(processes(self.folder)) <= self.times
        self.misbehave("reset")
        return super().reset(task_id)

    def step(self, action):
        self.misbehave("step")
        return super().step(action)

    def misbehave(self, method):
        if not self.bad or method != self.method:
            return
        if self.what == "raise":
            raise OSError("the server is gone")
        if self.what == "die":
            os._exit(3)
        if self.what == "start":
            other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
            (self.folder / str(other.pid)).touch()
        while self.what != "wait" or not (self.folder / "go").exists():
            if self.what != "work":
                time.sleep(0.02)


def processes(folder: Path) -> list[int]:
    """The processes that have been in unruly rooms."""
    return [int(file.name) for file in folder.iterdir() if file.name.isdecimal()]


class Apart(AlfWorld):
    """Our ALFWorld in a process of its own."""

    def __init__(self):
        super().__init__()
        self.isolated = True

"""A world that is not ours, in a process of its own: it may be slow, hang or crash, and nobody else waits for it.

A call is sent, and its answer taken when it has come; between the two the caller goes on with something else. A world
asks for this by `isolated` (envs/base.py). The process is started afresh (never forked: JAX has threads) and imports
nothing but the world. It is killed, and what it started with it, when its world hangs, when it is no longer wanted, and
when the program that wanted it is gone, however that ended.

    world = WorldProcess(partial(make_world, "alfworld", engine="textworld"), deadline=60)
    world.send("reset", task_id)
    ready([world], timeout=60)
    good, opening = world.answer()

Left out: playing again what failed (agent/loop.py).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from envs.base import World

ATTEMPTS = 20  # after which a process is replaced: TextWorld keeps memory and a copied library for every game


def call(world: World, method: str, args: tuple) -> tuple[bool, Any]:
    """(True, what the method returns), or (False, the traceback) of whatever a third-party world raised."""
    try:
        return True, getattr(world, method)(*args)
    except Exception:  # the one blanket except: the boundary to worlds that are not ours
        return False, traceback.format_exc()


class WorldProcess:
    """A world made by `make`, which is pickled, in a process of its own. `deadline`: seconds that a call may take."""

    def __init__(self, make: Callable[[], World], deadline: float):
        message = pickle.dumps(make)
        self.attempts = 0
        self._deadline, self._sent = deadline, time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="world-", ignore_cleanup_errors=True)  # for what it leaves
        self._connection, theirs = Pipe()
        with theirs:
            path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
            code = f"from envs.process import serve; serve({theirs.fileno()}, {self._folder.name!r})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                env=os.environ | {"PYTHONPATH": path, "TMPDIR": self._folder.name},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._write(message)

    def send(self, method: str, *args) -> None:
        """Calls a method of the world; the answer to the call before must have been taken."""
        self._sent = time.monotonic()
        self._write(pickle.dumps((method, args)))

    def answer(self) -> tuple[bool, Any]:
        """The answer that has come, as `call` gives it; (False, why) if the process has ended or is overdue."""
        if not self._connection.poll():
            return False, f"the world has not answered in {self._deadline:g} s"
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            self._end()
            return False, f"the world's process has ended, exit status {self._process.returncode}"

    def overdue(self) -> bool:
        return time.monotonic() - self._sent > self._deadline

    def kill(self) -> None:
        """Ends the process and all that it has started, whatever they are doing."""
        self._end()
        self._connection.close()
        self._folder.cleanup()

    def fileno(self) -> int:
        """Of the connection, for `ready`."""
        return self._connection.fileno()

    def _write(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # a process that has ended is seen when the answer is read
            self._connection.send_bytes(message)

    def _end(self) -> None:
        if self._process.returncode is None:  # until it is waited for, nobody else can have its number
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def ready(worlds: Iterable[WorldProcess], timeout: float) -> list[WorldProcess]:
    """Those that have answered, have ended or are overdue; waits at most so many seconds for the first answer."""
    worlds = list(worlds)
    came = wait(worlds, timeout)
    return [world for world in worlds if world in came or world.overdue()]


class Worlds:
    """The worlds of many attempts, used again and again: `take`, then `give_back`, or `drop` one that has failed.

    Isolated ones are at most `limit` processes (default: two a core), others as many as are taken. The first world is
    made here, to see of which kind it is: making one must be cheap, what is heavy belongs into its first reset.
    """

    def __init__(self, make: Callable[[], World], deadline: float, limit: int | None = None):
        first = make()
        self._isolated = first.isolated
        self._make, self._deadline = make, deadline
        self._limit = 2 * (os.cpu_count() or 1) if limit is None else limit
        self._processes: set[WorldProcess] = set()
        self._free: list[World | WorldProcess] = [] if self._isolated else [first]

    def room(self) -> bool:
        return not self._isolated or bool(self._free) or len(self._processes) < self._limit

    def take(self) -> World | WorldProcess:
        if self._free:
            return self._free.pop()
        if not self._isolated:
            return self._make()
        world = WorldProcess(self._make, self._deadline)
        self._processes.add(world)
        return world

    def give_back(self, world: World | WorldProcess) -> None:
        if self._isolated:
            world.attempts += 1
            if world.attempts == ATTEMPTS:
                return self.drop(world)
        self._free.append(world)

    def drop(self, world: World | WorldProcess) -> None:
        if self._isolated:
            self._processes.remove(world)
            world.kill()

    def __enter__(self) -> Worlds:
        return self

    def __exit__(self, *_) -> None:
        for world in self._processes:
            world.kill()


# ---- in the process --------------------------------------------------------------------------------------------------


def serve(number: int, folder: str) -> None:
    """Makes the world that comes over the connection with this file number, and answers calls until that is closed."""
    threading.Thread(target=end_with, args=[number, folder], daemon=True).start()
    connection = Connection(number)
    with contextlib.suppress(EOFError, ConnectionError):
        world = connection.recv()()
        while True:
            connection.send(call(world, *connection.recv()))


def end_with(number: int, folder: str) -> None:
    """Waits until the other end of the connection is gone, which would have killed this process and what it has started
    and removed its folder: does so in its stead."""
    poller = select.poll()
    poller.register(number, 0)  # hanging up is always told
    poller.poll()
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)

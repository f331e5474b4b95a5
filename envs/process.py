"""Third-party worlds in subprocesses: they may be slow, hang or crash, and no other attempt waits for them.

Calls are asynchronous: `send` one, do other work, and take its `answer` once the world is `ready`. A world opts in with
`isolated` (base.py). The subprocess is spawned, never forked (JAX has threads), and imports only the world. It is
killed, with everything it started, when its world hangs, when it is no longer needed, and when its parent ends, however
that happens.

    world = WorldProcess(partial(make_world, "alfworld", engine="textworld"), deadline=60)
    world.send("reset", task_id)
    ready([world], timeout=60)
    good, opening = world.answer()

Left out: retrying failed attempts (agent/loop.py).
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

from envs.base import World, ask

ATTEMPTS = 20  # played by a subprocess before it is replaced: TextWorld leaks memory and a copied library per game


def call(world: World, method: str, args: tuple) -> tuple[bool, Any]:
    """(True, the method's result), or (False, the traceback) if it raised or returned something else than it should."""
    try:
        return True, ask(world, method, *args)
    except (Exception, SystemExit):  # a blanket except: the boundary to third-party worlds
        return False, traceback.format_exc()


class WorldProcess:
    """A world in a subprocess, made there by `make`, which is pickled. `deadline`: seconds that a call may take."""

    def __init__(self, make: Callable[[], World], deadline: float):
        message = pickle.dumps(make)
        self.attempts = 0
        self._deadline, self._sent = deadline, time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="world-", ignore_cleanup_errors=True)  # the world's TMPDIR
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
        """Calls a method of the world; the answer to the previous call must have been taken."""
        self._sent = time.monotonic()
        self._write(pickle.dumps((method, args)))

    def answer(self) -> tuple[bool, Any]:
        """The result that `call` returned; (False, the reason) if the process has exited or is overdue."""
        if not self._connection.poll():
            return False, f"the world has not answered in {self._deadline:g} s"
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            self._end()
            return False, f"the world's process ended with exit status {self._process.returncode}"

    def overdue(self) -> bool:
        return time.monotonic() - self._sent > self._deadline

    def kill(self) -> None:
        """Kills the process and everything it started, whatever they are doing."""
        self._end()
        self._connection.close()
        self._folder.cleanup()

    def fileno(self) -> int:
        """The connection's file descriptor, for `ready`."""
        return self._connection.fileno()

    def _write(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # `answer` notices a process that has exited
            self._connection.send_bytes(message)

    def _end(self) -> None:
        if self._process.returncode is None:  # not reaped yet, so no other process can have its pid
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def ready(worlds: Iterable[WorldProcess], timeout: float) -> list[WorldProcess]:
    """Worlds that have answered, exited or are overdue; waits at most `timeout` seconds for the first answer."""
    worlds = list(worlds)
    readable = wait(worlds, timeout)
    return [world for world in worlds if world in readable or world.overdue()]


class Worlds:
    """A pool of worlds for many attempts: `take` one, then `give_back`, or `drop` one that has failed.

    At most `limit` isolated worlds run at once (default: two per core); other worlds are unlimited. The constructor
    makes one to see whether it is isolated, so making a world must be cheap: heavy loading belongs in its first reset.
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


# ---- in the subprocess -----------------------------------------------------------------------------------------------


def serve(descriptor: int, folder: str) -> None:
    """Receives the world's `make` over the connection, makes the world, and answers calls until the parent hangs up."""
    watcher = threading.Thread(target=exit_with_parent, args=[descriptor, folder], daemon=True)
    watcher.start()
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, ConnectionError):
        world = make_here(connection.recv())
        while True:
            connection.send(call(world, *connection.recv()))
    watcher.join()  # it sees the same hang-up, and removes the folder before it ends this process


def make_here(make: Callable[[], World]) -> World:
    """The world. A connection error of its own becomes a RuntimeError, so that it is not taken for the parent's end."""
    try:
        return make()
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(f"the world cannot be made: {error}") from error


def exit_with_parent(descriptor: int, folder: str) -> None:
    """Waits until the parent hangs up, then removes the folder and kills this process and everything it started, as the
    parent's `kill` would have done."""
    poller = select.poll()
    poller.register(descriptor, 0)  # poll always reports a hang-up
    poller.poll()
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)

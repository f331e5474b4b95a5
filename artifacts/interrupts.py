"""Ctrl-C and SIGTERM end a command at once, with one sentence and exit status 130 or 143.

    import artifacts.interrupts  # noqa: F401  first, so that it also covers the imports below

A KeyboardInterrupt can be lost in a library's callback, and waits for compiled code to return. Instead, the signal
number is written to a pipe as the signal arrives, and a thread that reads the pipe ends the process. Nothing is lost:
every file of a stage survives SIGKILL. Only commands of this project are affected, not programs that import it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("agentrefine", "artifacts", "bench", "envs", "lora", "models", "prompts")  # those that hold commands

PLAIN = "interrupted"
advice = PLAIN  # the sentence; while a stage has its directory open, it says how to resume


def end_at_once(received: int) -> None:
    """Prints the sentence and ends the process; daemon threads and subprocesses of worlds end with it."""
    name = Path(sys.argv[0]).name
    os.write(sys.stderr.fileno(), f"\n{name}: {advice}\n".encode(errors="replace"))
    os._exit(128 + received)


def wait_for_signal(pipe: int) -> None:
    received = os.read(pipe, 1)[0]
    while received not in SIGNALS:
        received = os.read(pipe, 1)[0]
    end_at_once(received)


def install() -> None:
    """Replaces the handlers of SIGINT and SIGTERM in this process; call it in the main thread."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # the thread acts
    threading.Thread(target=wait_for_signal, args=[read], daemon=True).start()


def is_own_command() -> bool:
    """Whether the program that runs is a stage or a command of this project."""
    file = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
    if ROOT not in file.parents:
        return False
    folder = file.relative_to(ROOT).parts[0]
    return folder == file.name or folder in PACKAGES


if is_own_command():
    install()

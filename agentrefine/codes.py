"""Runs the verification codes of a script, regular expressions that others wrote, on the actions of its turns.

    fitting([Code("cd {path}", "^cd (.*)$", {"{path}": ["home"]})], ["cd home", "cd music"])     # {0}

Python's own `re` runs them, so a code means what it means to anyone who tries it. As `re` knows no limits, it works in
a process of its own, which the kernel ends after SECONDS of CPU time over one script and gives no more than MEMORY. The
code at which it ends is at fault, and the next script gets a new process.

A code is first run on the name of its own action to find the group of each placeholder: the group that captures
"{path}" in the name captures the path in an action.
"""

from __future__ import annotations

import json
import math
import re
import resource
import signal
import subprocess
import sys
from typing import NamedTuple

SECONDS = 2.0
MEMORY = 512 * 2**20  # bytes of address space
LARGEST = 100_000  # characters that the nested repeats of a code may demand


class Code(NamedTuple):
    """The name of an action, its code, and the values of each placeholder in the name: {"{path}": ["home", "docs"]}."""

    name: str
    code: str
    values: dict[str, list[str]]


class CodeError(ValueError):
    """A code is at fault: (rule of verify.py, why)."""


# ---- this process ----------------------------------------------------------------------------------------------------

_idle: list[subprocess.Popen] = []  # processes that wait for a script


def fitting(codes: list[Code], actions: list[str]) -> set[int]:
    """The indices of the actions that some code matches as a whole, with listed values. Raises CodeError for the first
    code that is at fault or takes too much, and OSError if the process cannot be started."""
    process = _idle.pop() if _idle else start()
    if process.poll() is not None:
        process = start()
    answers, ended = ask(process, json.dumps([codes, actions]))
    if ended:
        process.communicate()
        spent = f"{SECONDS:g} s of CPU time" if process.returncode == -signal.SIGPROF else f"{MEMORY >> 20} MB"
        answers.append(("regex_invalid", f"takes more than {spent} on the actions of the script"))
    else:
        _idle.append(process)
    for code, (rule, found) in zip(codes, answers, strict=False):
        if rule:
            raise CodeError(rule, f"{code.name}: {found}")
    return {index for _, found in answers[: len(codes)] for index in found}


def start() -> subprocess.Popen:
    words = [sys.executable, "-I", "-S", "-W", "ignore", __file__]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True)
    if process.stdout.readline() != b"\n":
        raise OSError(f"cannot run verification codes: {' '.join(words)} ended with status {process.wait()}")
    return process


def ask(process: subprocess.Popen, request: str) -> tuple[list[tuple[str | None, str | list[int]]], bool]:
    """The answers of a process for the codes of a request in order, and whether it ended before the last of them."""
    try:
        process.stdin.write(request.encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return [], True
    answers = []
    while (line := process.stdout.readline()).endswith(b"\n") and line != b"\n":
        answers.append(tuple(json.loads(line)))
    return answers, line != b"\n"


# ---- the process that runs the codes ---------------------------------------------------------------------------------


def judge(code: Code, actions: list[str]) -> tuple[str | None, str | list[int]]:
    """(rule, why) for a code at fault, (None, indices of the actions that it matches with listed values) otherwise."""
    repeats = [int(count.lstrip("0")[:9] or "1") for count in re.findall(r"(?<!\\)\{(\d+)(?:,\d*)?\}", code.code)]
    if math.prod(repeats) > LARGEST:
        return "regex_invalid", f"repeats that multiply to more than {LARGEST:,}"
    try:
        pattern = re.compile(code.code)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        return "regex_invalid", f"not a regular expression: {error}"
    match = pattern.fullmatch(code.name)
    if match is None:
        return "regex_self", "the code does not match the action's own name"
    captured = [(text or "").strip() for text in match.groups()]
    for placeholder in code.values:
        if placeholder not in captured:
            return "regex_self", f"no group of the code captures {placeholder}"
    groups = [(group, set(code.values[text])) for group, text in enumerate(captured, 1) if text in code.values]
    return None, [
        index
        for index, action in enumerate(actions)
        if (match := pattern.fullmatch(action))
        and all((match[group] or "").strip() in allowed for group, allowed in groups)
    ]


def serve() -> None:
    """Reads lines of [codes, actions] and writes a line for each code, up to one at fault, then an empty line."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or hard > MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    print(flush=True)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends the process
        codes, actions = json.loads(line)
        for code in codes:
            rule, found = judge(Code(*code), actions)
            print(json.dumps([rule, found]), flush=True)
            if rule:
                break
        re.purge()  # memory that another script needs
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(flush=True)


if __name__ == "__main__":
    serve()

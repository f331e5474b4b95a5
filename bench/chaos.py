"""Does a command that was killed end with the same bytes as one that was not?

The five stages and lora.convert do something small in a process of their own, and are broken off at a random moment: by
SIGKILL, SIGTERM, SIGINT or a full disk. A third of them are broken off again while they resume. Then they run to their
end, and their files must be those of an unbroken run. Half of the moments are uniform over the time of the unbroken
run, imports included; the other half follow a change of its files, each equally likely. SIGTERM must end as 143, SIGINT
as 130 and a full disk as 2, with one sentence. Pairs of processes then start in one directory: one must be refused.

    python -m bench.chaos --seed 0 --kills 100        # 20 minutes on two cores
    python -m bench.chaos --stages refine --kills 8 --pairs 2

A full disk is a tmpfs of a random size, in a mount namespace of its own. Where that is not allowed it is a limit on the
size of files. All files of the run are compared but locks and checkpoints/, and but VARYING in the JSON files.
Left out: power failures (nothing is synced), servers, worlds in subprocesses.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from artifacts.cli import Range, run_main
from artifacts.seeds import generator

ROOT = Path(__file__).parents[1]
FULL = "full disk"
STATUS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, FULL: 2}  # kind of break -> the exit status that it must have
DRAWS = 30  # moments drawn for one break, if the command ends before them
PATIENCE = 600  # seconds for one command
# What clocks and this process alone put into done.json, metrics.jsonl and config.json.
VARYING = {"seconds", "rates", "made_per_hour", "asked", "tokens_per_s", "mfu", "peak_memory", "git", "versions"}

MODEL = ("--model", str(ROOT / "models/tiny-alfworld"))
PLAY = ("--run", "run", *MODEL, "--slots", "4", "--context", "512", "--max-turns", "8")
TRAIN = ("--run", "run", *MODEL, "--rank", "4", "--row-length", "640", "--batch-rows", "1", "--epochs", "3")
# Each chain plays in a folder of its own. Commands without a name only prepare the next.
CHAINS = (
    (
        ("rollout", "rollout.py", *PLAY, "--round", "0", "--limit", "4"),
        ("", "actre.py", *PLAY, "--round", "0"),
        ("train_pg", "train_pg.py", *TRAIN, "--round", "0", "--checkpoint-minutes", "0"),
        ("evaluate", "evaluate.py", *PLAY, "--round", "0", "--limit", "4"),
        ("", "rollout.py", *PLAY, "--round", "1", "--limit", "4"),
        ("actre", "actre.py", *PLAY, "--round", "1", "--budget", "1"),
    ),
    (("refine", "refine.py", "--run", "run", "--count", "150"),),
    (("convert", "-m", "lora.convert", *MODEL, "--out", "base"),),
)
STAGES = tuple(name for chain in CHAINS for name, *_ in chain if name)
# The shell of a full disk: $0 KiB, $1 the folder with the run, which is copied there and back, then the command.
DISK = """disk=$1.disk run=$1 && shift && mkdir -p "$disk" && mount -t tmpfs -o size=$0K tmpfs "$disk" &&
cp -a "$run/." "$disk" && cd "$disk" || exit 1
"$@"; status=$?; find "$run" -mindepth 1 -delete; cp -a . "$run"; exit $status"""


@dataclass(frozen=True, kw_only=True)
class Args:
    kills: Annotated[int, Range(0, 100_000)] = 100
    """Runs to break off, a third of them twice."""
    pairs: Annotated[int, Range(0, 100_000)] = 20
    """Pairs of processes to start in one directory."""
    processes: Annotated[int, Range(1, 1000)] = 2
    """Runs at a time."""
    stages: tuple[str, ...] = STAGES
    """Commands to break off, in turn: rollout, actre, train_pg, evaluate, refine, convert."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seeds kinds and moments; how far a command gets until then depends on the machine."""

    def check(self) -> None:
        if unknown := sorted(set(self.stages) - set(STAGES)):
            raise ValueError(f"--stages has {', '.join(unknown)}; expected some of {', '.join(STAGES)}")


class Wrong(Exception):
    """What a broken, resumed or second process did wrong."""


class Early(Exception):
    """A command ended before it could be broken off: another moment is drawn."""


class Unbroken(NamedTuple):
    """A command's unbroken run: its words, the files before and after it, its seconds, how often its files changed,
    and the KiB by which they grew."""

    words: tuple[str, ...]
    before: Path
    after: Path
    seconds: float
    changes: int
    growth: int


# ---- processes -------------------------------------------------------------------------------------------------------


def command(words: tuple[str, ...]) -> list[str]:
    return [sys.executable, *words] if words[0] == "-m" else [sys.executable, str(ROOT / words[0]), *words[1:]]


def start(words: list[str], folder: Path, before_start: Callable | None = None) -> subprocess.Popen:
    """Starts a process in a folder, with generated games and a quiet progress bar."""
    environment = {k: v for k, v in os.environ.items() if k not in ("ALFWORLD_DATA", "WEBSHOP_DATA")}
    environment |= {"PYTHONPATH": str(ROOT), "TQDM_MININTERVAL": "60"}
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=before_start
    )


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits for a process. Returns its status and what it printed to stdout and stderr."""
    try:
        out, said = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Wrong(f"does not end within {PATIENCE} s: {process.communicate()[1][-300:]}") from None
    return process.returncode, out.decode(errors="replace"), said.decode(errors="replace")


def complete(words: tuple[str, ...], folder: Path) -> None:
    """Runs a command to its end. Raises Wrong if it fails."""
    status, _, said = end(start(command(words), folder))
    if status:
        raise Wrong(f"{' '.join(words)} ends as {status}: {said[-2000:]}")


def check_end(words: tuple[str, ...], status: int, said: str, expected: int, sentence: str) -> None:
    """Raises Wrong unless a command ended with the expected status and with a sentence that has the given words."""
    name = f"{words[1].rpartition('.')[2]}.py" if words[0] == "-m" else Path(words[0]).name
    last = said.strip().rpartition("\n")[2]
    if status != expected or "Traceback" in said or not (last.startswith(f"{name}: ") and sentence in last):
        raise Wrong(
            f"ends as {status}, expected {expected} and one sentence with {sentence!r}, but says: {said[-2000:]}"
        )


def handles_signals(process: subprocess.Popen) -> bool:
    """Whether a command has begun: before its first line, Python alone decides what a signal does."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True  # it has ended, or this is not Linux
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGTERM - 1) & 1)


# ---- files -----------------------------------------------------------------------------------------------------------


def state(folder: Path) -> frozenset[tuple[str, int, int]]:
    """(path, size, time of change) of every file."""
    found = set()
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.stat(path := os.path.join(place, name))
            except FileNotFoundError:
                continue
            found.add((path, status.st_size, status.st_mtime_ns))
    return frozenset(found)


def states(process: subprocess.Popen, folder: Path) -> Iterator[frozenset]:
    """The state of a folder at first and after each change, until the process ends."""
    seen = None
    while process.poll() is None:
        now = state(folder)
        if now != seen:
            yield now
        seen = now
        time.sleep(0.001)


def kib(found: frozenset) -> int:
    return sum(-(-size // 4096) * 4 for _, size, _ in found)


def steady(path: Path) -> Any:
    """What two runs must agree on in a file."""
    data = path.read_bytes()
    if path.name not in ("done.json", "config.json", "metrics.jsonl"):
        return data
    try:
        records = [json.loads(line) for line in (data.splitlines() if path.suffix == ".jsonl" else [data])]
    except ValueError:
        return data
    return [{key: value for key, value in record.items() if key not in VARYING} for record in records]


def compare(folder: Path, unbroken: Path) -> None:
    """Raises Wrong, with the names, if files differ from those of the unbroken run."""
    found, expected = (
        {
            str(path.relative_to(place)): steady(path)
            for path in place.rglob("*")
            if path.is_file() and not path.name.endswith(".lock") and "checkpoints" not in path.parts
        }
        for place in (folder, unbroken)
    )
    names = sorted({*found, *expected})
    if differing := [name for name in names if found.get(name) != expected.get(name)]:
        raise Wrong(f"files differ from the unbroken run's: {', '.join(differing)}")


# ---- unbroken runs ---------------------------------------------------------------------------------------------------


def measured(words: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Runs a command to its end. Returns its seconds, the changes of its files and their growth in KiB."""
    started, process = time.monotonic(), start(command(words), folder)
    sizes = [kib(found) for found in states(process, folder)]
    seconds, (status, _, said) = time.monotonic() - started, end(process)
    if status:
        raise Wrong(f"{' '.join(words)} ends as {status}: {said[-2000:]}")
    return {"seconds": seconds, "changes": len(sizes) - 1, "growth": max(sizes) - sizes[0]}


def unbroken_runs(folder: Path, stages: tuple[str, ...]) -> dict[str, Unbroken]:
    """The unbroken run of each stage. Raises Wrong if one fails, or if a second run of it has other files."""
    found = {}
    for number, chain in enumerate(CHAINS):
        last = max((index for index, (name, *_) in enumerate(chain) if name in stages), default=-1)
        place = folder / f"chain_{number}"
        place.mkdir()
        for name, *words in chain[: last + 1]:
            before, after = folder / f"{name}_before", folder / f"{name}_after"
            if name in stages:
                shutil.copytree(place, before)
                shutil.copytree(place, after)
            complete(tuple(words), place)  # compiles what is not in the cache
            if name in stages:
                how = measured(tuple(words), after)
                found[name] = Unbroken(words=tuple(words), before=before, after=after, **how)
                compare(after, place)
                tqdm.write(f"{name:<9}{how['seconds']:5.1f} s, {how['changes']} changes of files, {how['growth']} KiB")
    return found


# ---- broken runs -----------------------------------------------------------------------------------------------------


def wait_for_moment(process: subprocess.Popen, folder: Path, unbroken: Unbroken, rng: np.random.Generator) -> None:
    """Waits for a random moment: one of the unbroken run's seconds, or just after one of the changes of its files.
    Raises Early if the process ends before."""
    change, seconds = 0, float(rng.uniform(0, unbroken.seconds))
    if rng.random() < 0.5:
        change, seconds = int(rng.integers(1, unbroken.changes, endpoint=True)), float(rng.uniform(0, 0.01))
    for count, _ in enumerate(states(process, folder)):
        if count == change:
            break
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
    status, _, said = end(process)
    raise Early if status == 0 else Wrong(f"ends as {status} by itself: {said[-2000:]}")


def can_mount() -> bool:
    """Whether a namespace with mounts of its own is allowed."""
    try:
        test = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "-o", "size=4K", "tmpfs", "/mnt"]
        return subprocess.run(test, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def fill_disk(unbroken: Unbroken, rng: np.random.Generator, folder: Path, mounts: bool) -> None:
    """Runs a command with too little room. Raises Early if it is enough, Wrong for the wrong end."""
    words, room = command(unbroken.words), int(rng.integers(1, unbroken.growth, endpoint=True))
    if mounts:
        size = kib(state(folder)) + room
        words = ["unshare", "--map-root-user", "--mount", "bash", "-c", DISK, str(size), str(folder), *words]
        process = start(words, folder)
    else:
        limit = 1024 * room, resource.RLIM_INFINITY
        process = start(words, folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    status, _, said = end(process)
    if status == 0:
        raise Early
    check_end(unbroken.words, status, said, STATUS[FULL], "space" if mounts else "too large")


def break_off(kind: str, unbroken: Unbroken, rng: np.random.Generator, folder: Path, mounts: bool) -> None:
    """Runs a command in a folder and breaks it off. Raises Early if it ends before, Wrong for the wrong end."""
    if kind == FULL:
        return fill_disk(unbroken, rng, folder, mounts)
    process = start(command(unbroken.words), folder)
    wait_for_moment(process, folder, unbroken, rng)
    while kind != "SIGKILL" and process.poll() is None and not handles_signals(process):
        time.sleep(0.001)
    process.send_signal(getattr(signal, kind))
    status, _, said = end(process)
    if status == 0:
        raise Early
    if kind != "SIGKILL":
        check_end(unbroken.words, status, said, STATUS[kind], "interrupted")
    elif status != STATUS[kind]:
        raise Wrong(f"ends as {status} after SIGKILL: {said[-2000:]}")
    return None


def killed_and_resumed(
    kinds: list[str], unbroken: Unbroken, mounts: bool, rng: np.random.Generator, folder: Path
) -> None:
    """Breaks a command off, once for each of `kinds`, resumes it and compares its files."""
    for kind in kinds:
        break_off(kind, unbroken, rng, folder, mounts)
    complete(unbroken.words, folder)
    compare(folder, unbroken.after)


def two_at_once(unbroken: Unbroken, rng: np.random.Generator, folder: Path) -> None:
    """Starts a command twice. One must be refused, and the files must be the other's."""
    first = start(command(unbroken.words), folder)
    try:
        first.wait(float(rng.uniform(0, unbroken.seconds / 2)))
    except subprocess.TimeoutExpired:
        ends = [end(process) for process in (start(command(unbroken.words), folder), first)]
    else:
        raise Early
    if "finished already" in ends[0][1]:
        raise Early
    ran = sum(status == 0 for status, *_ in ends)
    if ran != 1:
        raise Wrong(f"{ran} of two processes ran: {[said[-1000:] for *_, said in ends]}")
    for status, _, said in ends:
        if status:
            check_end(unbroken.words, status, said, 2, "another process is")
    compare(folder, unbroken.after)


# ---- the campaign ----------------------------------------------------------------------------------------------------


def kinds_of(index: int, stages: int) -> list[str]:
    """How a run is broken off: every stage in all four ways in turn, and every third run twice."""
    kinds = list(STATUS)
    return [kinds[index // stages % 4]] + ([kinds[index % 4]] if index % 3 == 0 else [])


def attempt(title: str, address: tuple, unbroken: Unbroken, run: Callable, folder: Path) -> Counter[str]:
    """Calls run(rng, copy of the files from before the command), again if the moments were too late. Prints what went
    wrong and counts it."""
    count = Counter()
    for draw in range(DRAWS):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            shutil.copytree(unbroken.before, place, dirs_exist_ok=True)
            try:
                run(generator(*address, draw), Path(place))
                return count
            except Early:
                count["moments_drawn_again"] += 1
            except Wrong as why:
                tqdm.write(f"{title}, {address}, draw {draw}: {why}")
                return count + Counter(failures=1)
    tqdm.write(f"{title}, {address}: ended before each of {DRAWS} moments")
    return count + Counter(failures=1)


def campaign(args: Args, folder: Path) -> Counter[str]:
    """Breaks off and starts twice what the flags say. Prints failures and counts them with all else."""
    count, mounts = Counter(kills=args.kills, pairs=args.pairs, failures=0), can_mount()
    runs, attempts, stages = unbroken_runs(folder, args.stages), [], len(args.stages)
    for index in range(args.kills):
        name, kinds = args.stages[(index + index // stages) % stages], kinds_of(index, stages)
        count.update([name, *kinds, *["killed_twice"] * (len(kinds) > 1)])
        run = functools.partial(killed_and_resumed, kinds, runs[name], mounts)
        attempts.append((f"{name} after {' and '.join(kinds)}", (args.seed, "kill", index), runs[name], run))
    for index in range(args.pairs):
        name = args.stages[index % stages]
        run = functools.partial(two_at_once, runs[name])
        attempts.append((f"two at once: {name}", (args.seed, "pair", index), runs[name], run))
    with ThreadPoolExecutor(args.processes) as pool:
        ended = pool.map(lambda each: attempt(*each, folder), attempts)
        for each in tqdm(ended, total=len(attempts), desc="broken", unit="run"):
            count.update(each)
    return count


def main(args: Args) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            count = campaign(args, Path(folder))
        except Wrong as why:
            raise ValueError(f"an unbroken run fails: {why}") from why
    seconds = round(time.monotonic() - started)
    disk = "tmpfs" if can_mount() else "limit on the size of files"
    print(f"{args.kills} runs killed and resumed, {count['pairs']} pairs, {count['failures']} failures, {seconds} s")
    print(json.dumps({"bench": "chaos", "seed": args.seed, **count, "disk": disk, "seconds": seconds}))
    if count["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main, Args, __doc__)

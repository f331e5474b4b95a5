"""Does malformed input end in a sentence, whatever it is, and never in a traceback, a hang or a wrong training example?

    python -m bench.fuzz --seed 0                         # minutes
    python -m bench.fuzz --seed 0 --only records/17       # one case again

Four kinds of cases, each drawn from the seed and its own number:
- actions: twenty in a row in a world that needs no installation, reworded or not, half of them malformed. The world
  must answer, a refused action must change nothing, and the record must come back whole from its line.
- records: a file of trajectories with one change. It is read whole or refused by file and line, nothing that ended in a
  fault is selected to train on, and what is packed has finite weights and the ids of its text.
- folders: a base, its tokenizer and an adapter with one file damaged. They are read or refused by name; what is cut,
  missing or not finite must be refused.
- replies: a server that sends one after a few good ones, once or forever. It must be played as what it says or end as
  a fault; no attempt may be lost, and a run with a good server must then finish on the same cache.
Allowed are results, and ValueError and OSError with a sentence. Time is that of the CPU, with a server that of the
clock; a case that is slow once is tried again.
Left out: worlds in subprocesses, the numbers that a damaged but accepted model computes.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import contextlib
import faulthandler
import io
import json
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from artifacts.cli import Range, run_main
from artifacts.seeds import generator
from bench.fuzzing.demands import SLOW, Broken, require
from bench.fuzzing.files import Folders, Replies
from bench.fuzzing.games import ACTIONS, Actions, Records

HANGS, STUCK = 30, 120  # seconds after which Python code is interrupted, and after which the campaign is given up
KINDS = {"actions": Actions, "records": Records, "folders": Folders, "replies": Replies}


@dataclass(frozen=True, kw_only=True)
class Args:
    actions: Annotated[int, Range(0, 10**9)] = 10_000
    """Actions, twenty a case."""
    records: Annotated[int, Range(0, 10**9)] = 1000
    """Files of trajectories with one change."""
    folders: Annotated[int, Range(0, 10**9)] = 500
    """Folders of models, tokenizers and adapters with one damaged file."""
    replies: Annotated[int, Range(0, 10**9)] = 300
    """Replies of a server."""
    only: str | None = None
    """Run this one case, such as records/17 (default: all)."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of all cases."""

    def check(self) -> None:
        if self.only is not None and not re.fullmatch(rf"({'|'.join(KINDS)})/[0-9]+", self.only):
            raise ValueError(f"--only is {self.only!r}; expected a kind and a number, such as records/17")


class Hang(BaseException):
    """Raised in code that does not return."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what is printed, such as progress bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def once(case: Callable, rng: np.random.Generator) -> tuple[Counter[str], str]:
    """Runs a case. Returns its counts, and what went wrong, if anything did."""
    count, started = Counter(), case.clock()
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        with quiet():
            count = case(rng)
        seconds = case.clock() - started
        require(seconds < case.limit, f"{SLOW}{seconds:.1f} s")
    except Broken as error:
        return count, str(error)
    except BaseException as error:  # a blanket except: that any other exception is a failure is the point
        return count, "".join(traceback.format_exception(error)[-4:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return count, ""


def interrupt(*_: Any) -> None:
    raise Hang(f"does not end within {HANGS} s")


def campaign(args: Args, folder: Path) -> Counter[str]:
    """Runs all cases and prints what fails. Returns the counts."""
    total = Counter(failures=0)
    cases = (-(-args.actions // ACTIONS), args.records, args.folders, args.replies)
    numbers = {kind: range(count) for kind, count in zip(KINDS, cases, strict=True)}
    if args.only is not None:
        kind, _, number = args.only.partition("/")
        numbers = {kind: [int(number)]}
    for kind, chosen in numbers.items():
        with quiet():
            case = KINDS[kind](folder) if chosen else None
        for number in tqdm(chosen, desc=kind, unit="case", mininterval=0):  # if all hangs, the bar says where
            faulthandler.dump_traceback_later(STUCK, exit=True, file=sys.__stderr__)
            count, wrong = once(case, generator(args.seed, "fuzz", kind, number))
            if wrong.startswith(SLOW):
                count, wrong = once(case, generator(args.seed, "fuzz", kind, number))
            total.update(count)
            total["failures"] += bool(wrong)
            if wrong:
                tqdm.write(f"{kind}/{number}: {wrong} ({case.what})")
        faulthandler.cancel_dump_traceback_later()
    return total


def main(args: Args) -> None:
    started = time.monotonic()
    signal.signal(signal.SIGALRM, interrupt)
    with tempfile.TemporaryDirectory() as folder:
        count = campaign(args, Path(folder))
    seconds = round(time.monotonic() - started)
    print(f"{count['failures']} failures in {seconds} s")
    print(json.dumps({"bench": "fuzz", "seed": args.seed, **count, "seconds": seconds}))
    if count["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main, Args, __doc__)

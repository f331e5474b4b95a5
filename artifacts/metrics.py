"""metrics.jsonl: one flushed line per optimizer step, and a progress bar with the same figures."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tqdm import tqdm

from artifacts.atomic import atomic_write


class MetricsLog:
    """`with MetricsLog(directory, done, total) as log: log.write({"step": 1, "loss": 2.0, ...})`.

    A resumed run keeps the first `done` lines and drops later ones, whose steps it repeats. With active=False it writes
    and shows nothing, since only one of several processes logs.
    """

    def __init__(self, directory: Path, done: int, total: int, *, active: bool = True):
        path = directory / "metrics.jsonl"
        if active and path.exists():
            kept = path.read_text().split("\n")[:done]
            with atomic_write(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))
        self._file = open(path if active else os.devnull, "a")
        self._bar = tqdm(total=total, initial=done, desc=directory.name, disable=not active)

    def write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._bar.set_postfix(
            loss=f"{line['loss']:.2f}",
            positive=f"{line['logprob_positive']:.4f}",
            tokens_per_s=f"{line['tokens_per_s']:.0f}",
            refresh=False,
        )
        self._bar.update()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._bar.close()

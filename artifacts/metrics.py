"""metrics.jsonl: one flushed line per optimizer step, a progress bar and curves of the same figures, and limits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tqdm import tqdm

from artifacts.atomic import atomic_write
from artifacts.json_io import parse_json, read_json
from artifacts.trackers import Curves, Tracker


class Line(msgspec.Struct):
    """What is read of a line."""

    step: int


class MetricsLog:
    """`with MetricsLog(directory, done, total) as log: log.write({"step": 1, "loss": 2.0, ...})`.

    A resumed run keeps the lines of its first `done` steps and drops those of later ones, which it repeats. With
    active=False it writes and shows nothing, since only one of several processes logs. `track`: a tracker that is sent
    every line too, those that were kept at once.
    """

    def __init__(self, directory: Path, done: int, total: int, *, active: bool = True, track: Tracker | None = None):
        path = directory / "metrics.jsonl"
        if active and path.exists():
            keep_steps(path, done)
        self._curves = metrics_curves(track if active else None, directory)
        self._file = open(path if active else os.devnull, "a")
        self._bar = tqdm(total=total, initial=done, desc=directory.name, disable=not active)

    def write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._curves.add([line])
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
        self._curves.close()


def keep_steps(path: Path, done: int) -> None:
    """Rewrites the file with one line for each of the first `done` steps, in order. A last line that was cut is
    dropped. Raises ValueError, with file:line, for another one that cannot be read."""
    *lines, _ = path.read_bytes().split(b"\n")
    found = {parse_json(line, Line, f"{path}:{number}").step: line for number, line in enumerate(lines, 1)}
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"".join(found[step] + b"\n" for step in sorted(found) if step <= done))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; none if it does not exist. Raises ValueError, with file:line, for one that
    cannot be read or has no step."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], 1):
        parse_json(line, Line, f"{path}:{number}")
        found.append(parse_json(line, dict[str, Any], f"{path}:{number}"))
    return found


def metrics_curves(to: Tracker | None, directory: Path) -> Curves:
    """The curves of a train_pg directory, with the steps that its metrics.jsonl has so far."""
    config, lines = directory / "config.json", read_metrics(directory / "metrics.jsonl") if to else []
    settings = read_json(config, dict[str, Any]).get("args", {}) if to and config.exists() else {}
    return Curves(to, directory.parents[1], directory.parent.name, settings, lines)


def check_step(line: dict, floor: float, remedy: str) -> None:
    """Raises ValueError, with the step and the remedy, if the loss or gradient is not finite or the loss runs away.

    Only tokens with negative weight can run away: failures with R_f > 0 are imitated like successes.
    """
    if not np.isfinite([line["loss"], line["gradient_norm"]]).all():
        raise ValueError(f"step {line['step']}: loss {line['loss']}, gradient norm {line['gradient_norm']}. {remedy}")
    if line["logprob_negative"] < floor:
        raise ValueError(
            f"step {line['step']}: the mean log-probability of tokens with negative weight (failures) is "
            f"{line['logprob_negative']:.1f}, under --floor {floor:g}: their loss is unbounded below, and diverges. "
            f"{remedy}"
        )

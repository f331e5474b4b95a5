"""Curves in the trackers that people already look at: TensorBoard, Weights & Biases, Trackio; docs/looking.md.

    curves = Curves("tensorboard", Path("runs/a3t"), "round_0", settings, lines)    # a run of the tracker: a3t/round_0
    curves.add([{"step": 31, "loss": 2.0}])
    curves.close()

The files of a run are the truth. Whoever opens the curves of a name writes them anew from `lines`, which come from
those files, so a resumed run neither repeats nor loses a step. Whatever a tracker raises is said once and ends nothing.
Left out: where lines come from (metrics.py, track.py).
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from artifacts.json_io import read_json, write_json

Tracker = Literal["tensorboard", "wandb", "trackio"]
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "a3t"  # in W&B (unless $WANDB_PROJECT is set) and Trackio
UPLOAD_SECONDS = 60.0  # that W&B may take at the end, in which the stage waits; the rest stays on disk


@dataclass(frozen=True, kw_only=True)
class TrackArgs:
    """Where figures are shown too."""

    track: Tracker | None = None
    """Also send figures to a tracker, as they come: tensorboard, wandb or trackio (docs/looking.md); the files of the
    run stay the same."""

    def check(self) -> None:
        if self.track:
            require_package(f"--track {self.track}", PACKAGES[self.track])


def require_package(who: str, package: str) -> None:
    """Raises ValueError, with the command that installs it, if the package that `who` needs is missing."""
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:  # or a mere folder of that name, such as the one that W&B makes
        raise ValueError(
            f"{who} needs the package {package}, which is not installed; "
            f"run: pip install --constraint requirements/tracking.txt {package}"
        )


class Curves:
    """The curves of one run of a tracker, named <run>/<name>; without a tracker (None), all of this does nothing.

    settings: shown with the curves, where the tracker has a place for them. lines: dicts with an int "step", in rising
    order, and figures; what is not a finite number is left out.
    """

    def __init__(
        self,
        to: Tracker | None,
        run: Path,
        name: str,
        settings: Mapping[str, Any],
        lines: Iterable[Mapping[str, Any]],
    ):
        self._to, self._run, self._tracker = to, run, None
        self.failed = False
        if to:
            with self._forgiving():
                self._tracker = TRACKERS[to](run, name, dict(settings))
        self.add(lines)

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if self._tracker:
            with self._forgiving():
                for line in lines:
                    self._tracker.log(line["step"], figures(line))
                self._tracker.flush()

    def close(self) -> None:
        if self._tracker:
            with self._forgiving():
                self._tracker.close()
        self._tracker = None

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a blanket except: third-party trackers, with which no training may end
            self._tracker, self.failed = None, True
            why = (str(error).splitlines() or [""])[0]
            tqdm.write(
                f"{self._to} failed ({type(error).__name__}: {why}), so no more is sent to it; nothing is lost: "
                f"python -m artifacts.track --run {self._run} --to {self._to} sends all of it later",
                file=sys.stderr,
            )


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line but for its step."""
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def tracking_id(run: Path) -> str:
    """What trackers know a run by, wherever it is moved: drawn once and kept in <run>/tracking.json."""
    path = run / "tracking.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:8]})
    return read_json(path, dict[str, str])["id"]


# ---- the trackers: each replaces what it had under the same name -----------------------------------------------------


class TensorBoard:
    """Event files in <run>/tensorboard/<name>, written in this thread, so that an error is raised where it happens (the
    writer's usual queue blocks forever once its thread has failed)."""

    def __init__(self, run: Path, name: str, settings: dict[str, Any]):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = run / "tensorboard" / name
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in folder.glob("events.out.tfevents.*"):
            os.truncate(earlier, 0)  # not removed: an open TensorBoard goes on only from a file that is there
        self._event, self._file = Event, EventsWriter(str(folder / "events"))
        # Which makes it forget what it read of the earlier file.
        self._file.write_event(Event(wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, values: dict[str, float]) -> None:
        event = self._event(wall_time=time.time(), step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._file.write_event(event)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class WandB:
    """A run of W&B with a fixed id, which replaces an earlier one with that id. Its files are in <run>/wandb; without
    an account, or with WANDB_MODE=offline, only there."""

    def __init__(self, run: Path, name: str, settings: dict[str, Any]):
        import wandb

        ours = f"{tracking_id(run)}-{name}"
        for earlier in (run / "wandb").glob(f"offline-run-*-{ours}"):
            shutil.rmtree(earlier)
        known = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
        if not known:
            tqdm.write(f"wandb has no account here: curves stay in {run}/wandb, and `wandb sync` uploads them later")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=ours,
            name=f"{run.resolve().name}/{name}",
            group=run.resolve().name,
            dir=str(run),
            config=settings,
            mode=None if known else "offline",
            settings=wandb.Settings(console="off", quiet=True, finish_timeout=UPLOAD_SECONDS),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run in Trackio's local database, which replaces an earlier one of the same run and name."""

    def __init__(self, run: Path, name: str, settings: dict[str, Any]):
        import trackio

        ours = f"{tracking_id(run)}-{name}"
        with suppress(ValueError):  # no such project yet
            for earlier in list(trackio.Api().runs(PROJECT)):
                if (earlier.config or {}).get("id") == ours:
                    earlier.delete()
        self._trackio = trackio
        self._run = trackio.init(
            project=PROJECT,
            name=f"{run.resolve().name}/{name}",
            group=run.resolve().name,
            config=settings | {"id": ours},
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def flush(self) -> None:
        """Trackio writes by itself, twice a second."""

    def close(self) -> None:
        self._trackio.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}

"""The stage directory: config.json first, then the stage's own files, done.json last; and the record of a run.

    runs/<name>/round_0/{rollout,actre,train_pg,evaluate}/        runs/<name>/run.json

    with Stage(directory, args, facts, identity) as stage:
        if stage.finished:
            return
        ...                                         # append to files that a killed run can resume
        stage.finish(counts)

A killed stage resumes when it is run again, and retries what ended as env_error, llm_error or timeout. A finished stage
says so. A stage whose settings have another meaning is refused, and nothing is replaced; so is a second process in the
same directory, and a stage of another world or base than the run's. A stage that fails before it has written anything
leaves no directory.
Left out: what a stage does (rollout.py, actre.py, train_pg.py, evaluate.py).
"""

from __future__ import annotations

import artifacts.interrupts

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from artifacts.atomic import lock
from artifacts.cli import run_main
from artifacts.json_io import read_json, write_json
from envs.make import DEFAULTS, UNSEEN

# Settings that say how a stage computes, asks and waits, not what for: it may resume with different values.
HOW = {"concurrency", "timeout", "retries", "deadline", "turn_deadline", "processes", "url", "key", "slots", "track"}
HOW |= {"rollout_weights", "drafts", "mesh", "device_rows", "remat", "attention", "checkpoint_minutes", "preview"}
# Settings whose meaning is in the facts: the content of files wherever they are, the tasks of a panel, the round, the
# world (by its facts and the content of its tasks).
IN_FACTS = {"run", "round", "name", "model", "env", "data", "panel", "panels", "limit", "prompt", "adapter", "script"}
IN_FACTS |= {"actre_prompt", "actre_adapter", "base", "inputs", "personas", "epochs", "verify", "out", "import_"}
IN_FACTS |= {"shard"}
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy", "alfworld")
ROOT = Path(__file__).parents[1]  # the project's folder


class StageError(ValueError):
    """Says what was got, what was expected and what to do. A command prints it and exits with status 2."""


class Busy(StageError):
    """Another process is at work in the directory."""


def run_stage(main: Callable[[Any], Any], cls: type, description: str) -> None:
    """run_main (cli.py) for commands that compile: programs are cached under runs/.compiled, since all stages of all
    rounds share the same few."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(ROOT / "runs" / ".compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    run_main(main, cls, description)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- rounds ----------------------------------------------------------------------------------------------------------


def round_directory(run: Path, round_index: int) -> Path:
    return Path(run) / f"round_{round_index}"


def current_round(run: Path) -> int:
    """The first round whose train_pg/done.json is missing."""
    round_index = 0
    while (round_directory(run, round_index) / "train_pg" / "done.json").exists():
        round_index += 1
    return round_index


def require_done(directory: Path, command: str) -> dict:
    """The done.json of an earlier stage. If it is not finished, raises StageError with the command that finishes it."""
    path = directory / "done.json"
    if not path.exists():
        raise StageError(f"{directory} is not finished (no done.json); run: {command}")
    return read_json(path, dict[str, Any])


def adapter_of_round(run: Path, round_index: int) -> Path | None:
    """The adapter that plays a round: the one trained in the round before; None in round 0."""
    if round_index == 0:
        return None
    directory = round_directory(run, round_index - 1) / "train_pg"
    require_done(directory, f"python train_pg.py --run {run} --round {round_index - 1}")
    return directory / "adapter"


def adapter_sha(adapter: Path | None) -> str | None:
    """Identifies an adapter in a config.json: the sha256 of its weights."""
    return None if adapter is None else sha256(adapter / "adapter_model.safetensors")


# ---- the run ---------------------------------------------------------------------------------------------------------

FLAGS = {
    "base": "--model",
    "tokenizer": "--model",
    "config": "--model",
    "env": "--env",
    "world": "--env, --engine or --mode",
}


def read_run(run: Path) -> dict[str, Any]:
    """run.json: what a run is. `env` and `world` of its training tasks, their `content` by panel, the base (`model`,
    where it was; `base`, `tokenizer`, `config`: sha256) and the form of the `prompts`. Empty for a new run."""
    path = Path(run) / "run.json"
    return read_json(path, dict[str, Any]) if path.exists() else {}


def base_of(run: Path, given: Path | None, env: str | None = None) -> Path:
    """The base of a stage: the one given, else the run's, else that of the world `env` (default: the run's world).
    Raises StageError if the run's base is no longer where it was."""
    record = read_run(run)
    if given is not None or "model" not in record:
        return given or DEFAULTS.get(env or record.get("env", "alfworld"), UNSEEN).model
    if not Path(record["model"]).exists():
        raise StageError(f"the base of {run} was {record['model']}, which is not there; give its folder by --model")
    return Path(record["model"])


def joined_identity(run: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """run.json with what a stage knows of the run. Raises StageError, with the flag, for what contradicts it."""
    old = read_run(run)
    then, now = by_name({k: v for k, v in old.items() if k != "model"}), by_name(identity)
    found = [name for name in sorted(now) if name in then and then[name] != now[name]]
    if found:
        known = f" (its base was {old['model']})" if "model" in old else ""
        differing = "; ".join(
            f"{name} is {shown(then[name])} there, {shown(now[name])} now ({FLAGS.get(name.split('.')[0], '--data')})"
            for name in found
        )
        raise StageError(f"{run} is another run{known}: {differing}. Give the run's own setting, or a new --run.")
    return {**old, **identity, "content": old.get("content", {}) | identity.get("content", {})}


# ---- one stage -------------------------------------------------------------------------------------------------------


def by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Flattens nested settings: {"args": {"server": {"model": "x"}}} -> {"args.server.model": "x"}."""
    found = {}
    for name, value in settings.items():
        inner = by_name(value) if isinstance(value, dict) else {}
        found |= {f"{name}.{key}": v for key, v in inner.items()} or {name: value}
    return found


def shown(value: Any) -> str:
    """A value as messages show it: of a sha256, what tells it apart."""
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else repr(value)


def as_json(args: Any) -> dict[str, Any]:
    """The fields of a dataclass as config.json stores them."""
    return json.loads(json.dumps(dataclasses.asdict(args), default=str))


def compared(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config.json decides the result, by name: all facts, and arguments in neither HOW nor IN_FACTS."""
    args = by_name(config.get("args", {}))
    kept = {
        f"args.{name}": value for name, value in args.items() if name.split(".")[-1] not in HOW and name not in IN_FACTS
    }
    return kept | {f"facts.{name}": value for name, value in by_name(config.get("facts", {})).items()}


def differences(old: dict[str, Any], config: dict[str, Any], args: Any) -> list[str]:
    """What differs between two config.json, as sentences. A setting newer than `old` had its default then."""
    defaults = {f.name: f.default for f in dataclasses.fields(args) if f.default is not dataclasses.MISSING}
    then = compared({"args": as_json(dataclasses.replace(args, **defaults))}) | compared(old)
    now = compared(config)
    return [
        f"{name}: there {shown(then.get(name))}, now {shown(now.get(name))}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]


class Stage:
    """One stage in its directory; see the module's docstring.

    args: the settings, resolved (no default left that depends on the world or the run). facts: what the result depends
    on besides them (hashes of panel, content, base, adapter, inputs). identity: what the stage knows of the run.
    Raises StageError if the directory holds a stage of other settings, files of something else, or another process.
    """

    def __init__(self, directory: Path, args: Any, facts: dict[str, Any], identity: dict[str, Any] | None = None):
        self.directory = Path(directory)
        self.started = time.time()
        self.args, self.config = args, {"args": as_json(args), "facts": facts}
        self._run = Path(getattr(args, "run", self.directory))
        self._record = joined_identity(self._run, identity) if identity else None
        self._made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.directory / ".lock")
        if self._lock is None:
            raise Busy(f"another process is at work in {self.directory}; wait until it ends, or choose another --run")
        with contextlib.ExitStack() as refused:
            refused.callback(self.close)
            self.finished = self._open(args)
            refused.pop_all()
        if self.finished:
            print(f"{self.directory}: finished already")
            self.close()
        else:
            artifacts.interrupts.advice = f"interrupted; {self.directory} is kept, the same command resumes it"

    def _open(self, args: Any) -> bool:
        """Compares or writes config.json. Returns whether the stage is finished."""
        path = self.directory / "config.json"
        for leftover in (*self.directory.glob("*.tmp"), *self.directory.glob("adapter/*.tmp")):
            leftover.unlink()  # of a process that was killed while it wrote
        if self._results():
            if not path.exists():
                raise StageError(
                    f"{self.directory} holds {self._results()[0]} but no config.json, so it is not this stage's. "
                    "Choose another --run, or remove the directory."
                )
            if differing := differences(read_json(path, dict[str, Any]), self.config, args):
                raise StageError(
                    f"{self.directory} belongs to a run with other settings ({'; '.join(differing)}). "
                    "Use those settings, choose another --run (evaluate.py: or --name), or remove the directory."
                )
        else:
            write_json(path, {**self.config, **provenance()})
        if self._record is not None and self._record != read_run(self._run):
            write_json(self._run / "run.json", self._record)
        return (self.directory / "done.json").exists()

    def _results(self) -> list[str]:
        """Names of the files and folders that are more than a beginning."""
        return sorted(
            path.name
            for path in self.directory.iterdir()
            if path.name not in ("config.json", ".lock") and (path.is_dir() or path.stat().st_size)
        )

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes done.json, the last file of a stage. `seconds` counts only this process, not interrupted ones."""
        write_json(self.directory / "done.json", {**summary, "seconds": round(time.time() - self.started, 1)})
        self.close()

    def close(self) -> None:
        """Releases the lock. If nothing was written, removes the directory and those made for it."""
        if self._lock is None:
            return
        if self._made and not self._results():
            for path in self.directory.iterdir():
                path.unlink()
            for path in self._made:
                if path == self._run and [each.name for each in path.iterdir()] == ["run.json"]:
                    (path / "run.json").unlink()
                with contextlib.suppress(OSError):  # not empty: another process is at work there
                    path.rmdir()
        os.close(self._lock)
        self._lock = None
        artifacts.interrupts.advice = artifacts.interrupts.PLAIN

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def provenance() -> dict[str, Any]:
    """Git commit and dirty flag, package versions, Python and the device kind; no host or user names."""
    import jax

    def git(*words: str) -> str | None:
        result = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "git": {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))},
        "versions": versions,
        "python": sys.version.split()[0],
        "device": jax.devices()[0].device_kind,
    }

"""The stage directory: config.json first, then the stage's own files, done.json last.

    runs/<name>/round_0/{rollout,actre,train_pg,evaluate}/

A stage that was killed is run again and resumes (what ended as env_error, llm_error or timeout is played again); one
that is finished says so; one whose arguments have changed is refused and nothing is replaced. Left out: what a stage
does (rollout.py, actre.py, train_pg.py, evaluate.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from artifacts.atomic import atomic_write

# Settings that change how a stage asks a server or waits for a world, and not what for: it may be resumed with others.
HOW_ONLY = ("concurrency", "timeout", "retries", "deadline", "turn_deadline", "processes")
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy", "alfworld")
ROOT = Path(__file__).parents[1]  # the project's folder


class StageError(Exception):
    """What was got, what was expected, what to do. A command prints it and exits with status 2."""


def run_main(main, args) -> None:
    """Runs a stage's main(args); a StageError, ValueError, missing file or package becomes one line and exit status 2.

    Compiled programs are kept under runs/.compiled, because every stage of every round needs the same few.
    """
    import jax

    jax.config.update("jax_compilation_cache_dir", str(ROOT / "runs" / ".compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        main(args)
    except (StageError, ValueError, FileNotFoundError, ImportError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise StageError(f"{path} is not JSON ({error}); remove it and run the stage again") from error


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- rounds ----------------------------------------------------------------------------------------------------------


def round_directory(run: Path, number: int) -> Path:
    return Path(run) / f"round_{number}"


def current_round(run: Path) -> int:
    """The first round whose train_pg/done.json is missing."""
    number = 0
    while (round_directory(run, number) / "train_pg" / "done.json").exists():
        number += 1
    return number


def require_done(directory: Path, command: str) -> dict:
    """The done.json of an earlier stage. Raises StageError: not finished, and the command that finishes it."""
    path = directory / "done.json"
    if not path.exists():
        raise StageError(f"{directory} is not finished (no done.json); run: {command}")
    return read_json(path)


def adapter_of_round(run: Path, number: int) -> Path | None:
    """The adapter that the policy of round `number` carries: the one trained in the round before; None in round 0."""
    if number == 0:
        return None
    directory = round_directory(run, number - 1) / "train_pg"
    require_done(directory, f"python train_pg.py --run {run} --round {number - 1}")
    return directory / "adapter"


def adapter_sha(adapter: Path | None) -> str | None:
    """What tells adapters apart in a config.json: the sha256 of the weights."""
    return None if adapter is None else sha256(adapter / "adapter_model.safetensors")


# ---- one stage -------------------------------------------------------------------------------------------------------


def by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings as one dict: {"args": {"server": {"model": "x"}}} -> {"args.server.model": "x"}."""
    found = {}
    for name, value in settings.items():
        inner = by_name(value) if isinstance(value, dict) else {}
        found |= {f"{name}.{key}": v for key, v in inner.items()} or {name: value}
    return found


def as_json(args: Any) -> dict[str, Any]:
    """The fields of a dataclass as config.json has them."""
    return json.loads(json.dumps(dataclasses.asdict(args), default=str))


class Stage:
    """`stage = Stage(directory, args, facts)`; `if stage.finished: return`; ...; `stage.finish(counts)`.

    facts: what the result depends on beside the arguments (hashes of panel, base, adapter, inputs).
    Raises StageError if the directory holds a stage of other arguments or facts.
    """

    def __init__(self, directory: Path, args: Any, facts: dict[str, Any]):
        self.directory = Path(directory)
        self.started = time.time()
        config = {"args": as_json(args), "facts": facts}
        path = self.directory / "config.json"
        if path.exists():
            old = read_json(path)
            there, now = (by_name({"args": c.get("args", {}), "facts": c.get("facts", {})}) for c in (old, config))
            defaults = {f.name: f.default for f in dataclasses.fields(args) if f.default is not dataclasses.MISSING}
            # A setting that is newer than the directory had its default there.
            there = by_name({"args": as_json(dataclasses.replace(args, **defaults))}) | there
            differing = [
                f"{name}: there {there.get(name)!r}, now {now.get(name)!r}"
                for name in sorted({*there, *now})
                if there.get(name) != now.get(name) and name.split(".")[-1] not in HOW_ONLY
            ]
            if differing:
                raise StageError(
                    f"{self.directory} belongs to a run with other settings ({'; '.join(differing)}). "
                    "Repeat those settings, or give another --run, or remove the directory."
                )
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(path, {**config, **provenance()})
        self.finished = (self.directory / "done.json").exists()
        if self.finished:
            print(f"{self.directory}: finished already")

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes done.json, the last file of a stage. `seconds` counts this process only, not an interrupted one."""
        write_json(self.directory / "done.json", {**summary, "seconds": round(time.time() - self.started, 1)})


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

"""The stage directory: config.json first, then the stage's own files, done.json last.

    runs/<name>/round_0/{rollout,actre,train_pg,evaluate}/

A killed stage resumes when it is run again, and retries what ended as env_error, llm_error or timeout. A finished stage
says so. A stage whose arguments have changed is refused, and nothing is replaced.
Left out: what a stage does (rollout.py, actre.py, train_pg.py, evaluate.py).
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

# Transport and timeout settings: how a stage asks and waits, not what for. It may resume with different values.
TRANSPORT = ("concurrency", "timeout", "retries", "deadline", "turn_deadline", "processes")
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy", "alfworld")
ROOT = Path(__file__).parents[1]  # the project's folder


class StageError(Exception):
    """Says what was got, what was expected and what to do. A command prints it and exits with status 2."""


def run_main(main, args) -> None:
    """Runs a stage's main(args). A StageError, ValueError, missing file or package becomes one line and exit status 2.

    Compiled programs are cached under runs/.compiled, since all stages of all rounds share the same few.
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
    return read_json(path)


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


# ---- one stage -------------------------------------------------------------------------------------------------------


def by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Flattens nested settings: {"args": {"server": {"model": "x"}}} -> {"args.server.model": "x"}."""
    found = {}
    for name, value in settings.items():
        inner = by_name(value) if isinstance(value, dict) else {}
        found |= {f"{name}.{key}": v for key, v in inner.items()} or {name: value}
    return found


def as_json(args: Any) -> dict[str, Any]:
    """The fields of a dataclass as config.json stores them."""
    return json.loads(json.dumps(dataclasses.asdict(args), default=str))


class Stage:
    """`stage = Stage(directory, args, facts)`; `if stage.finished: return`; ...; `stage.finish(counts)`.

    facts: what the result depends on besides the arguments (hashes of panel, base, adapter, inputs).
    Raises StageError if the directory holds a stage with other arguments or facts.
    """

    def __init__(self, directory: Path, args: Any, facts: dict[str, Any]):
        self.directory = Path(directory)
        self.started = time.time()
        config = {"args": as_json(args), "facts": facts}
        path = self.directory / "config.json"
        if path.exists():
            old = read_json(path)
            then, now = (by_name({"args": c.get("args", {}), "facts": c.get("facts", {})}) for c in (old, config))
            defaults = {f.name: f.default for f in dataclasses.fields(args) if f.default is not dataclasses.MISSING}
            # A setting that is newer than the directory had its default then.
            then = by_name({"args": as_json(dataclasses.replace(args, **defaults))}) | then
            differing = [
                f"{name}: there {then.get(name)!r}, now {now.get(name)!r}"
                for name in sorted({*then, *now})
                if then.get(name) != now.get(name) and name.split(".")[-1] not in TRANSPORT
            ]
            if differing:
                raise StageError(
                    f"{self.directory} belongs to a run with other settings ({'; '.join(differing)}). "
                    "Use those settings, choose another --run, or remove the directory."
                )
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(path, {**config, **provenance()})
        self.finished = (self.directory / "done.json").exists()
        if self.finished:
            print(f"{self.directory}: finished already")

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes done.json, the last file of a stage. `seconds` counts only this process, not interrupted ones."""
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

"""The experiments on a pretrained model: the commands that they run are ones that the project has."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from artifacts.cli import parse
from artifacts.json_io import write_json
from bench import pretrained

ROOT = Path(__file__).parent.parent


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that experiments run, those of ./run.sh included, instead of running them."""
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$*"\n')
    (tmp_path / "python").chmod(0o755)
    ran = []

    def run(command, *, check, env):
        if command[0] == "./run.sh":
            env = env | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
            done = subprocess_run(command, check=check, env=env, cwd=ROOT, capture_output=True, text=True)
            ran.extend(shlex.split(line) for line in done.stdout.splitlines())
        else:
            ran.append(command[1:])

    subprocess_run = subprocess.run
    monkeypatch.setattr(pretrained.subprocess, "run", run)
    return ran


@pytest.fixture
def settings(tmp_path):
    """A model that need not be made, and the stages that arms share."""
    runs = tmp_path / "runs"
    for arm, stages in {
        "bootstrap-300": pretrained.BOOTSTRAP,
        "a3t": ("round_0/evaluate", "round_1/rollout", "round_1/actre"),
    }.items():
        for stage in stages:
            (runs / arm / stage).mkdir(parents=True)
            write_json(runs / arm / stage / "done.json", {"success": 7})
        write_json(runs / arm / "run.json", {"arm": arm})
    (tmp_path / "base").mkdir()
    return pretrained.Args(runs=runs, results=tmp_path / "results", model=tmp_path / "base")


def test_every_command_of_every_experiment_parses(commands, settings):
    pretrained.main(settings)
    for words in commands:
        for option, value in itertools.pairwise(words):
            if option == "--actre-adapter":  # which the stage before writes
                Path(value).mkdir(parents=True, exist_ok=True)
                (Path(value) / "adapter_model.safetensors").touch()
        module, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
        parse(importlib.import_module(module).Args, "", rest)
    assert sum("--count 7" in " ".join(words) for words in commands) == 1  # in the place of the seven won compositions


def test_arms_share_finished_stages(settings):
    (settings.runs / "a3t/round_0/evaluate/done.json").unlink()
    for _ in range(2):  # the second time they are there already
        pretrained.share(settings, "other", "a3t", "round_0/evaluate", "round_1/actre", "round_2/actre")
        (settings.runs / "a3t/round_1/actre/done.json").unlink(missing_ok=True)
    other = settings.runs / "other"
    assert {str(path.relative_to(other)) for path in other.rglob("*.json")} == {"round_1/actre/done.json", "run.json"}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def stage_of(arm: Path, name: str, done: bool = True, **files: bytes) -> Path:
    stage = arm / name
    stage.mkdir(parents=True)
    write_json(stage / "config.json", {"out": f"{pretrained.ROOT}/runs/a3t"})
    if done:
        write_json(stage / "done.json", {})
    for file, content in files.items():
        (stage / f"{file}.jsonl").write_bytes(content)
    return stage


def test_what_is_kept_names_no_path_and_an_unfinished_stage_is_laid_back(settings):
    shutil.rmtree(settings.runs)
    arm, attempts = settings.runs / "a3t", b'{"task_id": "a"}\n{"task_id": "b"'
    stage_of(arm, "round_1/rollout", done=False, trajectories=attempts)
    stage_of(arm, "round_1/train_pg", done=False, metrics=b"{}\n")  # its checkpoint is not kept
    write_json(arm / "run.json", {})

    pretrained.keep(settings, "a3t")
    kept = settings.results / "a3t"
    first = {name: (kept / name).read_bytes() for name in files(kept)}
    pretrained.keep(settings, "a3t")
    assert first == {name: (kept / name).read_bytes() for name in files(kept)}
    assert set(first) == {"run.json", "round_1/rollout/config.json", "round_1/rollout/trajectories.jsonl.gz"}
    assert json.loads(first["round_1/rollout/config.json"]) == {"out": "runs/a3t"}

    shutil.rmtree(settings.runs)
    pretrained.main(dataclasses.replace(settings, experiments=(), restore=True))
    assert files(arm) == {"run.json", "round_1/rollout/config.json", "round_1/rollout/trajectories.jsonl"}
    laid_back = arm / "round_1/rollout/trajectories.jsonl"
    assert laid_back.read_bytes() == attempts
    laid_back.write_bytes(b"played on")
    pretrained.restore(settings)
    assert laid_back.read_bytes() == b"played on"  # what is there is left as it is


def test_training_is_run_again_unless_all_that_its_adapter_played_is_kept(settings):
    shutil.rmtree(settings.runs)
    arm = settings.runs / "a3t"
    for index in (0, 1, 2):
        for name in ("rollout", "actre", "train_pg", "evaluate"):
            played = {} if name == "train_pg" else {"trajectories": b""}
            stage_of(arm, f"round_{index}/{name}", done=index < 2 or name == "rollout", **played)
        (arm / f"round_{index}/train_pg/adapter").mkdir()
        (arm / f"round_{index}/train_pg/adapter/adapter_model.safetensors").write_bytes(b"%d" % index)
    write_json(arm / "run.json", {})
    pretrained.keep(settings, "a3t")
    shutil.rmtree(settings.runs)
    pretrained.restore(settings)
    assert files(arm / "round_0/train_pg") == {"config.json", "done.json"}  # finished, without its adapter
    assert not (arm / "round_1/train_pg").exists()  # round 2 is not composed, so this adapter plays on

    pretrained.share(settings, "other", "a3t", "round_0/rollout", "round_0/train_pg", "round_1/rollout")
    assert not (settings.runs / "other/round_0/train_pg").exists()  # it is trained there, and plays its own round 1
    assert (settings.runs / "other/round_0/rollout").exists() and not (settings.runs / "other/round_1").exists()

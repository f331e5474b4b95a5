"""The experiments on a pretrained model: the commands that they run are ones that the project has."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
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


def test_what_is_kept_names_no_path_and_is_laid_back_but_for_adapters(settings):
    arm, trajectories = settings.runs / "a3t", b'{"task_id": "a"}\n{"task_id": "b"'
    unfinished, training, started = arm / "round_1/rollout", arm / "round_1/train_pg", arm / "round_2/train_pg"
    (unfinished / "done.json").unlink()
    (unfinished / "trajectories.jsonl").write_bytes(trajectories)
    for stage in (unfinished, training, started):
        stage.mkdir(parents=True, exist_ok=True)
        write_json(stage / "config.json", {"out": f"{pretrained.ROOT}/runs/a3t"})
    write_json(training / "done.json", {})
    (training / "adapter").mkdir()

    pretrained.keep(settings, "a3t")
    first = {path: path.read_bytes() for path in settings.results.rglob("*") if path.is_file()}
    pretrained.keep(settings, "a3t")
    assert first == {path: path.read_bytes() for path in settings.results.rglob("*") if path.is_file()}
    assert {str(path.relative_to(settings.results / "a3t")) for path in first} == {
        "run.json",
        "round_1/rollout/config.json",
        "round_1/rollout/trajectories.jsonl.gz",
        "round_1/train_pg/config.json",
        "round_1/train_pg/done.json",
    }
    kept = settings.results / "a3t/round_1/train_pg/config.json"
    assert kept.read_text() == '{\n  "out": "runs/a3t"\n}\n'

    shutil.rmtree(settings.runs)
    pretrained.main(dataclasses.replace(settings, experiments=(), restore=True))
    assert {str(path.relative_to(arm)) for path in arm.rglob("*") if path.is_file()} == {
        "run.json",
        "round_1/rollout/config.json",
        "round_1/rollout/trajectories.jsonl",
    }
    assert (unfinished / "trajectories.jsonl").read_bytes() == trajectories
    (unfinished / "trajectories.jsonl").write_bytes(b"played on")
    pretrained.restore(settings)  # what is there is left as it is
    assert (unfinished / "trajectories.jsonl").read_bytes() == b"played on"

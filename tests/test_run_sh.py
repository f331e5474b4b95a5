"""Which stages run.sh runs with which flags, by a program in python's place that writes its arguments."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
UNSET = ("RUN", "BUDGET", "COUNT", "SEED", "SERVER", "SERVER_MODEL", "TRUST", FRACTION)


@pytest.fixture
def run_sh(tmp_path):
    """Runs ./run.sh with one round, given arguments and variables; returns its exit status, commands and errors."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "model").mkdir()
    set_here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ROUNDS": "1", "MODEL": str(tmp_path / "model")}
    env = {name: value for name, value in os.environ.items() if name not in UNSET}

    def run(*words: str, script: Path = ROOT / "run.sh", **variables: str) -> tuple[int, list[str], str]:
        here = env | set_here | variables
        done = subprocess.run([script, *words], cwd=ROOT, env=here, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


def stages(commands: list[str]) -> list[str]:
    return [command.split()[1] if command.startswith("-m ") else command.split()[0] for command in commands]


LOOP = ["rollout.py", "actre.py", "train_pg.py", "evaluate.py"]


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("tiny", LOOP),
        ("webshop", LOOP),
        ("smollm2", ["models.demonstrations", "models.demonstrations", "train_pg.py", *LOOP[1:]]),
        ("smollm2-webshop", ["models.demonstrations", "models.demonstrations", "train_pg.py", *LOOP[1:]]),
        ("paper", ["lora.convert", *LOOP]),
        ("refine", ["refine.py", "train_pg.py", *["evaluate.py"] * 3]),
    ],
)
def test_each_mode_runs_its_stages_in_order(run_sh, mode, expected):
    status, commands, _ = run_sh(mode)
    assert (status, stages(commands)) == (0, expected)


def test_a_trusted_run_goes_on_after_its_finished_stages(run_sh, tmp_path):
    run = tmp_path / "run"
    for stage in ("round_0/rollout", "round_0/actre", "round_0/train_pg", "round_0/evaluate", "round_1/rollout"):
        (run / stage).mkdir(parents=True)
        (run / stage / "done.json").touch()
    _, commands, _ = run_sh(RUN=str(run), ROUNDS="2", TRUST="1")
    assert stages(commands) == ["actre.py", "train_pg.py", "evaluate.py"] and all("--round 1" in c for c in commands)
    assert (
        stages(run_sh(RUN=str(run), ROUNDS="2")[1]) == LOOP * 2
    )  # each stage says that it is finished, or what differs


def test_flags_with_a_stage_s_name_come_last_and_go_to_it_alone(run_sh):
    words = [
        "--play.max-turns",
        "2",
        "--train.epochs",
        "1",
        "2",
        "--rollout.server.url",
        "URL",
        "--evaluate.limit",
        "3",
    ]
    for mode in ([], ["webshop"]):
        _, [rollout, actre, train, evaluate], _ = run_sh(*mode, *words)
        assert rollout.endswith("--max-turns 2 --server.url URL")
        assert "--max-turns 2" in actre and "URL" not in actre
        assert train.endswith("--epochs 1 2") and "max-turns" not in train
        assert evaluate.endswith("--max-turns 2 --limit 3")


@pytest.mark.parametrize("mode", ["tiny", "webshop", "smollm2", "smollm2-webshop", "paper", "refine"])
def test_a_server_plays_in_every_stage_that_plays_and_the_base_is_trained_on_as_it_is_served(run_sh, mode):
    assert not any("--server" in command for command in run_sh(mode)[1])
    _, commands, _ = run_sh(mode, SERVER="http://localhost:8000/v1")
    server = "--server.url http://localhost:8000/v1 --server.model base --server.api tokens"
    playing = [command for command in commands if command.split()[0] in ("rollout.py", "actre.py", "evaluate.py")]
    assert playing and all(server in command for command in playing)
    assert sum("--server" in command for command in commands) == len(playing)
    for train in (command.split() for command in commands if command.startswith("train_pg.py")):
        weights = [train[i + 1] for i, word in enumerate(train) if word == "--weights"]
        assert weights[-1] == ("nf4" if mode == "paper" else "fp32")
    assert "--server.model other" in run_sh(mode, SERVER="http://x/v1", SERVER_MODEL="other")[1][-1]


@pytest.mark.parametrize(
    "words, got",
    [(["new"], "new"), (["tiny", "--limit", "3"], "--limit"), (["--seed", "3"], "--seed"), (["tiny", "x"], "x")],
)
def test_what_it_does_not_know_is_refused_before_anything_runs(run_sh, words, got):
    status, commands, said = run_sh(*words)
    assert (status, commands) == (2, []) and f"run.sh: got '{got}'" in said


def test_refine_passes_flags_on_and_refuses_those_of_stages_that_it_does_not_run(run_sh):
    _, commands, _ = run_sh("refine", "--evaluate.limit", "3", "--train.rank", "8")
    assert commands[1].endswith("--rank 8")
    assert all(command.endswith("--limit 3") for command in commands[2:])
    status, commands, said = run_sh("refine", "--rollout.limit", "3")
    assert (status, commands) == (2, []) and "rollout or actre, which refine does not run" in said


def test_flags_of_the_demonstrations_go_to_them_alone_and_are_refused_where_there_are_none(run_sh):
    status, [demonstrations, third, *others], _ = run_sh("smollm2", "--demonstrations.displaced", "0.1")
    assert status == 0 and demonstrations.endswith("--count 300 --seed 0 --displaced 0.1")
    assert third.endswith("--count 100 --seed 0 --displaced 0.1")
    assert not any("displaced" in command for command in others)
    status, commands, error = run_sh("tiny", "--demonstrations.displaced", "0.1")
    assert (status, commands) == (2, []) and "only smollm2" in error


def test_a_run_survives_an_update_of_run_sh(run_sh, tmp_path):
    copy = tmp_path / "run.sh"
    copy.write_bytes((ROOT / "run.sh").read_bytes())
    copy.chmod(0o755)
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@"\necho "(" > {copy}\n')
    status, commands, _ = run_sh(script=copy)
    assert (status, stages(commands)) == (0, LOOP)


def test_a_gpu_s_memory_is_taken_almost_whole_unless_the_environment_says_otherwise(run_sh, tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$' + FRACTION + '"\n')
    assert set(run_sh()[1]) == {".92"}
    assert set(run_sh(**{FRACTION: ".5"})[1]) == {".5"}


@pytest.mark.parametrize("mode", ["tiny", "paper"])
def test_what_follows_from_the_memory_is_left_to_the_stages(run_sh, mode):
    _, commands, _ = run_sh(mode)
    assert not [
        flag for flag in ("--slots", "--rollout-weights", "--remat", "--device-rows") if flag in " ".join(commands)
    ]

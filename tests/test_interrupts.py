"""Ctrl-C, SIGTERM and closed pipes, in every command: one sentence, the right exit status, nothing swallowed."""

from __future__ import annotations

import ast
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.imports import python_files

ROOT = Path(__file__).parent.parent


def commands() -> list[str]:
    """The files with a command line, run as scripts or with -m."""
    return [name for name in python_files(ROOT) if "\nclass Args" in (ROOT / name).read_text()]


@pytest.mark.parametrize("name", commands())
def test_a_command_can_be_interrupted_from_its_first_import_on_and_fails_in_one_way(name):
    body = [node for node in ast.parse((ROOT / name).read_text()).body if not isinstance(node, ast.Expr)]
    assert [ast.unparse(node) for node in body[:2]] == [
        "from __future__ import annotations",
        "import artifacts.interrupts",
    ]
    assert ast.unparse(body[-1].body[-1]).startswith(("run_main(", "run_stage(")), (
        "run_main turns errors into sentences"
    )


def start(*words: str, **how) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        **how,
    )


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def synthesis(tmp_path: Path) -> tuple[list[str], Path]:
    """A stage that writes rows from its first second on, and its file."""
    run = tmp_path / "run"
    return ["refine.py", "--run", str(run), "--count", "100000"], run / "refine" / "trajectories.jsonl"


def has_rows(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stage_that_is_interrupted_says_how_to_resume(tmp_path, sent, status):
    words, played = synthesis(tmp_path)
    process = start(*words)
    wait_for(lambda: has_rows(played))
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)
    assert process.returncode == status
    last = said.decode().strip().splitlines()[-1]
    assert last == f"refine.py: interrupted; {played.parent} is kept, the same command resumes it"
    assert "Traceback" not in said.decode() and not (played.parent / "done.json").exists()


@pytest.mark.parametrize("stage", ["rollout", "actre", "train_pg", "evaluate", "refine"])
@pytest.mark.parametrize("module", ["artifacts.interrupts", "numpy"])
def test_an_interrupt_while_a_stage_imports_its_modules_is_not_swallowed(tmp_path, stage, module):
    process = start("-X", "importtime", f"{stage}.py", "--run", str(tmp_path / "run"))
    fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)  # so that the stage waits for its lines to be read
    assert any(line.split()[-1:] == [module.encode()] for line in process.stderr)  # written as its import ends
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    others = [line for line in said.decode().splitlines() if line and not line.startswith("import time:")]
    assert (process.returncode, others) == (130, [f"{stage}.py: interrupted"])


def test_a_world_played_from_the_shell_can_be_interrupted_and_its_pipe_closed():
    process = start("-m", "envs.play", "--env", "synthetic", "--task", "syn_valid/00000")
    assert b'"observation"' in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130  # with its input still open
    assert process.stderr.read() == b"\nplay.py: interrupted\n"

    process = start("-m", "envs.play", "--env", "synthetic", "--tasks", "--split", "syn_train")
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(30) == 0


def test_run_sh_passes_a_signal_on_to_the_stage_at_work(tmp_path):
    _, played = synthesis(tmp_path)
    environment = {"RUN": str(tmp_path / "run"), "COUNT": "100000", "JAX_PLATFORMS": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    loop = subprocess.Popen(
        ["./run.sh", "refine"],
        cwd=ROOT,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    wait_for(lambda: has_rows(played))
    loop.send_signal(signal.SIGTERM)
    _, said = loop.communicate(timeout=60)  # ends only when the stage, which has the same pipe, has ended
    assert loop.returncode == 143 and b"interrupted" in said and b"Traceback" not in said

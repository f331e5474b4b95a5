"""Every import points down, and none runs in a circle; docs/design.md has the floors."""

from __future__ import annotations

import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.imports import imports_of, python_files

ROOT = Path(__file__).parent.parent
STAGES = {"rollout.py", "actre.py", "refine.py", "train_pg.py", "evaluate.py"}


def floors() -> dict[str, int]:
    """Each package or file of the block `floors` in docs/design.md -> its floor."""
    block = re.search(r"```floors\n(.*?)```", (ROOT / "docs/design.md").read_text(), re.S)[1]
    return {name: int(line.split()[0]) for line in block.splitlines() for name in line.split()[1:]}


def floor_of(file: str, known: dict[str, int]) -> int:
    return known[file] if file in known else known[file.split("/")[0]]


def faults(root: Path, known: dict[str, int]) -> list[str]:
    """What is wrong with the imports of a tree; nothing if all is well."""
    graph = {file: imports_of(root, file) for file in python_files(root)}
    found = []
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"circle: {' -> '.join(reversed(error.args[1]))}")
    for file, imported in graph.items():
        for other in sorted(imported):
            here, there = floor_of(file, known), floor_of(other, known)
            same_package = "/" in file and file.split("/")[0] == other.split("/")[0]
            if there > here or (there == here and not same_package):
                found.append(f"not down: {file} (floor {here}) imports {other} (floor {there})")
    return found


def test_every_import_points_down():
    assert faults(ROOT, floors()) == []


def test_the_root_holds_the_stages_and_nothing_else():
    assert {path.name for path in ROOT.glob("*.py")} == STAGES


PLANTED = {  # the second file of a circle, or of an arrow up
    "circle": "def f():\n    from lora import first\n",
    "circle while type checking": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lora.first import x\n"
    ),
    "not down: lora": "import rollout\n",
    "not down: lora/second": "import envs.base\n",
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(tmp_path, fault):
    for name in ("lora", "envs"):
        (tmp_path / name).mkdir()
    (tmp_path / "rollout.py").write_text("")
    (tmp_path / "envs" / "base.py").write_text("")
    (tmp_path / "lora" / "first.py").write_text("from lora import second\n")
    (tmp_path / "lora" / "second.py").write_text("")
    assert faults(tmp_path, floors()) == []
    (tmp_path / "lora" / "second.py").write_text(PLANTED[fault])
    [found] = faults(tmp_path, floors())
    assert found.startswith(fault.split(" while")[0])


def test_who_asks_a_server_imports_no_engine():
    """Nor does a stage that is only imported: the engine is loaded with the first local policy."""
    code = "import sys, rollout, actre, evaluate; print([m for m in sys.modules if m in ('lora.engine', 'lora.model')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

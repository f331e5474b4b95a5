"""What is written must hold: commands of README and docs/ parse, every flag is read, files named there exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from artifacts.cli import parse
from tests.support.imports import imports_of, python_files
from tests.support.page import save_files, shell_commands

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
SCRIPTS = [file for file in python_files(ROOT) if re.search(r"^class \w*Args\b", (ROOT / file).read_text(), re.M)]


def test_the_readme_has_the_loop():
    commands = shell_commands(ROOT / "README.md")
    assert ["rollout.py"] in commands and ["train_pg.py"] in commands
    assert "make run" in (ROOT / "README.md").read_text() and "make test" in (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> str:
    """A home with the files that pages say to save there."""
    home = tmp_path_factory.mktemp("home")
    for page in PAGES:
        save_files(page, home)
    return f"{home}/"


@pytest.mark.parametrize("words", [words for page in PAGES for words in shell_commands(page)], ids=" ".join)
def test_commands_parse(words, home, monkeypatch):
    """Whether the optional packages of --track and the like are installed or not."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))
    words = [re.sub("^~/", home, word) for word in words]
    module, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
    parse(importlib.import_module(module).Args, "", rest)


@pytest.mark.parametrize("file", SCRIPTS)
def test_every_flag_has_a_sentence_and_is_read(file):
    """In its own file, in one that it imports or, where flags are inherited (PlayArgs, ...), in one that imports it."""
    for cls in ast.parse((ROOT / file).read_text()).body:
        if not (isinstance(cls, ast.ClassDef) and cls.name.endswith("Args")):
            continue
        heirs = [other for other in python_files(ROOT) if file in imports_of(ROOT, other)] if cls.name != "Args" else []
        text = "\n".join((ROOT / reader).read_text() for reader in [file, *imports_of(ROOT, file), *heirs])
        fields = [
            (node.target.id, cls.body[i + 1] if i + 1 < len(cls.body) else None)
            for i, node in enumerate(cls.body)
            if isinstance(node, ast.AnnAssign)
        ]
        assert fields
        for name, after in fields:
            assert re.search(rf"\bargs\.{name}\b", text), f"{file}: --{name} is never read"
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), f"{file}: --{name}: no help"


def test_run_sh_passes_only_flags_that_exist():
    """Each stage's own Args must take what run.sh gives it, in the tiny and in the paper configuration."""
    text = (ROOT / "run.sh").read_text()
    given = {
        "common": "rollout actre train_pg evaluate",
        "first": "rollout",
        "play": "rollout actre evaluate",
        "compose": "actre",
        "train": "train_pg",
    }
    for array, stages in given.items():
        flags = set(re.findall(r"--([a-z-]+)", " ".join(re.findall(rf"\b{array}\+?=\(([^)]*)\)", text))))
        for stage in stages.split():
            fields = {f.replace("_", "-") for f in importlib.import_module(stage).Args.__dataclass_fields__}
            assert flags <= fields, f"run.sh: {flags - fields} is no flag of {stage}.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_a_page_exist(page):
    if page.name == "log.md":  # a diary: names of its day
        return
    for name in re.findall(r"`([\w/.-]+\.(?:py|sh|md|txt))`", page.read_text()):
        assert (ROOT / name).exists() or (ROOT / "docs" / name).exists(), f"{page.name} names {name}"


def test_every_test_that_the_tables_of_failures_name_exists():
    """`file::test`; `::test` is of the file named before it, `test` of the file in the head of its table."""
    head = file = ""
    named = 0
    for line in (ROOT / "docs/failures.md").read_text().splitlines():
        if heading := re.search(r"\| tests(?: \(`tests/(test_\w+)\.py`\))? \|$", line):
            head = heading[1] or ""
        for words in re.findall(r"`([\w:]+)`", line.rstrip(" |").rpartition(" | ")[2]):
            before, colons, test = words.rpartition("::")
            file = before or (file if colons else head)
            assert f"def {test}(" in (ROOT / "tests" / f"{file}.py").read_text(), f"docs/failures.md names {words}"
            named += 1
    assert named > 50


def test_shell_scripts_parse():
    for script in (*ROOT.glob("*.sh"), ROOT / ".ci" / "run"):
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0, script

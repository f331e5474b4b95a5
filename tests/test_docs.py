"""What is written must hold: README commands parse, every flag is read, names in the README exist."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(
    p
    for p in ROOT.glob("**/*.py")
    if not {".venv", "runs", "data", "tests"} & set(p.relative_to(ROOT).parts)
    and re.search(r"class (Play)?Args\b", p.read_text())
)


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def readme_commands() -> list[list[str]]:
    """Every `python ...` command of the README's code blocks, as words."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.split("\n"):
            for command in line.split("#")[0].split("&&"):
                words = shlex.split(command)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words[:1] == ["python"] and words[1] != "-c":
                    found.append(words[1:])
    return found


def test_the_readme_has_the_loop():
    assert ["rollout.py"] in readme_commands() and ["train_pg.py"] in readme_commands()
    assert "make run" in README and "make test" in README


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_readme_commands_parse(words):
    path = ROOT / (words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0])
    tyro.cli(load(path).Args, args=words[2:] if words[0] == "-m" else words[1:])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_flag_has_a_sentence_and_is_read(path):
    text = path.read_text()
    body = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name in ("Args", "PlayArgs")).body
    # What stages share is read in them too, and some of a script's flags in modules of its own.
    elsewhere = {
        "agent.py": ("rollout.py", "actre.py", "evaluate.py"),
        "train_pg.py": ("examples.py",),
        "pretrain.py": ("models/alfworld_lessons.py",),
    }
    others = ("agent.py",) if "(PlayArgs)" in text else elsewhere.get(path.name, ())
    text += "".join((ROOT / name).read_text() for name in others)
    fields = [
        (node.target.id, body[i + 1] if i + 1 < len(body) else None)
        for i, node in enumerate(body)
        if isinstance(node, ast.AnnAssign)
    ]
    assert fields
    for name, after in fields:
        assert re.search(rf"\bargs\.{name}\b", text), f"{path.name}: --{name} is never read"
        assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), f"{path.name}: --{name}: no help"


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
            fields = {f.replace("_", "-") for f in load(ROOT / f"{stage}.py").Args.__dataclass_fields__}
            assert flags <= fields, f"run.sh: {flags - fields} is no flag of {stage}.py"


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"`([\w/.-]+\.(?:py|sh|md))`", README):
        assert (ROOT / name).exists() or (ROOT / "models" / name).exists(), name


def test_shell_scripts_parse():
    for script in (*ROOT.glob("*.sh"), ROOT / ".ci" / "run"):
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0, script

"""Who imports whom, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

ON_DEMAND = "envs/make.py"  # the one file whose imports inside functions do not count: it makes any world by name


def python_files(root: Path) -> list[str]:
    """The project's Python files, tests apart, as paths below `root`."""
    files = (path.relative_to(root) for path in root.glob("**/*.py"))
    return sorted(str(p) for p in files if p.parts[0] not in {".venv", "runs", "data", "tests"})


def imports_of(root: Path, file: str) -> set[str]:
    """The project's files that a file imports: at module level, in functions and under TYPE_CHECKING."""
    tree = ast.parse((root / file).read_text())
    nodes = tree.body if file == ON_DEMAND else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import, which this does not follow"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = (f"{name.replace('.', '/')}.py" for name in names)
    return {path for path in paths if (root / path).is_file()} - {file}

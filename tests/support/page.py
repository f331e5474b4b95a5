"""What a page of the documentation says to save and to run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


def shell_commands(page: Path) -> list[list[str]]:
    """Every `python ...` command of a page's bash blocks, as words."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
        for line in block.replace("\\\n", " ").split("\n"):
            for command in re.split(r"&&|\|", line.split("#")[0]):
                words = shlex.split(command.split(" > ")[0])
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words[:1] == ["python"] and words[1] != "-c":
                    found.append(words[1:])
    return found


def save_files(page: Path, home: Path) -> None:
    """Writes the page's Python blocks to the files in `home` that their first lines name: `# ~/keys/world.py`."""
    for text, name in re.findall(r"```python\n(# ~/(\S+)\n.*?)```", page.read_text(), re.S):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)

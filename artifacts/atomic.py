"""Atomic file writes: a reader sees the old file or the new one, and a killed run leaves no half-written file.

Imports nothing else of the project; every package may import it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which replaces `path` when the block ends without an exception.

    with atomic_write("scores.json") as temporary:
        temporary.write_text(text)
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""Atomic file writes, and locks that end with their process.

A reader sees the old file or the new one, and a killed run leaves no half-written file.

Imports nothing else of the project; every package may import it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)  # of a file system without locks


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which replaces `path` when the block ends without an exception.

    with atomic_write("scores.json") as temporary:
        temporary.write_text(text)
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # of this process, on any machine
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def lock(path: Path) -> int | None:
    """Locks a file for this process, and makes it. Returns the descriptor that holds the lock, which ends with the
    process, however that happens; None if another process has it. Some network file systems have no locks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):  # not removed or made again by another since
                return descriptor
    except OSError as error:
        if error.errno in NO_LOCKS:
            print(f"{path.parent}: this file system has no locks; start only one process here", file=sys.stderr)
            return descriptor
        if not isinstance(error, BlockingIOError):
            os.close(descriptor)
            raise
    os.close(descriptor)
    return None

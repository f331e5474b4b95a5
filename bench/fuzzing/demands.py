"""The demands that bench/fuzz.py makes of every case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LIMIT = 1.0  # seconds
SLOW = "takes "  # how a complaint about time begins


class Broken(Exception):
    """A demand that is not met."""


def require(good: bool, complaint: str) -> None:
    if not good:
        raise Broken(complaint)


def accepted(name: str, call: Callable, *arguments: Any) -> Any:
    """The result of a call, or None if it refused its input. Raises Broken unless the refusal has the given name."""
    try:
        return call(*arguments)
    except (ValueError, OSError) as error:
        require(name in str(error), f"{type(error).__name__} without {name!r}: {str(error)[:500]!r}")
        return None

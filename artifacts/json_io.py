"""JSON files, read through types: whatever is wrong with a file becomes one sentence with its name.

    counts = read_json(directory / "done.json", dict[str, Any])
    config = read_json(folder / "adapter_config.json", AdapterConfig)  # a msgspec.Struct, which ignores unknown keys

Imports nothing of the project but atomic.py; every package may import it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from artifacts.atomic import atomic_write

T = TypeVar("T")


def read_json(path: str | Path, type: type[T] = Any) -> T:
    """The content of a JSON file as `type`. Raises FileNotFoundError, and ValueError as parse_json does."""
    return parse_json(Path(path).read_bytes(), type, str(path))


def parse_json(data: bytes | str, type: type[T] = Any, where: str = "JSON") -> T:
    """Parses JSON into `type`. Raises ValueError, starting with `where`, for text that is cut, is not UTF-8 or not JSON
    (NaN and infinities are not), is nested too deeply, lacks a key, or has a value of another type."""
    try:
        return msgspec.json.decode(data, type=type)
    except msgspec.ValidationError as error:
        raise ValueError(f"{where}: {error}") from error
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}); restore it, or make it again") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply to be read; restore it, or make it again") from error


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

"""Command lines from dataclasses (tyro): help in groups, ranges of numbers, and one way to run and to fail.

    @dataclass(frozen=True, kw_only=True)
    class Args:
        trials: Annotated[int, Range(1, 1000)] = 1
        "Attempts per task."

        def check(self) -> None: ...        # optional: raises ValueError for values that do not go together

    if __name__ == "__main__":
        run_main(main, Args, __doc__)

Imports nothing of the project but interrupts.py, because every command is parsed here.
"""

from __future__ import annotations

import ast
import dataclasses
import errno
import inspect
import math
import os
import sqlite3
import sys
import textwrap
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number may have: at least `low` (more than `low` if `above`) and at most `high`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        least = f"{'more than' if self.above else 'at least'} {self.low}"
        return least if self.high == math.inf else f"{least} and at most {self.high}"


# ---- running ---------------------------------------------------------------------------------------------------------


def run_main(main: Callable[[Any], Any], cls: type, description: str) -> None:
    """Parses the command line and runs main(args). A bad value, a missing file or package, a full disk and the like
    become one line and exit status 2. A reader that closes the pipe, such as `head`, is no error."""
    try:
        main(parse(cls, description))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, sqlite3.Error) as error:
        print(f"{Path(sys.argv[0]).name}: {explain(error)}", file=sys.stderr)
        sys.exit(2)


def explain(error: Exception) -> str:
    """An error in one sentence. Those of the file system say what is wrong with which file, and what to do."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error) or type(error).__name__
    advice = {
        errno.ENOSPC: "; what is written is kept: free some space and run the same command again",
        errno.EDQUOT: "; what is written is kept: free some space and run the same command again",
        errno.ENOTDIR: "; expected a folder: a part of this path is a file",
        errno.EEXIST: "; expected a folder, or nothing, in this place",
        errno.ENOENT: "; check the path",
    }
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}{advice.get(error.errno, '')}"


# ---- parsing ---------------------------------------------------------------------------------------------------------


def parse(cls: type[T], description: str, args: Sequence[str] | None = None) -> T:
    """Parses a command line (default: sys.argv) into an instance of the dataclass `cls`.

    Flags are flat: --name for every field, inherited or not, and --group.name for the fields of a nested dataclass.
    Inherited and nested fields need a default. A default of None is not shown: its sentence says what happens then.
    Raises ValueError, with the flag's name, for a number that is not finite or outside its Range, and whatever the
    `check` methods of the dataclasses raise.
    """
    words = sys.argv[1:] if args is None else list(args)
    if {"-h", "--help"} & set(words):
        print(f"{description.strip()}\n")  # tyro would join its lines
    values = _from_view(cls, tyro.cli(_make_view(cls), description="", args=words))
    check_values(values)
    return values


def check_values(values: Any, prefix: str = "") -> None:
    """Checks the numbers of a dataclass and of nested ones, then calls their `check`; see `parse`."""
    for name, hint in get_type_hints(type(values), include_extras=True).items():
        value = getattr(values, name)
        if dataclasses.is_dataclass(value):
            check_values(value, f"{prefix}{name.replace('_', '-')}.")
        else:
            _check_number(f"--{prefix}{name.replace('_', '-')}", value, hint)
    if hasattr(values, "check"):
        try:
            values.check()
        except ValueError as error:  # a nested class, Server, says --server; the flag may be --actre-server
            raise ValueError(str(error).replace(f"--{type(values).__name__.lower()}.", f"--{prefix}")) from error


def _check_number(flag: str, value: Any, hint: Any) -> None:
    """Raises ValueError for a number outside the Range of its hint; looks into optional values and tuples."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{flag} is {value}; expected a finite number")
    if isinstance(value, tuple):
        while typing.get_origin(hint) is not tuple:  # Positional[tuple[...]], tuple[...] | None
            hint = typing.get_args(hint)[0]
        hints = typing.get_args(hint)
        for index, each in enumerate(value):
            _check_number(flag, each, hints[0] if Ellipsis in hints else hints[index])
    elif typing.get_origin(hint) is Annotated:
        allowed = next((each for each in hint.__metadata__ if isinstance(each, Range)), None)
        if value is not None and allowed is not None and value not in allowed:
            raise ValueError(f"{flag} is {value}; expected {allowed}")
    elif value is not None:
        for inner in typing.get_args(hint):
            _check_number(flag, value, inner)


def _make_view(cls: type) -> type:
    """The dataclass that tyro parses: the fields of `cls` itself, one nested dataclass for each class it inherits
    from, then the nested dataclasses of `cls`."""
    hints, sentences = get_type_hints(cls, include_extras=True), _sentences(cls)
    remaining = {field.name: field for field in dataclasses.fields(cls)}
    own, groups, nested = [], [], []
    for owner in cls.__mro__:
        flags = []
        for field in [remaining.pop(name) for name in vars(owner).get("__annotations__", {}) if name in remaining]:
            hint, default, sentence = hints[field.name], field.default, sentences[field.name]
            if dataclasses.is_dataclass(hint):
                view = _make_view(hint)
                nested.append(_entry(field.name, view, view(**vars(default)), help=sentence))
            else:
                flags.append(_entry(field.name, hint, default, help=sentence, help_behavior_hint=_shown_default))
        if owner is cls:
            own = flags
        elif flags:
            group = _make_dataclass(owner.__name__, flags)
            title = owner.__name__.removesuffix("Args").lower()
            flat = tyro.conf.OmitArgPrefixes[group]
            groups.append(_entry(owner.__name__, flat, group(), name=title, help=owner.__doc__))
    return _make_dataclass(cls.__name__, [*own, *groups, *nested])


def _from_view(cls: type[T], view: Any) -> T:
    """The instance of `cls` with the values of an instance of its view."""
    hints, values = get_type_hints(cls), {}
    for name, value in vars(view).items():
        values |= {name: value} if name in hints else vars(value)
    return cls(**{n: _from_view(hints[n], v) if dataclasses.is_dataclass(v) else v for n, v in values.items()})


def _entry(field: str, hint: Any, default: Any, /, **how: Any) -> tuple[str, Any, Any]:
    """A field for _make_dataclass; `how`: see tyro.conf.arg."""
    return field, Annotated[hint, tyro.conf.arg(**how)], dataclasses.field(default=default)


def _make_dataclass(name: str, entries: list[tuple[str, Any, Any]]) -> type:
    return dataclasses.make_dataclass(name, entries, frozen=True, kw_only=True)


def _shown_default(label: str) -> str:
    return "" if label in ("None", "''", "") else f"(default: {label})"


def _sentences(cls: type) -> dict[str, str]:
    """The sentence below each field of `cls` and of the classes it inherits from, on one line."""
    found: dict[str, str] = {}
    for owner in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        for field, after in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[field.target.id] = " ".join(after.value.value.split())
    return found

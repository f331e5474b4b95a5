"""Command lines from dataclasses (tyro), with the help in groups: a command's own flags, then inherited ones by class.

Imports nothing else of the project, because every command is parsed here.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

T = TypeVar("T")


def parse(cls: type[T], description: str, args: Sequence[str] | None = None) -> T:
    """Parses a command line (default: sys.argv) into an instance of the dataclass `cls`.

    Flags are flat: --name for every field, inherited or not, and --group.name for the fields of a nested dataclass.
    Inherited and nested fields need a default. A default of None is not shown: its sentence says what happens then.
    """
    words = sys.argv[1:] if args is None else list(args)
    if {"-h", "--help"} & set(words):
        print(f"{description.strip()}\n")  # tyro would join its lines
    return _from_view(cls, tyro.cli(_make_view(cls), description="", args=words))


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

"""Command lines from dataclasses (tyro), with help in groups: a command's own flags, then those it inherits, by class.

On the ground floor, as every command of the project is parsed here: imports nothing of it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

T = TypeVar("T")


def parse(cls: type[T], description: str, args: Sequence[str] | None = None) -> T:
    """An instance of the dataclass `cls` from a command line (default: sys.argv).

    Flags are flat: --name for every field, inherited or not, and --group.name for the fields of a nested dataclass. A
    default of None is not shown, since its sentence says what happens then.
    """
    return _from_view(cls, tyro.cli(_view_type(cls), description=description, args=args))


def _view_type(cls: type) -> type:
    """What tyro sees: the fields of `cls` itself, then one nested dataclass for each class it inherits from, then its
    nested dataclasses."""
    own, inherited, nested = [], {}, []
    hints, sentences = get_type_hints(cls, include_extras=True), _sentences(cls)
    for field in dataclasses.fields(cls):
        owner = _owner(cls, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            view = _view_type(hints[field.name])
            values = {f.name: getattr(field.default, f.name) for f in dataclasses.fields(field.default)}
            described = Annotated[view, tyro.conf.arg(help=sentences[field.name])]
            nested.append((field.name, described, dataclasses.field(default=view(**values))))
            continue
        described = tyro.conf.arg(help=sentences[field.name], help_behavior_hint=_shown_default)
        entry = (field.name, Annotated[hints[field.name], described], dataclasses.field(default=field.default))
        (own if owner is cls else inherited.setdefault(owner, [])).append(entry)
    groups = []
    for owner, entries in sorted(inherited.items(), key=lambda item: cls.__mro__.index(item[0])):
        group = dataclasses.make_dataclass(owner.__name__, entries, frozen=True, kw_only=True)
        described = Annotated[tyro.conf.OmitArgPrefixes[group], tyro.conf.arg(help=owner.__doc__)]
        groups.append((_group_name(owner), described, dataclasses.field(default=group())))
    return dataclasses.make_dataclass(cls.__name__, [*own, *groups, *nested], frozen=True, kw_only=True)


def _from_view(cls: type[T], parsed: Any) -> T:
    """The instance of `cls` that an instance of its view stands for."""
    hints, values = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        owner = _owner(cls, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = _from_view(hints[field.name], getattr(parsed, field.name))
        else:
            values[field.name] = getattr(parsed if owner is cls else getattr(parsed, _group_name(owner)), field.name)
    return cls(**values)


def _owner(cls: type, name: str) -> type:
    return next(c for c in cls.__mro__ if name in c.__annotations__)


def _group_name(owner: type) -> str:
    return owner.__name__.removesuffix("Args").lower()


def _shown_default(label: str) -> str:
    return "" if label in ("None", "''", "") else f"(default: {label})"


def _sentences(cls: type) -> dict[str, str]:
    """The sentence below each field, of `cls` and of those it inherits from, on one line."""
    found: dict[str, str] = {}
    for owner in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        for field, after in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[field.target.id] = " ".join(after.value.value.split())
    return found

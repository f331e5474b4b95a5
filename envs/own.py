"""Classes of the user's own: worlds (base.py), and scripts that play them, in any file or installed package.

    load_own("~/keys/world.py:Keys", World)        # a class in a file, which need not belong to a package
    load_own("package.module:Keys", World)         # a class of an installed package

A process keeps to the code that it loaded first, and knows its sha256: that of the file alone, not of what it imports.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import sys
import traceback
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from envs import base
from envs.base import World

ADVICE = "docs/your-own-world.md has one to copy"
NAMING = ("tasks", "left_out", "fingerprint", "reset")  # raise ValueError for a split or a task that does not exist


class Script(Protocol):
    """A scripted player, made with the opening of a task as its only argument.

    Texts reach it as the agent reads them: on one line, the paragraph that states the task first.
    """

    def observe(self, action: str, observation: str) -> None:
        """Reads the world's answer to its last action; not called after the last one of an attempt."""
        ...

    def decide(self) -> tuple[str, str]:
        """The next (thought, action). An empty thought is none."""
        ...


class Own(NamedTuple):
    """A class, and the sha256 of the file that it was loaded from."""

    cls: type
    sha256: str

    @property
    def facts(self) -> dict[str, str]:
        """What a stage records of it."""
        return {"class": self.cls.__name__, "file": self.sha256}


def nearest(name: str, known: Iterable[str]) -> str:
    """A question after the known name that is nearest, "did you mean X? "; empty if none is near."""
    return "".join(f"did you mean {near}? " for near in difflib.get_close_matches(name, list(known), n=1))


def why(error: BaseException, where: str) -> str:
    """What code of the user's raised, with its line: "KeyError: 'red' (world.py, line 12)". `where`: the file."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == where]
    frame = (own or frames)[-1]
    if isinstance(error, SyntaxError) or frame.filename == base.__file__:  # which have a line, and none, of that file
        return f"{type(error).__name__}: {error}"
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"


@contextlib.contextmanager
def explained(own: Own | None) -> Iterator[None]:
    """Makes a ValueError, with the line, of what an own world raises in here, or returns that it may not.

    Passed on as they are: its ValueErrors about a split or a task that does not exist, and errors of other code.
    """
    try:
        yield
    except (Exception, SystemExit) as error:  # a blanket except: the class is a program
        where = inspect.getfile(own.cls) if own else None
        frames = traceback.extract_tb(error.__traceback__)
        called = next((frame.name for frame in frames if frame.filename == where), None)
        returned = frames[-1].filename == base.__file__  # of envs.base.ask
        if own is None or not (called or returned) or (isinstance(error, ValueError) and called in NAMING):
            raise
        raise ValueError(f"{own.cls.__name__} of {where} failed: {why(error, where)}") from error


def load_own(address: str, protocol: type) -> Own:
    """The class at an address, FILE.py:CLASS or package.module:CLASS.

    Raises ValueError if there is none, if its module cannot be imported, or if it lacks a method of the protocol.
    """
    where, _, name = address.rpartition(":")
    if not (where and name.isidentifier()):
        raise ValueError(f"{address!r} names no class; expected FILE.py:CLASS or package.module:CLASS")
    module, digest = load_module(str(Path(where).expanduser().resolve()) if where.endswith(".py") else where)
    found = getattr(module, name, None)
    if not isinstance(found, type):
        known = {each: value for each, value in vars(module).items() if inspect.isclass(value)}
        own = [each for each, value in known.items() if value.__module__ == module.__name__]
        raise ValueError(
            f"{where} has no class {name!r}: {nearest(name, known)}expected one of {', '.join(own) or '(it has none)'}"
        )
    if lacking := [method for method in methods(protocol) if not callable(getattr(found, method, None))]:
        shown = ", ".join(f"{method}({', '.join(parameters)})" for method, parameters in methods(protocol).items())
        raise ValueError(f"{name} of {where} lacks {', '.join(lacking)}; expected a class with {shown}: {ADVICE}")
    return Own(found, digest)


def methods(protocol: type) -> dict[str, list[str]]:
    """{method: its parameters} of a protocol."""
    found = {name: value for name, value in vars(protocol).items() if inspect.isfunction(value) and name[0] != "_"}
    return {name: [*inspect.signature(value).parameters][1:] for name, value in found.items()}


@functools.cache
def load_module(where: str) -> tuple[types.ModuleType, str]:
    """A module by the path of its file or by its name, and the sha256 of its file. Raises ValueError."""
    path = Path(where)
    if path.suffix != ".py":
        try:
            module = importlib.import_module(where)
            return module, hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
        except (Exception, SystemExit) as error:  # a blanket except: what is imported is a program
            raise ValueError(f"the module {where} cannot be imported: {why(error, where)}") from error
    if not path.is_file():
        there = [each.name for each in path.parent.glob("*.py")]
        raise ValueError(f"{path} is no file: {nearest(path.name, there)}expected the Python file that holds the class")
    source = path.read_bytes()
    # A name that depends on the path alone, so that what the class makes can be pickled between processes.
    module = types.ModuleType(f"own_{path.stem}_{hashlib.sha256(where.encode()).hexdigest()[:8]}")
    module.__file__ = where
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, where, "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:  # a blanket except: the file is a program
        del sys.modules[module.__name__]
        raise ValueError(f"{path} cannot be loaded: {why(error, where)}") from error
    return module, hashlib.sha256(source).hexdigest()


def make_own(own: Own, data: str | None, file: str | None) -> World:
    """A world of that class: CLASS(), or with `data` CLASS(data=...). Its facts then say which it is.

    `file`: the sha256 that its file must have, in a process that loads it later than a stage has begun (None: any).
    Raises ValueError if it is another one, and if the world cannot be made or has no `isolated` or `facts`.
    """
    where, name = inspect.getfile(own.cls), own.cls.__name__
    if file not in (None, own.sha256):
        raise ValueError(f"{where} was changed while {name} is played; play it again in a new run")
    try:
        world = own.cls() if data is None else own.cls(data=data)
        isolated, facts = (getattr(world, attribute, None) for attribute in ("isolated", "facts"))
    except (Exception, SystemExit) as error:  # a blanket except: the class is a program
        raise ValueError(f"{name}({'' if data is None else f'data={data!r}'}) failed: {why(error, where)}") from error
    if not (isinstance(isolated, bool) and isinstance(facts, dict)):
        got = f"isolated = {isolated!r} and facts = {facts!r}"
        raise ValueError(f"{name} of {where} has {got}; expected True or False, and a dictionary: {ADVICE}")
    try:
        as_written = json.loads(json.dumps(facts, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}.facts cannot be written as JSON ({error}); expected texts and numbers") from error
    try:
        world.facts = as_written | {"own": {"name": own.cls.name, **own.facts}}
    except AttributeError as error:  # a property, a frozen or a slotted class
        raise ValueError(f"{name}.facts cannot be set ({error}); expected a plain attribute: {ADVICE}") from error
    return world

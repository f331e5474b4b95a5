"""Policies without a model: demonstrations and replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agent.policy import Ask, Line
from artifacts.render import act_line, parse_reply, think_line
from envs.alfworld.demonstrator import Demonstrator


class ScriptedPolicy:
    """Plays scripts: for each session, `make(opening text)` returns an object with extend(text) and reply() -> line."""

    remote = False

    def __init__(self, make: Callable[[str], object], slots: int = 64):
        self.slots = slots
        self._make = make
        self._scripts: dict[int, object] = {}
        self._asked: list[int] = []
        self.counts: dict[str, int] = {}
        self._opened = 0

    def open(self, text: str) -> int:
        self._opened += 1
        self._scripts[self._opened] = self._make(text)
        return self._opened

    def extend(self, session: int, text: str) -> None:
        self._scripts[session].extend(text)

    def submit(self, ask: Ask) -> None:
        self._asked.append(ask.session)

    def poll(self, wait: bool = True) -> list[tuple[int, Line]]:
        asked, self._asked = self._asked, []
        return [(session, self._scripts[session].reply()) for session in asked]

    def close(self, session: int) -> tuple[list[int], list[int]]:
        del self._scripts[session]
        return [], []


class DemonstratorScript:
    """A world's demonstrator as an agent: it reads the session's text and writes an agent's lines. `player` makes it
    from the opening: ALFWorld's, or envs.webshop.demonstrator.Demonstrator (in mode "text")."""

    def __init__(self, opening: str, player: Callable = Demonstrator):
        self._player = player(opening.removeprefix("Observation: ").split("\n")[0])
        self._action: str | None = None  # decided on; its thought is already written
        self._last = ""  # the last action, whose observation is due

    def extend(self, text: str) -> None:
        _, said = parse_reply(text)
        if text == act_line(said):
            self._last, self._action = said, None
        elif text.startswith("Observation: ") and not text.startswith("Observation: OK."):
            self._player.observe(self._last, text.removeprefix("Observation: ").split("\n")[0])

    def reply(self) -> str:
        if self._action is None:
            thought, self._action = self._player.decide()
            return think_line(thought)
        self._last, self._action = self._action, None
        return act_line(self._last)


class ReplayScript:
    """A fixed list of lines, one per reply: for tests and to replay a recorded trajectory."""

    def __init__(self, lines: Sequence[str]):
        self._lines = iter(lines)

    def extend(self, text: str) -> None:
        """A replay ignores the session."""

    def reply(self) -> str | None:
        return next(self._lines, None)

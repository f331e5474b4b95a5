"""Policies without a model: demonstrations and replays."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

from agent.policy import Ask, Line, NoReply
from artifacts.render import act_line, parse_reply, think_line
from envs.alfworld.demonstrator import Demonstrator
from envs.own import Script


class ScriptedPolicy:
    """Plays scripts: for each session, `make(opening text)` returns an object with extend(text) and reply() -> line. A
    script whose reply raises gives no line (NoReply, with the traceback)."""

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
        return [(session, self._reply(session)) for session in asked]

    def _reply(self, session: int) -> Line:
        try:
            return self._scripts[session].reply()
        except (Exception, SystemExit):  # a blanket except: a script is a program of the user's
            return NoReply(f"the script failed:\n{traceback.format_exc()}")

    def close(self, session: int) -> tuple[list[int], list[int]]:
        del self._scripts[session]
        return [], []


class DemonstratorScript:
    """A demonstrator as an agent: it reads the session's text and writes an agent's lines. `player` makes it from the
    opening: ALFWorld's, envs.webshop.demonstrator.Demonstrator (in mode "text"), or any other Script. It only runs in
    `reply`, which raises TypeError unless it decides on two texts."""

    def __init__(self, opening: str, player: Callable[[str], Script] = Demonstrator):
        self._make, self._opening = player, opening.removeprefix("Observation: ").split("\n")[0]
        self._player: Script | None = None
        self._action: str | None = None  # decided on; its thought is already written
        self._last = ""  # the last action, whose observation is due
        self._answered = False  # the next text is the harness's answer to a thought
        self._unread: list[tuple[str, str]] = []  # (action, observation) pairs

    def extend(self, text: str) -> None:
        kind, said = parse_reply(text)
        if text in (act_line(said), think_line(said)):  # in the place of its own
            self._answered, self._action = kind == "think", None
            self._last = said if kind == "act" else self._last
        elif self._answered:
            self._answered = False
        elif text.startswith("Observation: "):
            self._unread.append((self._last, text.removeprefix("Observation: ").split("\n")[0]))

    def reply(self) -> str:
        if self._player is None:
            self._player = self._make(self._opening)
        for action, observation in self._unread:
            self._player.observe(action, observation)
        self._unread.clear()
        if self._action is None:
            decided = self._player.decide()
            if not (isinstance(decided, tuple) and len(decided) == 2 and all(isinstance(x, str) for x in decided)):
                raise TypeError(f"decide returned {decided!r:.200}; expected two texts, (thought, action)")
            thought, self._action = decided
            if thought:
                self._answered = True
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

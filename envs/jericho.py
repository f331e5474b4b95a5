"""Jericho: interactive fiction, classics of the Z-machine. Needs jericho, and games supplied by the user.

The project ships no games: most are not free. Put story files (zork1.z5, detective.z5, ...) of the releases that
jericho supports into a folder and pass it as $JERICHO_GAMES or --data. A task is `jericho_test/<game>`, one of
AgentBoard's 20 games if its file exists, or `jericho_all/<game>`, any file in the folder. Games are seeded as for their
walkthroughs. Commands to the interpreter (save, quit, ...) do nothing.
Left out: the turn limit (the runner's; AgentBoard's is 30), AgentBoard's goals and subgoals, spaCy's model: objects are
looked up among all words of the room's description.

Play one: JERICHO_GAMES=... python -m envs.play --env jericho --tasks --split jericho_all
Source: Jericho (arXiv 1909.05398); AgentBoard (arXiv 2401.13178) for the choice of games.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from envs.base import Observation, Result, check_split, content_hash

GAMES = (
    "905",
    "acorncourt",
    "afflicted",
    "balances",
    "detective",
    "dragon",
    "huntdark",
    "jewel",
    "library",
    "loose",
    "night",
    "omniquest",
    "pentari",
    "reverb",
    "snacktime",
    "weapon",
    "zenon",
    "zork1",
    "zork2",
    "zork3",
)
SPLITS = ("jericho_all", "jericho_test")
META = {"quit", "q", "restart", "restore", "save", "script", "unscript", "transcript", "verbose", "brief", "superbrief"}
LONGEST = 190  # bytes of a command; jericho truncates at 198
COMMANDS = (
    "go {direction}",
    "look",
    "inventory",
    "examine {object}",
    "take {object}",
    "drop {object}",
    "open {object}",
    "close {object}",
    "put {object} in {object}",
    "give {object} to {person}",
    "attack {person} with {object}",
    "unlock {object} with {object}",
    "push {object}",
    "pull {object}",
    "turn on {object}",
    "turn off {object}",
    "read {object}",
    "ask {person} about {topic}",
    "wait",
)


def extract_words(text: str) -> set[tuple[str, str]]:
    """All words as nouns, in place of jericho's spaCy model; jericho drops the words unknown to the game."""
    return {(word, "NOUN") for word in re.findall(r"[a-z]+", text.lower())}


def package_util() -> ModuleType:
    """jericho's own `util`: its attribute of that name is ctypes' util if ctypes.util was imported before."""
    return importlib.import_module("jericho.util")


class Jericho:
    """The user's games as a `World`.

    `data`: the folder with the story files (default: $JERICHO_GAMES). Reward is the game's score over its maximum,
    0..1; progress is the largest so far. A game is solved when it says so or all points are scored. Raises ImportError
    without jericho, FileNotFoundError without games.
    """

    isolated = True

    def __init__(self, data: str | None = None):
        try:
            import jericho
        except ImportError as error:
            why = f"env 'jericho' needs jericho ({error}): pip install -r requirements/worlds.txt"
            raise ImportError(why) from error
        given = data or os.environ.get("JERICHO_GAMES")
        files = sorted(Path(given).expanduser().glob("*.z[1-8]")) if given else []
        if not files:
            raise FileNotFoundError(
                f"env 'jericho' needs games, and {given!r} holds none: expected a folder with story files such as "
                "zork1.z5, of releases that jericho supports; pass it as --data or $JERICHO_GAMES"
            )
        self._files = {file.stem: file for file in files}
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        self.facts = {"jericho": jericho.__version__, "games": digest[:16]}
        self._game: Any = None
        self._progress, self._done = 0.0, False

    def tasks(self, split: str) -> Sequence[str]:
        """Sorted ids: those of AgentBoard's 20 games that exist (jericho_test), or all games (jericho_all)."""
        check_split(split, SPLITS)
        return [f"{split}/{name}" for name in sorted(self._files) if split == "jericho_all" or name in GAMES]

    def left_out(self, split: str) -> Mapping[str, str]:
        """Those of AgentBoard's games that have no story file."""
        missing = set(GAMES) - {task_id.partition("/")[2] for task_id in self.tasks(split)}
        return {f"{split}/{name}": "no story file" for name in sorted(missing)} if split == "jericho_test" else {}

    def fingerprint(self, task_ids: Iterable[str]) -> str:
        """sha256 of the story files and of jericho's version. Raises ValueError for an unknown id."""
        version = self.facts["jericho"].encode()
        return content_hash(task_ids, lambda task_id: version + self._file(task_id).read_bytes())

    def reset(self, task_id: str) -> Observation:
        """Start a game. Raises ValueError for an unknown id or a file that jericho does not support."""
        file = self._file(task_id)
        import jericho

        package_util().extract_objs = extract_words
        self._game = jericho.FrotzEnv(str(file))
        if not self._game.is_fully_supported:
            raise ValueError(
                f"jericho does not know {file}, so it has no score: expected the release "
                "of the game that jericho's documentation lists"
            )
        if not self._game.bindings.get("seed"):
            self._game.seed(1)  # otherwise the game seeds itself from the clock
        text, _ = self._game.reset()
        self._progress, self._done = self._score(), False
        task = f"score as many of the {self._game.get_max_score()} points of {file.stem} as you can"
        return Observation(text=f"{text.strip()}\nYour task is to {task}.", task=task)

    def step(self, action: str) -> Result:
        """Take one action. Commands that the game's parser does not understand are not valid."""
        if self._game is None or self._done:
            raise RuntimeError(f"{'the game is over' if self._done else 'no game yet'}: call reset(task_id)")
        command = " ".join(re.sub(r"[^ -~]", " ", action).split())
        valid = False
        if not command:
            text = "Say what you want to do."
        elif len(command) > LONGEST:
            text = "That is too long a command."
        elif command.lower().split()[0].rstrip(".") in META:
            text = "That command is not for you."
        else:
            text, _, self._done, _ = self._game.step(command)
            valid, text = package_util().recognized(text), text.strip()
        score = self._score()
        success = self._game.victory() or score == 1.0
        self._done = self._done or success or self._game._emulator_halted()
        self._progress = 1.0 if success else max(self._progress, score)
        return Result(
            observation=text,
            reward=score,
            progress=self._progress,
            success=success,
            done=self._done,
            valid=valid or self._done,
        )

    def actions(self) -> list[str]:
        """Sorted commands that change the game's state, which jericho finds by trial, and `look` and `inventory`.
        Takes seconds in large games."""
        self._need_game()
        found = self._game.get_valid_actions(use_parallel=False)
        return sorted({*found, "look", "inventory"})

    def commands(self) -> list[str]:
        """Templates of commands that most games of this kind understand."""
        self._need_game()
        return list(COMMANDS)

    def solution(self) -> list[str]:
        """jericho's walkthrough of the game, from its start."""
        self._need_game()
        return self._game.get_walkthrough()

    def _file(self, task_id: str) -> Path:
        split, _, name = task_id.partition("/")
        if split not in SPLITS or task_id not in self.tasks(split):
            raise ValueError(
                f"unknown task {task_id!r}: expected jericho_test/<game> or jericho_all/<game>, where "
                f"<game> is one of {', '.join(sorted(self._files))}"
            )
        return self._files[name]

    def _score(self) -> float:
        return min(1.0, max(0.0, self._game.get_score() / max(1, self._game.get_max_score())))

    def _need_game(self) -> None:
        if self._game is None:
            raise RuntimeError("no game yet: call reset(task_id)")

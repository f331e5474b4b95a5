"""ALFWorld: household tasks in text, played by our own engine (`engine.py`) or, as the reference, by TextWorld.

A task's id is its folder below `json_2.1.1`: `valid_seen/<task>/<trial>`. Real games come from `data` or
`$ALFWORLD_DATA`; where there is neither, and for the splits `gen_*` and `mini_*`, from
`generate.py`. `index.py` lists the playable games.
Left out: the turn limit (the runner's), AI2-THOR, alfworld's experts.

Play one: python -m envs.play --env alfworld --task valid_seen/<task>/<trial>
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from envs.alfworld.engine import COMMANDS, GRAMMARS, NOTHING, Game
from envs.alfworld.index import _index
from envs.alfworld.textworld import _TextWorldGame
from envs.base import Observation, Result

ENGINES = ("ours", "textworld")


class AlfWorld:
    """ALFWorld as a `World`.

    `data`: the folder that holds `json_2.1.1` (default: $ALFWORLD_DATA, else generated games; FileNotFoundError where
    it does not). `engine`: "ours", or "textworld" (seconds a reset; cannot be pickled; its progress is 0 or 1 only).
    `grammar`: "0.4" speaks as alfworld 0.4 ("move O to R", "You arrive at desk 1."), "0.3" as the versions before ("put
    O in/on R", "You arrive at loc 12.", no `help`), whatever the file itself says.

    Texts are TextWorld's, verbatim, but for the opening's banner line and the blank line after it. `Observation.task`
    is the task line without "Your task is to: " and its final period. Reward is 1.0 when won, else 0.0. Progress is the
    share of the goal's conditions met at best so far (`Game.conditions`); what holds at the start counts.
    """

    def __init__(self, data: str | None = None, engine: str = "ours", grammar: str = "0.4"):
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}: expected one of {ENGINES}")
        if grammar not in GRAMMARS:
            raise ValueError(f"unknown grammar {grammar!r}: expected one of {GRAMMARS}")
        self.engine, self.grammar = engine, grammar
        self.isolated, self.facts = engine == "textworld", {"engine": engine, "grammar": grammar}
        self._root = _data_root(data)
        self._game: Game | _TextWorldGame | None = None
        self._progress, self._done = 0.0, False

    def tasks(self, split: str) -> Sequence[str]:
        """Sorted ids of the games of a split: train, valid_seen, ...; gen_train, gen_valid, ... are generated."""
        root = self._root_of(split)
        splits = _index(root)
        if split not in splits:
            raise ValueError(f"no split {split!r} in {root}: expected one of {', '.join(sorted(splits)) or '(none)'}")
        return splits[split]

    def reset(self, task_id: str) -> Observation:
        """Start a game. ValueError for an unknown id or a game file that cannot be read (it names the file)."""
        split = task_id.split("/")[0]
        root = self._root_of(split)
        splits = _index(root)
        if task_id not in splits.get(split, ()):
            raise ValueError(
                f"unknown task {task_id!r}: expected <split>/<task>/<trial> of a playable game in {root}, which has "
                f"the splits {', '.join(sorted(splits))}; `python -m envs.play --tasks --split SPLIT` lists ids"
            )
        file = root / task_id / "game.tw-pddl"
        make = Game if self.engine == "ours" else _TextWorldGame
        try:
            self._game = make(json.loads(file.read_bytes()), self.grammar)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"cannot read the game {file} ({type(error).__name__}: {error}): expected JSON with the "
                "pddl_problem and grammar of an ALFRED game; unpack or generate it again"
            ) from error
        met, total = self._game.conditions()
        self._progress, self._done = met / total, False
        return Observation(text=self._game.text, task=self._game.task)

    def step(self, action: str) -> Result:
        """Do one action. Blanks around it are ignored, as TextWorld does; any other difference makes it invalid."""
        if self._game is None or self._done:
            raise RuntimeError(f"{'the game is over' if self._done else 'no game yet'}: call reset(task_id)")
        answer = self._game.act(action.strip())
        met, total = self._game.conditions()
        self._done = met == total
        self._progress = max(self._progress, met / total)
        return Result(
            observation=NOTHING if answer is None else answer,
            reward=float(self._done),
            progress=self._progress,
            success=self._done,
            done=self._done,
            valid=answer is not None,
        )

    def actions(self) -> list[str]:
        """Every admissible command, sorted; after the end, those that the last state would admit."""
        if self._game is None:
            raise RuntimeError("no game yet: call reset(task_id)")
        return self._game.actions()

    def commands(self) -> list[str]:
        """Templates of the grammar's commands; `help` is none in grammar 0.3."""
        if self._game is None:
            raise RuntimeError("no game yet: call reset(task_id)")
        return list(COMMANDS[self.grammar])

    def _root_of(self, split: str) -> Path:
        if split.startswith(("gen_", "mini_")) and not (self._root / split).is_dir():
            return _generated_root()
        return self._root


def _data_root(data: str | None) -> Path:
    """The `json_2.1.1` folder to play from."""
    given = data or os.environ.get("ALFWORLD_DATA")
    if not given:
        return _generated_root()
    root = Path(given).expanduser() / "json_2.1.1"
    if not root.is_dir():
        raise FileNotFoundError(
            f"{'data' if data else '$ALFWORLD_DATA'} is {given!r}, but there is no folder {root}: expected the folder "
            "that holds json_2.1.1 (alfworld-download makes one), or nothing at all for generated games"
        )
    return root.resolve()


@lru_cache
def _generated_root() -> Path:
    from envs.alfworld.generate import ensure_generated  # on demand: real games need no generator

    return Path(ensure_generated()).resolve() / "json_2.1.1"

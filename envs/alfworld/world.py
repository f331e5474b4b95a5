"""ALFWorld: household tasks in text, played by our engine (`engine.py`) or the reference, TextWorld (`textworld.py`).

A task id is the game's folder below `json_2.1.1`: `valid_seen/<task>/<trial>`. Real games come from `data` or
`$ALFWORLD_DATA`; without either, and for the splits `gen_*` and `mini_*`, `generate.py` makes them. `index.py` lists
the playable games.
Left out: the turn limit (the runner's), AI2-THOR, alfworld's experts.

Play one: python -m envs.play --env alfworld --task valid_seen/<task>/<trial>
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from artifacts.json_io import parse_json
from envs.alfworld.engine import COMMANDS, GRAMMARS, NOTHING, Game
from envs.alfworld.index import Games, cached_games, split_names
from envs.alfworld.textworld import TextWorldGame
from envs.base import Observation, Result, content_hash
from envs.wording import form, numbered

ENGINES = ("ours", "textworld")


class AlfWorld:
    """ALFWorld as a `World`.

    `data`: the folder that holds `json_2.1.1` (default: $ALFWORLD_DATA, else generated games; FileNotFoundError if it
    holds none). `engine`: "ours", or "textworld" (seconds per reset; cannot be pickled; progress is only 0 or 1).
    `grammar`: "0.4", the wording of alfworld 0.4 ("move O to R", "You arrive at desk 1."), or "0.3", that of earlier
    versions ("put O in/on R", "You arrive at loc 12.", no `help`), whatever the game file says.

    Texts are TextWorld's, verbatim, without the opening's banner line and the blank line after it. `Observation.task`
    is the task line without "Your task is to: " and its final period. Reward is 1.0 when won, else 0.0. Progress is the
    largest share so far of the goal's conditions that hold (`Game.conditions`); those that hold at the start count.
    """

    def __init__(self, data: str | None = None, engine: str = "ours", grammar: str = "0.4"):
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}: expected one of {ENGINES}")
        if grammar not in GRAMMARS:
            raise ValueError(f"unknown grammar {grammar!r}: expected one of {GRAMMARS}")
        self.engine, self.grammar = engine, grammar
        self.isolated, self.facts = engine == "textworld", {"engine": engine, "grammar": grammar}
        self._root = data_root(data)
        self._game: Game | TextWorldGame | None = None
        self._progress, self._done = 0.0, False

    def tasks(self, split: str) -> Sequence[str]:
        """Sorted game ids of a split: train, valid_seen, ...; gen_train, gen_valid, ... are generated."""
        return self._games(split).playable

    def left_out(self, split: str) -> Mapping[str, str]:
        """Games that the stock loader skips too, with the reason (`index.py`)."""
        return self._games(split).left_out

    def fingerprint(self, task_ids: Iterable[str]) -> str:
        """sha256 of the game files; a tenth of a second for 600 games. Raises ValueError for an unknown id."""
        return content_hash(task_ids, lambda task_id: self._file(task_id).read_bytes())

    def reset(self, task_id: str) -> Observation:
        """Start a game. Raises ValueError for an unknown id, a game that is left out, or an unreadable game file."""
        file = self._file(task_id)
        make = Game if self.engine == "ours" else TextWorldGame
        try:
            self._game = make(parse_json(file.read_bytes(), dict[str, Any], "the file"), self.grammar)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"cannot read the game {file} ({type(error).__name__}: {error}): expected JSON with the "
                "pddl_problem and grammar of an ALFRED game; unpack or generate it again"
            ) from error
        met, total = self._game.conditions()
        self._progress, self._done = met / total, False
        return Observation(text=self._game.text, task=self._game.task)

    def step(self, action: str) -> Result:
        """Take one action. As in TextWorld, surrounding spaces are ignored; any other deviation makes it invalid."""
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
        """Every admissible command, sorted; after the end, those of the final state."""
        if self._game is None:
            raise RuntimeError("no game yet: call reset(task_id)")
        return self._game.actions()

    def commands(self) -> list[str]:
        """Templates of the grammar's commands; grammar 0.3 has no `help`."""
        if self._game is None:
            raise RuntimeError("no game yet: call reset(task_id)")
        return list(COMMANDS[self.grammar])

    def _games(self, split: str) -> Games:
        """The games of a split. Raises ValueError for an unknown one."""
        root = self._split_root(split)
        if split not in (names := split_names(root)):
            raise ValueError(f"no split {split!r} in {root}: expected one of {', '.join(names) or '(none)'}")
        return cached_games(root, split)

    def _file(self, task_id: str) -> Path:
        """The file of a game that can be played. Raises ValueError for any other."""
        split = task_id.split("/")[0]
        root = self._split_root(split)
        names = split_names(root)
        games = cached_games(root, split) if split in names else Games(playable=(), left_out={})
        if reason := games.left_out.get(task_id):
            raise ValueError(f"task {task_id!r} is left out ({reason}), as by the stock loader: unpack the data again")
        if task_id not in games.playable:
            raise ValueError(
                f"unknown task {task_id!r}: expected <split>/<task>/<trial> of a playable game in {root}, which has "
                f"the splits {', '.join(names)}; `python -m envs.play --tasks --split SPLIT` lists ids"
            )
        return root / task_id / "game.tw-pddl"

    def _split_root(self, split: str) -> Path:
        if split.startswith(("gen_", "mini_")) and not (self._root / split).is_dir():
            return generated_root()
        return self._root


def other_grammar(refused: Iterable[str], grammar: str) -> tuple[float, str]:
    """(share of the agent's refused commands that are commands of the other grammar; a note if it is more than half of
    them, else ""). `refused`: every invalid action; `grammar`: the one that was played."""
    refused, [other] = list(refused), [name for name in GRAMMARS if name != grammar]
    foreign = [template for template in COMMANDS[other] if template not in COMMANDS[grammar]]
    forms = [form(numbered(template)) for template in foreign]
    share = sum(any(each.fullmatch(command.strip()) for each in forms) for command in refused) / max(1, len(refused))
    note = (
        f"{100 * share:.0f} % of the refused commands are of ALFWorld's grammar {other} ({', '.join(foreign)}), and "
        f"this is {grammar}: the agent or its prompt was made for the other"
    )
    return share, note if share > 0.5 else ""


def data_root(data: str | None) -> Path:
    """The `json_2.1.1` folder to play from."""
    given = data or os.environ.get("ALFWORLD_DATA")
    if not given:
        return generated_root()
    root = Path(given).expanduser() / "json_2.1.1"
    if not root.is_dir():
        raise FileNotFoundError(
            f"{'data' if data else '$ALFWORLD_DATA'} is {given!r}, but {root} is not a folder: expected the folder "
            "that holds json_2.1.1 (alfworld-download makes one), or no setting at all, for generated games"
        )
    return root.resolve()


@lru_cache
def generated_root() -> Path:
    """The `json_2.1.1` folder of generated games, which are made on first use."""
    from envs.alfworld.generate import ensure_generated  # on demand: real games do not need the generator

    return Path(ensure_generated()).resolve() / "json_2.1.1"

"""ALFWorld: household tasks in text, played by our own engine (`envs/alfred.py`) or, as the reference, by TextWorld.

A task's id is its folder below `json_2.1.1`: `valid_seen/<task>/<trial>`. Real games come from `data` or
`$ALFWORLD_DATA`; where there is neither, and for the splits `gen_*` and `mini_*`, from `envs/generate.py`. Games are
listed as the stock loader lists them (paths with `movable` or `Sliced`, and games marked unsolvable, are left out), in
an index file, so that starting does not read thousands of files.
Left out: the turn limit (the runner's), AI2-THOR, alfworld's experts.

Play one: python -m envs.play --env alfworld --task valid_seen/<task>/<trial>
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from envs.alfred import COMMANDS, GRAMMARS, NOTHING, Game
from envs.base import Observation, Result

ENGINES = ("ours", "textworld")
TASK_TYPES = (
    "pick_and_place_simple",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "look_at_obj_in_light",
    "pick_two_obj_and_place",
)
_BANNER = "-= Welcome to TextWorld, ALFRED! =-\n\n"
_INDEX_VERSION = 1


def task_type(task_id: str) -> str:
    """The task's type, one of TASK_TYPES, from its folder's name. ValueError for an id of another form."""
    parts = task_id.split("/")
    kind = parts[1].split("-")[0] if len(parts) == 3 else ""
    if kind not in TASK_TYPES:
        raise ValueError(f"no task type in {task_id!r}: expected <split>/<type>-.../<trial>, type one of {TASK_TYPES}")
    return kind


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
    from envs.generate import ensure_generated  # on demand: real games need no generator

    return Path(ensure_generated()).resolve() / "json_2.1.1"


@lru_cache
def _index(root: Path) -> dict[str, tuple[str, ...]]:
    return load_index(root)


def load_index(root: Path) -> dict[str, tuple[str, ...]]:
    """The playable task ids of every split below `root` (a `json_2.1.1` folder), from the index file or by a scan.

    The index lies in `root` or, where that cannot be written, below ~/.cache/a3t. A split is scanned when task or trial
    folders have come or gone since (see `_split_mark`) and when no index can be read. A game that changes inside an
    existing trial folder is not noticed: delete the index then.
    """
    name = hashlib.sha256(str(root).encode()).hexdigest()[:16]
    places = (root / ".a3t_index.json", Path.home() / ".cache" / "a3t" / f"alfworld_{name}.json")
    found = [_read_index(place) for place in places]
    index = {}
    for split in sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."):
        mark = _split_mark(root / split)
        kept = [entry for splits in found if (entry := splits.get(split)) and entry["mark"] == mark]
        index[split] = kept[0] if kept else {"mark": mark, "ids": _scan_split(root, split)}
    if index not in found:
        text = json.dumps({"version": _INDEX_VERSION, "splits": index})
        for place in places:  # where neither can be written, the next start scans again
            if _write_index(place, text):
                break
    return {split: tuple(entry["ids"]) for split, entry in index.items()}


def _split_mark(folder: Path) -> list[int]:
    """Changes when a task or trial folder comes or goes. Not st_mtime: unpacking an archive sets that back."""
    changed = [entry.stat().st_ctime_ns for entry in os.scandir(folder) if entry.is_dir()]
    return [len(changed), max(changed, default=0), folder.stat().st_ctime_ns]


def _read_index(place: Path) -> dict[str, dict]:
    """What an index file holds; nothing where it is missing, corrupt or of another version."""
    try:
        content = json.loads(place.read_bytes())
        splits = content["splits"].items() if content["version"] == _INDEX_VERSION else ()
        return {split: {"mark": list(entry["mark"]), "ids": list(map(str, entry["ids"]))} for split, entry in splits}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_index(place: Path, text: str) -> bool:
    temporary = place.with_suffix(f".{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, place)
    except OSError:
        return False
    return True


def _scan_split(root: Path, split: str) -> list[str]:
    folders = [file.parent for file in (root / split).glob("*/*/game.tw-pddl")]
    ids = sorted(folder.relative_to(root).as_posix() for folder in folders if (folder / "traj_data.json").is_file())
    kept = [task_id for task_id in ids if "movable" not in task_id and "Sliced" not in task_id]
    bar = tqdm(kept, desc=f"indexing {split}", unit="game", delay=1)
    return [task_id for task_id in bar if _playable(root / task_id / "game.tw-pddl")]


def _playable(file: Path) -> bool:
    """Whether the stock loader plays it. A broken file counts too: it is no silent gap, as its reset names it."""
    try:
        content = file.read_bytes()
        marks = re.findall(rb'"solvable"\s*:\s*(true|false)', content)
        if marks:
            return marks[-1] == b"true"
        json.loads(content)
    except (OSError, ValueError):
        return True
    return False  # whole, but never checked: the stock loader skips it


class _TextWorldGame:
    """One game on the reference engine, TextWorld with alfworld's names, behind the same methods as `alfred.Game`."""

    def __init__(self, data: dict[str, str], grammar: str):
        environment = dict(os.environ)
        # Importing alfworld makes the folder that $ALFWORLD_DATA names and sets the variable: neither is wanted.
        os.environ["ALFWORLD_DATA"] = str(Path(__file__).parent)
        try:
            import textworld
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from textworld.envs.pddl import PddlEnv

            self._env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))
        except ImportError as error:
            raise ImportError(
                f"engine 'textworld' needs alfworld with TextWorld ({error}): install the Debian packages cmake and "
                "g++, then `pip install alfworld==0.4.2`; or play with engine 'ours'"
            ) from error
        finally:
            os.environ.clear()
            os.environ.update(environment)
        self._env.load(_as_old_game(data) if grammar == "0.3" else data)
        self._state = self._env.reset()
        self.text = self._state.feedback.removeprefix(_BANNER)
        self.task = self.text.partition("Your task is to: ")[2].strip().removesuffix(".")

    def act(self, command: str) -> str | None:
        valid = command in self._state["admissible_commands"]
        self._state, _, _ = self._env.step(command)
        return self._state.feedback if valid else None

    def actions(self) -> list[str]:
        return list(self._state["admissible_commands"])

    def conditions(self) -> tuple[int, int]:
        return int(self._state["won"]), 1


def _as_old_game(data: dict[str, str]) -> dict[str, str]:
    """The game as alfworld 0.3.5 writes it: three wordings are other ones, and there is no `help`."""
    words = data["grammar"].replace('"You arrive at {r.name}.', '"You arrive at {lend.name}.')
    words = words.replace("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}.")
    words = words.replace('"move {o} to {r}"', '"put {o} in/on {r}"')
    domain = re.sub(r"\(:action help.*", ")", data["pddl_domain"], flags=re.DOTALL)
    return {**data, "grammar": words, "pddl_domain": domain}

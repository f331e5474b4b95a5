"""Fixed lists of tasks, so that a score names exactly what was played.

A panel is a file in envs/panels: sorted task ids, one per line. envs/panels/SHA256 records the sha256 of each file's
bytes, in sha256sum's format; a panel that does not match is refused. --panel and --panels also take a file of the same
form anywhere, FILE.txt, and the name of a split of the world, for all of its tasks; a stage records their sha256.

    python -m envs.panel                              # list and verify the panels
    python -m envs.panel --make                       # make them again; real ones from $ALFWORLD_DATA, $WEBSHOP_DATA

| panel | contents |
|---|---|
| train-600, valid-60 | disjoint draws from the real train split, with the A3T paper's counts by task type |
| valid_seen-140, valid_unseen-134 | the whole evaluation splits |
| gen_train-120, gen_valid-100 | the first games of the generated splits with the generator's default seed |
| mini_train-120, mini_valid-100 | the same with the small rooms used when the alfworld wheel is missing |
| webshop_train-2300, webshop_eval-400 | draws from WebShop's official splits, with the A3T paper's counts |
| webshop_test-500 | the whole official test split |
| webshop_small_train-100, webshop_small_test-200 | draws from the 1,000-product set, spread over its products |
| webshop_gen_train-100, webshop_gen_test-200 | the same for the generated catalogue with its default seed |
| syn_valid-60, syn_held-60 | the first synthetic worlds in training vocabulary and in held-out vocabulary |
| pddl_test-60 | 20 barman, 10 blocksworld, 20 gripper and 10 tyreworld problems, AgentBoard's counts |
| babyai_test-112 | AgentBoard's 28 levels of BabyAI (one replaced, see envs/babyai.py) with its four seeds |
| scienceworld_test-90 | the first, middle and last test variation of each of the 30 tasks |
| jericho_test-20 | AgentBoard's 20 games, supplied by the user |

WebShop's official goals are identified by their position in the original's shuffle, so making their panels needs no
data; other goals are identified by their hash.

Demonstrations and base-model training never use a task of any of these: `excluded_ids()`. A panel of the user's has no
part in that, so `require_trainable` keeps the project's evaluation out of what is trained on, and evaluate.py refuses a
panel of the user's of which a part was trained on.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from artifacts.cli import Range, run_main
from envs.alfworld.generate import SEED, generate_games
from envs.alfworld.index import TASK_TYPES, cached_games, split_names, task_type
from envs.alfworld.rooms import family, wheel_folder
from envs.alfworld.world import data_root
from envs.base import World
from envs.make import DEFAULTS, require_world
from envs.own import nearest
from envs.synthetic.world import Synthetic
from envs.webshop.generate import ensure_catalogue
from envs.webshop.goals import OFFICIAL

PANELS = Path(__file__).with_name("panels")

# Counts by type, in the order of TASK_TYPES, that the paper draws from train's 3,553 games (A3T, appendix on ALFWorld).
DRAWN = {"train-600": (135, 98, 74, 92, 59, 142), "valid-60": (12, 10, 7, 14, 8, 9)}
WHOLE = {"valid_seen-140": "valid_seen", "valid_unseen-134": "valid_unseen"}
FILE = ".txt"  # ends the name of a panel that is a file
NAMED = 10  # tasks that an error names
CHOOSE = "choose one by --panel or --panels (`python -m envs.panel` lists them)"
GENERATED = {"gen_train-120": 120, "gen_valid-100": 100, "mini_train-120": 120, "mini_valid-100": 100}
ALFWORLD = (*DRAWN, *WHOLE, *GENERATED)
OFFICIAL_SHOP = {"webshop_train-2300": "train", "webshop_eval-400": "eval", "webshop_test-500": "test"}
SMALL_SHOP = {"webshop_small_train-100": "small_train", "webshop_small_test-200": "small_test"}
GENERATED_SHOP = {"webshop_gen_train-100": "gen_train", "webshop_gen_test-200": "gen_test"}
WEBSHOP = (*OFFICIAL_SHOP, *SMALL_SHOP, *GENERATED_SHOP)
HELD_OUT = {  # worlds never trained on
    "pddl": "pddl_test-60",
    "babyai": "babyai_test-112",
    "scienceworld": "scienceworld_test-90",
    "jericho": "jericho_test-20",
}
SYNTHETIC = {"syn_valid-60": "syn_valid", "syn_held-60": "syn_held"}
NAMES = (*ALFWORLD, *WEBSHOP, *SYNTHETIC, *HELD_OUT.values())
OF_WORLD = {"alfworld": ALFWORLD, "webshop": WEBSHOP, "synthetic": (*SYNTHETIC,)}
OF_WORLD |= {env: (name,) for env, name in HELD_OUT.items()}


def panel_path(name: str, folder: Path = PANELS) -> Path:
    """The panel's file. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"panel {name!r} is unknown: expected one of {', '.join(NAMES)}")
    return folder / f"{name}.txt"


def panel_sha256(name: str, folder: Path = PANELS) -> str:
    """The recorded sha256 of a panel, for a stage's config.json."""
    panel_path(name, folder)
    record = folder / "SHA256"
    for line in record.read_text().splitlines() if record.is_file() else ():
        digest, _, file_name = line.partition("  ")
        if file_name == f"{name}.txt":
            return digest
    raise ValueError(f"{record} has no line for {name}.txt: run `python -m envs.panel --make`")


def read_panel(name: str, folder: Path = PANELS) -> list[str]:
    """The panel's task ids, sorted. Raises ValueError if the name is unknown or the file was changed or is missing."""
    path, expected = panel_path(name, folder), panel_sha256(name, folder)
    if not path.is_file():
        raise ValueError(f"{path} is missing: restore it from the project, or run `python -m envs.panel --make`")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != expected:
        raise ValueError(
            f"{path} has sha256 {found}, expected {expected}: the panel was changed, so scores on it are not"
            " comparable. Restore it from the project, or run `python -m envs.panel --make`."
        )
    return content.decode().splitlines()


def panel_name(panel: str) -> str:
    """What facts and scores call a panel: its name, that of its file without the ending, or that of the split. Raises
    ValueError for a file that is called like a panel of the project."""
    name = Path(panel).stem if panel.endswith(FILE) else panel
    if panel.endswith(FILE) and name in NAMES:
        raise ValueError(f"{panel} is called like a panel of the project; expected another name, to tell scores apart")
    return name


def pick_tasks(panel: str, limit: int | None = None, world: World | None = None) -> tuple[list[str], str]:
    """The ids and the sha256 of a panel: one of the project's, a file FILE.txt, or a split of the world. With a limit,
    that many ids spread evenly over it (sorted by type). Raises ValueError."""
    if panel in NAMES or (world is None and not panel.endswith(FILE)):
        task_ids, digest = read_panel(panel), panel_sha256(panel)
    else:
        task_ids = read_ids(Path(panel).expanduser()) if panel.endswith(FILE) else split_ids(panel, world)
        digest = hashlib.sha256("".join(f"{task_id}\n" for task_id in task_ids).encode()).hexdigest()
    if limit is not None and limit < len(task_ids):
        task_ids = [task_ids[i] for i in np.linspace(0, len(task_ids) - 1, limit).round().astype(int)]
    return task_ids, digest


def read_ids(path: Path) -> list[str]:
    """The task ids of a panel file of the user's. Line ends may be those of Windows, and change nothing. Raises
    ValueError, with the line, unless they are sorted and unique."""
    try:
        task_ids = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"the panel {path} cannot be read as text ({error}); expected a task id per line") from error
    for number, (task_id, before) in enumerate(zip(task_ids, ["", *task_ids], strict=False), 1):
        if not task_id or task_id != task_id.strip():
            raise ValueError(f"{path}:{number}: got {task_id!r}; expected a task id, without blanks around it")
        if task_id <= before:
            got = f"{task_id} a second time" if task_id == before else f"{task_id} after {before}"
            raise ValueError(f"{path}:{number}: got {got}; expected sorted ids: LC_ALL=C sort -u -o {path} {path}")
    return task_ids


def split_ids(split: str, world: World) -> list[str]:
    """All tasks of a split. Raises ValueError, with what a panel may be, if the world has no such split."""
    try:
        task_ids = list(world.tasks(split))
    except (ValueError, LookupError) as error:
        known = () if "own" in world.facts else NAMES
        raise ValueError(
            f"{split!r} is no panel: {nearest(split, known)}expected one that `python -m envs.panel` lists, a file "
            f"FILE{FILE} of task ids, or a split of the world ({error}); give it by --panel or --panels"
        ) from error
    if strange := [task_id for task_id in task_ids if not str(task_id).startswith(f"{split}/")]:
        raise ValueError(f"the split {split} has a task {strange[0]!r}; expected ids that begin with {split}/")
    if not task_ids:
        raise ValueError(f"the split {split} has no task; expected another, or a file FILE{FILE} of task ids")
    return task_ids


def require_trainable(panel: str, env: str, task_ids: Sequence[str]) -> None:
    """Raises ValueError if a panel of the user's, to be trained on, has tasks of one that the project evaluates on."""
    if panel in NAMES:
        return  # chosen by its name
    for name in OF_WORLD.get(env, ()):
        if "train-" not in name and (shared := sorted(set(task_ids) & set(read_panel(name)))):
            raise ValueError(
                f"{len(shared)} tasks of {panel} are in the panel {name}, such as {shared[0]}, on which this project "
                "evaluates; leave them out, since what is trained on cannot be evaluated on"
            )


def require_tasks(world: World, task_ids: Iterable[str]) -> None:
    """Raises ValueError, with the reasons, unless the world can play every task, so that a panel is never played in
    part."""
    task_ids = list(task_ids)
    splits = sorted({task.split("/")[0] for task in task_ids})
    known = {task for split in splits for task in world.tasks(split)}
    missing = [task for task in task_ids if task not in known]
    if missing:
        reasons = {task: reason for split in splits for task, reason in world.left_out(split).items()}
        named = [f"{task} ({reasons.get(task, 'not in the data')})" for task in missing[:NAMED]]
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise ValueError(
            f"{len(missing)} of {len(task_ids)} tasks cannot be played: {', '.join(named)}{more}; give the data that "
            "the panel was made from (--data, or $ALFWORLD_DATA, $WEBSHOP_DATA or $JERICHO_GAMES), or another panel"
        )


def default_panels(purpose: str, env: str, data: str | None) -> tuple[str, ...]:
    """The panels that a stage plays by default; `purpose` is train or evaluate.

    Real ALFWorld games (`data` or $ALFWORLD_DATA): train-600; valid_seen-140, and valid_unseen-134 if its games exist.
    Generated games: gen_train-120; gen_valid-100 (mini_* without the alfworld wheel). WebShop: the panels of the
    catalogue in `data` or $WEBSHOP_DATA, official, small or generated. Synthetic and held-out worlds: evaluation only.
    Own worlds: their splits train and test.
    Raises ValueError if there is none, FileNotFoundError if there is no such data.
    """
    require_world(env)
    if env not in DEFAULTS:
        return ("train",) if purpose == "train" else ("test",)
    if env == "alfworld":
        return _house_panels(purpose, data)
    if env == "webshop":
        return _shop_panels(purpose, data)
    if env == "synthetic" and purpose == "evaluate":
        return tuple(SYNTHETIC)
    if env in HELD_OUT and purpose == "evaluate":
        return (HELD_OUT[env],)
    raise ValueError(f"env {env!r} has no default panel to {purpose} with: {CHOOSE}")


def _house_panels(purpose: str, data: str | None) -> tuple[str, ...]:
    real, name = ({"train-600": "train"}, "train-120") if purpose == "train" else (WHOLE, "valid-100")
    if not (data or os.environ.get("ALFWORLD_DATA")):
        return (f"{family()}_{name}",)
    root = data_root(data)
    splits = split_names(root)
    generated = {f"{kind}_{name}": f"{kind}_{name.partition('-')[0]}" for kind in ("gen", "mini")}
    for panels in (real, generated):
        if found := [name for name, split in panels.items() if split in splits]:
            return tuple(found)
    raise ValueError(f"{root} has no default panel to {purpose} with, only {', '.join(splits) or 'no split'}: {CHOOSE}")


def _shop_panels(purpose: str, data: str | None) -> tuple[str, ...]:
    # On demand: only WebShop needs its packages.
    from envs.webshop.catalogue import data_folder, open_catalogue, prepare

    splits = open_catalogue(prepare(data_folder(data))).splits
    for panels in (OFFICIAL_SHOP, SMALL_SHOP, GENERATED_SHOP):
        if set(panels.values()) <= set(splits):
            return tuple(panels)[:1] if purpose == "train" else tuple(panels)[-1:]
    raise ValueError(f"no panel belongs to a catalogue with the splits {', '.join(splits) or '(none)'}: {CHOOSE}")


def excluded_ids() -> set[str]:
    """All task ids of all panels. Demonstrations and base-model training text must not come from them."""
    return {task_id for name in NAMES for task_id in read_panel(name)}


def write_panel(name: str, task_ids: Iterable[str], folder: Path = PANELS) -> None:
    """Writes a panel and its line in SHA256. Raises ValueError unless the number of ids is the one in its name."""
    content = "".join(f"{task_id}\n" for task_id in sorted(set(task_ids))).encode()
    if content.count(b"\n") != int(name.rpartition("-")[2]):
        raise ValueError(f"panel {name} would hold {content.count(bytes([10]))} different tasks: check the data")
    folder.mkdir(parents=True, exist_ok=True)
    panel_path(name, folder).write_bytes(content)
    record = folder / "SHA256"
    kept = [line for line in record.read_text().splitlines()] if record.is_file() else []
    kept = [line for line in kept if not line.endswith(f"  {name}.txt")]
    record.write_text("\n".join(sorted([*kept, f"{hashlib.sha256(content).hexdigest()}  {name}.txt"])) + "\n")


def real_ids(data: Path, split: str) -> list[str]:
    """Sorted ids of the playable games of a real split; none if the data has no such split."""
    root = data / "json_2.1.1"
    return list(cached_games(root, split).playable) if (root / split).is_dir() else []


def draw(task_ids: Sequence[str], seed: int) -> dict[str, list[str]]:
    """The two panels drawn from train. The games of each type are shuffled and dealt to train-600, then to valid-60."""
    panels = {name: [] for name in DRAWN}
    for type_index, kind in enumerate(TASK_TYPES):
        pool = [task_id for task_id in sorted(task_ids) if task_type(task_id) == kind]
        np.random.default_rng([seed, zlib.crc32(kind.encode())]).shuffle(pool)
        for name, counts in DRAWN.items():
            if len(pool) < counts[type_index]:
                raise ValueError(f"train has too few {kind} games for {name}: is the data complete?")
            panels[name] += [pool.pop() for _ in range(counts[type_index])]
    return panels


def official_ids(split: str, count: int, seed: int) -> list[str]:
    """`count` of WebShop's official goals, drawn without replacement."""
    low, high = next((low, high) for name, low, high in OFFICIAL if name == split)
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    return [f"{split}/{low + position:05d}" for position in rng.choice(high - low, count, replace=False)]


def draw_goals(task_ids: Iterable[str], split: str, count: int, seed: int) -> list[str]:
    """`count` goals of a split, in rounds: each takes one goal of every product that has any left, in a drawn order."""
    by_product: dict[str, list[str]] = {}
    for task_id in task_ids:
        by_product.setdefault(task_id.rpartition("-")[0], []).append(task_id)
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    piles = [rng.permutation(by_product[product]).tolist() for product in rng.permutation(sorted(by_product))]
    dealt = [pile[index] for index in range(max(map(len, piles))) for pile in piles if index < len(pile)]
    return dealt[:count]


def make_shop_panels(seed: int) -> None:
    """Writes WebShop's panels; those of the 1,000-product set only if $WEBSHOP_DATA holds it."""
    from envs.webshop.catalogue import open_catalogue, prepare

    for name, split in OFFICIAL_SHOP.items():
        write_panel(name, official_ids(split, int(name.rpartition("-")[2]), seed))
    sources = [(GENERATED_SHOP, ensure_catalogue())]
    sources += [(SMALL_SHOP, Path(os.environ["WEBSHOP_DATA"]))] if os.environ.get("WEBSHOP_DATA") else []
    for panels, folder in sources:
        catalogue = open_catalogue(prepare(folder))
        for name, split in panels.items():
            if split in catalogue.splits:
                write_panel(name, draw_goals(catalogue.splits[split], split, int(name.rpartition("-")[2]), seed))


def held_out_ids(env: str) -> Sequence[str]:
    """The tasks of a held-out world's panel; listing them does not need the world's packages."""
    from envs import babyai, jericho, scienceworld
    from envs.pddl import world as pddl

    if env == "jericho":
        return [f"jericho_test/{name}" for name in jericho.GAMES]
    if env == "scienceworld":
        return scienceworld.panel_ids()
    return pddl.ids_of("pddl_test") if env == "pddl" else babyai.ids_of("babyai_test")


@dataclass(frozen=True, kw_only=True)
class Args:
    make: bool = False
    """Make the panels again instead of verifying them. Panels whose games are missing stay unchanged."""
    data: Path | None = None
    """(ALFWorld) Folder with the real games' json_2.1.1 (default: $ALFWORLD_DATA)."""
    seed: Annotated[int, Range(0)] = SEED
    """Seed of the draws from real splits and of the generated games."""

    def check(self) -> None:
        if self.data:
            data_root(str(self.data))


def main(args: Args) -> None:
    data = (args.data or Path(os.environ.get("ALFWORLD_DATA", "."))).expanduser()
    if args.make:
        if train := real_ids(data, "train"):
            for name, task_ids in draw(train, args.seed).items():
                write_panel(name, task_ids)
        for name, split in WHOLE.items():
            if task_ids := real_ids(data, split):
                write_panel(name, task_ids)
        for name, count in GENERATED.items():
            split = name.partition("-")[0]
            if wheel_folder() or split.startswith("mini"):
                write_panel(name, (task_id for task_id, _, _ in generate_games(args.seed, split, count)))
        make_shop_panels(args.seed)
        for name, split in SYNTHETIC.items():
            write_panel(name, Synthetic().tasks(split)[: int(name.rpartition("-")[2])])
        for env, name in HELD_OUT.items():
            write_panel(name, held_out_ids(env))
    for name in (*WEBSHOP, *SYNTHETIC, *HELD_OUT.values()):
        print(f"{name}: {len(read_panel(name))} tasks, sha256 {panel_sha256(name)[:16]}")
    for name in ALFWORLD:
        task_ids = read_panel(name)
        by_type = "/".join(str(sum(task_type(task_id) == kind for task_id in task_ids)) for kind in TASK_TYPES)
        print(f"{name}: {len(task_ids)} tasks, by type {by_type}, sha256 {panel_sha256(name)[:16]}")
    print("types:", ", ".join(TASK_TYPES))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

"""Generated games: winnable, shaped as real ones, always the same, playable by the stock engine, never half written."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from artifacts.cli import parse
from envs import panel
from envs.alfworld import generate, rooms
from envs.alfworld.index import TASK_TYPES, task_type
from envs.alfworld.world import AlfWorld
from envs.panel import PANELS, read_panel
from envs.webshop import demonstrator
from envs.webshop import generate as webshop_generate

ROOT = Path(__file__).parents[1]
needs_wheel = pytest.mark.skipif(rooms.wheel_folder() is None, reason="the data of the alfworld wheel is not installed")
FAMILIES = [pytest.param("gen", marks=needs_wheel), "mini"]


def facts_of(game: dict) -> dict[str, list[tuple[str, ...]]]:
    """{predicate: arguments of each of its facts} from a game's problem, read apart from the engine."""
    start = game["pddl_problem"].split("(:init")[1].split("(:goal")[0]
    facts: dict[str, list[tuple[str, ...]]] = {}
    for fact in re.findall(r"\(([^()]+)\)", start):
        predicate, *arguments = fact.split()
        facts.setdefault(predicate, []).append(tuple(arguments))
    return facts


@pytest.mark.parametrize("family", FAMILIES)
def test_walkthrough_wins_every_type_and_not_before_its_last_command(family, tmp_path):
    split = f"{family}_valid"
    generate.write_split(tmp_path, split, seed=11, count=60)
    world = AlfWorld(data=str(tmp_path))
    won = Counter()
    for task_id in world.tasks(split):
        commands = json.loads((tmp_path / "json_2.1.1" / task_id / "game.tw-pddl").read_text())["walkthrough"]
        world.reset(task_id)
        successes = []
        for command in commands:
            assert command in world.actions(), f"{task_id}: {command} is not admissible"
            successes.append(world.step(command).success)
        assert successes == [False] * (len(commands) - 1) + [True], task_id
        won[task_type(task_id)] += 1
    assert set(won) == set(TASK_TYPES) and won.total() == 60


@needs_wheel
def test_stock_alfworld_lists_the_games_and_its_textworld_is_won_by_their_walkthroughs(tmp_path):
    pytest.importorskip("textworld", reason="TextWorld is not installed")
    split = "gen_valid"
    wanted = {"pick_two_obj_and_place", "pick_clean_then_place_in_recep"}  # of bathrooms, which TextWorld loads soonest
    for task_id, game, record in generate.generate_games(3, split, 400):
        if record["task_type"] in wanted and record["scene"]["scene_num"] > 400:
            wanted.remove(record["task_type"])
            folder = tmp_path / "json_2.1.1" / task_id
            folder.mkdir(parents=True)
            (folder / "game.tw-pddl").write_text(json.dumps(game))
            (folder / "traj_data.json").write_text(json.dumps(record))
    script = """
import json, sys
from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv
config = {
    "env": {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6], "expert_type": "handcoded",
            "domain_randomization": False},
    "dataset": {"eval_id_data_path": sys.argv[1], "num_eval_games": -1},
    "general": {"training_method": "dqn"},
    "rl": {"training": {"max_nb_steps_per_episode": 50}},
}
games = AlfredTWEnv(config, train_eval="eval_in_distribution")
env = games.init_env(batch_size=1)
for _ in games.game_files:
    _, infos = env.reset()
    won = []
    for command in json.load(open(infos["extra.gamefile"][0]))["walkthrough"]:
        assert command in infos["admissible_commands"][0], command
        _, _, _, infos = env.step([command])
        won.append(infos["won"][0])
    print("WON", won == [False] * (len(won) - 1) + [True])
"""
    # Importing alfworld makes a cache folder where ALFWORLD_DATA says.
    environment = os.environ | {"ALFWORLD_DATA": str(tmp_path)}
    command = [sys.executable, "-c", script, str(tmp_path / "json_2.1.1" / split)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("WON True") == 2, done.stdout + done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_games_whatever_the_process_and_the_order(family):
    split = f"{family}_valid"
    script = f"from envs.alfworld.generate import *; print([i for i, _, _ in generate_games(5, {split!r}, 20)])"
    runs = []
    for hash_seed in ("1", "2"):  # sets iterate in another order
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        run = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
        runs.append(ast.literal_eval(run.stdout))
    alone = [generate.generate_game(5, split, number)[0] for number in reversed(range(20))]
    assert runs[0] == runs[1] == alone[::-1]
    others = [generate.generate_game(6, split, 0), generate.generate_game(5, f"{family}_train", 0)]
    assert all(game["pddl_problem"] != generate.generate_game(5, split, 0)[1]["pddl_problem"] for _, game, _ in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_game_is_in_two_splits(family):
    names = [f"{family}_{name}" for name in generate.SPLIT_SIZES]
    hashes = [
        task_id.rpartition("_")[2]
        for split in names
        for task_id, _, _ in generate.generate_games(generate.SEED, split, 200)
    ]
    assert len(set(hashes)) == len(hashes) == 600


@needs_wheel
def test_games_are_shaped_as_the_real_ones():
    """Bounds around what was measured over the 3,553 real training games: 23.5 receptacles, 31.5 objects in them, 16 %
    of receptacles at another one's place, 44 % of them empty, 1 to 4 targets; unseen rooms never."""
    receptacles, objects, shared, empty, hidden, types = [], [], [], [], [], Counter()
    for _, game, record in generate.generate_games(0, "gen_train", 300):
        facts = facts_of(game)
        places, inside = dict(facts["receptacleAtLocation"]), dict(facts["inReceptacle"])
        at = Counter(places.values())
        receptacles.append(len(places))
        objects.append(len(inside))
        shared.append(sum(at[place] > 1 for place in places.values()) / len(places))
        empty.append(1 - len(set(inside.values())) / len(places))
        target = f"{record['pddl_params']['object_target']}Type"
        targets = [name for name, kind in facts["objectType"] if kind == target]
        openable = {name for (name,) in facts.get("openable", [])}
        hidden.append(all(inside[name] in openable for name in targets))
        assert 1 <= len(targets) <= 4
        assert facts["atLocation"][0][1] not in places.values(), "the agent starts away from receptacles"
        assert record["scene"]["scene_num"] not in rooms.UNSEEN_SCENES
        types[record["task_type"]] += 1
    means = [sum(column) / 300 for column in (receptacles, objects, shared, empty, hidden)]
    bounds = [(21, 26), (28, 36), (0.12, 0.22), (0.35, 0.52), (0.03, 0.16)]
    assert all(low < mean < high for mean, (low, high) in zip(means, bounds, strict=True)), means
    for kind, (count, _, _) in rooms.TASKS.items():
        assert abs(types[kind] / 300 - count / 3553) < 0.09, types


def test_the_rooms_left_out_are_those_of_valid_unseen():
    assert {int(task_id.split("/")[1].rpartition("-")[2]) for task_id in read_panel("valid_unseen-134")} == {
        10,
        219,
        308,
        424,
    }
    assert {10, 219, 308, 424} <= rooms.UNSEEN_SCENES


@needs_wheel
def test_task_lines_are_the_wheels_templates():
    library = {}
    for node in ast.parse((rooms.wheel_folder() / "gen/goal_library.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            library[node.targets[0].slice.value] = ast.literal_eval(node.value)["templates"]
    for kind, (_, _, phrases) in rooms.TASKS.items():
        theirs = {phrase.replace("{toggle}", "desklamp") + "." for phrase in library[kind]}
        assert set(phrases) == theirs, kind


def test_alfworld_is_never_imported():
    script = (
        "import sys; from envs.alfworld.generate import *; "
        "generate_game(0, f'{family()}_train', 0); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "envs.alfworld.rooms" in done.stdout.split() and "alfworld" not in done.stdout.split()


def test_without_the_wheel_there_are_small_rooms_and_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms.importlib.util, "find_spec", lambda name: None)
    rooms.catalogue.cache_clear()
    assert generate.family() == "mini"
    with pytest.raises(FileNotFoundError, match="pip install --no-deps alfworld"):
        generate.generate_game(0, "gen_train", 0)
    monkeypatch.setattr(generate, "SPLIT_SIZES", {"train": 3, "valid": 3, "demo": 3})
    generate.ensure_generated(tmp_path, demo_games=3)
    splits = [path.name for path in (tmp_path / "json_2.1.1").iterdir()]
    assert sorted(splits) == ["mini_demo", "mini_train", "mini_valid"]


@pytest.mark.parametrize("split, message", [("train", "unknown"), ("gen_test", "unknown"), ("tiny_train", "tiny")])
def test_unknown_splits_are_refused(split, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        generate.ensure_generated(tmp_path, splits=[split])
    assert not (tmp_path / "json_2.1.1" / split).exists()


def test_what_is_there_is_kept_and_another_seed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "SPLIT_SIZES", {"valid": 4})
    generate.ensure_generated(tmp_path, seed=1, splits=["mini_valid"], demo_games=1)
    files = sorted(tmp_path.glob("json_2.1.1/mini_valid/*/*/*"))
    before = [file.stat().st_mtime_ns for file in files]
    assert generate.ensure_generated(tmp_path, seed=1, splits=["mini_valid"], demo_games=1) == tmp_path
    assert len(files) == 8 and [file.stat().st_mtime_ns for file in files] == before
    with pytest.raises(ValueError, match="'seed': 1.*'seed': 2.*delete it or choose another folder"):
        generate.ensure_generated(tmp_path, seed=2, splits=["mini_valid"], demo_games=1)
    monkeypatch.setattr(generate, "ATTRACTION", {})  # another generator, whose games would lie differently
    with pytest.raises(ValueError, match="'first': 'mini_valid/.*delete it or choose another folder"):
        generate.ensure_generated(tmp_path, seed=1, splits=["mini_valid"], demo_games=1)
    (tmp_path / "json_2.1.1/mini_valid/generated.json").unlink()
    with pytest.raises(ValueError, match="no record of how it was made"):
        generate.ensure_generated(tmp_path, seed=1, splits=["mini_valid"], demo_games=1)


def test_a_killed_generation_leaves_no_split_and_the_next_one_completes_it(tmp_path):
    command = [sys.executable, "-m", "envs.alfworld.generate", "--folder", str(tmp_path), "--splits", "mini_train"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(3000):  # until it has begun to write games
        if next(tmp_path.glob("building-*/*/*/*/game.tw-pddl"), None):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("building-*/*/*/*")) and not list(tmp_path.glob("json_2.1.1/*"))
    generate.ensure_generated(tmp_path, splits=["mini_train"])
    assert len(list(tmp_path.glob("json_2.1.1/mini_train/*/*/game.tw-pddl"))) == 600


def test_two_processes_that_generate_at_once_end_with_one_split(tmp_path):
    generate.write_split(tmp_path, "mini_valid", seed=1, count=2)
    kept = sorted(tmp_path.glob("json_2.1.1/mini_valid/*/*/*"))
    generate.write_split(tmp_path, "mini_valid", seed=1, count=2)  # the slower one finds the split in place
    assert sorted(tmp_path.glob("json_2.1.1/mini_valid/*/*/*")) == kept and not list(tmp_path.glob("building-*"))


def test_generated_data_and_panels_are_where_the_project_keeps_them():
    """Their paths are relative to their modules, so a module that moves takes them along unless its anchor follows."""
    assert generate.FOLDER.parent == webshop_generate.FOLDER.parent == ROOT / "data"
    assert generate.FOLDER != webshop_generate.FOLDER
    assert PANELS == ROOT / "envs" / "panels" and (PANELS / "SHA256").is_file()


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        (generate, "--seed", -1),
        (generate, "--demo-games", 0),
        (generate, "--demo-games", 10**9),
        (webshop_generate, "--seed", -1),
        (webshop_generate, "--products", 0),
        (webshop_generate, "--products", 10**9),
        (demonstrator, "--limit", 0),
        (demonstrator, "--max-turns", -1),
        (panel, "--seed", -1),
    ],
)
def test_numbers_out_of_range_are_refused_by_the_flags_name(command, flag, value):
    with pytest.raises(ValueError, match=f"{flag} is {value}; expected at least [01]"):
        parse(command.Args, "", [flag, str(value)])


def test_a_damaged_record_of_how_data_was_made_is_named(tmp_path):
    folder = webshop_generate.ensure_catalogue(tmp_path / "shop", products=5)
    stamp = folder / webshop_generate.STAMP
    stamp.write_bytes(stamp.read_bytes()[:10])
    with pytest.raises(ValueError, match="generated.json is not valid JSON"):
        webshop_generate.ensure_catalogue(folder, products=5)

"""Thought diversity: figures by hand, and that they tell the diverse from the monotonous."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agentrefine import diversity
from artifacts.cli import parse
from artifacts.trajectory import write_file
from tests.support.helpers import trajectory, turn

ROOT = Path(__file__).parents[1]


def write(path: Path, thoughts: list[str]) -> Path:
    rows = [
        trajectory(task_id=f"gen_train/x/{i}", turns=[turn(thought, "look", "You see nothing.")])
        for i, thought in enumerate(thoughts)
    ]
    write_file(path, rows)
    return path


def test_distinct_n_by_hand():
    thoughts = ["I see a mug", "I see a pen"]
    assert diversity.distinct_n(thoughts, 1) == 5 / 8
    assert diversity.distinct_n(thoughts, 2) == 4 / 6  # i see, see a, a mug, a pen
    assert diversity.distinct_n(["Mug", "mug"], 1) == 0.5 and diversity.distinct_n(["mug"], 2) == 0


def test_spread_counts_clusters_and_their_effective_number():
    assert diversity.spread(np.repeat([0, 1, 2, 3], 25)) == (4, pytest.approx(4.0))
    held, effective = diversity.spread(np.array([0] * 999 + [1]))
    assert held == 1 and 1 < effective < 1.01


def test_every_line_of_a_thought_counts(tmp_path):
    path = write(tmp_path / "t.jsonl", ["I look.\nI think again.", "", "...", "I go."])
    assert diversity.load_thoughts(path) == ["I look.", "I think again.", "I go."]


def test_the_diverse_file_wins_every_figure_and_draws_repeat(tmp_path):
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(300)]
    many = write(tmp_path / "many.jsonl", [" ".join(rng.choice(words[i % 20 * 15 :][:15], 6)) for i in range(200)])
    few = write(tmp_path / "few.jsonl", [f"I check the shelf {i % 4}." for i in range(300)])
    args = diversity.Args(files=(many, few), clusters=20)
    found, points_NK = diversity.compare(args)
    assert points_NK.shape == (400, 50)
    diverse, monotonous = found["files"]
    assert found["drawn"] == 200 and (diverse["thoughts"], monotonous["thoughts"]) == (200, 300)
    for figure in ("distinct", "distinct_1", "distinct_2", "distinct_3", "clusters", "effective_clusters"):
        assert diverse[figure] > monotonous[figure], figure
    assert monotonous["distinct"] == 4 / 200 and monotonous["clusters"] <= 4 and diverse["clusters"] >= 14
    assert diversity.compare(args)[0] == found


def test_the_script_prints_one_json_line_and_refuses_in_one_sentence(tmp_path):
    path = write(tmp_path / "a.jsonl", ["I go.", "I see a mug.", "I take it."])
    empty = write(tmp_path / "b.jsonl", ["", "..."])
    command = [sys.executable, "-m", "agentrefine.diversity", "--picture", str(tmp_path / "p/t.png")]
    again = write(tmp_path / "c.jsonl", ["I go.", "I see a pen."])
    words = [*command, str(path), str(again), str(path)]  # one that is named twice is one
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert [entry["distinct"] for entry in found["files"]] == [1.0, 1.0] and found["drawn"] == 2
    assert (tmp_path / "p/t.png").read_bytes().startswith(b"\x89PNG")
    for files, message in (([str(path), str(empty)], "b.jsonl holds no thought"), ([], "no file")):
        done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--thoughts", "1"], "--thoughts is 1; expected at least 2"),
        (["--clusters", "0"], "--clusters is 0; expected at least 1"),
        (["--seed", "-1"], "--seed is -1; expected at least 0"),
        (["--picture", "thoughts.mp3"], "--picture is thoughts.mp3; expected a name that ends in .png or .svg"),
    ],
)
def test_a_mistaken_value_is_refused_before_anything_is_read(words, message):
    with pytest.raises(ValueError, match=message):
        parse(diversity.Args, "", ["nowhere.jsonl", *words])

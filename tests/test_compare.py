"""Runs are compared over the same tasks only; published intervals come out, and what differs is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from artifacts.compare import comparison_table, differences, differing, paired
from artifacts.json_io import write_json
from artifacts.scores import score
from tests.support.helpers import trajectory


def solved(both: int, first_only: int, second_only: int, neither: int) -> tuple[set[str], set[str], int]:
    names = [str(k) for k in range(both + first_only + second_only + neither)]
    first = set(names[: both + first_only])
    second = set(names[:both]) | set(names[both + first_only : both + first_only + second_only])
    return first, second, len(names)


def test_the_interval_is_newcombe_s_and_the_test_mcnemar_s():
    found = paired(*solved(36, 12, 2, 0))
    assert [round(x, 4) for x in found.interval] == [-0.3404, -0.0569]  # Newcombe (1998), the second less the first
    assert found.p == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    assert (found.both, found.first_only, found.second_only, found.n) == (36, 12, 2, 50)
    back = paired(*reversed(solved(36, 12, 2, 0)[:2]), 50)
    assert back.interval == pytest.approx((0.0569, 0.3404), abs=1e-4) and back.p == found.p


def test_equal_runs_differ_by_nothing_with_an_interval_around_it():
    found = paired(*solved(3, 0, 0, 2))
    assert found.difference == 0 and found.p == 1 and found.interval[0] < 0 < found.interval[1]
    assert paired(set(), set(), 1).interval == pytest.approx((-0.7935, 0.7935), abs=1e-3)


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    draws = np.random.default_rng(0).multinomial(60, [0.5, 0.05, 0.15, 0.3], 1000)
    covered = [low <= 0.1 <= high for low, high in (paired(*solved(*draw)).interval for draw in draws)]
    assert 0.93 < np.mean(covered) < 0.98


def write_run(run: Path, won: list[bool], *, content: str = "a", turns: int = 20, stage: str = "evaluate") -> Path:
    folder = run / "base" / stage
    folder.mkdir(parents=True)
    rows = [trajectory(task_id=f"s/pick_and_place_simple-x/t{k}", success=w) for k, w in enumerate(won)]
    write_json(folder / "scores.json", {"panel": score(rows) | {"content": content, "world": {}}})
    write_json(folder / "config.json", {"args": {"max_turns": turns, "slots": turns}, "facts": {"adapter": str(run)}})
    write_json(folder / "done.json", {})
    return run


def test_other_tasks_are_named_and_not_compared(tmp_path):
    first, other = write_run(tmp_path / "a", [True, False]), write_run(tmp_path / "b", [True, True], content="b")
    (found,) = differences(first, other)
    assert found.paired is None and found.why == "other tasks or data"
    assert "not compared: other tasks or data" in comparison_table([first, other])


def test_attempts_lost_to_faults_are_not_compared(tmp_path):
    first, other = write_run(tmp_path / "a", [True, False]), write_run(tmp_path / "b", [True])
    assert next(differences(first, other)).why == "attempts lost to faults"


def test_scores_without_a_content_hash_are_not_compared(tmp_path):
    runs = [write_run(tmp_path / name, [True], content="") for name in "ab"]
    assert next(differences(*runs)).paired is None


def test_settings_that_differ_are_listed_and_marked(tmp_path):
    first, other = write_run(tmp_path / "a", [False] * 3), write_run(tmp_path / "b", [True] * 3, turns=50)
    text = comparison_table([first, other])
    assert differing([first, other]) == [
        ("evaluate: adapter", [repr(str(first)), repr(str(other))]),
        ("evaluate: max_turns", ["20", "50"]),
    ]
    assert "base*" in text and "* played with other settings: args.max_turns 50 (first 20)" in text
    assert "+100.0 [" in text and "0.250" in text


def test_runs_without_a_common_evaluation_say_so(tmp_path):
    runs = [write_run(tmp_path / "a", [True]), write_run(tmp_path / "b", [True], stage="evaluate_P1")]
    assert "they share no evaluation" in comparison_table(runs)

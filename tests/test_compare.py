"""Runs are compared over the same tasks only; published intervals come out, and what differs is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from artifacts.compare import comparison_table, differences, differing, paired, steps
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
    assert [round(x, 4) for x in found.interval] == [-0.3404, -0.0569]  # Newcombe (1998), the second minus the first
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


def rows(*tries: str) -> list:
    """Attempts at task 0, 1, ...: in each word a letter per trial, + solved, - not, ! lost to a fault."""
    return [
        trajectory(
            task_id=f"s/pick_and_place_simple-x/t{task}",
            trial=trial,
            success=sign == "+",
            end={"+": "success", "-": "max_turns", "!": "env_error"}[sign],
        )
        for task, word in enumerate(tries)
        for trial, sign in enumerate(word)
    ]


def write_run(
    run: Path, *tries: str, content: str = "a", turns: int = 20, stage: str = "evaluate", subject: str = "base"
) -> Path:
    folder = run / subject / stage
    folder.mkdir(parents=True)
    scored = score(rows(*tries), trials=len(tries[0]))
    write_json(folder / "scores.json", {"panel": scored | {"content": content, "world": {}}})
    write_json(folder / "config.json", {"args": {"max_turns": turns, "slots": turns}, "facts": {"adapter": str(run)}})
    write_json(folder / "done.json", {})
    return run


def put(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True)
    write_json(path, value)


def write_round(run: Path, index: int, *tries: str) -> None:
    write_run(run, *tries, subject=f"round_{index}")
    put(run / f"round_{index}/train_pg/done.json", {})


def test_other_tasks_are_named_and_not_compared(tmp_path):
    first, other = write_run(tmp_path / "a", "+", "-"), write_run(tmp_path / "b", "+", "+", content="b")
    (found,) = differences(first, other)
    assert found.paired is None and found.why == "other tasks or data"
    assert "not compared: other tasks or data" in comparison_table([first, other])


@pytest.mark.parametrize(("one", "other"), [("!++", "++!"), ("+++", "+!+")])
def test_attempts_lost_to_faults_are_not_compared(tmp_path, one, other):
    runs = write_run(tmp_path / "a", *one), write_run(tmp_path / "b", *other)
    assert next(differences(*runs)).why == "attempts lost to faults"
    assert "not compared: attempts lost to faults" in comparison_table(runs)


def test_an_incomplete_best_of_several_trials_is_not_compared(tmp_path):
    runs = write_run(tmp_path / "a", "++", "+!"), write_run(tmp_path / "b", "--", "--")
    assert next(differences(*runs)).why == "attempts lost to faults"


def test_of_several_trials_the_shares_and_the_difference_are_of_the_same_measure(tmp_path):
    (found,) = differences(write_run(tmp_path / "a", "+---", "----"), write_run(tmp_path / "b", "++++", "++++"))
    assert (found.first, found.second, found.paired.difference) == (0.5, 1.0, 0.5)


def test_scores_without_a_content_hash_are_not_compared(tmp_path):
    runs = [write_run(tmp_path / name, "+", content="") for name in "ab"]
    assert next(differences(*runs)).paired is None


def test_settings_that_differ_are_listed_and_marked_but_not_what_follows_from_them(tmp_path):
    first, other = write_run(tmp_path / "a", "-", "-", "-"), write_run(tmp_path / "b", "+", "+", "+", turns=50)
    text = comparison_table([first, other])
    assert differing([first, other]) == [("evaluate: max_turns", ["20", "50"])]
    assert "base*" in text and "* played with other settings: args.max_turns 50 (first 20)" in text
    assert "+100.0 [" in text and "0.250" in text


def test_a_stage_that_one_run_lacks_and_a_round_played_otherwise_are_settings_that_differ(tmp_path):
    first, other = tmp_path / "a", tmp_path / "b"
    for run, temperatures in ((first, (1.0, 0.0)), (other, (0.0, 0.0))):
        for index, temperature in enumerate(temperatures):
            put(run / f"round_{index}/rollout/config.json", {"args": {"temperature": temperature}})
    put(first / "round_0/actre/config.json", {"args": {"probability": 0.1}})
    assert differing([first, other]) == [
        ("actre", ["there", "-"]),
        ("rollout: temperature", ["{'round_0': 1.0, 'round_1': 0.0}", "0.0"]),
    ]


def test_the_rounds_of_a_run_are_compared_each_with_the_one_before(tmp_path):
    run = write_run(tmp_path / "a", "-", "-")
    for index, tries in enumerate(("+-", "++", "-+")):
        write_round(run, index, *tries)
    found = {row.subject: row for row in steps(run, "evaluate")}
    assert list(found) == ["base → 0", "0 → 1", "1 → 2", "0 → 2"]
    assert [found[name].paired.difference for name in found] == [0.5, 0.5, -0.5, 0.0]
    assert (found["0 → 2"].paired.first_only, found["0 → 2"].paired.second_only) == (1, 1)


def test_the_last_rounds_are_compared_where_one_run_has_more(tmp_path):
    first, other = tmp_path / "a", tmp_path / "b"
    write_round(first, 0, "-", "-")
    for index, tries in enumerate(("+-", "++")):
        write_round(other, index, *tries)
    assert [(row.subject, row.paired.difference) for row in differences(first, other)] == [("0", 0.5), ("0 → 1", 1.0)]


def test_runs_without_a_common_evaluation_say_so(tmp_path):
    runs = [write_run(tmp_path / "a", "+"), write_run(tmp_path / "b", "+", stage="evaluate_P1")]
    assert "they share no evaluation" in comparison_table(runs)

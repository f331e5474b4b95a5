"""Figures checked by hand: single attempts, the best of several, perturbed wordings; where scores lie."""

from __future__ import annotations

import pytest

from artifacts.json_io import write_json
from artifacts.scores import (
    PEOPLE,
    WORDINGS,
    best_of_rounds,
    directory_name,
    perturbation_table,
    perturbations,
    read_scores,
    score,
    success_by_type,
    table,
)
from tests.support.helpers import trajectory

TASKS = [f"gen_valid/pick_and_place_simple-Mug-None-Desk-{i}/trial" for i in range(3)]


def attempt(task: int, trial: int, progress: float, **changes):
    won = progress == 1.0
    fields = {"reward": float(won), "success": won, "end": "success" if won else "max_turns"}
    return trajectory(task_id=TASKS[task], trial=trial, progress=progress, **(fields | changes))


ONE = score([attempt(0, 0, 1.0)])


def test_a_score_of_single_attempts():
    rows = [attempt(0, 0, 1.0), attempt(1, 0, 0.5), attempt(2, 0, 0.0, end="env_error")]
    scores = score(rows)
    assert (scores["success"], scores["n"], scores["rate"], scores["progress"]) == (1, 2, 0.5, 0.75)
    assert scores["ends"] == {"success": 1, "max_turns": 1, "env_error": 1} and "best_of" not in scores
    assert scores["wilson95"] == [0.0945, 0.9055]  # Wilson's interval of 1 of 2


def test_best_of_counts_any_success_and_the_most_progress():
    progress = [(0.0, 1.0, 0.0), (0.5, 0.0, 0.25), (1.0, 1.0, 0.0)]
    scores = score([attempt(i, k, p) for i, trials in enumerate(progress) for k, p in enumerate(trials)], 3)
    assert (scores["success"], scores["n"], scores["rate"]) == (3, 9, 0.3333)
    assert scores["progress"] == round(3.75 / 9, 4)
    best = scores["best_of"]
    assert (best["trials"], best["success"], best["n"], best["progress"]) == (3, 2, 3, round(2.5 / 3, 4))
    assert scores["wilson95"] == score([attempt(0, 0, 1.0), attempt(1, 0, 0.0), attempt(2, 0, 0.0)])["wilson95"]


def test_a_task_that_lost_a_trial_to_a_fault_is_not_among_the_best_of():
    rows = [attempt(0, 0, 1.0), attempt(0, 1, 0.0), attempt(1, 0, 1.0), attempt(1, 1, 0.0, end="llm_error")]
    scores = score(rows, 2)
    assert (scores["n"], scores["best_of"]["n"], scores["best_of"]["success"]) == (3, 1, 1)


def test_directories_tell_world_wording_and_trials():
    names = {
        directory_name(env, perturb, trials)
        for env in ("alfworld", "webshop", "babyai")
        for perturb in WORDINGS
        for trials in (1, 10)
    }
    assert len(names) == 3 * 6 * 2
    assert directory_name("alfworld", "none", 1) == "evaluate"
    assert directory_name("babyai", "P2", 10) == "evaluate_babyai_P2_best_of_10"


def write_scores(run, subject: str, name: str, scores: dict) -> None:
    folder = run / subject / name
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"args": {}, "facts": {}})
    write_json(folder / "scores.json", {"gen_valid-100": scores})
    write_json(folder / "done.json", {})


def test_the_perturbation_table_has_mean_and_population_deviation(tmp_path):
    """The paper's row of AgentRefine: 44.8 and five more, 48.5 on average, 3.73 the population standard deviation."""
    for wording, rate in zip(WORDINGS, (0.448, 0.5, 0.515, 0.545, 0.455, 0.448), strict=True):
        write_scores(
            tmp_path, "base", directory_name("alfworld", wording, 1), ONE | {"rate": rate, "progress": rate / 2}
        )
    found = perturbations(tmp_path, "alfworld", 1)
    success = found["base"]["gen_valid-100"]["success"]
    assert (success["none"], success["P3"], success["mean"]) == (44.8, 54.5, 48.52)
    assert success["std"] == pytest.approx(3.73, abs=0.05)
    assert found["base"]["gen_valid-100"]["progress"]["mean"] == 24.26
    line = next(line for line in perturbation_table(found).splitlines() if "success" in line)
    assert line.split()[2:-1] == ["success", "44.8", "50.0", "51.5", "54.5", "45.5", "44.8", "48.5"]


def test_a_wording_that_was_not_played_leaves_no_mean(tmp_path):
    for wording in WORDINGS[:-1]:
        write_scores(tmp_path, "base", directory_name("alfworld", wording, 1), ONE)
    assert perturbations(tmp_path, "alfworld", 1) == {}


def test_the_table_has_each_place_and_the_best_of_rounds(tmp_path):
    for number, won in enumerate(([0], [1])):
        write_scores(tmp_path, f"round_{number}", "evaluate", score([attempt(i, 0, float(i in won)) for i in range(3)]))
        (tmp_path / f"round_{number}/train_pg").mkdir()
        write_json(tmp_path / f"round_{number}/train_pg/done.json", {})
    write_scores(tmp_path, "adapter", "evaluate", score([attempt(i, 0, 0.5) for i in range(3)]))
    write_scores(tmp_path, "round_0", "evaluate_webshop", score([attempt(0, 0, 0.5, env="webshop")]))
    (tmp_path / "round_0/evaluate_P1").mkdir()  # begun, not finished
    lines = table(tmp_path, "evaluate").splitlines()
    assert [line.split()[1] for line in lines[1:4]] == ["adapter", "0", "1"] and PEOPLE not in lines
    assert "33.3 (k=1)" in lines[2] and "66.7 (k=2)" in lines[3] and "Pick" in lines[0]
    shop = table(tmp_path, "evaluate_webshop").splitlines()
    assert shop[-1] == PEOPLE and "Pick" not in shop[0]
    assert read_scores(tmp_path, "evaluate_P1") == {}


def test_the_best_of_rounds_is_a_share_of_all_tasks_though_some_were_lost_to_faults():
    one_lost = score([attempt(0, 0, 1.0), attempt(1, 0, 0.0, end="env_error")])
    none_lost = score([attempt(0, 0, 1.0), attempt(1, 0, 1.0)])
    trials = score([attempt(k, t, 1.0, end="env_error" if t == k else "success") for k in (0, 1) for t in (0, 1)], 2)
    entries = [{"best_of": None} | entry for entry in (one_lost, none_lost, trials)]
    by_round = {str(k): {"panel": entry} for k, entry in enumerate(entries)}
    assert best_of_rounds(by_round, "panel") == {"0": (0.5, 1), "1": (1.0, 2), "2": (1.0, 3)}


def test_tasks_have_types_where_their_ids_do():
    def made(env: str, *ids: str) -> dict:
        return success_by_type([trajectory(env=env, task_id=task_id) for task_id in ids])

    assert made("keys.py:Keys", "test/red-01", "test/blue-1", "test/red-2") == {
        "blue": {"success": 1, "n": 1},
        "red": {"success": 2, "n": 2},
    }
    assert made("synthetic", "syn_valid/00001") == made("webshop", "gen_test/G08F413CCF-00000001") == {}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-5], "not valid JSON"),
        (lambda text: text.replace('"rate": 1.0', '"rate": "high"'), "Expected `float`, got `str`"),
        (lambda text: text.replace('"reward"', '"rewards"'), "missing required field `reward`"),
        (lambda text: text.replace('"rate": 1.0', '"rate": NaN'), "not valid JSON"),
    ],
)
def test_a_damaged_scores_file_is_named(tmp_path, damage, said):
    write_scores(tmp_path, "base", "evaluate", ONE)
    path = tmp_path / "base" / "evaluate" / "scores.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=f"{path}.*{said}"):
        read_scores(tmp_path, "evaluate")

"""The tables of artifacts/stats.py against counts by hand, on files with everything that files can have."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import pytest

from artifacts import stats
from artifacts.json_io import write_json
from artifacts.stats import count, pattern, report, spread
from artifacts.trajectory import read_trajectories, to_line, trajectory_files, write_file
from envs.panel import read_panel
from tests.support.helpers import trajectory, turn
from tests.support.rooms import TASK

LOST = {"success": False, "reward": 0.0, "progress": 0.5, "end": "stuck"}


def stage(run, name: str, *rows):
    (run / name).mkdir(parents=True)
    write_file(run / name / "trajectories.jsonl", rows)
    write_json(run / name / "done.json", {})


def taken(*actions: str, refused: str = "", **changes):
    """A trajectory of these actions, those in `refused` not accepted."""
    turns = [turn("", action, "Nothing happens.", valid=action not in refused.split("; ")) for action in actions]
    return trajectory(turns=turns, **changes)


def test_a_run_is_counted(tmp_path):
    other = TASK.replace("trial_1", "trial_2")
    stage(tmp_path, "round_0/rollout", taken("a", "b", ids=[1] * 7, sampled=[0] * 7), taken("a", "b", trial=1))
    stage(tmp_path, "round_0/actre")
    stage(
        tmp_path,
        "round_1/rollout",
        taken("a", "b", trial=2),
        taken("a", "go to desk 1", "go to bed 2", task_id=other, refused="go to desk 1; go to bed 2", **LOST),
        taken(task_id=other, trial=1, **(LOST | {"end": "env_error"})),
    )
    empty, first, second = count(tmp_path)
    assert [each.name for each in (empty, first, second)] == ["round_0/actre", "round_0/rollout", "round_1/rollout"]
    assert (first.whole.n, first.whole.won, first.repeats, first.whole.tokens) == (2, 2, 1, Counter({7: 1}))
    assert (empty.whole.n, empty.types) == (0, {})
    assert (second.whole.n, second.whole.won, second.repeats) == (3, 1, 1)  # of round 0
    assert second.whole.ends == {"success": 1, "stuck": 1, "env_error": 1} and second.whole.turns == {2: 1, 3: 1, 0: 1}
    assert second.whole.refused == {"go to _": 2} and second.whole.share_refused == 2 / 5
    assert {kind: (group.won, group.n) for kind, group in second.types.items()} == {"Pick": (1, 3)}
    text = report(count(tmp_path))
    assert "attempts lost" not in text and "go to _ 100.0" in text and "no training trajectory plays a task" in text


def test_lost_attempts_are_told_apart_by_type_and_faults_are_nobodys(tmp_path):
    heat = TASK.replace("pick_and_place_simple", "pick_heat_then_place_in_recep")
    stage(
        tmp_path,
        "round_0/evaluate",
        trajectory(),
        taken("open desk 1", "open desk 1", "look", trial=1, refused="open desk 1", **LOST),
        taken("open desk 1", "look", trial=2, refused="open desk 1", **(LOST | {"end": "max_turns", "progress": 0.0})),
        taken("look", task_id=heat, **LOST),
        taken("look", task_id=heat, trial=1, **(LOST | {"end": "llm_error"})),
    )
    [found] = count(tmp_path)
    pick, heats = found.lost["Pick"], found.lost["Heat"]
    assert (pick.n, pick.attempts_refused, pick.attempts_insisting, pick.progress) == (2, 2, 1, 0.5)
    assert pick.ends == {"stuck": 1, "max_turns": 1} and pick.share_refused == 3 / 5
    assert (heats.n, heats.attempts_refused, heats.ends) == (1, 0, {"stuck": 1})
    [head, all_types, heat_line, pick_line] = report([found]).split("\n\n")[-2].split("\n")
    assert head.startswith("attempts lost") and all_types.split()[:5] == ["round_0/evaluate", "all", "3", "4", "33.3"]
    assert heat_line.split()[:3] == ["Heat", "1", "1"] and pick_line.split()[:3] == ["Pick", "2", "3"]


def test_a_composition_repeats_the_rollout_that_it_came_after_not_the_other_way_round(tmp_path):
    for name in ("round_0/actre", "round_0/rollout", "round_1/rollout"):
        stage(tmp_path, name, trajectory())
    assert {found.name: found.repeats for found in count(tmp_path)} == {
        "round_0/actre": 1,
        "round_0/rollout": 0,
        "round_1/rollout": 1,
    }


def test_a_share_won_leaves_out_attempts_that_were_lost_to_faults(tmp_path):
    lost = trajectory(trial=1, success=False, end="env_error", reward=0.0)
    stage(tmp_path, "round_0/evaluate", trajectory(), lost)
    [found] = count(tmp_path)
    assert (found.whole.n, found.whole.scored) == (2, 1) and " 100.0 " in report([found])


def test_training_on_a_task_of_a_panel_or_of_an_evaluation_is_a_leak(tmp_path):
    valid = read_panel("gen_valid-100")[0]
    played = TASK.replace("trial_1", "trial_2")
    stage(
        tmp_path,
        "round_0/rollout",
        trajectory(task_id=valid),
        trajectory(task_id=played),
        trajectory(),  # words as in the evaluation, another task
        trajectory(task_id=read_panel("gen_train-120")[0], first_observation="A room."),
    )
    stage(tmp_path, "round_0/evaluate_x", trajectory(task_id=played))
    trained, _ = sorted(count(tmp_path), key=lambda found: found.name, reverse=True)
    assert trained.leaks == {"gen_valid-100": 1, "round_0/evaluate_x": 1} and trained.alike == {"round_0/evaluate_x": 1}
    text = report(count(tmp_path))
    assert "LEAK: 1 of 4 trajectories of round_0/rollout play tasks of gen_valid-100" in text
    assert "open like other tasks of round_0/evaluate_x" in text and "no training trajectory" not in text


def test_a_line_that_is_being_written_is_left_out_and_a_damaged_one_is_named(tmp_path, capsys):
    path = tmp_path / "rollout" / "trajectories.jsonl"
    path.parent.mkdir()
    row = to_line(trajectory())
    path.write_bytes(row + to_line(trajectory(trial=1))[:-9])
    stats.main(stats.Args(run=tmp_path))
    assert "rollout        1      1  100.0" in capsys.readouterr().out
    assert len(list(read_trajectories(path, partial=True))) == 1
    with pytest.raises(ValueError, match="trajectories.jsonl:2: the line is cut off"):
        list(read_trajectories(path))
    path.write_bytes(row[:-9] + b"\n" + row)
    with pytest.raises(ValueError, match="trajectories.jsonl:1: not a trajectory record"):
        stats.main(stats.Args(run=tmp_path))
    path.write_bytes(row + row)
    with pytest.raises(ValueError, match="trajectories.jsonl:2: a second row"):
        stats.main(stats.Args(run=tmp_path))


def test_strange_text_stays_on_its_line_of_the_table(tmp_path):
    strange = "go\u2028to\x85 \x1b[31mred\x00 \u202e" + "x" * 99
    stage(tmp_path, "rollout", taken(strange, "", "click[a \u2028 b]", refused=f"{strange}; ; click[a \u2028 b]"))
    text = report(count(tmp_path))
    assert "click[_]" in text and "(empty)" in text and "go to ?[31mred? ?" in text
    assert not set(text) & set("\u2028\x85\x1b\x00\u202e")


def test_a_lone_surrogate_is_no_text_in_a_file(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    path.write_bytes(to_line(trajectory(task="X")).replace(b'"X"', b'"\\ud83d"'))
    with pytest.raises(ValueError, match="trajectories.jsonl:1: not a trajectory record"):
        stats.main(stats.Args(run=tmp_path))


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("take mug 1 from shelf 22", "take _ from _"),
        ("click[Buy Now]", "click[_]"),
        ("  go  north ", "go north"),
        ("", ""),
        ("a" * 60, "a" * 37 + "..."),
    ],
)
def test_a_pattern_leaves_out_what_changes_from_task_to_task(action, expected):
    assert pattern(action) == expected


def test_the_spread_of_lengths_is_by_nearest_rank():
    assert spread(Counter(range(1, 101))).split() == ["1", "50", "95", "100"]
    assert spread(Counter([7])).split() == ["7", "7", "7", "7"] and spread(Counter()).split() == ["-"] * 4


def test_files_of_shards_count_until_they_are_joined(tmp_path):
    stage(tmp_path, "round_0/shards/evaluate_a.b.1-of-2", trajectory())
    stage(tmp_path, "round_10/rollout", trajectory())
    stage(tmp_path, "round_9/rollout", trajectory())
    names = [str(path.parent.relative_to(tmp_path)) for path in trajectory_files(tmp_path)]
    assert names == ["round_0/shards/evaluate_a.b.1-of-2", "round_9/rollout", "round_10/rollout"]
    stage(tmp_path, "round_0/evaluate_a.b", trajectory())
    assert len(trajectory_files(tmp_path)) == 3


def test_a_large_file_takes_little_memory(tmp_path):
    path = tmp_path / "rollout" / "trajectories.jsonl"
    path.parent.mkdir()
    with path.open("wb") as file:
        for trial in range(2000):
            file.write(to_line(trajectory(trial=trial, ids=[7] * 500, sampled=[0] * 500)))
    count(tmp_path)  # the panels are read
    tracemalloc.start()
    [found] = count(tmp_path)
    assert found.whole.n == 2000 and found.repeats == 1999
    assert tracemalloc.get_traced_memory()[1] < 3e6  # the file has 6 MB, its trajectories as objects about 20
    tracemalloc.stop()


def test_a_folder_without_trajectories_is_refused(tmp_path):
    for run, said in ((tmp_path / "no", "no such run"), (tmp_path, "holds no trajectories.jsonl")):
        with pytest.raises(ValueError, match=said):
            stats.main(stats.Args(run=run))

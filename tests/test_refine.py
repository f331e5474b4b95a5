"""Synthesis: only what the verifier accepts is kept, nothing is lost, and what a language model gets wrong is asked
again, from where it was right, a few times at most."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import refine
from agent.server import Server
from artifacts.json_io import read_json
from artifacts.trajectory import read_trajectories
from tests.support.planted_refine import CLEAN
from tests.test_server import completion, server  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent


def test_the_stage_keeps_what_the_verifier_accepts_and_goes_on_where_it_was_killed(tmp_path, capsys):
    refine.main(refine.Args(run=tmp_path / "whole", count=25))
    assert "25 of" in capsys.readouterr().out
    path = tmp_path / "whole/refine/trajectories.jsonl"
    rows = list(read_trajectories(path))
    assert len(rows) == 25 and all(sum(bool(turn.errors) for turn in row.turns) >= 2 for row in rows)
    assert read_json(tmp_path / "whole/refine/done.json")["mistakes"].keys() == {"parameter", "place", "logic"}
    killed = tmp_path / "killed"
    refine.main(refine.Args(run=killed, count=25))
    (killed / "refine/done.json").unlink()
    lines = (killed / "refine/trajectories.jsonl").read_bytes().splitlines(keepends=True)
    (killed / "refine/trajectories.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:50])
    refine.main(refine.Args(run=killed, count=25))
    assert (killed / "refine/trajectories.jsonl").read_bytes() == path.read_bytes()
    refine.main(refine.Args(run=killed, count=25))
    assert "finished already" in capsys.readouterr().out


def test_other_seeds_teach_other_worlds(tmp_path):
    for seed in (0, 1):
        refine.main(refine.Args(run=tmp_path / str(seed), count=8, seed=seed))
    one, other = (
        {row.task_id for row in read_trajectories(tmp_path / f"{seed}/refine/trajectories.jsonl")} for seed in (0, 1)
    )
    assert len(one) == len(other) == 8 and not one & other


# ---- a language model ------------------------------------------------------------------------------------------------


SCRIPT, TURNS = CLEAN["shell"]()


def said(turns) -> bytes:
    return completion("\n".join(map(json.dumps, turns)))


def ask(server, tmp_path, answers, **changes) -> dict:  # noqa: F811
    """One persona; returns done.json."""
    server.answers[:] = answers
    (tmp_path / "personas.txt").write_text("A cook.\n")
    refine.main(
        refine.Args(
            **{
                "run": tmp_path,
                "count": 1,
                "personas": tmp_path / "personas.txt",
                "server": Server(url=server.url, model="m", retries=0),
            }
            | changes
        )
    )
    return read_json(tmp_path / "refine/done.json")


def test_a_script_and_its_turns_become_a_trajectory(server, tmp_path):  # noqa: F811
    done = ask(server, tmp_path, [completion(f"Here it is:\n```json\n{json.dumps(SCRIPT)}\n```"), said(TURNS)])
    [row] = read_trajectories(tmp_path / "refine/trajectories.jsonl")
    assert done["acceptance"] == 1 and [bool(turn.errors) for turn in row.turns] == [True, False, True, False]
    assert "A cook." in str(server.requests[0]) and SCRIPT["Goal"] in str(server.requests[1])
    assert len(server.requests) == 2


without_goal = {key: value for key, value in SCRIPT.items() if key != "Goal"}


def with_world(text: str) -> bytes:
    """The script with `text` in place of its environment's value."""
    return completion(json.dumps(SCRIPT | {"Environment": {"home": "HERE"}}).replace('"HERE"', text))


@pytest.mark.parametrize(
    "first",
    [
        completion("I would rather not."),
        completion(json.dumps(SCRIPT)[:200]),
        completion(json.dumps(without_goal)),
        completion("[" * 50_000),
        completion(""),
        with_world("1" * 5000),
        with_world("NaN"),
        with_world(r'"\ud83d"'),
        with_world("[" * 10_000 + "]" * 10_000),
        with_world("[" * 300 + "]" * 300),
    ],
    ids=[
        "no JSON",
        "cut",
        "a key is missing",
        "nested",
        "empty",
        "5,000 digits",
        "NaN",
        "half an emoji",
        "10,000 levels",
        "300 levels",
    ],
)
def test_a_bad_script_is_asked_for_again(server, tmp_path, first):  # noqa: F811
    assert ask(server, tmp_path, [first, completion(json.dumps(SCRIPT)), said(TURNS)])["acceptance"] == 1
    assert len(server.requests) == 3 and "Available Actions" in str(server.requests[1])


wrong_key = [*TURNS[:4], {**TURNS[4], "parameter_error": "no"}, *TURNS[5:]]
unflagged = [*TURNS[:4], TURNS[4], {**TURNS[5], "Action": "fly"}, {**TURNS[4], "turn": 6}, *TURNS[7:]]
CUT = "\n".join(map(json.dumps, TURNS[:5])) + "\n" + json.dumps(TURNS[5])[:30]


@pytest.mark.parametrize(
    "first",
    [
        completion(CUT),
        said(wrong_key),
        said(TURNS[:5] + TURNS[6:]),
        said(unflagged),
        completion(CUT.replace('"turn": 5', f'"turn": {"5" * 5000}') + '", "Action": "look"}'),
        completion(CUT + r'\ud83d", "Action": "look"}'),
    ],
    ids=["cut in the middle", "a bad flag", "the order", "an unflagged action", "5,000 digits", "half an emoji"],
)
def test_what_was_right_is_kept_and_gone_on_from(server, tmp_path, first):  # noqa: F811
    kept = len(TURNS[:3]) if first == said(wrong_key) else 5
    ask(server, tmp_path, [completion(json.dumps(SCRIPT)), first, said(TURNS[kept:])])
    [row] = read_trajectories(tmp_path / "refine/trajectories.jsonl")
    assert [turn.action for turn in row.turns] == [turn["Action"] for turn in TURNS[1::2]]
    asked = str(server.requests[2])
    assert TURNS[kept - 1]["Observation"] in asked and TURNS[kept]["Thought"] not in asked


def test_a_script_that_names_a_part_of_the_prompt_stays_as_it_is(server, tmp_path):  # noqa: F811
    wait = {"wait {turns}": {"verification code": "wait (.*)", "parameters": {"turns": ["1", "2"]}}}
    script = SCRIPT | {"Available Actions": SCRIPT["Available Actions"] | wait}
    ask(server, tmp_path, [completion(json.dumps(script)), said(TURNS[:5]), said(TURNS[5:])])
    for request in server.requests[1:]:
        [message] = request["messages"]
        assert message["content"].count("wait {turns}") == 1
    assert message["content"].count(TURNS[1]["Thought"]) == 1


def test_the_calls_are_capped_and_a_rejected_persona_is_counted(server, tmp_path):  # noqa: F811
    done = ask(server, tmp_path, [completion(json.dumps(SCRIPT)), *map(said, (TURNS[:3], TURNS[3:5], TURNS[5:7]))])
    assert len(server.requests) == 4 and done["verdicts"] == {"refinements": 1} and done["trajectories"] == 0


def test_a_killed_run_asks_nothing_twice(server, tmp_path):  # noqa: F811
    """Killed while the turns of later personas are still to come, and run again."""

    def answer(body):
        text = str(body)
        return completion(json.dumps(SCRIPT)) if "You design small text games" in text else said(TURNS)

    slow = [answer] * 7 + ["hang", answer]
    server.answers[:] = slow
    words = [
        sys.executable,
        "refine.py",
        "--run",
        str(tmp_path),
        "--count",
        "6",
        "--server.url",
        server.url,
        "--server.model",
        "m",
        "--server.concurrency",
        "1",
    ]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while len(server.requests) < 8:
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    there = len(list(read_trajectories(tmp_path / "refine/trajectories.jsonl")))
    assert there == 3
    server.answers[:] = [answer]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    rows = [row.key for row in read_trajectories(tmp_path / "refine/trajectories.jsonl")]
    assert len(rows) == len(set(rows)) == 6
    bodies = [json.dumps(body, sort_keys=True) for body in server.requests]
    assert len(bodies) == 13 and len(set(bodies)) == 12  # the one that hung was never answered


def test_the_verifier_alone_prints_a_verdict_a_line_that_says_which_key(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    wrong = json.dumps({"script": without_goal, "turns": TURNS})
    number = f'{{"script": {"1" * 5000}, "turns": []}}'
    path.write_text(json.dumps({"script": SCRIPT, "turns": TURNS}) + f"\n{wrong}\n{number}\n{{}}\n")
    refine.main(refine.Args(verify=path))
    verdicts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert verdicts[0] == {"ok": True, "rule": None, "turn": None, "why": None}
    assert verdicts[1] == {"ok": False, "rule": "keys", "turn": None, "why": "the script: missing `Goal`"}
    assert [verdict["rule"] for verdict in verdicts[2:]] == ["json", "keys"]
    assert "out of range" in verdicts[2]["why"] and "`script` and `turns`" in verdicts[3]["why"]

"""The verifier: planted faults are found for what they are, clean pairs pass, and no JSON whatever raises."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrefine.verify import main_over, to_trajectory, verified_prefix, verify, verify_line
from artifacts.trajectory import parse_line, to_line
from tests.support.planted_refine import ACTIONS, CLEAN, CODE, dm, planted, player

CORPUS = list(planted())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def mixed(draw):
    """A clean pair in which one value, anywhere in it, is replaced by any JSON."""
    script, turns = draw(st.sampled_from(sorted(CLEAN)).map(lambda name: CLEAN[name]()))
    pair = {"script": script, "turns": turns}
    node, key = pair, draw(st.sampled_from(["script", "turns"]))
    while node[key] and isinstance(node[key], dict | list) and draw(st.integers(0, 5)):
        node = node[key]
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    node[key] = draw(JSON)
    return pair["script"], pair["turns"]


@pytest.mark.parametrize("fault", CORPUS, ids=lambda fault: fault.name)
def test_planted_faults_are_named(fault):
    assert verify(fault.script, fault.turns) == (False, fault.rule, fault.turn)
    prefix = verified_prefix(fault.script, fault.turns)
    if fault.turn is None:
        assert prefix == 0
    elif fault.rule in ("keys", "order", "unflagged"):
        assert prefix <= fault.turn and (prefix == 0 or prefix >= fault.turn - 1)
    if prefix:
        assert fault.turns[prefix - 1]["role"] == "DM"


def test_the_corpus_is_large_and_has_every_rule():
    assert len(CORPUS) >= 60 and len({fault.name for fault in CORPUS}) == len(CORPUS)
    assert {fault.rule for fault in CORPUS} == {
        "keys",
        "order",
        "regex_invalid",
        "regex_self",
        "unflagged",
        "refinements",
        "incomplete",
    }


@pytest.mark.parametrize("name", CLEAN)
def test_clean_pairs_pass(name):
    script, turns = CLEAN[name]()
    assert verify(script, turns) == (True, None, None)
    assert verified_prefix(script, turns) == len(turns)


def test_what_a_regeneration_continues_from():
    script, turns = CLEAN["shell"]()
    assert verified_prefix(script, turns[:7]) == 7  # not completed: refinements may still come
    assert verified_prefix(script, turns[:8]) == 7  # a Player's turn without answer
    kitchen, cooking = CLEAN["kitchen"]()
    assert verified_prefix(kitchen, cooking[:11]) == 11
    turns[6]["logic_error"] = False
    assert verify(script, turns).rule == "refinements" and verified_prefix(script, turns) == 0  # over, too few
    turns[3]["Action"] = "cd music"
    assert verified_prefix(script, turns) == 3
    del turns[4]["Thought"]
    assert verified_prefix(script, turns) == 3


def test_the_first_fault_in_order_of_turns_is_named():
    script, turns = CLEAN["clinic"]()
    turns[9]["Action"], turns[12]["Observation"] = "knock", "Zoë leaves."
    del turns[10]["Thought"]
    assert verify(script, turns) == (False, "keys", 10)  # without a readable answer nobody knows if 9 was flagged
    turns[3]["role"] = "DM"
    assert verify(script, turns) == (False, "keys", 3)
    script[ACTIONS]["unlock store"][CODE] = "("
    assert verify(script, turns) == (False, "regex_invalid", None)


def test_two_mistakes_in_a_row_are_two_refinements():
    script, turns = CLEAN["shell"]()
    turns[2:3] = [dm(2, "No.", "parameter"), player(3, "Again.", "dir"), dm(4, "No.", "parameter")]
    turns[8]["logic_error"] = False
    assert verify(script, turns).ok


@settings(max_examples=200, deadline=None)
@given(JSON, JSON)
def test_any_json_is_judged(script, turns):
    assert not verify(script, turns).ok
    assert verified_prefix(script, turns) == 0


@settings(max_examples=300, deadline=None)
@given(mixed())
def test_a_pair_with_any_json_in_it_is_judged(pair):
    script, turns = pair
    verdict = verify(script, turns)
    assert verdict.ok == (verdict.rule is None)
    prefix = verified_prefix(script, turns)
    assert prefix == 0 or turns[prefix - 1]["role"] == "DM"
    line = json.dumps({"script": script, "turns": turns})
    assert verify_line(line) == verdict or verify_line(line).rule == "json"  # a part may be a string that is no JSON


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_clean_pair_stays_clean_under_changes_that_do_not_matter(data):
    script, turns = CLEAN[data.draw(st.sampled_from(sorted(CLEAN)))]()
    script["Environment"] = data.draw(st.dictionaries(st.text(), JSON, max_size=3))
    script["Goal"], script["Tone"] = data.draw(st.text()), data.draw(JSON)
    script["Completion Conditions"] = data.draw(st.lists(JSON, max_size=3))
    script[ACTIONS] = dict(data.draw(st.permutations(list(script[ACTIONS].items()))))
    for spec in script[ACTIONS].values():
        spec["description"] = data.draw(JSON)
    for turn in turns:
        turn["turn"], turn["Thought"] = data.draw(st.integers()), data.draw(st.text())
        if turn["role"] == "DM":
            turn["Observation"] = data.draw(st.text()) + turn["Observation"]
    assert verify(script, turns).ok
    row = to_trajectory(script, turns, split="made", task_id="p-0", seed=0)
    assert parse_line(to_line(row), "line") == row


def test_lines_of_a_file(tmp_path, capsys):
    script, turns = CLEAN["shell"]()
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"script": script, "turns": turns},
        {"script": json.dumps(script), "turns": json.dumps(turns)},
        {"script": script, "turns": json.dumps(turns)[:-20]},
        {"script": "Here is the script:", "turns": turns},
        {"script": script},
        [script, turns],
    ]
    bad = [b"", b"no json", b'{"script": ', b"\xff", b"[" * 100_000, b'{"script": NaN, "turns": []}']
    path.write_bytes(b"\n".join([json.dumps(line).encode() for line in lines] + bad))
    main_over(path)
    verdicts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(list(verdict) == ["ok", "rule", "turn"] for verdict in verdicts)
    assert [verdict["ok"] for verdict in verdicts] == [True] * 2 + [False] * 10
    assert [verdict["rule"] for verdict in verdicts[2:]] == ["json", "json", "keys", "keys"] + ["json"] * 6
    assert {verdict["turn"] for verdict in verdicts} == {None}


def test_the_record_of_a_pair():
    script, turns = CLEAN["kitchen"]()
    row = to_trajectory(script, turns, split="made", task_id="cook-1", seed=3)
    assert (row.source, row.env, row.success, row.end, row.seed) == ("refine", "refine", True, "success", 3)
    assert [turn.errors for turn in row.turns] == [[], ["parameter"], [], ["place"], [], []]
    assert [turn.valid for turn in row.turns] == [True, False, True, False, True, True]
    assert row.turns[1].action == "chop onion with knife" and row.turns[1].observation.startswith("There is no")
    for part in ("red onion", row.task, "walk to {place}, chop {food} with {tool}", "You stand at the kitchen door."):
        assert part in row.first_observation
    turns[6]["Thought"] = None
    with pytest.raises(ValueError, match="cook-1: not a verified trajectory: rule keys, turn 6"):
        to_trajectory(script, turns, split="made", task_id="cook-1", seed=3)

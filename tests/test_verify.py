"""The verifier: planted faults are found for what they are and named, clean pairs pass, and no JSON whatever raises or
takes long."""

from __future__ import annotations

import functools
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrefine import codes
from agentrefine.verify import LONGEST, main_over, to_trajectory, verified_prefix, verify, verify_line
from artifacts.trajectory import parse_line, to_line
from tests.support.planted_refine import ACTIONS, CD, CLEAN, CODE, action, dm, planted, player, put, without

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
    verdict = verify(fault.script, fault.turns)
    assert verdict[:3] == (False, fault.rule, fault.turn) and verdict.why
    prefix = verified_prefix(verdict, fault.turns)
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
    assert verify(script, turns) == (True, None, None, None)
    assert kept(script, turns) == len(turns)


def kept(script, turns) -> int:
    return verified_prefix(verify(script, turns), turns)


def test_what_a_regeneration_continues_from():
    script, turns = CLEAN["shell"]()
    assert kept(script, turns[:7]) == 7  # not completed: refinements may still come
    assert kept(script, turns[:8]) == 7  # a Player's turn without answer
    kitchen, cooking = CLEAN["kitchen"]()
    assert kept(kitchen, cooking[:11]) == 11
    turns[6]["logic_error"] = False
    assert verify(script, turns).rule == "refinements" and kept(script, turns) == 0  # over, too few
    turns[3]["Action"] = "cd music"
    assert kept(script, turns) == 3
    del turns[4]["Thought"]
    assert kept(script, turns) == 3


def test_the_first_fault_in_order_of_turns_is_named():
    script, turns = CLEAN["clinic"]()
    turns[9]["Action"], turns[12]["Observation"] = "knock", "Zoë leaves."
    del turns[10]["Thought"]
    assert verify(script, turns)[:3] == (False, "keys", 10)  # without a readable answer nobody knows if 9 was flagged
    turns[3]["role"] = "DM"
    assert verify(script, turns)[:3] == (False, "keys", 3)
    script[ACTIONS]["unlock store"][CODE] = "("
    assert verify(script, turns)[:3] == (False, "regex_invalid", None)


def test_two_mistakes_in_a_row_are_two_refinements():
    script, turns = CLEAN["shell"]()
    turns[2:3] = [dm(2, "No.", "parameter"), player(3, "Again.", "dir"), dm(4, "No.", "parameter")]
    turns[8]["logic_error"] = False
    assert verify(script, turns).ok


@settings(max_examples=200, deadline=None)
@given(JSON, JSON)
def test_any_json_is_judged(script, turns):
    assert not verify(script, turns).ok and kept(script, turns) == 0


@settings(max_examples=300, deadline=None)
@given(mixed())
def test_a_pair_with_any_json_in_it_is_judged(pair):
    script, turns = pair
    verdict = verify(script, turns)
    assert verdict.ok == (verdict.rule is None)
    prefix = verified_prefix(verdict, turns)
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
    assert all(list(verdict) == ["ok", "rule", "turn", "why"] for verdict in verdicts)
    assert [verdict["ok"] for verdict in verdicts] == [True] * 2 + [False] * 10
    assert [verdict["rule"] for verdict in verdicts[2:]] == ["json", "json", "keys", "keys"] + ["json"] * 6
    assert {verdict["turn"] for verdict in verdicts} == {None}
    assert [bool(verdict["why"]) for verdict in verdicts] == [False] * 2 + [True] * 10
    assert verdicts[2]["why"].startswith("`turns` is not valid JSON") and "keys `script`" in verdicts[4]["why"]


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
    with pytest.raises(ValueError, match="Expected `str`, got `null`"):
        to_trajectory(script, turns, split="made", task_id="cook-1", seed=3)


# ---- which key -------------------------------------------------------------------------------------------------------

WHY = [
    (put("script", []), "the script: expected `object`, got `array`"),
    (without("script", "Goal"), "the script: missing `Goal`"),
    (put("script", "Goal", 3), "the script.Goal: expected `str`, got `int`"),
    (without(*CD, "parameters"), "Available Actions.cd {path}: missing `parameters`"),
    (put(*CD, CODE, None), "Available Actions.cd {path}.verification code: expected `str`, got `null`"),
    (put(*CD, "parameters", "path", [{}]), "Available Actions.cd {path}.parameters.path[0]: expected `"),
    (
        put(*CD, "parameters", {"paths": []}),
        "Available Actions.cd {path}.parameters: missing `path`, a placeholder of the action",
    ),
    (put(*CD, CODE, "^cd (.*$"), "Available Actions.cd {path}: not a regular expression: missing )"),
    (put(*CD, CODE, "^cd .*$"), "Available Actions.cd {path}: no group of the code captures {path}"),
    (put(*CD, CODE, "^ls$"), "Available Actions.cd {path}: the code does not match the action's own name"),
    (put("turns", {}), "the turns: expected a list, got dict"),
    (without("turns", 3, "Action"), "turn 3: missing `Action`"),
    (put("turns", 4, "logic_error", "no"), "turn 4.logic_error: expected `bool`, got `str`"),
    (put("turns", 7, "Mood", "good"), "turn 7: has an unknown field `Mood`"),
    (put("turns", 2, "role", "Hero"), "turn 2.role: invalid value 'Hero'"),
    (without("turns", 4), "turn 4 is a Player's; DM first, then Player and DM in turn"),
    (without("turns", 8), "8 turns; expected a DM's turn as the last"),
    (put("turns", 3, "Action", "cd music"), "turn 4 sets no flag, though no code matches 'cd music'"),
    (lambda pair: pair.update(turns=pair["turns"][:3]), "0 of at least 2 mistakes are followed by another attempt"),
    (put("turns", 8, "Observation", "Done."), "the last observation does not say 'Task completed'"),
]


@pytest.mark.parametrize("change, why", WHY, ids=[why[:60] for _, why in WHY])
def test_the_verdict_says_which_key_and_what_was_expected(change, why):
    script, turns = CLEAN["shell"]()
    pair = {"script": script, "turns": turns}
    change(pair)
    assert why in verify(pair["script"], pair["turns"]).why


def test_what_is_quoted_in_a_verdict_is_cut():
    script, turns = CLEAN["shell"]()
    turns[3]["Action"] = "go " * 100_000
    assert len(verify(script, turns).why) <= LONGEST + 3


# ---- what codes mean and cost ----------------------------------------------------------------------------------------


def judged(actions: dict, passed: str = "cd documents"):
    """The verdict on the shell with further actions, and with `passed` as an action that the DM lets pass."""
    script, turns = CLEAN["shell"]()
    script[ACTIONS] |= actions
    turns[3]["Action"] = passed
    return verify(script, turns)


@pytest.mark.parametrize(
    "name, code, passed",
    [
        ("look", "(?:look){e}", "destroy everything"),
        ("call {name}", "call ([[:alpha:]{}]+)", "call Zoe"),
        ("dance", r"dance|(?:tap){i<=9}", "tap tap tap"),
    ],
    ids=["fuzzy", "POSIX classes", "insertions"],
)
def test_a_code_means_what_it_means_to_re(name, code, passed):
    assert not judged({name: action(code, name=["Zoe"])}, passed).ok


def test_wide_repeats_side_by_side_are_no_nested_ones():
    mix = {"mix {a} {b} {c} {d}": action(" ".join(["mix", *["(.{1,99})"] * 4]), a=["x"], b=["y"], c=["z"], d=["w"])}
    assert judged(mix, "mix x y z w").ok and judged(mix, "mix x y z v").rule == "unflagged"


def test_one_limit_of_time_holds_for_all_codes_of_a_script_together():
    slow = {f"{i:03d} {'a' * 28}!": action(r"\d+ (?:a|aa)+b|\d+ a+!") for i in range(600)}
    verdict = judged(slow)
    assert verdict.rule == "regex_invalid" and "takes more than 2 s of CPU time" in verdict.why
    assert judged({}).ok  # the next script is judged as if nothing had happened


def test_one_limit_of_memory_holds_too():
    verdict = judged({"spell": action("(?:(a)|b)*|spell")}, "ab" * 4_000_000)
    assert verdict.rule == "regex_invalid" and "spell: takes more than" in verdict.why
    assert judged({}).ok


HOSTILE = {
    "10,000 levels": functools.reduce(lambda inner, _: [inner], range(10_000), []),
    "an integer of 6,000 digits": 10**6000,
    "a lone surrogate": "\ud83d",
    "not a number": float("nan"),
    "a code with a number of 5,000 digits": f"cd (.*)|a{{{'1' * 5000}}}",
    "a code with a group of 5,000 digits": f"cd (.*)|(a)(?({'1' * 5000})b)",
}
PLACES = [
    ("script",),
    ("turns",),
    ("script", "Goal"),
    ("script", "Environment"),
    ("script", "Environment", "home"),
    ("script", ACTIONS),
    (*CD, CODE),
    (*CD, "parameters", "path"),
    (*CD, "parameters", "path", 0),
    ("turns", 3),
    ("turns", 3, "turn"),
    ("turns", 3, "Action"),
    ("turns", 4, "logic_error"),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_get_a_verdict_wherever_they_are(name):
    for place in PLACES:
        script, turns = CLEAN["shell"]()
        pair = {"script": script, "turns": turns}
        put(*place, HOSTILE[name])(pair)
        verdict = verify(pair["script"], pair["turns"])
        assert verdict.ok == (verdict.why is None)
        json.dumps(verdict)


def test_a_script_that_no_writer_of_json_could_write_is_refused():
    script, turns = CLEAN["shell"]()
    for _ in range(200):
        script["Environment"] = {"in": script["Environment"]}
    assert "nested deeper than 100 levels" in verify(script, turns).why


def test_a_process_that_ended_between_two_scripts_is_replaced(monkeypatch):
    assert judged({}).ok
    codes._idle[-1].kill()
    codes._idle[-1].wait()
    assert judged({}).ok
    monkeypatch.setattr(codes, "_idle", [])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="cannot run verification codes"):  # no verdict on the script
        judged({})

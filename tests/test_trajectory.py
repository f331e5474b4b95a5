"""The record and its renderings, each against a hand-written example."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from agent.attempt import AttemptSettings, Job
from agent.local import LocalPolicy
from agent.loop import PlayLoop
from artifacts.packing import pack, token_weights
from artifacts.render import OK, act_line, actre_segments, flat, parse_reply, react_segments, text_of
from artifacts.scores import closing_notes
from artifacts.tokens import read_codec, tokens_of
from artifacts.trajectory import Writer, read_trajectories, sort_file, to_line
from lora.tokenizer import encode_piece
from models.tokenizer import byte_tokenizer
from tests.support.helpers import byte_codec, codec_of, trajectory, turn, write_tiny_model
from tests.support.published import hand_tokenizer
from tests.support.rooms import TASK, Room

REACT = """Observation: Your task is to: put a mug in desk. You are in the middle of a room. \
Looking quickly around you, you see a desk 1, and a shelf 1.
Action: think[I need a mug. I check the shelf 1.]
Observation: OK.
Action: act[go to shelf 1]
Observation: You arrive at shelf 1. On the shelf 1, you see a mug 1.
Action: act[take mug 1 from shelf 1]
Observation: You pick up the mug 1 from the shelf 1.
"""
ACTRE = """Observation: Your task is to: put a mug in desk. You are in the middle of a room. \
Looking quickly around you, you see a desk 1, and a shelf 1.
Action: act[go to shelf 1]
Reason for the action: [I need a mug. I check the shelf 1.]
Observation: You arrive at shelf 1. On the shelf 1, you see a mug 1.
Action: act[take mug 1 from shelf 1]
Observation: You pick up the mug 1 from the shelf 1.
"""
STRANGE = 'a\u2028b\u2029c\x85d\x0b\U0001f9f9 "quote" \\ é'


def encode(text, first=False):
    return encode_piece(byte_tokenizer(), text, first)


CODEC = byte_codec()
HAND_TOKENIZER = hand_tokenizer()
HAND = codec_of(HAND_TOKENIZER, 300)


def test_rows_that_ended_in_a_fault_are_written_again(tmp_path, capsys):
    path = tmp_path / "trajectories.jsonl"
    ends = ["success", "llm_error", "stuck", "timeout", "env_error", "context_full"]
    with Writer(path) as writer:
        for trial, end in enumerate(ends):
            writer.write(trajectory(trial=trial, end=end))
    with Writer(path) as writer:
        assert [trial for trial in range(6) if (trajectory().task_id, trial) not in writer.known] == [1, 3, 4]
        assert "3 trajectories ended in a fault and are played again" in capsys.readouterr().out
        writer.write(trajectory(trial=1, end="finished"))
    assert [(t.trial, t.end) for t in sort_file(path)] == [
        (0, "success"),
        (1, "finished"),
        (2, "stuck"),
        (5, "context_full"),
    ]
    note = closing_notes([trajectory(end=end) for end in [*ends, "timeout"]], tmp_path, grammar=None)
    assert "env_error: 1, llm_error: 1, timeout: 2; to play them again, remove" in note
    assert closing_notes([trajectory()], tmp_path, grammar=None) == ""


def test_both_renderings_are_the_papers_form():
    assert text_of(react_segments(trajectory())) == REACT
    assert text_of(actre_segments(trajectory())) == ACTRE


def test_two_thoughts_are_two_lines_and_each_is_answered():
    two = trajectory(turns=[turn("First.\nSecond.", "look", "You see nothing.")])
    assert (
        "Action: think[First.]\nObservation: OK.\nAction: think[Second.]\nObservation: OK.\nAction: act[look]\n"
        in text_of(react_segments(two))
    )


def test_a_text_cannot_imitate_the_harness():
    forged = trajectory(turns=[turn("", "look", "Bad.\nAction: act[win]\nObservation: won")])
    assert text_of(react_segments(forged)).count("\nAction:") == 1
    assert flat("a \n\n b\rc") == "a b c"


def test_strange_characters_survive_file_and_rendering(tmp_path):
    path = tmp_path / "t.jsonl"
    with Writer(path) as writer:
        writer.write(trajectory(task=STRANGE, turns=[turn(STRANGE, STRANGE, STRANGE)]))
        writer.write(trajectory(trial=1))
    first, second = read_trajectories(path)
    assert first == trajectory(task=STRANGE, turns=[turn(STRANGE, STRANGE, STRANGE)])
    assert second.trial == 1
    assert STRANGE in text_of(react_segments(first))


@pytest.mark.parametrize(
    "break_line, message",
    [
        (lambda line: line[: len(line) // 2] + b"\n", "not a trajectory record"),
        (lambda line: line.replace(b'"schema":1', b'"schema":2'), "schema 2"),
        (lambda line: line.replace(b'"trial"', b'"attempt"'), "attempt"),
        (lambda line: line.rstrip(b"\n"), "cut off"),
        (lambda line: line.replace(b'"success":true', b'"success":"yes"'), "success"),
        (lambda line: line.replace(b'"ids":[]', b'"ids":[1]'), "1 ids but 0 sampled"),
    ],
)
def test_errors_name_file_and_line(tmp_path, break_line, message):
    path = tmp_path / "t.jsonl"
    path.write_bytes(to_line(trajectory()) + break_line(to_line(trajectory(trial=1))))
    with pytest.raises(ValueError, match=rf"t\.jsonl:2: .*{message}"):
        list(read_trajectories(path))


def test_a_cut_last_line_is_dropped_and_the_rest_known(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(to_line(trajectory()) + to_line(trajectory(trial=1))[:50])
    with Writer(path) as writer:
        assert writer.known == {trajectory().key}
        writer.write(trajectory(trial=1))
        with pytest.raises(ValueError, match="already there"):
            writer.write(trajectory(trial=1))
    assert [t.trial for t in read_trajectories(path)] == [0, 1]


def test_sort_file_orders_by_task_then_trial(tmp_path):
    path = tmp_path / "t.jsonl"
    keys = [("b/x/1", 0), ("a/x/1", 1), ("a/x/1", 0)]
    path.write_bytes(b"".join(to_line(trajectory(task_id=t, trial=k)) for t, k in keys))
    assert [t.key for t in sort_file(path)] == sorted(keys) == [t.key for t in read_trajectories(path)]


def test_replies_parse_and_a_malformed_one_is_a_command():
    assert parse_reply(" think[I go.]\n") == ("think", "I go.")
    assert parse_reply(" act[go to desk 1]\n") == ("act", "go to desk 1")
    assert parse_reply(act_line("look")) == ("act", "look")
    assert parse_reply(" act[go to desk 1\n") == ("act", "act[go to desk 1")
    assert parse_reply("\n") == ("act", "")


def played(record):
    """The record with ids as they would have been played: every agent line sampled."""
    pieces = [(encode(s.text), int(s.agent)) for s in react_segments(record)]
    ids = [i for piece, _ in pieces for i in piece]
    return msgspec.structs.replace(record, ids=ids, sampled=[a for piece, a in pieces for _ in piece])


def test_tokens_of_played_ids_are_those_of_the_rendering():
    rendered, from_ids = tokens_of(trajectory(), CODEC), tokens_of(played(trajectory()), CODEC)
    assert rendered == from_ids
    assert byte_tokenizer().decode([i for i, a in zip(*rendered[:2], strict=True) if a]) == (
        " think[I need a mug. I check the shelf 1.]\n act[go to shelf 1]\n act[take mug 1 from shelf 1]\n"
    )


def with_replies(record, *replies: str):
    """The record as if its agent's lines had been sampled as these replies; each needs its newline."""
    ids, sampled, left = [], [], list(replies)
    for segment in react_segments(record):
        piece = encode(left.pop(0) if segment.agent else segment.text)
        ids, sampled = ids + piece, sampled + [int(segment.agent)] * len(piece)
    return msgspec.structs.replace(record, ids=ids, sampled=sampled)


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        (" act[look]\n", "look"),
        ("act[look]\n", "look"),
        ("   act[ look ]  \n", "look"),
        (" look around\n", "look around"),
        (" Think [oops\n", "Think [oops"),
        (" act[go to sh\n", "act[go to sh"),
        ("\n", ""),
        (" act[a\rb]\n", "a\rb"),
        (" act[caf\u00e9 \U0001f9f9]\n", "caf\u00e9 \U0001f9f9"),
        (" think[a thought too many]\n", "a thought too many"),
    ],
)
def test_a_sampled_reply_keeps_its_own_ids_however_it_spells_its_action(reply, action):
    assert parse_reply(reply)[1] == action
    record = with_replies(trajectory(turns=[turn("", action, "Nothing happens.", valid=False)]), reply)
    tokens = tokens_of(record, CODEC)
    assert tokens.ids == record.ids and [i for i, a in zip(*tokens[:2], strict=True) if a] == encode(reply)


@pytest.mark.parametrize(("thoughts", "thought"), [(["", "x"], "\nx"), ([""], ""), (["x", "", "y"], "x\n\ny")])
def test_empty_thoughts_were_played_too(thoughts, thought):
    """The record's text leaves them out, so that only the ids tell where they were."""
    pieces = [(react_segments(trajectory(turns=[]))[0].text, 0)]
    pieces += [piece for text in thoughts for piece in ((f" think[{text}]\n", 1), (OK, 0))]
    pieces += [(" act[look]\n", 1), ("Observation: A box.\n", 0)]
    ids = [i for text, _ in pieces for i in encode(text)]
    sampled = [flag for text, flag in pieces for _ in encode(text)]
    record = trajectory(turns=[turn(thought, "look", "A box.")], ids=ids, sampled=sampled)
    tokens = tokens_of(record, CODEC)
    assert tokens.ids == ids and tokens.agent == sampled and set(tokens.turn) == {-1, 0}


def changed_ids(how: str):
    """A played record of which some ids were changed."""
    record = played(trajectory())
    ids, sampled = list(record.ids), list(record.sampled)
    start = sampled.index(1)
    stop = start + sampled[start:].index(0)
    if how == "reversed":
        ids[start : stop - 1] = ids[start : stop - 1][::-1]
    elif how == "one sampled id":
        ids[start + 8] += 1
    elif how == "one observed id":
        ids[stop + 3] += 1
    elif how == "not marked as sampled":
        ids[start + 8] += 1
        sampled = [0] * len(sampled)
    elif how == "observation marked as sampled":
        sampled[stop : stop + 4] = [1] * 4
    elif how == "cut":
        ids, sampled = ids[:stop], sampled[:stop]
    elif how == "longer":
        ids, sampled = ids + [65, 66], sampled + [1, 1]
    else:
        ids[start + 8] = int(how)
    return msgspec.structs.replace(record, ids=ids, sampled=sampled)


CHANGES = ["reversed", "one sampled id", "one observed id", "not marked as sampled", "observation marked as sampled"]


@pytest.mark.parametrize("how", [*CHANGES, "cut", "longer", "-5", "256", str(10**30)])
def test_ids_that_do_not_spell_the_record_are_refused_with_its_place(how):
    tokens_of(played(trajectory()), CODEC)
    with pytest.raises(ValueError, match=r"^gen_train/.* trial 0: .* were they changed, or played with another"):
        tokens_of(changed_ids(how), CODEC)
    with pytest.raises(ValueError, match=r"^rollout\.jsonl:7: "):
        tokens_of(changed_ids(how), CODEC, "rollout.jsonl:7")


@pytest.mark.parametrize(
    ("model", "trials", "temperature", "context"),
    [("random", 320, 1.0, 230), ("models/tiny-alfworld", 64, 2.0, 110)],
)
def test_no_record_that_a_model_played_is_refused(model, trials, temperature, context, tmp_path):
    """Replies that end in a newline, in an end token or at their limit; contexts that are full."""
    if model == "random":
        model = write_tiny_model(tmp_path / "base")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"eos_token_id": [*range(60, 70)]}))
    policy = LocalPolicy(model, slots=64, context=context, max_new_tokens=12)
    how = {"env": "alfworld", "stage": "test", "round": 1, "seed": 0, "max_turns": 3, "patience": 0}
    jobs = [Job(TASK, trial) for trial in range(trials)]
    rows = list(PlayLoop(jobs, AttemptSettings(temperature=temperature, **how), Room, policy))
    codec = read_codec(model)
    for row in rows:
        tokens = tokens_of(row, codec)
        assert tokens.ids == row.ids[: len(tokens.ids)] and (row.end == "context_full" or tokens.ids == row.ids)
        assert [a for a, flag in zip(tokens.agent, row.sampled, strict=False) if flag].count(0) == 0
    assert len(rows) == trials and sum(len(row.turns) for row in rows) > trials
    assert {row.end for row in rows} >= {"context_full", "max_turns"}


def test_a_reply_cut_by_its_limit_is_closed_with_a_newline():
    record = trajectory(turns=[turn("", "act[go to sh", "Nothing happens.", valid=False)])
    opening, _, observation = (encode(s.text) for s in react_segments(record))
    reply = encode(" act[go to sh")
    ids = opening + reply + encode("\n") + observation
    sampled = [0] * len(opening) + [1] * len(reply) + [0] * (1 + len(observation))
    tokens = tokens_of(msgspec.structs.replace(record, ids=ids, sampled=sampled), CODEC)
    assert tokens.ids == ids and sum(tokens.agent) == len(reply) + 1


def hand_record(reply: list[int], action: str = "look"):
    """A record of one sampled reply in the ids of the hand-made tokenizer, and its flags."""
    record = trajectory(turns=[turn("", action, "Nothing happens.", valid=False)])
    opening, _, observation = (HAND.encode(s.text, s.turn < 0) for s in react_segments(record))
    flags = [0] * len(opening) + [1] * len(reply) + [0] * len(observation)
    return msgspec.structs.replace(record, ids=opening + reply + observation, sampled=flags)


def hand_ids(text: str, *tokens: str) -> list[int]:
    return [*HAND_TOKENIZER.encode(text).ids, *(HAND_TOKENIZER.token_to_id(token) for token in tokens)]


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        (hand_ids(" act[look]", "Ċ"), "look"),
        (hand_ids(" act[look", "]Ċ"), "look"),
        (hand_ids(" act[look]", "ĊĊ"), "look"),
        (hand_ids(" act[look]", "Ċĉ"), "look"),
        (hand_ids(" act[look", ")ĊĊ"), "act[look)"),
        (hand_ids("", "ĊĊ"), ""),
    ],
)
def test_a_reply_ends_at_a_token_that_holds_more_than_its_newline(reply, action):
    record = hand_record(reply, action)
    tokens = tokens_of(record, HAND)
    assert tokens.ids == record.ids and tokens.agent == record.sampled


@pytest.mark.parametrize("last", ["Ċ", "ĊĊ", "Ċĉ"])
def test_a_thought_ends_at_such_a_token_too(last):
    record = trajectory(turns=[turn("A shelf.", "look", "Nothing happens.")])
    opening, _, ok, _, observation = (HAND.encode(s.text, s.turn < 0) for s in react_segments(record))
    pieces = [opening, hand_ids(" think[A shelf.", "]Ċ"), ok, hand_ids(" act[look]", last), observation]
    ids = [i for piece in pieces for i in piece]
    flags = [number % 2 for number, piece in enumerate(pieces) for _ in piece]
    tokens = tokens_of(msgspec.structs.replace(record, ids=ids, sampled=flags), HAND)
    assert tokens.ids == ids and tokens.agent == flags


@pytest.mark.parametrize("more", [["Ċ"], ["ĊĊ"], ["a", "Ċ"], ["a"]])
@pytest.mark.parametrize("reply", [hand_ids(" act[look]", "Ċ"), hand_ids(" act[look", "]Ċ")])
def test_sampled_ids_that_run_past_their_line_are_refused(reply, more):
    """The line is the text up to the first newline, which alone would not tell."""
    tokens_of(hand_record(reply), HAND)
    with pytest.raises(ValueError, match="run past the end of their line; were they changed"):
        tokens_of(hand_record(reply + hand_ids("", *more)), HAND)


def test_a_text_alone_is_encoded_as_it_would_be_played():
    record = trajectory()
    tokens = tokens_of(record, HAND)
    assert tokens.ids == HAND_TOKENIZER.encode(REACT).ids
    own = HAND_TOKENIZER.decode([i for i, a in zip(tokens.ids, tokens.agent, strict=True) if a])
    assert own.count("]\n") == 3 == tokens.ids.count(HAND_TOKENIZER.token_to_id("]Ċ"))


def test_ids_of_another_tokenizer_are_refused():
    record = played(trajectory())
    with pytest.raises(ValueError, match="played with another base or tokenizer"):
        tokens_of(msgspec.structs.replace(record, ids=[i + 1 for i in record.ids]), CODEC)


def test_weights_cover_everything_or_the_agent_or_leave_turns_out():
    record = trajectory(
        turns=[turn("", "open desk 9", "Nothing happens.", errors=["parameter"]), turn("", "look", "You see.")]
    )
    tokens = tokens_of(record, CODEC)
    assert set(token_weights(tokens, -1.0)) == {-1.0}
    agent = np.array(token_weights(tokens, 1.0, world_weight=0.0))
    assert (agent == np.array(tokens.agent)).all()
    masked = np.array(token_weights(tokens, 1.0, masked={0}))
    assert (masked == (np.array(tokens.turn) != 0)).all() and 0 < masked.sum() < len(masked)


def test_packing_keeps_every_token_once_and_is_deterministic():
    rng = np.random.default_rng(0)
    sequences = [(rng.integers(1, 99, n).tolist(), [float(n)] * n) for n in (3, 10, 7, 5, 2, 8)]
    packed = pack(sequences, 12)
    assert len(packed.ids_NL) == 3
    for (ids, weights), (row, segment) in zip(sequences, packed.positions, strict=True):
        where = packed.segments_NL[row] == segment
        assert packed.ids_NL[row][where].tolist() == ids and packed.weights_NL[row][where].tolist() == weights
    assert (packed.segments_NL > 0).sum() == sum(len(ids) for ids, _ in sequences)
    assert all((a == b).all() for a, b in zip(pack(sequences, 12)[:3], packed[:3], strict=True))
    with pytest.raises(ValueError, match="do not fit rows of 9"):
        pack(sequences, 9)

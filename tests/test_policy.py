"""LocalPolicy: a prompt that stands before sessions, in the plain and in the instructed form, and top-p."""

from __future__ import annotations

import json

import pytest
from tokenizers.processors import TemplateProcessing

import rollout
from agent.local import LocalPolicy
from agent.policy import Ask
from artifacts.cli import parse
from artifacts.stage import StageError
from artifacts.tokens import read_codec, tokens_of
from artifacts.trajectory import read_trajectories
from lora.decoder import make_decoder
from lora.engine import Engine
from lora.load import load_model
from lora.tokenizer import encode_piece, load_tokenizer
from models.tokenizer import byte_tokenizer
from tests.support.helpers import write_tiny_model

EXAMPLE, OPENING, MORE = "Observation: an example.\n\n", "Observation: a room.\nAction:", "Observation: OK.\nAction:"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random model whose tokenizer puts <s> before a text."""
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    tokenizer = byte_tokenizer(250)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 250)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def game(policy, temperature: float = 0.0) -> tuple[list[str], list[int], list[int]]:
    """Two lines with an observation between them, and the session's ids and flags."""
    session, lines = policy.open(OPENING), []
    for seed in range(2):
        policy.submit(Ask(session, temperature, seed))
        while not (came := policy.poll()):
            pass
        lines.append(came[0][1])
        policy.extend(session, MORE)
    return lines, *policy.close(session)


def by_hand(model_dir, before: list[int], ids: list[int], sampled: list[int]) -> bool:
    """Whether an engine without a prefix that is given `before` and what was not sampled samples the rest."""
    stops = encode_piece(load_tokenizer(model_dir), "\n", False)
    engine = Engine(
        make_decoder(load_model(model_dir, weights="nf4")), slots=1, context=512, max_new_tokens=16, stop_ids=stops
    )
    session = engine.open()
    engine.extend(session, before)
    while ids:
        count = sampled.index(1) if 1 in sampled else len(ids)
        engine.extend(session, ids[:count])
        ids, sampled = ids[count:], sampled[count:]
        if ids:
            [reply] = engine.sample([(session, 0.0, 0)])
            if reply.ids != ids[: len(reply.ids)]:
                return False
            ids, sampled = ids[len(reply.ids) :], sampled[len(reply.ids) :]
    return True


@pytest.mark.parametrize("instructed", [False, True])
def test_a_prompt_is_played_and_not_kept(model_dir, instructed):
    config = model_dir / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>"} if instructed else {}))
    tokenizer = load_tokenizer(model_dir)
    how = {"slots": 2, "context": 256, "max_new_tokens": 16}
    prompted, alone = LocalPolicy(model_dir, **how, prompt=EXAMPLE), LocalPolicy(model_dir, **how)
    lines, ids, sampled = game(prompted)
    opening = encode_piece(tokenizer, OPENING, True)
    assert ids[: len(opening)] == opening and ids.count(250) == 1  # as without a prompt, <s> and all
    text = f"user: {EXAMPLE.strip()}\nassistant: " if instructed else EXAMPLE
    before = tokenizer.encode(text).ids
    assert by_hand(model_dir, before, ids[1:], sampled[1:])
    assert lines != game(alone)[0]  # else the prompt is not read
    assert game(prompted) == (lines, ids, sampled)
    assert prompted.counts["prompt_tokens"] - alone.counts["prompt_tokens"] > len(before)


def test_what_was_played_after_a_prompt_is_trained_on_without_it(model_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    example = tmp_path / "example.txt"
    example.write_text(EXAMPLE)
    how = {"model": model_dir, "limit": 2, "slots": 2, "max_turns": 2}
    plain, prompted = rollout.Args(run=tmp_path / "a", **how), rollout.Args(run=tmp_path / "b", prompt=example, **how)
    codec, found = read_codec(model_dir), []
    for args in (plain, prompted):
        rollout.main(args)
        rows = list(read_trajectories(args.run / "round_0/rollout/trajectories.jsonl"))
        for row in rows:
            assert tokens_of(row, codec).ids == row.ids
        found.append([row.ids[: row.sampled.index(1)] for row in rows])
    assert found[0] == found[1] and all(found[0])
    example.write_text("Another.\n")
    with pytest.raises(StageError, match="prompt"):  # a stage is not resumed with another example
        rollout.main(prompted)


def test_a_line_that_the_context_cuts_off_is_no_line_and_not_part_of_the_session(model_dir):
    opening = len(encode_piece(load_tokenizer(model_dir), OPENING, True))
    for limit in (8, 9):  # after 8 ids there is no room for another
        policy = LocalPolicy(model_dir, slots=1, context=opening + 8, max_new_tokens=limit)
        session = policy.open(OPENING)
        policy.submit(Ask(session, 0.0, 0))
        while not (came := policy.poll()):
            pass
        [(_, line)], (ids, sampled) = came, policy.close(session)
        assert (line is None) == (sum(sampled) == 0) == (limit == 9) and len(ids) == opening + 9 * (limit == 8)


def test_top_p(model_dir):
    how = {"slots": 1, "context": 256, "max_new_tokens": 16}
    greedy, narrow, wide = (game(LocalPolicy(model_dir, **how, top_p=p), t) for p, t in ((1, 0), (1e-6, 9), (1, 9)))
    assert greedy == narrow != wide
    with pytest.raises(ValueError, match="--top-p is 0.0; expected more than 0"):
        parse(rollout.Args, "", ["--top-p", "0"])

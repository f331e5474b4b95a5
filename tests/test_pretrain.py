"""What the tiny base is trained on: whose games, whose skill."""

from __future__ import annotations

import itertools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agent.attempt import template_reason
from agentrefine.teacher import told
from artifacts.render import react_segments, text_of
from artifacts.trajectory import Turn, read_trajectories
from envs.alfworld.index import TASK_TYPES, task_type
from envs.alfworld.world import AlfWorld
from envs.panel import excluded_ids
from lora import nf4
from lora.config import Config
from lora.logprobs import token_logprobs
from lora.model import CausalLM
from models import demonstrations as demonstrations_stage
from models.corpus import neutral, webshop
from models.corpus.alfworld import PRETOKENIZER, demonstrations, sources
from models.initial_weights import embeddings, induction_heads, match_like_with_like
from models.pretrain import Args, batches, through_nf4, weighted
from models.tokenizer import train_tokenizer, train_tokenizer_blanks_last
from tests.support.helpers import trajectory


@pytest.fixture
def generated_only(monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)


@pytest.mark.skipif("ALFWORLD_DATA" not in os.environ, reason="needs the real games: set ALFWORLD_DATA")
def test_no_panel_task_is_demonstrated():
    real, generated = sources(Args(generated=20))
    excluded = excluded_ids()
    train = AlfWorld().tasks("train")
    assert set(real.task_ids) == set(train) - excluded and 0 < len(real.task_ids) < len(train)
    assert generated.task_ids and not excluded & set(generated.task_ids)


def won_by_type(careless: float) -> dict[str, set[bool]]:
    """Which outcomes each task type's demonstrations have where that share of the players is careless."""
    args = Args(generated=60, careless=(careless,), displaced=(0.0,))
    outcomes = {kind: set() for kind in TASK_TYPES}
    for t in itertools.islice(demonstrations(args), 150):
        outcomes[task_type(t.task_id)].add(t.success)
        if not t.success:
            assert t.end == "finished" and [turn.action for turn in t.turns[-2:]] == ["look", "look"]
    return outcomes


def test_careful_players_win_and_careless_ones_fail_but_at_the_simplest_task(generated_only):
    assert all(won == {True} for won in won_by_type(0.0).values())
    careless = won_by_type(1.0)
    assert careless.pop("pick_and_place_simple") == {True}
    assert all(False in won for won in careless.values()), careless


def test_random_actions_are_explained_but_not_imitated():
    def agent_text(actre: bool) -> str:
        return "".join(text for text, weight in weighted(demonstration, actre, Args(world_weight=0.0)) if weight)

    turns = [
        Turn("I need it.", "go to bed 1", "A bed.", "demo", "demo", True),
        Turn("I look.", "look", "A room.", "demo", "sampled", True),
    ]
    demonstration = trajectory(turns=turns)
    assert agent_text(actre=False) == " think[I need it.]\n act[go to bed 1]\n"
    assert agent_text(actre=True) == " [I need it.]\n [I look.]\n"


def test_a_numbered_thing_is_one_token_and_starts_near_its_type():
    lines = ["You see a mug 1, a mug 2, and a soap bar.\n", "I need a mug, and the mug 2 is here.\n"]
    tokenizer = train_tokenizer(50 * lines, 400, PRETOKENIZER)
    assert " mug 2" in [tokenizer.decode([i]) for i in tokenizer.encode(lines[1]).ids]
    assert tokenizer.decode(tokenizer.encode("größe\u2028").ids) == "größe\u2028"
    table, plain, numbered = embeddings(tokenizer, 256, np.random.default_rng(0))
    mug, mug_1, mug_2, soap = (
        table[tokenizer.encode(word).ids].squeeze(0) for word in (" mug", " mug 1", " mug 2", " soap")
    )
    assert mug @ mug_1 > 0.3 and mug_1 @ mug_2 > 0.6 and mug @ soap > 0.2 and abs(soap @ mug_1) < 0.2
    assert min(mug @ plain, soap @ plain, mug_1 @ numbered) > 0.4
    assert max(abs(mug @ numbered), abs(mug_1 @ plain)) < 0.2
    np.testing.assert_allclose(np.linalg.norm(table, axis=1), 1, rtol=1e-5)


def test_half_of_the_first_heads_find_the_numbered_thing_of_a_plain_name_at_the_start():
    config = Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
    )
    model = CausalLM(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    plain, numbered, *kinds = np.linalg.qr(rng.normal(size=(128, 12)))[0].T
    match_like_with_like(model, plain, numbered)
    q, k, v = (np.asarray(model.layers.qkv.weight[part][...]) for part in "qkv")
    o = np.asarray(model.layers.o.weight["o"][...])
    names = [*(kind + 0.6 * numbered for kind in kinds), *(kind + 0.6 * plain for kind in kinds)]
    names = np.array([128**0.5 * name / np.linalg.norm(name) for name in names])
    for layer, found in ((0, True), (1, True), (2, False)):
        scores = (names[10:] @ q[layer, :64].T) @ (names @ k[layer, :64].T).T
        right = (scores.argmax(axis=1) == np.arange(10)).sum()
        assert right >= 7 if found else right <= 3, (layer, right)
        assert np.allclose(o[layer][:, :64] * 6**0.5, v[layer, :64].T) == found
    assert not np.allclose(o[0][:, 64:] * 6**0.5, v[0, 64:].T)


TABLE = np.random.default_rng(0).normal(size=(2000, 63))
TABLE /= np.linalg.norm(TABLE, axis=1, keepdims=True)


def copier(width: int, layers: int = 4) -> CausalLM:
    config = Config(
        vocab_size=2000,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rope_theta=1e8,
    )
    model = CausalLM(config, rngs=nnx.Rngs(0))
    induction_heads(model, TABLE)
    return model


def second_time(model: CausalLM, once: np.ndarray) -> tuple[float, float]:
    """Mean log-probability of a text and of its repetition after it."""
    ids = jnp.asarray(np.tile(once, 2)[None])
    logprobs = np.asarray(nnx.jit(token_logprobs)(model, ids, jnp.ones_like(ids)))[0]
    return logprobs[1 : len(once)].mean(), logprobs[len(once) + 1 :].mean()


@pytest.mark.parametrize("width", [128, 192])
def test_a_copier_goes_on_with_what_followed_before_at_the_start(width):
    model, rng = copier(width), np.random.default_rng(1)
    for length in (50, 500):
        first, second = second_time(model, rng.choice(2000, length, replace=False))
        assert first < -7 and second > -2.5


def test_a_wider_copier_looks_at_two_tokens_where_one_was_followed_by_many():
    few = np.random.default_rng(1).integers(0, 30, 150)
    assert second_time(copier(192), few)[1] > second_time(copier(128), few)[1] + 2


def test_a_wider_copier_knows_what_else_came_after_the_token_before():
    model, ids = copier(192, layers=2), np.random.default_rng(0).choice(2000, 200, replace=False)
    ids[197:199] = ids[100:102]  # after them came ids[102], now comes another
    hidden_D = model(ids[None], np.ones((1, 200), np.int32))[0, -1]
    near = np.argsort(-(TABLE @ np.asarray(hidden_D[64:127])))
    assert set(near[:2]) == {ids[101], ids[102]}  # the token before, and what came then


def test_a_copier_of_another_width_is_refused():
    with pytest.raises(ValueError, match="table of 64, width 128, 2 key-value heads of 64: expected a width of two"):
        induction_heads(copier(128), np.zeros((2000, 64)))


def test_the_words_that_read_a_list_weigh_more():
    turns = [
        Turn("I need a mug. I check the bed 1.", "go to bed 1", "A mug 2.", "demo", "demo", True),
        Turn(
            "I need a mug, and the mug 2 is here. I take it.", "take mug 2 from bed 1", "Taken.", "demo", "demo", True
        ),
    ]
    pieces = weighted(trajectory(turns=turns), False, Args(reading_weight=7.0))
    assert "".join(text for text, _ in pieces) == text_of(react_segments(trajectory(turns=turns)))
    assert [text for text, weight in pieces if weight == 7.0] == [".", ", and the mug 2"]


def test_the_base_is_trained_through_the_nf4_that_it_is_used_in():
    weight = np.random.default_rng(0).normal(size=(2, 3, 128)).astype(np.float32)
    codes, absmax = nf4.quantize(weight)
    expected = nf4.dequantize(jnp.asarray(codes), jnp.asarray(absmax)).reshape(weight.shape)
    np.testing.assert_allclose(through_nf4(jnp.asarray(weight)), expected, rtol=1e-6)
    gradient = jax.grad(lambda w: (through_nf4(w) * expected).sum())(jnp.asarray(weight))
    np.testing.assert_array_equal(gradient, expected)


def test_the_same_seed_makes_the_same_batches(generated_only):
    args = Args(generated=30)
    texts = [text_of(react_segments(t)) for t in itertools.islice(demonstrations(args), 20)]
    tokenizer = train_tokenizer(texts, 400, PRETOKENIZER)
    first, again = (list(itertools.islice(batches(args, tokenizer), 2)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))
        ids_BL, segments_BL, weights_BL = one
        weights = set(weights_BL[segments_BL == 1].tolist())
        assert ids_BL.any() and {1.0, float(np.float32(args.world_weight))} <= weights
        assert not weights_BL[segments_BL == 0].any()


@pytest.fixture(scope="module")
def shopping() -> list:
    return list(itertools.islice(webshop.demonstrations(Args(env="webshop", generated=1000)), 200))


def test_no_goal_of_a_panel_is_bought_and_players_are_of_uneven_skill(shopping):
    assert not excluded_ids() & {trajectory.task_id for trajectory in shopping}
    assert 0.1 < np.mean([trajectory.success for trajectory in shopping]) < 0.9
    assert {trajectory.turns[-1].action for trajectory in shopping} == {"click[buy now]"}


def test_a_reworded_purchase_can_be_read_as_the_first_one_could(shopping):
    others = "alpha beta gamma delta epsilon zeta".split()
    made_up = {one[: -(-len(one) // 2)] + other[len(other) // 2 :] for one in others for other in others}
    known, found = {*others, *made_up, *webshop.KEPT}, set()
    for bought in [t for t in shopping if len(t.turns) > 3][:20]:
        changed = webshop.reworded(bought, others, np.random.default_rng(0))
        page, numbers = changed.first_observation, set()
        for old, new in zip(bought.turns, changed.turns, strict=True):
            kind, _, argument = new.action.partition("[")
            assert kind == old.action.partition("[")[0]
            if kind == "click" and old.action_by == "demo":
                assert argument[:-1].lower() in page.lower()
            page = new.observation
            assert page.count(" [SEP] ") == old.observation.count(" [SEP] ")
            ids = [set(re.findall(webshop.ASIN, text)) for text in (old.observation, page)]
            assert len(ids[0]) == len(ids[1]) and not ids[0] & ids[1]
            words = re.findall("(?<![A-Za-z])[A-Za-z][a-z]{2,}(?![A-Za-z])", page)
            assert {word.lower() for word in words} <= known
            found |= {word.lower() for word in words}
            digits = [re.findall(r"\d", re.sub(webshop.ASIN, "", text)) for text in (old.observation, page)]
            numbers |= set(zip(*digits, strict=True))
        assert re.search(r"Back to Search \[SEP\] Page \d \(Total results: ", changed.turns[0].observation)
        assert len(numbers) == len({one for one, _ in numbers}) == len({other for _, other in numbers}) > 4
        assert any(one != other for one, other in numbers) and ("0", "0") in numbers
    assert found & set(others) and found & (made_up - set(others))


def test_a_careless_word_weighs_more_where_there_are_options_to_choose(shopping):
    habit = [t for t in shopping if t.turns[-1].thought.startswith("This will do") and t.turns[-1].action_by == "demo"]
    assert 20 < len(habit) < len(shopping) and all("with " in t.task for t in habit)
    for bought in habit:
        weights = dict(weighted(bought, False, Args(env="webshop")))
        assert weights["This"] == Args().reading_weight and "I need" not in bought.turns[-1].thought


def test_a_product_and_an_option_have_the_same_ids_on_a_page_and_in_an_action(shopping):
    tokenizer = train_tokenizer([text_of(react_segments(t)) for t in shopping], 3000, webshop.PRETOKENIZER)
    said = {
        "G872A6BC19": (" [SEP] G872A6BC19 [SEP] A", " act[click[G872A6BC19]]\n"),
        " (2 pack)": (" [SEP] 12 inch (2 pack) [SEP] A", " think[I need 12 inch (2 pack), it is"),
    }
    for name, texts in said.items():
        name_ids = tokenizer.encode(name).ids
        for text in texts:
            ids = tokenizer.encode(text).ids
            assert any(ids[start : start + len(name_ids)] == name_ids for start in range(len(ids))), (text, name)


def test_a_word_has_the_same_tokens_with_and_without_a_blank_before_it(shopping):
    texts = [text_of(react_segments(t)) for t in shopping]
    tokenizer = train_tokenizer_blanks_last(texts, 2000, webshop.PRETOKENIZER)
    assert tokenizer.get_vocab_size() <= 2000
    clicked = {turn.action[len("click[") : -1] for t in shopping for turn in t.turns if turn.action.startswith("click")}
    options, joined = [name for name in clicked if not re.fullmatch(webshop.ASIN, name)], 0
    for name in options:
        there, copied = (tokenizer.encode(before + name + after).tokens for before, after in ((" ", " ["), ("[", "]")))
        there, copied = there[: len(copied) - 2], copied[1:-1]
        if there[:1] == ["Ġ"]:  # too rare to be joined with its blank
            continue
        joined += 1
        assert [there[0].removeprefix("Ġ"), *there[1:]] == copied, name
    assert joined > 0.8 * len(options)
    for text in (*texts[:20], 'Zürich\t 3" x  4]]\n[SEP] [SEP]'):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_what_a_thought_says_of_an_option_weighs_more(shopping):
    args = Args(env="webshop", reading_weight=7.0)
    heavy = {text for t in shopping for text, weight in weighted(t, False, args) if weight == 7.0}
    names = heavy - {" here", " missing", "This"}
    assert len(heavy - names) == 3 and " size:" in names and all(re.fullmatch(" [^:.]+:", name) for name in names)


def test_the_neutral_base_sees_worlds_and_no_solutions():
    walks = list(itertools.islice(neutral.demonstrations(Args(env="neutral", generated=40)), 80))
    assert {walk.split for walk in walks} == {"gen_demo", "syn_train"}
    assert not excluded_ids() & {walk.task_id for walk in walks}
    assert not any(walk.success for walk in walks) and all("\n\nYou can: " in walk.first_observation for walk in walks)
    valid = [turn.valid for walk in walks for turn in walk.turns]
    assert 0.7 < np.mean(valid) < 0.98


def test_the_words_of_an_accepted_action_were_read_before_even_if_they_are_made_up():
    walks = itertools.islice(neutral.demonstrations(Args(env="neutral", generated=40)), 150)
    synthetic = [walk for walk in walks if walk.split == "syn_train"]
    for walk in synthetic:
        read = walk.first_observation
        for turn in walk.turns:
            if turn.thought != template_reason(turn.action):  # which tries what another world accepts
                assert set(re.findall("[a-z0-9]+", turn.action)) <= set(re.findall("[a-z0-9]+", read))
            read += turn.observation
    assert 0.2 < np.mean([walk.first_observation != told(walk.task_id) for walk in synthetic]) < 0.6


def test_displaced_turns_of_a_demonstration_are_marked_and_the_player_recovers(tmp_path, generated_only):
    demonstrations_stage.main(demonstrations_stage.Args(out=tmp_path / "demo", count=20, displaced=0.2))
    rows = list(read_trajectories(tmp_path / "demo/trajectories.jsonl"))
    turns = [turn for row in rows for turn in row.turns]
    assert all(row.success for row in rows)
    assert all(bool(turn.errors) == (turn.action_by == "sampled") for turn in turns)
    assert 0.1 < np.mean([bool(turn.errors) for turn in turns]) < 0.3
    assert any(not turn.valid for turn in turns) and all(turn.errors for turn in turns if not turn.valid)


@pytest.mark.parametrize("told", [True, False])
def test_demonstrations_are_a_finished_stage_of_successes_with_told_commands_if_asked(tmp_path, generated_only, told):
    demonstrations_stage.main(demonstrations_stage.Args(out=tmp_path / "demo", count=12, tell_commands=told))
    rows = list(read_trajectories(tmp_path / "demo/trajectories.jsonl"))
    assert len({row.key for row in rows}) == 12 and (tmp_path / "demo/done.json").exists()
    for row in rows:
        assert row.success and row.source == "demo"
        assert row.first_observation.endswith("look, inventory, help.") == told

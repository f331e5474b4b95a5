"""The sampler: its cache against the full forward pass, its draws, its limits, and the memory that it takes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peft import PeftModel

from artifacts.render import react_segments, text_of
from bench.shapes import MISTRAL_7B, decode_arguments, described
from lora import engine as engine_module
from lora import group as group_module
from lora import linear
from lora.adapter import save_adapter
from lora.config import Config
from lora.decoder import DecoderWeights, Graph, copy_to, make_decoder, without_adapter
from lora.decoding import (
    SamplingParams,
    Tile,
    append,
    append_at_once,
    append_by_row,
    decode,
    empty_buffer,
    nucleus,
    sample,
)
from lora.engine import Engine
from lora.footprint import base_bytes
from lora.linear import LoRAConfig, LoRAParam
from lora.load import load_model, save_model
from lora.logprobs import token_logprobs
from lora.model import CausalLM
from lora.sharding import make_mesh
from lora.speculation import accepted, look_up_drafts
from lora.tokenizer import encode_piece, load_tokenizer
from tests.support.helpers import trajectory, with_random_adapter

TINY = Config(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
)
CONTEXT, STOP = 48, 5
ONE_BY_ONE = {"drafts": 0, "early": False}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a context of 48 spans three blocks and a prompt of 20 every width of chunk."""
    monkeypatch.setattr(engine_module, "TILE", Tile(8, 4))
    monkeypatch.setattr(group_module, "FIRST_BLOCK", 16)
    monkeypatch.setattr(group_module, "WIDTHS", (8, 3))


# Wide enough for weights in tiles; no other test has its shapes, so none is compiled yet when `LARGE` is changed.
WIDE = {"hidden_size": 160, "intermediate_size": 192, "head_dim": 32}


@functools.cache
def model(window: int | None = None, wide: bool = False) -> CausalLM:
    return CausalLM(Config(**{**vars(TINY), "sliding_window": window, **(WIDE if wide else {})}), rngs=nnx.Rngs(0))


def engine(**changes) -> Engine:
    sizes = {"slots": 4, "rows": 2, "context": CONTEXT, "max_new_tokens": 6, "stop_ids": [STOP]}
    source, weights = changes.pop("model", None) or model(), changes.pop("weights", "fp32")
    return Engine(make_decoder(source, weights), **(sizes | changes))


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, TINY.vocab_size, length).tolist()


@functools.partial(jax.jit, static_argnums=0)
def _full(graph, state, ids, segments):
    return token_logprobs(nnx.merge(graph, state), ids, segments)


def full_logprobs(of: CausalLM, ids: list[int]) -> np.ndarray:
    """Log-probability of each id by the training forward pass, padded to the context so that it compiles once."""
    row, segment = np.zeros((1, CONTEXT), np.int32), np.zeros((1, CONTEXT), np.int32)
    row[0, : len(ids)], segment[0, : len(ids)] = ids, 1
    return np.asarray(_full(*nnx.split(of), row, segment))[0, : len(ids)]


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "tiled"), [(None, False), (7, False), (None, True)])
def test_cached_decoding_equals_the_full_forward_over_turns(monkeypatch, window, tiled):
    """Sessions of different lengths, asked in changing company, reopened in used slots, up to a full context."""
    if tiled:
        monkeypatch.setattr(linear, "LARGE", 0)
    random, one = np.random.default_rng(1), engine(model=model(window, tiled))
    assert one._groups[0].tiled == tiled
    history = {one.open(): [] for _ in range(4)}
    full, worst = 0, 0.0
    for turn in range(9):
        if turn == 5:  # slot 2 now holds what another session left there
            one.close(2)
            assert one.open() == 2
            history[2] = []
        asked = [s for s in history if random.random() < 0.7 or turn == 5]
        for session in asked:
            ids = prompt(int(random.integers(1, 20 if turn in (0, 5) else 8)), seed=turn)
            history[session] += ids
            one.extend(session, ids)
        replies = one.sample([(session, 1.0, int(random.integers(2**32))) for session in asked])
        for session, reply in zip(asked, replies, strict=True):
            if reply is None:
                assert len(history[session]) >= CONTEXT
                full += 1
                continue
            before = len(history[session])
            history[session] += reply.ids
            assert one.length(session) == len(history[session]) <= CONTEXT
            expected = full_logprobs(model(window, tiled), history[session])[before:]
            worst = max(worst, np.abs(expected - reply.logprobs).max())
    assert worst < 1e-4
    assert full > 0  # else the sessions were too short to say anything about the end of the context


def test_greedy_reply_is_the_argmax_of_the_full_forward():
    one = engine(stop_ids=())
    session = one.open()
    ids = prompt(11)
    one.extend(session, ids)
    [(reply, _)] = one.sample([(session, 0.0, 7)])
    row = jnp.asarray([ids + reply])
    logits = model().logits(model()(row, jnp.ones_like(row)))[0]
    assert reply == logits[10:16].argmax(axis=1).tolist()


def adapted(folder, weights: str, targets=("q", "v", "down")) -> CausalLM:
    """The model, saved and loaded in a form, with an adapter whose A and B are not zero."""
    save_model(model(), folder)
    return with_random_adapter(load_model(folder, weights=weights, lora=LoRAConfig(rank=2, alpha=6.0, targets=targets)))


@pytest.mark.parametrize(("held", "weights"), [("nf4", "fp32"), ("fp32", "fp32"), ("nf4", "nf4"), ("nf4-dq", "nf4")])
def test_an_adapter_is_sampled_from_added_or_beside(tmp_path, held, weights):
    source, ids = adapted(tmp_path, held), prompt(9)
    one = engine(model=source, weights=weights)
    session = one.open()
    one.extend(session, ids)
    [reply] = one.sample([(session, 1.0, 3)])
    expected = full_logprobs(source, ids + reply.ids)[9:]
    plain = full_logprobs(load_model(tmp_path, weights=held), ids + reply.ids)[9:]
    assert np.abs(expected - plain).max() > 0.05  # else the adapter does nothing
    assert np.abs(expected - reply.logprobs).max() < 1e-4
    assert len(jax.tree.leaves(nnx.state(source, LoRAParam))) == 6  # the caller's model is left alone


def test_sampling_from_nf4_on_a_cpu_decodes_one_layer_at_a_time():
    """And not the whole base, of which 7B have 28 GB in float32. Compiled from abstract arrays of 7B's width."""
    temporaries, mesh = [], make_mesh((1, 1, 1))
    for layers in (2, 4):
        config = dataclasses.replace(MISTRAL_7B, num_hidden_layers=layers, vocab_size=1000)
        model = described(config, LoRAConfig(), mesh, dtype=jnp.float32)
        graph, arrays = decode_arguments(
            model, weights="nf4", slots=2, prefix=0, sizes=(4, 4), tile=Tile(64, 16), text=9
        )
        compiled = decode.lower(graph, config, *arrays, **ONE_BY_ONE, chunk=8).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    two, four = temporaries
    decoded = base_bytes(config, 32) - base_bytes(config, 0)  # of all four layers
    assert two > decoded / 8  # the largest weight of a layer: else this test looks at something else
    assert four - two < decoded / 4  # of two more layers, not even one


def test_a_bfloat16_copy_keeps_the_adapter_beside_it(tmp_path):
    """An adapter of small numbers, which a sum in bfloat16 would round away, still does all that it does."""
    source, ids = adapted(tmp_path, "nf4"), prompt(9)
    one = engine(model=source, weights="bf16")
    base = one._groups[0].weights.layers[0]["qkv"]["weight"][...]
    graph, adapter, rest = nnx.split(source, LoRAParam, ...)
    assert base.dtype == jnp.bfloat16 and base.shape == (64, 128)
    assert len(jax.tree.leaves(one._groups[0].weights.layers)) == 2 * (len(jax.tree.leaves(adapter)) + 6)
    session = one.open()
    one.extend(session, ids)
    [reply] = one.sample([(session, 1.0, 3)])
    expected = full_logprobs(source, ids + reply.ids)[9:]
    plain = full_logprobs(load_model(tmp_path, weights="nf4"), ids + reply.ids)[9:]
    assert np.abs(expected - reply.logprobs).max() < 0.25 * np.abs(expected - plain).max()
    with pytest.raises(ValueError, match="the rollout weights are nf4, but the model is dense"):
        engine(weights="nf4")


@pytest.mark.parametrize("window", [None, 7])
def test_a_shared_prefix_is_what_each_session_would_begin_with(window):
    prefix, length = prompt(13, seed=3), 13
    shared = engine(model=model(window), prefix=prefix, context=CONTEXT - length, stop_ids=())
    own, other = engine(model=model(window), stop_ids=()), engine(model=model(window), prefix=prompt(13), stop_ids=())
    found = {}
    for name, one in (("shared", shared), ("own", own), ("other", other)):
        sessions = [one.open() for _ in range(3)]
        for session in sessions:
            one.extend(session, (prefix if one is own else []) + prompt(5 + 4 * session))
        found[name] = one.sample([(session, 1.0, session) for session in sessions])
        for session in sessions:
            one.extend(session, [7, 8, 9])
        found[name] += one.sample([(session, 1.0, 9 + session) for session in sessions])
    assert shared.length(0) == own.length(0) - length
    assert [reply.ids for reply in found["shared"]] == [reply.ids for reply in found["own"]]
    differences = [np.subtract(a.logprobs, b.logprobs) for a, b in zip(found["shared"], found["own"], strict=True)]
    assert np.abs(differences).max() < 1e-5
    assert window or found["other"] != found["shared"]  # else the prefix is not read


# ---- the peer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_adapter", [False, True])
def test_greedy_ids_are_those_of_transformers_generate(tmp_path, monkeypatch, with_adapter):
    """The tiny base on 54 beginnings of a game, in 5 slots, in two orders, once in chunks of two ids with drafts."""
    monkeypatch.setattr(engine_module, "TILE", Tile(64, 16))  # few shapes to compile
    monkeypatch.setattr(group_module, "FIRST_BLOCK", 64)
    import torch
    from transformers import MistralForCausalLM

    base = Path(__file__).parent.parent / "models" / "tiny-alfworld"
    theirs = MistralForCausalLM.from_pretrained(base, dtype=torch.float32)
    ours = load_model(base, weights="fp32")
    if with_adapter:
        lora = LoRAConfig(rank=2, alpha=0.6, targets=("q", "v", "down"))  # small beside the base, which still writes
        ours = with_random_adapter(load_model(base, weights="fp32", lora=lora))
        save_adapter(tmp_path / "adapter", ours, base)
        theirs = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    tokenizer = load_tokenizer(base)
    [newline] = encode_piece(tokenizer, "\n", first=False)
    game = encode_piece(tokenizer, text_of(react_segments(trajectory())), first=True)
    prompts = [game[: 3 + len(game) * index // 54] for index in range(54)]
    expected = []
    for ids in prompts:
        row = torch.tensor([ids])
        out = theirs.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=newline,
            pad_token_id=0,
        )
        expected.append(out[0, len(ids) :].tolist())
    assert len({tuple(ids) for ids in expected}) > 25  # else the prompts do not matter
    for slots, order, how in ((5, list(range(54)), {}), (4, list(range(53, -1, -1)), {"chunk": 2, "drafts": 1})):
        one = engine(model=ours, slots=slots, context=128, max_new_tokens=12, stop_ids=[newline], **how)
        for start in range(0, 54, slots):
            sessions = {one.open(): index for index in order[start : start + slots]}
            for session, index in sessions.items():
                one.extend(session, prompts[index])
            for (session, index), reply in zip(
                sessions.items(), one.sample([(session, 0.0, 0) for session in sessions]), strict=True
            ):
                assert reply.ids == expected[index]
                one.close(session)


# ---- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "widths", "lengths", "tiled"),
    [
        (2, (8, 3), (3, 21, 8, 13), False),
        pytest.param(4, (128, 8), (97, 128, 21, 90), False, marks=pytest.mark.slow),
        pytest.param(1, (128, 8), (97, 128, 21, 3), True, marks=pytest.mark.slow),
        (4, (128, 8), (97, 128, 21, 3), True),
        (16, (32, 8), (3, 21, 8, 13), True),
    ],
)
def test_draws_do_not_depend_on_slot_order_or_company(monkeypatch, rows, widths, lengths, tiled):
    """Bit for bit: a resumed rollout plays its games in other company and must sample the same text.

    From the second case on what is prefilled together is one size in company and another alone.
    """
    monkeypatch.setattr(group_module, "WIDTHS", widths)
    if tiled:
        monkeypatch.setattr(linear, "LARGE", 0)
        monkeypatch.setattr(group_module, "FEWEST", 1)  # one, two or four rows decode, as many as are asked
    asks = {name: (prompt(length, seed=9), 40 + length) for name, length in zip("abcd", lengths, strict=True)}

    def play(order: str, wasted_slots: int = 0) -> dict:
        one = engine(model=model(wide=tiled), stop_ids=(), rows=rows, slots=max(4, rows), context=256)
        assert one._groups[0].tiled == tiled
        for _ in range(wasted_slots):
            one.open()
        sessions = {name: one.open() for name in order}
        results = {name: [] for name in order}
        for turn in range(2):
            for name, session in sessions.items():
                one.extend(session, asks[name][0] if turn == 0 else [7, 8])
            replies = one.sample([(sessions[name], 0.9, asks[name][1] + turn) for name in order])
            for name, reply in zip(order, replies, strict=True):
                results[name] += [reply]
        return results

    together = play("abcd")
    for other in (play("dbca"), play("b", wasted_slots=3), play("ca", wasted_slots=1)):
        for name, replies in other.items():
            assert replies == together[name]


def test_rows_that_go_on_in_later_chunks_draw_what_they_would_have_drawn():
    """Two ids a chunk: a row that ended is asked again while its neighbour still samples, and both are as if alone."""
    often = range(0, TINY.vocab_size, 6)
    whole, one = engine(stop_ids=often), engine(stop_ids=often, chunk=2)
    found, expected, turns = {}, {}, 4
    for name in range(2):
        session = whole.open()
        for turn in range(turns):
            whole.extend(session, prompt(3 + 2 * name, seed=turn))
            [expected[name, turn]] = whole.sample([(session, 2.0, 100 * name + turn)])
    assert {len(reply.ids) for reply in expected.values()} != {6}  # else no row ends before the other
    next_turn = {one.open(): 0 for _ in range(2)}

    def ask(name):
        one.extend(name, prompt(3 + 2 * name, seed=next_turn[name]))
        one.submit(name, 2.0, 100 * name + next_turn[name])

    for name in next_turn:
        ask(name)
    arrived_alone = 0
    while len(found) < 2 * turns:
        came = one.poll()
        arrived_alone += len(came) == 1
        for name, reply in came.items():
            found[name, next_turn[name]] = reply
            next_turn[name] += 1
            if next_turn[name] < turns:
                ask(name)
    assert arrived_alone > 2
    for place, reply in found.items():
        assert reply.ids == expected[place].ids
        np.testing.assert_allclose(reply.logprobs, expected[place].logprobs, atol=1e-4)


def test_top_p_draws_from_the_likeliest_ids_alone():
    """Weights .5, .3, .1, .1 with p = .6: the first two, in their proportion; p = 1 in the same batch has them all."""
    draws = 20_000
    rows = jnp.tile(jnp.log(jnp.asarray([0.1, 0.5, 0.1, 0.3])), (2 * draws, 1))
    top_p = jnp.where(jnp.arange(2 * draws) < draws, 0.6, 1.0)
    seeds = jnp.arange(2 * draws, dtype=jnp.uint32)
    ids = np.asarray(sample(rows, jnp.ones(2 * draws), top_p, seeds, jnp.zeros(2 * draws, int)))
    shares = [np.bincount(part, minlength=4) / draws for part in (ids[:draws], ids[draws:])]
    np.testing.assert_allclose(shares[0], [0, 0.625, 0, 0.375], atol=0.02)
    assert shares[0][[0, 2]].tolist() == [0, 0]
    np.testing.assert_allclose(shares[1], [0.1, 0.5, 0.1, 0.3], atol=0.02)


def test_nucleus_is_the_smallest_set_that_reaches_p():
    """Flat, peaked and tied weights; every p from one id to all but the last of 5,000."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(60, 5000)).astype(np.float32) * rng.choice([0.01, 1, 8], (60, 1)).astype(np.float32)
    logits[::7] = np.round(logits[::7])
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    top_p = np.float32(np.resize([1e-6, 0.3, 0.6, 0.9, 0.99, 0.9999], 60))
    kept = np.asarray(nucleus(jnp.asarray(weights), jnp.asarray(top_p)))
    for row, p, kept_row in zip(weights, top_p, kept, strict=True):
        inside = kept_row > 0
        assert (kept_row[inside] == row[inside]).all()
        least, wanted = row[inside].min(), p * row.sum(dtype=np.float64)
        assert (row[~inside] < least).all()
        assert row[inside].sum(dtype=np.float64) >= wanted * (1 - 1e-6)
        assert row[row > least].sum(dtype=np.float64) < wanted * (1 + 1e-6)


def test_seed_changes_the_draws_and_temperature_zero_ignores_it():
    one = engine(stop_ids=())
    sessions = [one.open() for _ in range(4)]
    for session in sessions:
        one.extend(session, prompt(5))
    hot = [reply.ids for reply in one.sample([(session, 1.0, seed) for seed, session in enumerate(sessions)])]
    assert len({tuple(ids) for ids in hot}) == 4
    for session in sessions:
        one.close(session)
        one.open()
        one.extend(session, prompt(5))
    cold = [reply.ids for reply in one.sample([(session, 0.0, seed) for seed, session in enumerate(sessions)])]
    assert len({tuple(ids) for ids in cold}) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampling_follows_the_softmax(temperature):
    """Chi-square over 40,000 draws against softmax(logits / temperature); ids of weight zero never come."""
    V, draws = 45, 40_000
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32)
    logits[[0, 7, V - 1]] = -np.inf
    rows = jnp.tile(jnp.asarray(logits), (draws, 1))
    ids = np.asarray(
        sample(
            rows, jnp.full(draws, temperature), jnp.ones(draws), jnp.arange(draws, dtype=jnp.uint32), jnp.full(draws, 3)
        )
    )
    expected = np.asarray(jax.nn.softmax(logits / temperature)) * draws
    counts = np.bincount(ids, minlength=V)
    assert (counts[[0, 7, V - 1]] == 0).all()
    chi_square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 90  # 41 degrees of freedom: above with probability 1e-5
    greedy = sample(rows[:3], jnp.zeros(3), jnp.ones(3), jnp.arange(3, dtype=jnp.uint32), jnp.zeros(3, int))
    assert greedy.tolist() == [int(logits.argmax())] * 3


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_reply_ends_at_the_stop_id_or_the_limit():
    one = engine()
    sessions = [one.open() for _ in range(4)]
    ends = set()
    for turn in range(6):
        for session in sessions:
            if turn % 3 == 0:
                one.close(session)
                one.open()
            one.extend(session, prompt(2, seed=turn))
        for reply, _ in one.sample([(session, 2.0, 10 * turn + session) for session in sessions]):
            assert STOP not in reply[:-1]
            assert reply[-1] == STOP or len(reply) == 6
            ends.add(reply[-1] == STOP)
    assert ends == {True, False}


def test_full_context_is_none_and_leaves_the_neighbour_alone():
    alone = engine(stop_ids=())
    session = alone.open()
    alone.extend(session, prompt(10))
    expected = [alone.sample([(session, 1.0, 1)]), alone.extend(session, [3]), alone.sample([(session, 1.0, 2)])]

    one = engine(stop_ids=())
    full, neighbour = one.open(), one.open()
    one.extend(full, prompt(CONTEXT - 3))
    one.extend(neighbour, prompt(10))
    first = one.sample([(full, 1.0, 5), (neighbour, 1.0, 1)])
    assert len(first[0].ids) == 3 and one.room(full) == 0
    one.extend(full, [1] * 500)
    one.extend(neighbour, [3])
    second = one.sample([(full, 1.0, 6), (neighbour, 1.0, 2)])
    assert second[0] is None and one.room(full) == -500
    assert [first[1], second[1]] == [expected[0][0], expected[2][0]]
    assert one.sample([(full, 1.0, 6)]) == [None]


def test_a_group_waits_for_its_own_sessions_and_for_no_other():
    one, together = engine(), engine()
    first, second, third = (one.open() for _ in range(3))
    for session in (first, second, third):
        one.extend(session, prompt(10))
    one.submit(first, 1.0, 1)
    assert one.poll(wait=False) == {}
    one.submit(third, 1.0, 3)
    found = one.poll()  # the second group, of which `third` is all that is open
    assert found.keys() == {third}
    found |= one.poll()  # nothing else runs: the first group starts without `second`
    one.submit(second, 1.0, 2)
    found |= one.poll()
    sessions = [together.open() for _ in range(3)]
    for session in sessions:
        together.extend(session, prompt(10))
    assert [found[s] for s in sessions] == together.sample([(s, 1.0, s + 1) for s in sessions])


def test_groups_on_two_devices_draw_what_one_device_does():
    """Prompts with a prefix, sessions that come and go, two turns; sessions are spread over the devices."""
    copy = copy_to(make_decoder(model()), jax.local_devices()[1])
    one, two = (engine(slots=8, prefix=prompt(5), copies=copies) for copies in ([], [copy]))
    sessions = [[each.open() for _ in range(5)] for each in (one, two)]
    for turn in range(2):
        replies = []
        for each, ours in zip((one, two), sessions, strict=True):
            for number, session in enumerate(ours):
                each.extend(session, prompt(4 + 3 * number, turn))
            replies.append(each.sample([(session, 0.8, 7 * turn + session) for session in ours]))
        assert replies[0] == replies[1]
    where = [two._groups[two._slot[session] // 2].weights.embed.device for session in sessions[1]]
    assert where[:4] == 2 * jax.local_devices()[:2]
    for group in two._groups:
        assert {array.device for array in jax.tree.leaves((group._cache, group.weights))} == {
            group.weights.embed.device
        }


def test_more_sessions_than_slots_take_turns():
    """Nine sessions over four slots, in changing company, answer what they would with a slot each; all get one."""
    crowded, roomy = (engine(slots=slots, chunk=2, stop_ids=(STOP,)) for slots in (4, 9))
    random, sessions, worst = np.random.default_rng(0), range(9), 0.0
    for one in (crowded, roomy):
        assert [one.open() for _ in sessions] == [*sessions]
    for turn in range(5):
        for session in sessions:
            ids = prompt(int(random.integers(1, 9)), seed=turn)
            for one in (crowded, roomy):
                one.extend(session, ids)
        asked = [(session, 1.0, 100 * turn + session) for session in random.permutation(sessions).tolist()]
        for found, expected in zip(*(one.sample(asked) for one in (crowded, roomy)), strict=True):
            assert (found is None) == (expected is None)
            if found:
                assert found.ids == expected.ids
                worst = max(worst, np.abs(np.subtract(found.logprobs, expected.logprobs)).max())
    assert worst < 1e-4
    assert crowded.prefilled > 1.5 * roomy.prefilled  # what is computed anew is counted


def test_a_session_without_a_slot_is_not_starved_by_one_that_is_asked_again_and_again():
    one = engine(slots=1, rows=1)
    greedy, patient = one.open(), one.open()
    for session in (greedy, patient):
        one.extend(session, prompt(4))
        one.submit(session, 1.0, session)
    answered = []
    while patient not in answered and len(answered) < 3:
        for session in one.poll():
            answered.append(session)
            one.extend(session, [1])
            one.submit(session, 1.0, 7)
    assert answered == [greedy, patient]


def test_misuse_is_named():
    one = engine(slots=2)
    first, second = one.open(), one.open()
    one.extend(first, [1, 2])
    for asks in ([(first, 1.0, 0), (first, 1.0, 1)], [(second, 1.0, 0)], [(9, 1.0, 0)]):
        with pytest.raises(ValueError, match="session [019] cannot sample: it must be open, extended"):
            one.sample(asks)
    with pytest.raises(ValueError, match="session 0 cannot be closed while its request is pending"):
        one.close(first)  # the first of two asks above was taken
    with pytest.raises(ValueError, match="top_p=0.0; expected more than 0"):
        engine(slots=2).sample([(first, 1.0, 0, 0.0)])
    with pytest.raises(ValueError, match="context=4096.*max_position_embeddings less the prefix's 0 ids, 2048"):
        engine(context=4096)


# ---- drafts ----------------------------------------------------------------------------------------------------------


def play(drafts: int, early: bool, prefix=()) -> tuple[list[list[int]], Engine]:
    """Ids of six sessions in four slots, greedy and sampled, over five turns, three times over."""
    one = engine(slots=4, rows=4, context=120, max_new_tokens=12, drafts=drafts, early=early, prefix=prefix)
    random, found = np.random.default_rng(0), []
    for game in range(3):
        sessions = [one.open() for _ in range(6)]
        for _ in range(5):
            for session in sessions:
                one.extend(session, random.integers(0, 8, 7).tolist())
            requests = [(session, (0.0, 1.0)[session % 2], 100 * game + session) for session in sessions]
            found += [reply.ids for reply in one.sample(requests)]
        for session in sessions:
            one.close(session)
    return found, one


def test_drafts_change_no_id(monkeypatch):
    monkeypatch.setattr(engine_module, "TILE", Tile(64, 16))  # few shapes to compile
    monkeypatch.setattr(group_module, "FIRST_BLOCK", 128)
    expected, plain = play(drafts=0, early=False)
    assert plain.sampled == plain.steps == sum(map(len, expected))
    for drafts, early in ((3, False), (3, True), (1, False), (0, True)):
        found, one = play(drafts, early)
        assert found == expected
        assert one.sampled == plain.sampled
        assert (one.steps < plain.steps) == (drafts > 0)
    prefix = prompt(9)
    assert play(3, True, prefix)[0] == play(0, False, prefix)[0] != expected


def test_drafts_are_what_followed_the_longest_match():
    """Of [1 2 3], later [9 2 3], then 1 2 3: the first match is longer. A stop id and what follows is no draft."""
    text = [[1, 2, 3, 7, 8, 9, 2, 3, 4, 4, 1, 2, 3, 0], [1, 2, 6, STOP, 1, 2, 7, 7, 2, 0, 0, 0, 0, 0], [4] * 14]
    ends, stops = jnp.array([12, 8, 0]), jnp.arange(61) == STOP
    drafts, usable = look_up_drafts(jnp.array(text), ends, stops, 3)
    assert usable.tolist() == [3, 3, 0]
    assert drafts[:2].tolist() == [[7, 8, 9], [7, 7, 2]]
    drafts, usable = look_up_drafts(jnp.array(text)[1:2], jnp.array([5]), stops, 3)
    assert (drafts[0, 0], usable.tolist()) == (6, [1])


def test_only_right_drafts_that_were_wanted_count():
    ids = jnp.array([[9, 1, 2], [9, 1, 2], [9, 1, 2], [9, 7, 2]])
    drawn = jnp.array([[1, 2, 3], [1, 2, 3], [1, 5, 3], [1, 2, 3]])
    assert accepted(ids, drawn, jnp.array([3, 2, 3, 3])).tolist() == [3, 2, 2, 1]


def test_appending_at_once_equals_appending_by_row():
    random = np.random.default_rng(0)
    for case in range(50):
        P = int(random.integers(1, 9))
        block = random.normal(size=(4, 2, 3, 16, 8)), random.normal(size=(4, 2, 4, 3, 8, 4))
        fresh = random.normal(size=(3, P, 2, 16)), random.normal(size=(3, P, 2, 4, 4))
        rows, lengths = random.permutation(4)[:3], random.integers(0, 40, 3)
        where = 8 * (case % 3), rows, lengths, random.integers(0, P + 1, 3)
        arrays = jax.tree.map(jnp.asarray, (block, fresh, *where))
        one, other = (write(*arrays) for write in (append_at_once, append_by_row))
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_base_alone_shares_the_arrays_of_an_adapted_one(tmp_path):
    source, ids = adapted(tmp_path, "nf4"), prompt(9)
    decoder = make_decoder(source, "nf4")
    bare = without_adapter(decoder)
    assert without_adapter(make_decoder(source, "fp32")) is None  # added to the base
    held = {id(array) for array in jax.tree.leaves(decoder.weights.layers)}
    assert {id(array) for array in jax.tree.leaves(bare.weights.layers)} < held
    one = Engine(bare, slots=2, context=CONTEXT, max_new_tokens=6, stop_ids=[STOP])
    session = one.open()
    one.extend(session, ids)
    [reply] = one.sample([(session, 1.0, 3)])
    expected = full_logprobs(load_model(tmp_path, weights="nf4"), ids + reply.ids)[9:]
    assert np.abs(expected - reply.logprobs).max() < 1e-4


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_nothing_of_the_size_of_the_cache_is_copied(monkeypatch):
    """Decoding for all slots reads the cache where it lies, and writing goes into the donated block."""
    monkeypatch.setattr(engine_module, "TILE", Tile(64, 16))
    rows, T, H, C = 16, 8, TINY.num_attention_heads, TINY.head_dim
    graph, stacked = nnx.split(model().layers)
    layers = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(2)]
    nothing = jnp.zeros((2, C, 0)), jnp.zeros((2, 0, C))
    view = DecoderWeights(
        model().embed[...], model().norm[...], model().unembed().T, np.arange(61) == STOP, layers, [nothing] * 2
    )
    block = (jnp.zeros((rows, 2, 16, C, 64)), jnp.zeros((rows, 2, 1, 16, 64, C)))  # 1,024 places
    size = sum(x.nbytes for x in block)
    ints = np.zeros(rows, np.int32)
    floats = ints.astype(np.float32)
    asked = SamplingParams(ints, ints, floats, floats, ints.astype(np.uint32))
    text = np.zeros((rows, T + 2), np.int32), ints
    how = {"chunk": T, "drafts": 0, "early": False}
    decoding = decode.lower(Graph(graph), TINY, view, [[block]] * 2, ints, asked, *text, **how).compile()
    scores = rows * H * 1024 * 4
    assert decoding.memory_analysis().temp_size_in_bytes < 4 * scores < size
    writing = append.lower(block, empty_buffer(TINY, rows, T, jnp.float32), 0, ints, ints, ints).compile()
    assert writing.memory_analysis().alias_size_in_bytes >= size
    assert writing.memory_analysis().temp_size_in_bytes < size / 2


def test_a_group_is_cut_where_its_rows_reach_unequally_far():
    assert group_module.parts([256] * 16, 16) == [slice(0, 16)]
    assert group_module.parts([512] * 8 + [3072] * 4, 16) == [slice(0, 8), slice(8, 12)]
    assert group_module.parts([256, 3072], 16) == [slice(0, 2)]  # one row more costs less than a step more
    for reaches in ([0], [256, 384, 512, 768, 1024, 1536, 2048, 3072, 3072]):
        cuts = group_module.parts(reaches, 16)
        assert [index for cut in cuts for index in range(len(reaches))[cut]] == [*range(len(reaches))]

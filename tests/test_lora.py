"""The decoder, its NF4 base and its adapters: against plain numpy and dense layers (test_families.py: transformers)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora import attention, logprobs, nf4
from lora.config import Config
from lora.linear import FUSED, NF4, TARGETS, LoRAConfig, LoRAParam, adapter_matmul, drop, nf4_matmul
from lora.load import load_model
from lora.logprobs import token_logprobs
from lora.model import CausalLM
from tests.support.helpers import TINY, logits_of, random_ids, with_random_adapter

ALL = LoRAConfig(rank=4, alpha=12.0, targets=TARGETS)


# ---- the adapter -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["nf4", "fp32"])
def test_adapter_is_alpha_over_rank_times_b_a(base_dir, weights):
    """A forgotten or doubled alpha/r, or A and B swapped, shows against one dense product in numpy."""
    model = with_random_adapter(load_model(base_dir, weights=weights, lora=ALL))
    layer = nnx.merge(*(lambda graph, state: (graph, jax.tree.map(lambda x: x[1], state)))(*nnx.split(model.layers)))
    for name, parts in FUSED.items():
        linear = getattr(layer, name)
        x = np.random.default_rng(1).standard_normal((2, 3, linear.inputs)).astype(np.float32)
        for part, got in zip(parts, linear(jnp.asarray(x)), strict=True):
            dense = dense_weight(linear, part)
            full = dense + 12.0 / 4 * np.asarray(linear.b[part][...]) @ np.asarray(linear.a[part][...])
            assert np.abs(np.asarray(got) - x @ full.T).max() < 1e-4
            assert np.abs(x @ (full - dense).T).max() > 1  # else this test says nothing


def dense_weight(linear, part: str) -> np.ndarray:
    """The base's weight [O, I] of a part as numpy computes it."""
    if not linear.quantized:
        return np.asarray(linear.weight[part][...])
    weight = nf4.VALUES[np.asarray(linear.codes[...], np.uint8)] * np.asarray(linear.absmax[...])[..., None]
    return np.split(weight.reshape(len(weight), -1), np.cumsum(linear.rows)[:-1])[linear.parts.index(part)]


def test_qlora_gradients_are_those_of_the_dense_layer():
    random = np.random.default_rng(2)
    codes, absmax = nf4.quantize(random.standard_normal((48, 128)).astype(np.float32))
    codes, absmax = jnp.asarray(codes, jnp.uint4), jnp.asarray(absmax)
    weight = nf4.dequantize(codes, absmax).reshape(48, 128)
    x, a, b = (jnp.asarray(random.standard_normal(s), jnp.float32) for s in ((2, 5, 128), (4, 128), (48, 4)))

    def ours(x, a, b):
        return jnp.sin(nf4_matmul(x, NF4(codes, absmax), (48,), 2) + adapter_matmul(x, a, b, 3.0)).sum()

    def dense(x, a, b):
        return jnp.sin(x @ (weight + 3.0 * b @ a).T).sum()

    for got, expected in zip(jax.grad(ours, (0, 1, 2))(x, a, b), jax.grad(dense, (0, 1, 2))(x, a, b), strict=True):
        assert jnp.abs(got - expected).max() < 2e-3 * jnp.abs(expected).max()


@pytest.mark.parametrize("weights", ["nf4", "fp32"])
def test_gradients_reach_a_and_b_and_nothing_else(base_dir, weights):
    lora = LoRAConfig(rank=2, alpha=8.0, targets=("q", "v", "down"))
    model = load_model(base_dir, weights=weights, lora=lora)
    ids = jnp.asarray(random_ids(2, 9))
    graph, adapter, frozen = nnx.split(model, LoRAParam, ...)

    @jax.jit
    @jax.grad
    def gradient_of(adapter):
        return token_logprobs(nnx.merge(graph, adapter, frozen), ids, jnp.ones_like(ids)).sum()

    fresh = dict(nnx.to_flat_state(gradient_of(adapter)))
    assert {path[2:] for path in fresh} == {(side, t) for t in lora.targets for side in "ab"}
    for path, gradient in fresh.items():  # B is zero at the start, so A has none yet
        assert (np.abs(gradient[...]).max() > 0) == (path[2] == "b")
    _, adapter, _ = nnx.split(with_random_adapter(model), LoRAParam, ...)
    for gradient in jax.tree.leaves(gradient_of(adapter)):
        assert (np.abs(gradient).max(axis=(1, 2)) > 0).all()  # in every layer


def test_fresh_adapter_changes_nothing_and_comes_from_its_seed(base_dir):
    plain = load_model(base_dir, weights="nf4")
    one, two = (load_model(base_dir, weights="nf4", lora=LoRAConfig(rank=4), seed=seed) for seed in (1, 2))
    assert np.array_equal(logits_of(plain, random_ids(1, 7)), logits_of(one, random_ids(1, 7)))
    again = load_model(base_dir, weights="nf4", lora=LoRAConfig(rank=4, targets=("v", "q")), seed=1)
    one, two, again = (model.layers.qkv.a["q"][...] for model in (one, two, again))
    assert not np.array_equal(one, two)
    assert np.array_equal(one, again)
    assert np.abs(one).max() <= 64**-0.5 < 2 * np.abs(one).max()


@pytest.mark.parametrize("weights", ["nf4", "nf4-dq"])
def test_no_decoded_weight_is_kept_for_the_backward_pass(base_dir, weights):
    """When AD goes through `dequantize`, weights of all layers leave the forward scan as floats [N, O, G, 64]."""
    model = load_model(base_dir, weights=weights, lora=ALL)
    ids = jnp.asarray(random_ids(1, 5))
    graph, adapter, frozen = nnx.split(model, LoRAParam, ...)

    def loss(adapter):
        return token_logprobs(nnx.merge(graph, adapter, frozen), ids, jnp.ones_like(ids)).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapter).jaxpr
    crossing = {
        (str(variable.aval.dtype), variable.aval.shape)
        for equation in jaxpr.eqns
        if equation.primitive.name == "scan"
        for variable in equation.outvars
    }
    N = TINY.num_hidden_layers
    weights = {getattr(model.layers, name).codes.shape for name in FUSED}
    weights |= {(N, shape[1], shape[2] * shape[3]) for shape in weights}
    assert any(shape[:1] == (N,) for _, shape in crossing)  # there are residuals, and none is a weight
    assert not [shape for dtype, shape in crossing if shape in weights and dtype.startswith(("float", "bfloat"))]


def test_bfloat16_activations_keep_the_adapter_and_its_gradient_in_float32(base_dir):
    exact = with_random_adapter(load_model(base_dir, weights="nf4", lora=ALL))
    rough = with_random_adapter(load_model(base_dir, weights="nf4", lora=ALL, dtype=jnp.bfloat16))
    ids = random_ids(2, 9)
    graph, adapter, frozen = nnx.split(rough, LoRAParam, ...)

    @jax.jit
    @jax.value_and_grad
    def loss(adapter):
        return token_logprobs(nnx.merge(graph, adapter, frozen), ids, np.ones_like(ids)).sum()

    value, gradient = loss(adapter)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert rough.embed.dtype == jnp.bfloat16
    logprobs = jax.nn.log_softmax(logits_of(exact, ids)[:, :-1])
    assert abs(value - np.take_along_axis(np.asarray(logprobs), ids[:, 1:, None], axis=2).sum()) < 0.02 * abs(value)


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="qkv.*expected.*'gate'"):
        LoRAConfig(targets=("q", "qkv"))


def test_dropout_drops_for_the_adapter_alone_and_by_its_key(base_dir):
    lora = LoRAConfig(rank=4, alpha=12.0, targets=("q", "down"), dropout=0.5)
    model = with_random_adapter(load_model(base_dir, weights="nf4", lora=lora))
    ids = random_ids(1, 40)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, key):
        return token_logprobs(nnx.merge(graph, state), ids, np.ones_like(ids), key=key)

    plain, one, again, two = (run(state, key) for key in (None, *map(jax.random.key, (0, 0, 1))))
    assert np.array_equal(one, again) and not np.array_equal(one, two) and not np.array_equal(one, plain)
    x = jnp.ones((400, 64))
    dropped = drop(x, 0.25, jax.random.key(0))
    assert set(np.unique(dropped).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(dropped.mean()) - 1) < 0.02
    no_adapter = with_zero_b(model)
    graph, state = nnx.split(no_adapter)
    assert np.array_equal(run(state, None), run(state, jax.random.key(3)))  # the base sees all of it


def with_zero_b(model: CausalLM) -> CausalLM:
    graph, adapter, rest = nnx.split(model, LoRAParam, ...)
    flat = nnx.to_flat_state(adapter)
    zero = [(path, value.replace(0 * value[...]) if path[-2] == "b" else value) for path, value in flat]
    return nnx.merge(graph, nnx.from_flat_state(zero), rest)


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 6])
def test_packed_rows_give_the_logprobs_of_separate_rows(window):
    """Attention or positions that cross a segment, and logits chunks cut wrongly, all show here."""
    model = CausalLM(Config(**{**vars(TINY), "sliding_window": window}), rngs=nnx.Rngs(3))
    lengths, L, orders = (130, 1, 47, 62), 256, ((0, 1, 2, 3), (2, 0, 3, 1))
    texts = [random_ids(n, seed=n) for n in lengths]
    ids, segments = np.zeros((2, L), np.int32), np.zeros((2, L), np.int32)
    for row, order in enumerate(orders):
        ids[row, : sum(lengths)] = np.concatenate([texts[i] for i in order])
        segments[row, : sum(lengths)] = np.repeat(np.arange(1, 5), [lengths[i] for i in order])
    graph, state = nnx.split(model)
    packed = np.asarray(jax.jit(lambda state: token_logprobs(nnx.merge(graph, state), ids, segments))(state))
    assert (packed[segments == 0] == 0).all()
    for i, text in enumerate(texts):
        alone = jax.nn.log_softmax(logits_of(model, text[None]))[0]
        expected = np.take_along_axis(np.asarray(alone)[:-1], text[1:, None], axis=1)[:, 0]
        for row, order in enumerate(orders):
            got = packed[row][segments[row] == 1 + order.index(i)]
            assert got[0] == 0
            assert np.abs(got[1:] - expected).max(initial=0) < 1e-5


def test_window_hides_what_is_older(monkeypatch):
    monkeypatch.setattr(attention, "ATTENTION_BLOCK", 8)
    one_layer = Config(**{**vars(TINY), "num_hidden_layers": 1, "sliding_window": 6})
    model = CausalLM(one_layer, rngs=nnx.Rngs(0))
    ids = random_ids(1, 30)
    changed = ids.copy()
    changed[0, 10] = (changed[0, 10] + 1) % TINY.vocab_size
    moved = np.abs(logits_of(model, ids) - logits_of(model, changed)).max(axis=(0, 2)) > 0
    assert moved[10:16].all()
    assert not moved[:10].any() and not moved[16:].any()


def test_chunked_logits_and_remat_change_nothing(monkeypatch):
    model = CausalLM(TINY, rngs=nnx.Rngs(0))
    ids, segments = random_ids(2, 40), np.repeat([[1, 2], [1, 0]], 20, axis=1).astype(np.int32)
    graph, params = nnx.split(model)

    def value_and_grad(**how):
        loss = jax.value_and_grad(lambda p: token_logprobs(nnx.merge(graph, p), ids, segments, **how).sum())
        return jax.jit(loss)(params)

    whole, gradient = value_and_grad()
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 0)
    monkeypatch.setattr(logprobs, "TOKENS_PER_CHUNK", 7)
    chunked, chunked_gradient = value_and_grad(remat="full")
    assert abs(whole - chunked) < 1e-3
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(chunked_gradient), strict=True):
        assert jnp.abs(one - other).max() < 1e-3

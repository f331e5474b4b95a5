"""The Mistral, its NF4 base and its adapters: against transformers, bitsandbytes, PEFT and plain numpy."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora import attention, mistral, nf4
from lora.checkpoint import base_sha
from lora.convert import load_adapter, load_model, save_adapter, save_model
from lora.linear import FUSED, NF4, TARGETS, LoRAConfig, LoRAParam, adapter_matmul, nf4_matmul
from lora.mistral import Config, Mistral, token_logprobs

TINY = Config(
    vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, rope_theta=1e6,
)  # fmt: skip
GOLDEN = Path(__file__).with_name("golden_nf4.json")
ALL = LoRAConfig(rank=4, alpha=12.0, targets=TARGETS)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A random base in Hugging Face layout, saved by us."""
    folder = tmp_path_factory.mktemp("base")
    save_model(Mistral(TINY, rngs=nnx.Rngs(0)), folder)
    return folder


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, shape).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, state, ids_BL):
    model = nnx.merge(graph, state)
    return model.logits(model(ids_BL, jnp.ones_like(ids_BL)))


def logits_of(model: Mistral, ids_BL: np.ndarray) -> np.ndarray:
    """Logits [B, L, V] of rows that are one text each."""
    return np.asarray(_logits(*nnx.split(model), ids_BL))


def with_random_adapter(model: Mistral) -> Mistral:
    """The model with both A and B away from zero."""
    graph, adapter, rest = nnx.split(model, LoRAParam, ...)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)


# ---- NF4 -------------------------------------------------------------------------------------------------------------


def nf4_cases() -> dict[str, np.ndarray]:
    """Weights [4, 128] of every kind that a quantiser can get wrong."""
    random = np.random.default_rng(5)
    normal = random.standard_normal((4, 128)).astype(np.float32)
    borders = (nf4.VALUES[:-1] + nf4.VALUES[1:]) / 2
    edges = np.concatenate([borders, np.nextafter(borders, 1), np.nextafter(borders, -1), [1.0]])
    return {
        "normal": normal,
        "zero": np.zeros_like(normal),
        "constant": np.full_like(normal, -0.37),
        "one_spike": np.where(np.arange(128) == 77, 5.0, 0.01 * normal).astype(np.float32),
        "huge": normal * np.float32(1e37),
        "tiny": normal * np.float32(1e-37),
        "denormal": normal * np.float32(1e-42),
        "borders": np.resize(edges, (4, 128)).astype(np.float32),
        "values": np.resize(nf4.VALUES, (4, 128)) * np.float32(0.013),
    }


def packed_hex(codes: np.ndarray) -> str:
    """Codes as bitsandbytes packs them, the first of two in the high half of a byte."""
    return (codes[..., ::2] << 4 | codes[..., 1::2]).astype(np.uint8).tobytes().hex()


@pytest.mark.parametrize("case", nf4_cases())
def test_nf4_is_what_bitsandbytes_gave(case):
    """Against `golden_nf4.json`, which `python -m tests.test_lora` writes where bitsandbytes is installed."""
    codes, absmax = nf4.quantize(nf4_cases()[case])
    golden = json.loads(GOLDEN.read_text())[case]
    assert packed_hex(codes) == golden["codes"]
    assert absmax.tobytes().hex() == golden["absmax"]


@pytest.mark.parametrize("case", nf4_cases())
def test_nf4_is_bitsandbytes_bit_for_bit(case):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = nf4_cases()[case]
    packed, state = functional.quantize_4bit(torch.tensor(weight), quant_type="nf4", blocksize=64)
    theirs = packed.numpy().reshape(4, 2, 32)
    codes, absmax = nf4.quantize(weight)
    assert np.array_equal(codes[..., ::2] << 4 | codes[..., 1::2], theirs)
    assert np.array_equal(absmax.view(np.uint32), state.absmax.numpy().reshape(4, 2).view(np.uint32))
    decoded = np.asarray(nf4.dequantize(jnp.asarray(codes, jnp.uint4), jnp.asarray(absmax))).reshape(4, 128)
    expected = functional.dequantize_4bit(packed, state).numpy()
    if case == "denormal":  # XLA flushes these to zero; nothing else may be lost
        assert np.abs(decoded - expected).max() < np.finfo(np.float32).tiny
    else:
        assert np.array_equal(decoded, expected)


def test_nf4_in_bfloat16_is_the_float32_product_rounded_once():
    codes, absmax = nf4.quantize(nf4_cases()["normal"])
    expected = (nf4.VALUES[codes] * absmax[..., None]).astype(jnp.bfloat16)
    assert np.array_equal(nf4.dequantize(jnp.asarray(codes, jnp.uint4), jnp.asarray(absmax), jnp.bfloat16), expected)


def test_width_that_is_no_multiple_of_64_names_the_layer_and_the_way_out(tmp_path):
    odd = Config(**{**vars(TINY), "intermediate_size": 96})
    save_model(Mistral(odd, rngs=nnx.Rngs(0)), tmp_path)
    with pytest.raises(ValueError, match="'down' has 96 inputs.*multiple of 64.*fp32"):
        load_model(tmp_path, weights="nf4")
    assert logits_of(load_model(tmp_path, weights="fp32"), random_ids(1, 5)).shape == (1, 5, TINY.vocab_size)
    with pytest.raises(ValueError, match=r"\(3, 96\).*multiple of 64"):
        nf4.quantize(np.zeros((3, 96), np.float32))


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


def test_no_decoded_weight_is_kept_for_the_backward_pass(base_dir):
    """When AD goes through `dequantize`, weights of all layers leave the forward scan as floats [N, O, G, 64]."""
    model = load_model(base_dir, weights="nf4", lora=ALL)
    ids = jnp.asarray(random_ids(1, 5))
    graph, adapter, frozen = nnx.split(model, LoRAParam, ...)

    def loss(adapter):
        return token_logprobs(nnx.merge(graph, adapter, frozen), ids, jnp.ones_like(ids)).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapter).jaxpr
    crossing = {
        (str(variable.aval.dtype), variable.aval.shape)
        for equation in jaxpr.eqns if equation.primitive.name == "scan" for variable in equation.outvars
    }  # fmt: skip
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


def test_merge_is_the_same_model(base_dir):
    model = with_random_adapter(load_model(base_dir, weights="nf4", lora=ALL))
    expected = logits_of(model, random_ids(2, 11))
    for name in FUSED:
        setattr(model.layers, name, getattr(model.layers, name).merged(jnp.float32))
    assert not jax.tree.leaves(nnx.state(model, LoRAParam))
    assert np.abs(logits_of(model, random_ids(2, 11)) - expected).max() < 1e-4


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="qkv.*expected.*'gate'"):
        LoRAConfig(targets=("q", "qkv"))


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 6])
def test_packed_rows_give_the_logprobs_of_separate_rows(window):
    """Attention or positions that cross a segment, and logits chunks cut wrongly, all show here."""
    model = Mistral(Config(**{**vars(TINY), "sliding_window": window}), rngs=nnx.Rngs(3))
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


@pytest.mark.parametrize("window", [None, 100])
def test_attention_and_its_gradient_are_those_of_all_scores_at_once(window):
    """Segments that need each number of keys, and a length that is no multiple of a block."""
    lengths, (B, L, H, K, C) = ((90, 350, 250), (610, 3, 77)), (2, 700, 4, 2, 8)
    segments = np.array([np.repeat([1, 2, 3, 0], [*n, L - sum(n)]) for n in lengths])
    rng = np.random.default_rng(0)
    q, k, v, wanted = (rng.normal(size=(B, L, n, C)).astype(np.float32) for n in (H, K, K, H))

    def dense(q, k, v):
        k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
        scores = jnp.einsum("blhc,bmhc->bhlm", q, k) * C**-0.5
        seen = attention.visible(segments, segments, 0, window)
        return jnp.einsum("bhlm,bmhc->blhc", jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30)), v)

    def ours(q, k, v):
        return attention.attention(q, k, v, jnp.asarray(segments), window, "blocks").reshape(B, L, H, C)

    def value_and_grad(attend):
        mask = (segments > 0)[:, :, None, None]
        return jax.jit(jax.value_and_grad(lambda *x: (attend(*x) * wanted * mask).sum(), argnums=(0, 1, 2)))(q, k, v)

    for one, other in zip(*(jax.tree.leaves(value_and_grad(attend)) for attend in (ours, dense)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_window_hides_what_is_older(monkeypatch):
    monkeypatch.setattr(attention, "ATTENTION_BLOCK", 8)
    one_layer = Config(**{**vars(TINY), "num_hidden_layers": 1, "sliding_window": 6})
    model = Mistral(one_layer, rngs=nnx.Rngs(0))
    ids = random_ids(1, 30)
    changed = ids.copy()
    changed[0, 10] = (changed[0, 10] + 1) % TINY.vocab_size
    moved = np.abs(logits_of(model, ids) - logits_of(model, changed)).max(axis=(0, 2)) > 0
    assert moved[10:16].all()
    assert not moved[:10].any() and not moved[16:].any()


def test_chunked_logits_and_remat_change_nothing(monkeypatch):
    model = Mistral(TINY, rngs=nnx.Rngs(0))
    ids, segments = random_ids(2, 40), np.repeat([[1, 2], [1, 0]], 20, axis=1).astype(np.int32)
    graph, params = nnx.split(model)

    def value_and_grad(**how):
        loss = jax.value_and_grad(lambda p: token_logprobs(nnx.merge(graph, p), ids, segments, **how).sum())
        return jax.jit(loss)(params)

    whole, gradient = value_and_grad()
    monkeypatch.setattr(mistral, "LOGITS_PER_CHUNK", 7 * TINY.vocab_size)
    chunked, chunked_gradient = value_and_grad(remat="full")
    assert abs(whole - chunked) < 1e-3
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(chunked_gradient), strict=True):
        assert jnp.abs(one - other).max() < 1e-3


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 4}, {"sliding_window": 7}]
)
def test_transformers_reads_ours_and_we_read_theirs(tmp_path, changes):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ours = Mistral(Config(**{**vars(TINY), **changes}), rngs=nnx.Rngs(1))
    save_model(ours, tmp_path / "ours")
    ids = random_ids(2, 23)
    theirs = transformers.MistralForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(logits_of(ours, ids) - expected).max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs", weights="fp32")
    assert again.config == ours.config
    assert np.abs(logits_of(again, ids) - expected).max() < 1e-4


def test_bfloat16_files_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    save_model(Mistral(TINY, rngs=nnx.Rngs(1)), tmp_path / "ours")
    theirs = transformers.MistralForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs.float()(torch.tensor(random_ids(1, 9))).logits.numpy()
    assert np.abs(logits_of(load_model(tmp_path / "theirs", weights="fp32"), random_ids(1, 9)) - expected).max() < 1e-4


def test_config_of_transformers_4_and_of_other_models(tmp_path, base_dir):
    raw = json.loads((base_dir / "config.json").read_text())
    old = {key: value for key, value in raw.items() if key not in ("rope_parameters", "head_dim")}
    (tmp_path / "config.json").write_text(json.dumps(old | {"rope_theta": 5e5, "num_attention_heads": 2}))
    config = Config.read(tmp_path)
    assert (config.rope_theta, config.head_dim) == (5e5, 32)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="llama.*expected.*mistral"):
        Config.read(tmp_path)


def test_checkpoint_of_another_shape_names_every_tensor(base_dir, tmp_path):
    config = json.loads((base_dir / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((base_dir / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"Missing: model\.layers\.3\.input_layernorm.*layers\.3\.self_attn\.v_proj"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 98}))
    with pytest.raises(ValueError, match=r"embed_tokens.*\(97, 64\).*\(98, 64\)"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        base_sha(tmp_path / "nothing")


def test_adapter_comes_back_as_it_was_and_only_on_its_base(base_dir, tmp_path):
    model = with_random_adapter(load_model(base_dir, weights="nf4", lora=ALL))
    save_adapter(tmp_path / "adapter", model, base_dir)
    assert not list((tmp_path / "adapter").glob("*.tmp"))
    again = load_adapter(base_dir, tmp_path / "adapter", "nf4")
    assert np.array_equal(logits_of(again, random_ids(2, 9)), logits_of(model, random_ids(2, 9)))
    save_model(Mistral(TINY, rngs=nnx.Rngs(9)), tmp_path / "other")
    with pytest.raises(ValueError, match="trained on another base"):
        load_adapter(tmp_path / "other", tmp_path / "adapter", "nf4")
    with pytest.raises(ValueError, match="without an adapter"):
        save_adapter(tmp_path / "none", load_model(base_dir), base_dir)
    with pytest.raises(ValueError, match="quantised or adapted"):
        save_model(model, tmp_path / "none")


def test_adapter_that_we_do_not_compute_is_refused(base_dir, tmp_path):
    save_adapter(tmp_path, load_model(base_dir, lora=LoRAConfig()), base_dir)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    odd = {"use_rslora": True, "target_modules": ["lm_head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | odd))
    with pytest.raises(ValueError, match="use_rslora=True.*lm_head.*expected a plain LoRA"):
        load_adapter(base_dir, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "k_proj"]}))
    with pytest.raises(ValueError, match="Missing: .*k_proj.*Unexpected: .*v_proj"):
        load_adapter(base_dir, tmp_path)


def test_peft_and_we_agree_on_each_other_s_adapters(base_dir, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    ids = random_ids(2, 13)

    def theirs(folder):
        base = transformers.MistralForCausalLM.from_pretrained(base_dir)
        with torch.no_grad():
            return peft.PeftModel.from_pretrained(base, folder).eval()(torch.tensor(ids)).logits.numpy()

    lora = LoRAConfig(rank=4, alpha=12.0, targets=("q", "v", "o", "up", "down"))
    model = with_random_adapter(load_model(base_dir, weights="fp32", lora=lora))
    save_adapter(tmp_path / "ours", model, base_dir)
    assert np.abs(theirs(tmp_path / "ours") - logits_of(model, ids)).max() < 1e-4

    base = transformers.MistralForCausalLM.from_pretrained(base_dir)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["k_proj", "gate_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(base_dir, tmp_path / "theirs", "fp32")
    assert np.abs(theirs(tmp_path / "theirs") - logits_of(loaded, ids)).max() < 1e-4
    assert np.abs(logits_of(loaded, ids) - logits_of(load_model(base_dir, weights="fp32"), ids)).max() > 1e-2


if __name__ == "__main__":
    import torch
    from bitsandbytes import functional

    golden = {}
    for name, weight in nf4_cases().items():
        packed, state = functional.quantize_4bit(torch.tensor(weight), quant_type="nf4", blocksize=64)
        golden[name] = {"codes": packed.numpy().tobytes().hex(), "absmax": state.absmax.numpy().tobytes().hex()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")

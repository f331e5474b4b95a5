"""Every supported family against transformers, bitsandbytes and PEFT, on random tiny models of transformers' classes.

Biases and norms are away from their initial values, and positions go beyond the original context of a scaled RoPE.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lora.adapter import save_adapter
from lora.checkpoint import HF_NAMES
from lora.config import Config
from lora.convert import Args, main
from lora.decoder import make_decoder
from lora.engine import Engine
from lora.linear import FUSED, TARGETS, LoRAConfig, LoRAParam
from lora.load import load_adapter, load_model, save_model
from lora.logprobs import token_logprobs
from lora.sharding import make_mesh
from lora.train_step import Batch, initial_state, make_update
from models.tokenizer import byte_tokenizer
from tests.support.helpers import all_tensors, logits_of, quantised_by_transformers, with_random_adapter
from train_pg import objective

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama3(factor: float) -> dict:
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    return {"rope_type": "llama3", "factor": factor, **bands, "rope_theta": 5e5}


# Name -> the config class in transformers, and what sets the family apart.
FAMILIES = {
    "llama-2": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-3.1": ("LlamaConfig", {"rope_parameters": llama3(8.0), "eos_token_id": [2, 3, 5]}),
    "llama-3.2": ("LlamaConfig", {"rope_parameters": llama3(32.0), "head_dim": 32, "tie_word_embeddings": True}),
    "smollm2": (
        "LlamaConfig",
        {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "qwen2.5": ("Qwen2Config", {"sliding_window": 32, "use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2Config", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3-tied": ("Qwen3Config", {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral-0.1": ("MistralConfig", {"sliding_window": 9}),
    "nemo": ("MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "ministral": (
        "MinistralConfig",
        {"head_dim": 32, "sliding_window": 200, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}
# A family, what its config.json says of windows, and what is computed: the window of all layers, and positions.
QWEN_WINDOW = {"sliding_window": 9, "use_sliding_window": True}
MIXED = ["full_attention", "sliding_attention"]
WINDOWS = [
    ("llama", {"sliding_window": 9}, (None, 512)),  # which Llama ignores
    ("qwen2", {"sliding_window": 9}, (None, 512)),
    ("qwen3", {"sliding_window": 9, "use_sliding_window": False}, (None, 512)),
    ("qwen3", QWEN_WINDOW | {"max_window_layers": 0}, (9, 512)),
    ("qwen2", QWEN_WINDOW, (None, 512)),  # from layer 28 on, of which there are 2
    ("qwen2", QWEN_WINDOW | {"max_window_layers": 1}, (None, 9)),  # a part of the layers
    ("mistral", {"sliding_window": 9}, (9, 512)),
    ("mistral", {"sliding_window": None}, (None, 512)),
    ("mistral", {"sliding_window": 9, "layer_types": MIXED}, (None, 9)),
    ("ministral", {"sliding_window": 900, "layer_types": MIXED}, (None, 512)),
    ("ministral", {"sliding_window": 9, "layer_types": ["full_attention"] * 2}, (None, 512)),
]
FAST = ("llama-3.1", "qwen2.5", "qwen3")
EACH = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
LENGTH = 100  # tokens of a text: three times the original context of the scaled RoPE
ALL = LoRAConfig(rank=4, alpha=12.0, targets=TARGETS)


@pytest.fixture(scope="module", params=EACH)
def folder(request, tmp_path_factory) -> Path:
    """A random model of the family as transformers writes it, with a tokenizer."""
    name, changes = FAMILIES[request.param]
    config = getattr(transformers, name)(**SIZES | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for key, weight in model.named_parameters():
        if "norm" in key:
            weight.data = 1 + 0.3 * torch.randn_like(weight)
        elif key.endswith("bias"):
            weight.data = 0.5 * torch.randn_like(weight)
        else:
            weight.data *= 5  # away from uniform predictions
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    byte_tokenizer(SIZES["vocab_size"]).save(str(folder / "tokenizer.json"))
    return folder


def theirs(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def their_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def texts(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape).astype(np.int32)


def test_logits_are_those_of_transformers_and_ours_come_back(folder, tmp_path):
    ids = texts(2, LENGTH)
    expected = their_logits(theirs(folder), ids)
    assert expected.std() > 0.3  # else this test says nothing
    model = load_model(folder, weights="fp32")
    assert np.abs(logits_of(model, ids) - expected).max() < 1e-4
    save_model(model, tmp_path)
    assert Config.read(tmp_path) == model.config
    assert np.abs(their_logits(theirs(tmp_path), ids) - expected).max() < 1e-4


def test_what_sets_the_family_apart_is_computed(folder):
    """Without biases, norms of heads or scaled RoPE the logits are others: the test above can fail."""
    model, ids = load_model(folder, weights="fp32"), texts(1, LENGTH)
    before = logits_of(model, ids)
    state = nnx.state(model)
    for path, leaf in nnx.to_flat_state(state):
        if {"bias", "q_norm", "k_norm"} & set(path):
            plain = leaf.replace(0 * leaf[...] + ("bias" not in path))
            nnx.update(model, nnx.from_flat_state([(path, plain)]))
            assert np.abs(logits_of(model, ids) - before).max() > 1e-2
            nnx.update(model, state)
    if model.config.rope_scaling is not None:
        model.config = type(model.config)(**{**vars(model.config), "rope_scaling": None})
        assert np.abs(logits_of(model, ids) - before).max() > 1e-2


def test_sampling_is_that_of_generate_and_its_cache_that_of_the_forward_pass(folder):
    model, reference = load_model(folder, weights="fp32"), theirs(folder)
    opening, count = texts(1, 40, seed=3), 24
    with torch.no_grad():
        text = reference.generate(
            torch.tensor(opening), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    engine = Engine(make_decoder(model), slots=2, context=LENGTH, max_new_tokens=count, stop_ids=[])
    session, turn = engine.open(), texts(5, seed=4)[:5]
    engine.extend(session, opening[0].tolist())
    [first] = engine.sample([(session, 0.0, 0)])
    assert first.ids == text[0, opening.shape[1] :].tolist()
    engine.extend(session, turn.tolist())  # the second turn reads what the first has cached
    [second] = engine.sample([(session, 0.0, 0)])
    whole = np.array([[*opening[0], *first.ids, *turn, *second.ids]], np.int32)
    graph, state = nnx.split(model)
    full = jax.jit(lambda state: token_logprobs(nnx.merge(graph, state), whole, np.ones_like(whole)))(state)
    full = np.asarray(full)[0]
    assert np.abs(full[40 : 40 + count] - first.logprobs).max() < 1e-4
    assert np.abs(full[45 + count :] - second.logprobs).max() < 1e-4


@pytest.mark.parametrize("weights", ["nf4", "nf4-dq"])
def test_a_quantised_folder_is_what_transformers_and_bitsandbytes_write(folder, tmp_path, weights, monkeypatch):
    pytest.importorskip("bitsandbytes")
    # On a CPU with AVX512-BF16 it would compute in bfloat16, whatever it is told.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    reference = quantised_by_transformers(folder, tmp_path / "theirs", weights == "nf4-dq")
    main(Args(model=folder, out=tmp_path / "ours", weights=weights))
    assert all_tensors(tmp_path / "ours") == all_tensors(tmp_path / "theirs")
    ids = texts(2, LENGTH)
    expected = their_logits(reference, ids)
    for who in ("ours", "theirs"):
        assert np.abs(logits_of(load_model(tmp_path / who, weights=weights), ids) - expected).max() < 2e-4
        assert np.abs(their_logits(theirs(tmp_path / who), ids) - expected).max() < 2e-4


def test_adapters_go_to_peft_and_come_back_and_merge(folder, tmp_path):
    peft, ids = pytest.importorskip("peft"), texts(2, LENGTH)
    model = with_random_adapter(load_model(folder, weights="fp32", lora=ALL))
    save_adapter(tmp_path / "ours", model, folder)
    expected = their_logits(peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "ours").eval(), ids)
    assert np.abs(logits_of(model, ids) - expected).max() < 1e-3 * np.abs(expected).max()
    main(Args(model=folder, adapter=tmp_path / "ours", out=tmp_path / "merged", weights="fp32"))
    assert np.abs(their_logits(theirs(tmp_path / "merged"), ids) - expected).max() < 1e-3 * np.abs(expected).max()

    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["k_proj", "gate_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(theirs(folder), config).eval()
    tuned.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(folder, tmp_path / "theirs", "fp32")
    assert np.abs(logits_of(loaded, ids) - their_logits(tuned, ids)).max() < 1e-4


def test_an_export_has_rope_where_transformers_4_and_5_look_for_it(folder, tmp_path):
    main(Args(model=folder, out=tmp_path / "out", weights="nf4"))
    config, wanted = json.loads((tmp_path / "out" / "config.json").read_text()), Config.read(folder)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == wanted.rope_theta
    scaling = {"rope_type": "llama3", **wanted.rope_scaling._asdict()} if wanted.rope_scaling else None
    assert config.get("rope_scaling") == scaling
    assert config["rope_parameters"].items() >= (scaling or {"rope_type": "default"}).items()
    assert Config.read(tmp_path / "out") == wanted


@pytest.mark.parametrize("family, said, computed", WINDOWS)
def test_a_window_of_some_layers_ends_the_positions(tmp_path, family, said, computed):
    file = SIZES | {"model_type": family, "rms_norm_eps": 1e-6, "head_dim": 16} | said
    (tmp_path / "config.json").write_text(json.dumps(file))
    config = Config.read(tmp_path)
    assert (config.sliding_window, config.max_position_embeddings) == computed


def test_one_step_of_adamw_is_peft_s(folder):
    """The same batch, the same A and B (neither zero), decay and all: A and B after the step are the same."""
    peft = pytest.importorskip("peft")
    lora = LoRAConfig(rank=4, alpha=12.0, targets=("q", "v", "down"))
    model = load_model(folder, weights="fp32", lora=lora)
    graph, adapter, rest = nnx.split(model, LoRAParam, ...)
    drawn = [0.05 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(jax.tree.leaves(adapter))]
    model = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(adapter), drawn), rest)
    ids, rate, decay = texts(2, 50), 1e-3, 0.1

    tuned = peft.get_peft_model(
        theirs(folder), peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    where = {
        (part, i, side): tuned.get_parameter(
            f"base_model.model.model.layers.{i}.{HF_NAMES[part]}.lora_{side.upper()}.default.weight"
        )
        for part in lora.targets
        for i in range(SIZES["num_hidden_layers"])
        for side in "ab"
    }
    before = {part: getattr(model.layers, name) for name, parts in FUSED.items() for part in parts}
    for (part, i, side), weight in where.items():
        weight.data = torch.tensor(np.asarray(getattr(before[part], side)[part][i]))
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=rate, weight_decay=decay)
    logits = tuned(torch.tensor(ids)).logits[:, :-1]
    chosen = torch.log_softmax(logits, -1).gather(2, torch.tensor(ids)[:, 1:, None])
    (-chosen.sum() / 2).backward()
    optimizer.step()

    mesh = make_mesh((1, 1, 1))
    graph, adapter, frozen = nnx.split(model, LoRAParam, ...)
    adapter, frozen = jax.device_put((adapter, frozen), NamedSharding(mesh, PartitionSpec()))
    ours = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(decay))
    update = make_update(objective, graph, ours, mesh, adapter, frozen)
    batch = Batch(ids[None], np.ones_like(ids)[None], np.ones((1, *ids.shape), np.float32))
    after, _, _ = update(adapter, initial_state(ours, adapter, mesh), frozen, rate, batch, 2.0, None)
    layers = nnx.merge(graph, after, frozen).layers
    stepped = {part: getattr(layers, name) for name, parts in FUSED.items() for part in parts}
    for (part, i, side), weight in where.items():
        got = np.asarray(getattr(stepped[part], side)[part][i])
        assert np.abs(got - weight.detach().numpy()).max() < 1e-5
        assert np.abs(got - np.asarray(getattr(before[part], side)[part][i])).max() > 5e-4  # it moved

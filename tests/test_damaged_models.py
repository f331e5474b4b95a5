"""Folders of models, adapters and tokenizers that are damaged, contradict themselves or hold what is not computed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers.processors import TemplateProcessing

from agent.local import LocalPolicy
from agent.policy import Ask
from lora import score
from lora.adapter import REFUSED_OPTIONS, read_adapter, save_adapter
from lora.checkpoint import STATE, Checkpoint, base_facts, layer_tensor
from lora.config import Config
from lora.convert import Args, main
from lora.decoder import make_decoder
from lora.engine import Engine
from lora.linear import TARGETS, LoRAConfig
from lora.load import load_model, save_model
from lora.model import CausalLM
from lora.tokenizer import load_tokenizer, prompt_ids
from models.tokenizer import byte_tokenizer
from tests.support.helpers import logits_of, random_ids, with_random_adapter

SMALL = Config(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=64,
)
DEEP = "[" * 10_000 + "]" * 10_000
NORM, QUERIES = "model.norm.weight", layer_tensor(0, "q")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small model over bytes with its tokenizer, an adapter, and a conversion to NF4 with double quantisation."""
    folder = tmp_path_factory.mktemp("whole")
    save_model(CausalLM(SMALL, rngs=nnx.Rngs(0)), folder / "base")
    byte_tokenizer().save(str(folder / "base" / "tokenizer.json"))
    model = with_random_adapter(load_model(folder / "base", lora=LoRAConfig(rank=2)))
    save_adapter(folder / "adapter", model, folder / "base")
    for weights in ("nf4", "nf4-dq"):
        main(Args(model=folder / "base", out=folder / weights, weights=weights))
    return folder


@pytest.fixture
def base(whole, tmp_path) -> Path:
    return shutil.copytree(whole / "base", tmp_path / "base")


@pytest.fixture
def adapter(whole, tmp_path) -> Path:
    return shutil.copytree(whole / "adapter", tmp_path / "adapter")


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path: Path, **changes) -> None:
    """Replaces or, with None, removes tensors."""
    tensors = load_file(path) | {name: value for name, value in changes.items() if value is not None}
    save_file({name: value for name, value in tensors.items() if changes.get(name, 0) is not None}, path)


def with_value(path: Path, name: str, value: float) -> np.ndarray:
    """The tensor with one other value."""
    array = load_file(path)[name].copy()
    array.reshape(-1)[array.size // 2] = value
    return array


# ---- config.json -----------------------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
NOT_COMPUTED = [
    ({"model_type": "gemma3_text"}, "model_type is 'gemma3_text'; expected one of llama, mistral"),
    ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
    ({"model_type": "qwen3_5"}, "model_type is 'qwen3_5'"),
    ({"model_type": "smollm3"}, "model_type is 'smollm3'"),
    ({"model_type": None}, "model_type is None"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"rope_scaling": YARN}, "rope_scaling.type is 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type is 'linear'"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
    ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "rope_scaling.rope_type is 'longrope'"),
    (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
        "llama3 has .*None.*expected four numbers",
    ),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor the larger one"),
    ({"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"factor": 2.0}}, "scale RoPE in different ways"),
    ({"rope_scaling": LLAMA3 | {"beta_fast": 32}}, "rope_scaling.beta_fast is 32"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "rope_parameters.full_attention"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"layer_types": ["full_attention", "full_attention"]}, "layer_types has 2 entries for 1 layers"),
    ({"layer_types": ["sliding_attention"]}, "there is no sliding window"),
    ({"layer_types": ["chunked_attention"]}, "layer_types are .'chunked_attention'"),
    ({"sliding_window": 8, "use_sliding_window": False}, "use_sliding_window is false"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'"),
]
CONTRADICTORY = [
    ({"num_key_value_heads": 3}, "num_attention_heads 2 is not a multiple of num_key_value_heads 3"),
    ({"head_dim": None, "hidden_size": 63}, "hidden_size 63 is not a multiple of num_attention_heads 2"),
    ({"head_dim": 31}, "odd"),
    ({"rope_theta": 5.0}, r"rope_theta has several values, \[5.0, 10000.0\]"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"vocab_size": -1}, "vocab_size"),
    ({"vocab_size": "256"}, "vocab_size"),
    ({"intermediate_size": 10**30}, "intermediate_size"),
    ({"rms_norm_eps": float("nan")}, "JSON"),
    ({"rope_parameters": []}, "rope_parameters"),
    ({"eos_token_id": "2"}, "eos_token_id"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"base_model_sha256": 5}, "base_model_sha256"),
]


@pytest.mark.parametrize("changes, said", NOT_COMPUTED + CONTRADICTORY)
def test_a_model_that_is_not_computed_or_contradicts_itself_is_refused_by_name(base, changes, said):
    change_json(base / "config.json", **changes)
    with pytest.raises(ValueError, match=f"config.json.*{said}"):
        Checkpoint(base).sha256  # noqa: B018


@pytest.mark.parametrize("key", ["vocab_size", "rms_norm_eps", "sliding_window", "max_position_embeddings"])
def test_a_key_that_readers_have_different_defaults_for_must_be_there(base, key):
    config = json.loads((base / "config.json").read_text())
    del config[key]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json.*missing required field `{key}`"):
        Config.read(base)


def test_theta_is_read_in_the_form_of_transformers_4_and_of_transformers_5(base):
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5, "rope_scaling": None}))
    assert (Config.read(base).rope_theta, Config.read(base).head_dim) == (5e5, 32)
    del config["rope_theta"]
    rope = {"rope_type": "default", "rope_theta": 7e5}
    (base / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    assert Config.read(base).rope_theta == 7e5


def test_every_end_token_of_either_file_ends_a_reply(base):
    change_json(base / "config.json", eos_token_id=[2, 32000])
    (base / "generation_config.json").write_text('{"eos_token_id": 7}')
    config = Config.read(base)
    assert config.eos_token_ids == (2, 32000, 7)
    assert config.to_json()["eos_token_id"] == [2, 32000, 7]
    for damaged in ("[]", '{"eos_token_id": [-1]}', DEEP):
        (base / "generation_config.json").write_text(damaged)
        with pytest.raises(ValueError, match="generation_config.json"):
            Config.read(base)
    (base / "generation_config.json").write_text("{}")

    change_json(base / "config.json", eos_token_id=list(range(100)))
    change_json(base / "generation_config.json", eos_token_id=list(range(100, 256)))
    policy = LocalPolicy(base, slots=1, context=32, max_new_tokens=8)
    session = policy.open("a room")
    policy.submit(Ask(session, 1.0, 0))
    while not policy.poll():
        pass
    assert sum(policy.close(session)[1]) == 1  # whatever was sampled first


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_a_head_beside_tied_embeddings_must_repeat_them(base):
    weights = base / "model.safetensors"
    change_json(base / "config.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings"):
        load_model(base)
    change_tensors(weights, **{"lm_head.weight": load_file(weights)["model.embed_tokens.weight"]})
    repeated = logits_of(load_model(base, weights="fp32"), random_ids(1, 5))
    change_tensors(weights, **{"lm_head.weight": None})
    assert np.array_equal(logits_of(load_model(base, weights="fp32"), random_ids(1, 5)), repeated)
    change_json(base / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="there is no lm_head.weight.*tie_word_embeddings"):
        load_model(base)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [NORM, QUERIES, "lm_head.weight", layer_tensor(0, "mlp_norm")])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, "bfloat16"])
def test_a_base_with_a_value_that_is_not_finite_is_refused_by_the_tensor_s_name(base, name, value, dtype):
    array = with_value(base / "model.safetensors", name, value).astype(dtype)
    change_tensors(base / "model.safetensors", **{name: array})
    with pytest.raises(ValueError, match=f"model.safetensors: {name} has values that are not finite"):
        load_model(base, weights="nf4")


@pytest.mark.parametrize(
    "weights, part", [("nf4", "absmax"), ("nf4-dq", "nested_absmax"), ("nf4-dq", "nested_offset"), ("nf4", "quant_map")]
)
def test_a_quantised_base_with_damaged_scales_is_refused_by_the_tensor_s_name(whole, tmp_path, weights, part):
    folder = shutil.copytree(whole / weights, tmp_path / "folder")
    path = folder / "model.safetensors"
    if part == "nested_offset":
        state = json.loads(load_file(path)[f"{QUERIES}.{STATE}"].tobytes()) | {part: 1e300}
        change_tensors(path, **{f"{QUERIES}.{STATE}": np.frombuffer(json.dumps(state).encode(), np.uint8)})
    else:
        change_tensors(path, **{f"{QUERIES}.{part}": with_value(path, f"{QUERIES}.{part}", np.nan)})
    with pytest.raises(ValueError, match=f"model.safetensors: {QUERIES}.*(not finite|other values|nested_offset)"):
        load_model(folder, weights=weights)


@pytest.mark.parametrize("state", ["[]", "{", DEEP, '{"blocksize": "64"}', '{"nested_offset": NaN}'])
def test_a_description_of_a_quantised_weight_that_cannot_be_read_is_named(whole, tmp_path, state):
    folder = shutil.copytree(whole / "nf4", tmp_path / "folder")
    change_tensors(folder / "model.safetensors", **{f"{QUERIES}.{STATE}": np.frombuffer(state.encode(), np.uint8)})
    with pytest.raises(ValueError, match=f"model.safetensors: {QUERIES}.{STATE}"):
        load_model(folder)


def test_tensors_of_a_kind_or_size_that_is_not_expected_are_named(whole, base, tmp_path):
    path = base / "model.safetensors"
    change_tensors(path, **{QUERIES: load_file(path)[QUERIES].astype(np.int8)})
    with pytest.raises(ValueError, match=f"{QUERIES} is stored as int8; expected float32"):
        load_model(base)
    folder = shutil.copytree(whole / "nf4", tmp_path / "folder")
    change_tensors(folder / "model.safetensors", **{f"{QUERIES}.absmax": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=rf"{QUERIES}.absmax has 3 values of float32; expected 64 of float32"):
        load_model(folder)
    shutil.copy(whole / "base" / "model.safetensors", base / "model-2.safetensors")
    with pytest.raises(ValueError, match="is in both .*model"):
        Checkpoint(base)


@pytest.mark.parametrize("index", ["[]", "{", DEEP, '{"weight_map": {"a": 5}}', '{"weight_map": {"a": ""}}'])
def test_an_index_that_cannot_be_read_is_named(base, index):
    (base / "model.safetensors.index.json").write_text(index)
    with pytest.raises((ValueError, FileNotFoundError), match="index.json|has no"):
        Checkpoint(base)


def test_a_model_whose_numbers_overflow_stops_instead_of_playing(base):
    """Every value of such a base is finite; what is computed from them is not."""
    path = base / "model.safetensors"
    change_tensors(path, **{NORM: np.full(64, 3e38, np.float32)})
    engine = Engine(make_decoder(load_model(base)), slots=1, context=16, max_new_tokens=4, stop_ids=[5])
    session = engine.open()
    engine.extend(session, [1, 2, 3])
    with pytest.raises(ValueError, match="log-probabilities are not finite"):
        engine.sample([(session, 0.0, 0)])
    (base / "text").write_text("text")
    with pytest.raises(ValueError, match="log-probabilities.*are not finite"):
        score.score(score.Args(model=base, text=base / "text"))


# ---- adapters --------------------------------------------------------------------------------------------------------

CHANGED_BASE = "changed the base.*merge it into that base .*path_initial_model_for.*for PiSSA, OLoRA, CorDA and LoRA-GA"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"r": None}, "`int`, got `null` - at `..r`"),
        ({"r": "16"}, "`int`, got `str` - at `..r`"),
        ({"r": 0}, "`int` >= 1 - at `..r`"),
        ({"lora_alpha": float("nan")}, "not valid JSON"),
        ({"lora_alpha": 1e308}, "<= 1000000.0 - at `..lora_alpha`"),
        ({"lora_alpha": -1}, ">= 1e-30 - at `..lora_alpha`"),
        ({"lora_dropout": 1.5}, "< 1.0 - at `..lora_dropout`"),
        ({"rank_pattern": {"q_proj": 0}}, "`int` >= 1 - at `..rank_pattern"),
        ({"rank_pattern": {"(": 2}}, r"is no regular expression \(missing \)"),
        ({"alpha_pattern": {"q_proj": -1}}, ">= 1e-30 - at `..alpha_pattern"),
        ({"alpha_pattern": {"a{99999999999}": 2}}, r"is no regular expression \(the repetition number is too large\)"),
        ({"target_modules": "*_proj"}, r"'\*_proj' is no regular expression \(nothing to repeat"),
        ({"target_modules": []}, r"target_modules=\[\] selects none of self_attn.q_proj, .*at least one"),
        ({"target_modules": None}, "target_modules=None selects none"),
        ({"target_modules": "q_proj"}, "target_modules='q_proj' selects none"),
        ({"target_modules": r"model\.layers\.0\.self_attn\.q"}, "target_modules=.* selects none"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "selects none"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "selects model.embed_tokens, and only .*; merge the adapter"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only 'LORA' is computed; merge .*, or train a LoRA adapter"),
        ({"init_lora_weights": "pissa"}, CHANGED_BASE),
        ({"init_lora_weights": "pissa_niter_4"}, CHANGED_BASE),
        ({"init_lora_weights": "olora"}, CHANGED_BASE),
        ({"init_lora_weights": "loftq"}, CHANGED_BASE),
        ({"init_lora_weights": "corda"}, CHANGED_BASE),
        ({"init_lora_weights": "lora_ga"}, CHANGED_BASE),
    ],
)
def test_an_adapter_that_cannot_be_meant_is_refused_by_name(whole, adapter, changes, said):
    change_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=f"adapter_config.json.*{said}"):
        read_adapter(Checkpoint(whole / "base"), adapter)


MERGED = "merge the adapter into its base with PEFT's merge_and_unload and give the merged folder as the base"
TRAINED = "PEFT cannot save it merged into its base, so train a plain LoRA adapter"
HOW_REFUSED = {
    "bias": ("lora_only", MERGED),
    "modules_to_save": (["lm_head"], MERGED),
    "trainable_token_indices": ([3], MERGED),
    "target_parameters": (["mlp.experts"], MERGED),
    "layers_to_transform": (0, MERGED),
    "use_dora": (True, MERGED),
    "use_bdlora": ({"nblocks": 2}, MERGED),
    "kasa_config": ({"beta": 1e-4}, MERGED),
    "monteclora_config": ({"num_samples": 8}, MERGED),
    "velora_config": ({"num_groups": 64}, MERGED),
    "layer_replication": ([[0, 1]], TRAINED),
    "lora_bias": (True, TRAINED),
    "alora_invocation_tokens": ([5], TRAINED),
    "arrow_config": ({"top_k": 3}, TRAINED),
    "use_qalora": (True, TRAINED),
}


@pytest.mark.parametrize("option", REFUSED_OPTIONS)
def test_an_option_of_peft_that_is_not_computed_is_refused_with_the_remedy(whole, adapter, option):
    value, remedy = HOW_REFUSED[option]
    change_json(adapter / "adapter_config.json", **{option: value})
    with pytest.raises(ValueError, match=rf"adapter_config.json: {option}=.*\(.*\): not computed; {remedy}\.$"):
        read_adapter(Checkpoint(whole / "base"), adapter)


def test_an_adapter_with_every_option_at_peft_s_default_is_read(whole, adapter):
    defaults = {
        "bias": "none",
        "use_dora": False,
        "layers_to_transform": None,
        "rank_pattern": {},
        "modules_to_save": [],
    }
    change_json(adapter / "adapter_config.json", **(dict.fromkeys(REFUSED_OPTIONS) | defaults))
    assert read_adapter(Checkpoint(whole / "base"), adapter)[0].targets == ("q", "v")


def test_an_adapter_s_config_without_a_rank_as_a_list_or_cut_is_a_sentence(whole, adapter):
    path, base = adapter / "adapter_config.json", Checkpoint(whole / "base")
    config = json.loads(path.read_text())
    del config["r"]
    for text in (json.dumps(config), "[]", path.read_text()[:40], DEEP, ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="adapter_config.json"):
            read_adapter(base, adapter)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        read_adapter(base, adapter)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_an_adapter_with_a_value_that_is_not_finite_or_overflows_is_refused_by_the_tensor_s_name(whole, adapter, value):
    path = adapter / "adapter_model.safetensors"
    name = next(name for name in load_file(path) if name.endswith("lora_B.weight"))
    change_tensors(path, **{name: with_value(path, name, value)})  # times alpha / r = 32 / 2
    with pytest.raises(ValueError, match=f"adapter_model.safetensors: {name}.* not finite"):
        read_adapter(Checkpoint(whole / "base"), adapter)


def test_an_adapter_that_overflows_by_the_alpha_of_one_layer_is_refused_by_the_tensor_s_name(base_dir, tmp_path):
    save_adapter(tmp_path, with_random_adapter(load_model(base_dir, lora=LoRAConfig(rank=2))), base_dir)
    path = tmp_path / "adapter_model.safetensors"
    name = f"base_model.model.{layer_tensor(1, 'v').replace('weight', 'lora_B.weight')}"
    change_tensors(path, **{name: with_value(path, name, 1e34)})
    read_adapter(Checkpoint(base_dir), tmp_path)
    change_json(tmp_path / "adapter_config.json", alpha_pattern={"1.self_attn.v_proj": 1e6})
    with pytest.raises(ValueError, match=f"adapter_model.safetensors: {name}, times alpha / r, .* not finite"):
        read_adapter(Checkpoint(base_dir), tmp_path)
    change_json(tmp_path / "adapter_config.json", lora_alpha=1e-3, alpha_pattern={"1.self_attn.v_proj": 1e3})
    with pytest.raises(ValueError, match=f"{name}, times its scale over the common one, .* not finite"):
        read_adapter(Checkpoint(base_dir), tmp_path)


def test_an_adapter_s_weights_that_are_cut_missing_or_of_another_shape_are_named(whole, adapter):
    path, base = adapter / "adapter_model.safetensors", Checkpoint(whole / "base")
    for rank in ({"r": 2**20}, {"rank_pattern": {"q_proj": 2**20}}):
        change_json(adapter / "adapter_config.json", **rank)
        with pytest.raises(ValueError, match=r"lora_A.weight has shape \(2, 64\), expected \(1048576, 64\)"):
            read_adapter(base, adapter)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="adapter_model.safetensors is not a valid safetensors file"):
        read_adapter(base, adapter)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors"):
        read_adapter(base, adapter)


@pytest.mark.parametrize(
    "old, new, said",
    [
        (
            "base_model.model.",
            "",
            "PEFT would not name .* 'model.layers.0.* but for instance 'base_model.model.model.*",
        ),
        ("base_model.model.", "base_model.model._orig_mod.", "would not name .*save it with PEFT's save_pretrained"),
        ("lora_A.weight", "lora_A.my_name.weight", "has a name as in training.*without '.my_name'; rename all tensors"),
        (
            "layers.0",
            "layers.35",
            "the last layer that is adapted is 35, but that of the base is 0; give the adapter's own",
        ),
        ("v_proj.lora_A", "k_proj.lora_A", r"Missing: .*v_proj.lora_A.weight\. Unexpected: .*k_proj.lora_A.weight"),
    ],
)
def test_an_adapter_s_tensors_of_other_names_are_refused_with_the_remedy(whole, adapter, old, new, said):
    path = adapter / "adapter_model.safetensors"
    save_file({name.replace(old, new): array for name, array in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=f"adapter_model.safetensors.*{said}"):
        read_adapter(Checkpoint(whole / "base"), adapter)


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "lm_head.weight",
            f"holds 'base_model.model.lm_head.weight', and weights that are trained whole, .*; {MERGED}",
        ),
        ("model.embed_tokens.lora_embedding_A", r"Missing: none\. Unexpected: .*embed_tokens.lora_embedding_A"),
    ],
)
def test_tensors_besides_an_adapter_of_the_projections_are_refused_by_name(whole, adapter, name, said):
    path = adapter / "adapter_model.safetensors"
    change_tensors(path, **{f"base_model.model.{name}": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match=f"adapter_model.safetensors.*{said}"):
        read_adapter(Checkpoint(whole / "base"), adapter)


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_ids_beyond_the_vocabulary_are_refused(base):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(base / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json has ids up to 256, but the model's vocab_size is 256"):
        load_tokenizer(base)
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5000)])
    tokenizer.save(str(base / "tokenizer.json"))
    with pytest.raises(ValueError, match="ids up to 5000"):
        load_tokenizer(base)


def test_a_tokenizer_neither_truncates_nor_pads(base):
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(base / "tokenizer.json"))
    assert len(load_tokenizer(base).encode("abcdef").ids) == 6


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"continuing_subword_prefix": "x"}, {"merges": [["a", 5]]}])
def test_a_tokenizer_that_draws_or_breaks_the_library_is_refused(base, changes):
    file = json.loads((base / "tokenizer.json").read_text())
    change_json(base / "tokenizer.json", model=file["model"] | changes)
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_tokenizer(base)


def test_a_panic_of_the_library_is_a_sentence(base):
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    tokenizer.save(str(base / "tokenizer.json"))
    post = json.loads((base / "tokenizer.json").read_text())["post_processor"]
    change_json(base / "tokenizer.json", post_processor=post | {"special_tokens": {}})
    with pytest.raises(ValueError, match="tokenizer.json is not a valid tokenizer"):
        load_tokenizer(base)


@pytest.mark.parametrize(
    "text", ["[]", "{", DEEP, '{"chat_template": 5}', '{"chat_template": [5]}', '{"chat_template": "", "bos_token": 5}']
)
def test_a_tokenizer_config_that_cannot_be_read_is_named(base, text):
    (base / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer_config.json"):
        prompt_ids(load_tokenizer(base), base, "an example")


def test_a_chat_template_must_be_text_and_its_tokens_must_exist(base):
    (base / "chat_template.jinja").write_bytes(b"\xff[INST]")
    with pytest.raises(ValueError, match="chat_template.jinja is not UTF-8"):
        prompt_ids(load_tokenizer(base), base, "an example")
    (base / "chat_template.jinja").write_text("{{ bos_token }}[INST] {{ messages[0].content }}")
    for config in ("{}", '{"bos_token": "<s>"}'):
        (base / "tokenizer_config.json").write_text(config)
        with pytest.raises(ValueError, match=f"{base}: its chat template prints bos_token, '(<s>)?' in tokenizer_conf"):
            prompt_ids(load_tokenizer(base), base, "an example")


@pytest.mark.parametrize("template", ["{{ messages[0].content", "{% if %}", "{{ raise_exception('no') }}", "[INST]"])
def test_a_chat_template_that_cannot_be_rendered_or_drops_the_example_is_named(base, template):
    (base / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"{base}: its chat template cannot render a chat of user"):
        prompt_ids(load_tokenizer(base), base, "an example")


# ---- all of it -------------------------------------------------------------------------------------------------------


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The bytes cut, with some replaced or inserted, or with a number or name in the JSON changed."""
    kind, at = draw.randrange(4), draw.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9))) + data[at + 4 :]
    if kind == 2:
        return data[:at] + draw.choice([b"[" * 10_000, b"null", b"-1", b"1e999", b"NaN", b'"', b"}"]) + data[at:]
    values = [b"null", b"-1", b"0", b'"x"', b"[]", b"{}", b"1e308", b"NaN", b"true", b"9" * 400]
    places = [i for i in range(len(data)) if data[i : i + 1] == b":"] or [0]
    at = draw.choice(places)
    end = min((i for i in (data.find(b",", at), data.find(b"}", at)) if i > 0), default=len(data))
    return data[: at + 1] + draw.choice(values) + data[end:]


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_read_or_refused_in_one_sentence(whole, tmp_path, seed):
    draw, refused = random.Random(seed), 0
    folders = {name: shutil.copytree(whole / name, tmp_path / name) for name in ("base", "nf4-dq", "adapter")}
    (folders["base"] / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    files = sorted(path for folder in folders.values() for path in folder.iterdir() if path.name != "conversion.json")
    for _ in range(60):
        path = draw.choice(files)
        data = path.read_bytes()
        path.write_bytes(mutated(data, draw))
        try:
            base = Checkpoint(folders["base"])
            for checkpoint in (base, Checkpoint(folders["nf4-dq"])):
                for name in checkpoint.shapes:
                    checkpoint.dense(name)
            read_adapter(base, folders["adapter"])
            load_tokenizer(folders["base"])
            base_facts(folders["base"])
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), error
            refused += 1
        path.write_bytes(data)
    assert 30 < refused < 60


# ---- what a base is --------------------------------------------------------------------------------------------------


def test_the_facts_of_a_base_are_its_weights_its_tokenizer_and_what_it_computes(whole, base):
    facts = base_facts(base)
    assert facts == base_facts(whole / "base") == base_facts(whole / "nf4")  # a copy, and a converted one
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(dict(reversed(config.items())) | {"architectures": [], "dtype": "x"}))
    assert base_facts(base) == facts

    def differing() -> list[str]:
        return [name for name, value in base_facts(base).items() if facts[name] != value]

    (base / "chat_template.jinja").write_text("[INST]")
    assert differing() == ["tokenizer"]
    (base / "chat_template.jinja").unlink()
    theta = {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    change_json(base / "config.json", **theta)
    assert differing() == ["config"]
    tokenizer = byte_tokenizer(200)
    tokenizer.save(str(base / "tokenizer.json"))
    change_tensors(base / "model.safetensors", **{NORM: np.ones(64, np.float32) * 2})
    assert differing() == ["base", "tokenizer", "config"]
    (base / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        base_facts(base)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_adapters_of_a_senseless_rank_are_refused_with_their_bytes(base_dir):
    with pytest.raises(ValueError, match=r"rank 100000 takes 1,459,200,000 bytes.*128 features.*Lower --rank"):
        load_model(base_dir, lora=LoRAConfig(rank=100_000, targets=TARGETS))


def test_a_text_to_score_that_is_too_long_or_no_text_is_refused_before_the_model_is_loaded(base, monkeypatch):
    monkeypatch.setattr(score, "load_model", None)
    (base / "text").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="text is not UTF-8"):
        score.score(score.Args(model=base, text=base / "text"))
    (base / "text").write_text("a" * 65)
    with pytest.raises(ValueError, match="text has 65 tokens, expected 2 to 64"):
        score.score(score.Args(model=base, text=base / "text"))

"""Adapters: ours in PEFT, PEFT's here with every rank and scale that it knows, and the remedies for what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from lora.adapter import REFUSED_OPTIONS, AdapterFile, read_adapter, save_adapter
from lora.checkpoint import Checkpoint, layer_tensor
from lora.convert import convert
from lora.linear import TARGETS, LoRAConfig, LoRAParam
from lora.load import load_adapter, load_model, save_model
from lora.model import CausalLM
from lora.sharding import make_mesh
from lora.train_step import Batch, initial_state, make_update
from tests.support.helpers import TINY, logits_of, random_ids, with_random_adapter
from train_pg import objective

ALL = LoRAConfig(rank=4, alpha=12.0, targets=TARGETS)
IDS = random_ids(2, 13)


def loaded(base_dir: Path):
    """The base in transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(base_dir)


def their_logits(model) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def in_peft(base_dir: Path, folder: Path) -> np.ndarray:
    """The logits of a saved adapter in PEFT."""
    return their_logits(pytest.importorskip("peft").PeftModel.from_pretrained(loaded(base_dir), folder))


def saved_by_peft(base_dir: Path, folder: Path, **options):
    """An adapter that PEFT makes and saves, all its values at random, in its model."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(loaded(base_dir), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def merged(base_dir: Path, folder: Path) -> np.ndarray:
    """The logits of an adapter that we merge; without adapters, all bases of a family share one compilation."""
    convert(Checkpoint(base_dir), folder / "merged", "fp32", folder, "fp32")
    return logits_of(load_model(folder / "merged", weights="fp32"), IDS)


# ---- ours ------------------------------------------------------------------------------------------------------------


def test_adapter_comes_back_as_it_was_and_only_on_its_base(base_dir, tmp_path, capsys):
    model = with_random_adapter(load_model(base_dir, weights="nf4", lora=ALL))
    save_adapter(tmp_path / "adapter", model, base_dir)
    assert not list((tmp_path / "adapter").glob("*.tmp"))
    again = load_adapter(base_dir, tmp_path / "adapter", "nf4")
    assert np.array_equal(logits_of(again, random_ids(2, 9)), logits_of(model, random_ids(2, 9)))
    assert capsys.readouterr().err == ""
    save_model(CausalLM(TINY, rngs=nnx.Rngs(9)), tmp_path / "other")
    with pytest.raises(ValueError, match="trained on another base"):
        load_adapter(tmp_path / "other", tmp_path / "adapter", "nf4")
    with pytest.raises(ValueError, match="without an adapter"):
        save_adapter(tmp_path / "none", load_model(base_dir), base_dir)
    with pytest.raises(ValueError, match="quantised or adapted"):
        save_model(model, tmp_path / "none")


def test_an_adapter_of_ours_computes_the_same_in_peft(base_dir, tmp_path):
    lora = LoRAConfig(rank=4, alpha=12.0, targets=("q", "v", "o", "up", "down"))
    model = with_random_adapter(load_model(base_dir, weights="fp32", lora=lora))
    save_adapter(tmp_path, model, base_dir)
    assert np.abs(in_peft(base_dir, tmp_path) - logits_of(model, IDS)).max() < 1e-4


# ---- PEFT's ----------------------------------------------------------------------------------------------------------

SOME = ["q_proj", "v_proj", "down_proj"]
UNSLOTH = r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|o_proj|up_proj)))"
OPTIONS = {
    "plain": {"r": 3, "lora_alpha": 7, "target_modules": ["k_proj", "gate_proj"]},
    "rsLoRA": {"r": 9, "lora_alpha": 4, "use_rslora": True, "target_modules": SOME},
    "ranks of modules": {"r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 7, "q_proj": 2}, "target_modules": SOME},
    "a rank of one layer": {
        "r": 4,
        "rank_pattern": {"^model.layers.1.self_attn.q_proj": 6, "layers.2.mlp.down_proj": 1, "q_proj": 3},
        "target_modules": SOME,
    },
    "alphas": {"r": 4, "lora_alpha": 2, "alpha_pattern": {r"1\..*": 9, "v_proj": 5.5}, "target_modules": SOME},
    "rsLoRA with ranks and alphas": {
        "r": 4,
        "lora_alpha": 2,
        "use_rslora": True,
        "rank_pattern": {"0.mlp.down_proj": 9, "v_proj": 2},
        "alpha_pattern": {r"layers.[12].self_attn.v_proj": 5, "down_proj": 1},
        "target_modules": SOME,
    },
    "no module of the rank r": {"r": 64, "rank_pattern": {".*_proj": 2}, "target_modules": SOME},
    "keys of no module": {
        "r": 4,
        "rank_pattern": {"proj": 9, "_proj": 9, "model.layers.1": 9, "self_attn": 9},
        "target_modules": SOME,
    },
    "a regular expression": {"r": 4, "target_modules": r".*\.(self_attn\.[qo]|mlp\.up)_proj"},
    "Unsloth's": {"r": 4, "rank_pattern": {"o_proj|up_proj": 2}, "target_modules": UNSLOTH},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "paths and exclusions": {
        "r": 4,
        "target_modules": ["self_attn.q_proj", "mlp.up_proj", "k_proj", "proj"],
        "exclude_modules": r".*\.self_attn\.k_proj",
    },
    "MiCA": {"r": 4, "init_lora_weights": "mica", "target_modules": SOME},
    "fan_in_fan_out": {"r": 4, "fan_in_fan_out": True, "target_modules": SOME},
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def family_dir(request, tmp_path_factory) -> Path:
    """A random base of each family, biases and all."""
    folder = tmp_path_factory.mktemp(request.param)
    model = CausalLM(dataclasses.replace(TINY, model_type=request.param), rngs=nnx.Rngs(5))
    for part, bias in model.layers.qkv.bias.items():
        bias[...] = jax.random.normal(jax.random.key(len(part)), bias.shape)
    save_model(model, folder)
    return folder


def check_against_peft(base_dir: Path, folder: Path, **options) -> CausalLM:
    """PEFT's adapter, merged by us or saved again by us, computes the same as before; returns it loaded."""
    expected = their_logits(saved_by_peft(base_dir, folder / "theirs", **options))
    assert np.abs(their_logits(loaded(base_dir)) - expected).max() > 1e-2  # else this says nothing
    assert np.abs(merged(base_dir, folder / "theirs") - expected).max() < 1e-4
    model = load_adapter(base_dir, folder / "theirs", "fp32")
    save_adapter(folder / "ours", model, base_dir)
    assert np.abs(in_peft(base_dir, folder / "ours") - expected).max() < 1e-4
    return model


@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_scales_and_targets_are_peft_s(base_dir, tmp_path, name):
    check_against_peft(base_dir, tmp_path, **OPTIONS[name])


def test_an_adapter_that_is_not_merged_is_peft_s_too(family_dir, tmp_path):
    options = OPTIONS["rsLoRA with ranks and alphas"] | {"target_modules": r"model\.layers\.\d+\..*_proj"}
    model = check_against_peft(family_dir, tmp_path, **options)
    assert np.abs(logits_of(model, IDS) - in_peft(family_dir, tmp_path / "theirs")).max() < 1e-4


def test_padding_stays_zero_in_training_and_what_was_trained_is_the_same_in_peft(base_dir, tmp_path):
    saved_by_peft(base_dir, tmp_path / "theirs", **OPTIONS["rsLoRA with ranks and alphas"])
    model = load_adapter(base_dir, tmp_path / "theirs", "fp32")
    mesh = make_mesh((1, 1, 1))
    graph, adapter, frozen = nnx.split(model, LoRAParam, ...)
    adapter, frozen = jax.device_put((adapter, frozen), NamedSharding(mesh, PartitionSpec()))
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    update = make_update(objective, graph, optimizer, mesh, adapter, frozen)
    state = initial_state(optimizer, adapter, mesh)
    batch = Batch(IDS[None], np.ones_like(IDS)[None], np.ones((1, *IDS.shape), np.float32))
    for _ in range(2):
        adapter, state, _ = update(adapter, state, frozen, 1e-2, batch, 2.0, None)
    trained = nnx.merge(graph, adapter, frozen)
    save_adapter(tmp_path / "ours", trained, base_dir)
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    padded = 0
    for name, before in theirs.items():
        rows, columns = before.shape
        after = ours[name]
        assert np.abs(after[:rows, :columns] - before).min() > 0  # B is folded as well
        assert not after[rows:].any() and not after[:, columns:].any()
        padded += after.size > before.size
    assert padded == 2 * 8  # all but one of nine modules
    assert np.abs(in_peft(base_dir, tmp_path / "ours") - merged(base_dir, tmp_path / "ours")).max() < 1e-4


def test_ranks_that_share_a_scale_leave_b_as_it_is(base_dir, tmp_path):
    """The common scale is the one of the modules, even if none has `r` and `lora_alpha`."""
    saved_by_peft(base_dir, tmp_path, **OPTIONS["no module of the rank r"])
    lora, adapter = read_adapter(Checkpoint(base_dir), tmp_path)
    assert (lora.rank, lora.alpha) == (2, 8.0)  # PEFT's lora_alpha
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model." + layer_tensor(1, "v").replace("weight", "lora_B.weight")
    assert np.array_equal(adapter["v", "b"][1], theirs[name])


# Options of PEFT that change nothing that is computed here, or only with another one, which is refused.
WITHOUT_EFFECT = {
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "inference_mode",
        "base_model_name_or_path",
        "auto_mapping",
        "revision",
    ),
    *("layers_pattern", "qalora_group_size", "ensure_weight_tying"),  # only with another option
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of initialisations
    *("fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config"),
}


def test_every_option_of_peft_is_computed_or_refused_or_known_to_have_no_effect():
    fields = {field.name for field in dataclasses.fields(pytest.importorskip("peft").LoraConfig)}
    computed = set(AdapterFile.__struct_fields__)
    assert fields - computed - set(REFUSED_OPTIONS) - WITHOUT_EFFECT == set()
    assert not (computed | WITHOUT_EFFECT) & set(REFUSED_OPTIONS)


def test_an_adapter_without_a_hash_says_once_which_base_is_assumed(base_dir, tmp_path, capsys):
    saved_by_peft(base_dir, tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    said = {"Qwen/Qwen2.5-7B-Instruct": "was trained on Qwen/Qwen2.5-7B-Instruct and records no hash of it"}
    capsys.readouterr()
    for name, what in (said | {None: "does not record its base"}).items():
        path.write_text(json.dumps(config | {"base_model_name_or_path": name}))
        for _ in range(2):
            read_adapter(Checkpoint(base_dir), tmp_path)
        printed = capsys.readouterr()
        assert (printed.out, printed.err) == ("", f"{tmp_path} {what}: assumed to be {base_dir}\n")


# ---- the remedies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"use_dora": True}, r"use_dora=True \(DoRA\): not computed"),
        (
            {"modules_to_save": ["lm_head", "embed_tokens"]},
            r"modules_to_save=.*'lm_head'.*\(embeddings, a head or norms",
        ),
        ({"trainable_token_indices": [3, 5]}, r"trainable_token_indices=\[3, 5\] \(embeddings of some tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules selects lm_head, and only adapters of the layers'"),
        ({"layers_to_transform": [0, 2]}, r"layers_to_transform=\[0, 2\] \(only some layers are adapted"),
        (
            {"target_modules": r".*\.[01]\.self_attn\.q_proj"},
            "target_modules selects self_attn.q_proj in layers 0, 1 of 3 only, and a projection is adapted in all",
        ),
    ],
)
def test_what_is_refused_is_computed_once_it_is_merged(base_dir, tmp_path, options, said):
    model = saved_by_peft(base_dir, tmp_path / "theirs", **({"r": 4, "target_modules": ["q_proj"]} | options))
    remedy = "; merge the adapter into its base with PEFT's merge_and_unload and give the merged folder as the base"
    with pytest.raises(ValueError, match=f"adapter_config.json: {said}.*{remedy}"):
        load_adapter(base_dir, tmp_path / "theirs")
    expected = their_logits(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    ours = load_model(tmp_path / "merged", weights="fp32")
    assert np.abs(logits_of(ours, IDS) - expected).max() < 1e-4
    assert np.abs(expected - their_logits(loaded(base_dir))).max() > 1e-2


def test_pissa_made_plain_by_peft_is_computed(base_dir, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(loaded(base_dir), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = their_logits(model)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        load_adapter(base_dir, tmp_path / "trained")
    initial = str(tmp_path / "initial")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=initial)
    assert np.abs(merged(base_dir, tmp_path / "plain") - expected).max() < 1e-4


def test_weights_in_a_pickle_are_refused_and_peft_saves_them_again(base_dir, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    expected = their_logits(saved_by_peft(base_dir, tmp_path / "one", target_modules=["q_proj"]))
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    torch.save({name: torch.tensor(array) for name, array in tensors.items()}, tmp_path / "one" / "adapter_model.bin")
    (tmp_path / "one" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapter_model.bin can run code.*PeftModel.from_pretrained.*save_pretrained"):
        load_adapter(base_dir, tmp_path / "one")
    peft.PeftModel.from_pretrained(loaded(base_dir), tmp_path / "one").save_pretrained(tmp_path / "two")
    assert np.abs(merged(base_dir, tmp_path / "two") - expected).max() < 1e-4


def test_names_as_in_training_are_refused_with_a_command_that_changes_them(base_dir, tmp_path):
    saved_by_peft(base_dir, tmp_path, target_modules=["v_proj"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace(".weight", ".default.weight"): array for name, array in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"lora_[AB]\.default\.weight.*without '.default'") as refused:
        load_adapter(base_dir, tmp_path)
    exec(re.search('python -c "(.*)"', str(refused.value))[1], {})
    _, adapter = read_adapter(Checkpoint(base_dir), tmp_path)
    name = "base_model.model." + layer_tensor(2, "v").replace("weight", "lora_A.weight")
    assert np.array_equal(adapter["v", "a"][2], tensors[name])

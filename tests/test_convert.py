"""Files in and out, against transformers, bitsandbytes and PEFT; conversions that are killed, repeated, in the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora import checkpoint, convert, nf4
from lora.adapter import adapter_name, save_adapter
from lora.checkpoint import base_sha, layer_tensor
from lora.config import Config
from lora.convert import Args, locked, main
from lora.linear import FUSED, TARGETS, LoRAConfig, all_gather_base
from lora.load import load_model, save_model
from lora.model import CausalLM
from models.tokenizer import byte_tokenizer
from tests.support.helpers import (
    TINY,
    all_tensors,
    logits_of,
    quantised_by_transformers,
    random_ids,
    with_random_adapter,
)

ALL = LoRAConfig(rank=4, alpha=12.0, targets=TARGETS)


@pytest.fixture(scope="module")
def base_dir(base_dir, tmp_path_factory) -> Path:
    """The random base with a tokenizer, without which nothing is converted."""
    folder = shutil.copytree(base_dir, tmp_path_factory.mktemp("with_tokenizer") / "base")
    byte_tokenizer(TINY.vocab_size).save(str(folder / "tokenizer.json"))
    return folder


def test_width_that_is_no_multiple_of_64_names_the_layer_and_the_way_out(tmp_path):
    odd = Config(**{**vars(TINY), "intermediate_size": 96})
    save_model(CausalLM(odd, rngs=nnx.Rngs(0)), tmp_path)
    with pytest.raises(ValueError, match="'down' has 96 inputs.*multiple of 64.*fp32"):
        load_model(tmp_path, weights="nf4")
    assert logits_of(load_model(tmp_path, weights="fp32"), random_ids(1, 5)).shape == (1, 5, TINY.vocab_size)


def test_bfloat16_files_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    save_model(CausalLM(TINY, rngs=nnx.Rngs(1)), tmp_path / "ours")
    theirs = transformers.MistralForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs.float()(torch.tensor(random_ids(1, 9))).logits.numpy()
    assert np.abs(logits_of(load_model(tmp_path / "theirs", weights="fp32"), random_ids(1, 9)) - expected).max() < 1e-4


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


# ---- 4-bit folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["nf4", "nf4-dq"])
def test_a_quantised_folder_is_what_transformers_and_bitsandbytes_write(base_dir, tmp_path, weights, monkeypatch):
    """Bit by bit, whoever quantises; and whoever reads it computes the same, weight by weight exactly."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    # On a CPU with AVX512-BF16 it would compute in bfloat16, whatever it is told.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    theirs = quantised_by_transformers(base_dir, tmp_path / "theirs", weights == "nf4-dq")
    main(Args(model=base_dir, out=tmp_path / "ours", weights=weights))
    assert all_tensors(tmp_path / "ours") == all_tensors(tmp_path / "theirs")
    assert base_sha(tmp_path / "ours") == base_sha(base_dir)

    ids = random_ids(2, 17)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    quantised_now = load_model(base_dir, weights=weights)
    for model in (quantised_now, *(load_model(tmp_path / who, weights=weights) for who in ("ours", "theirs"))):
        assert np.abs(logits_of(model, ids) - expected).max() < 1e-4
        for name, parts in FUSED.items():
            linear = getattr(model.layers, name)
            for layer in range(TINY.num_hidden_layers):
                base = jax.tree.map(lambda x, layer=layer: x[layer], linear.base())
                codes, absmax = all_gather_base(base, linear.rows, linear.inputs // 64)
                ours = np.asarray(nf4.dequantize(codes, absmax)).reshape(-1, linear.inputs)
                wanted = []
                for part in parts:
                    weight = theirs.get_submodule(layer_tensor(layer, part).removesuffix(".weight")).weight
                    wanted.append(functional.dequantize_4bit(weight.data, weight.quant_state).numpy())
                assert np.array_equal(ours, np.concatenate(wanted))
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
        assert np.abs(read(torch.tensor(ids)).logits.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("stored, wanted", [("nf4", "nf4-dq"), ("nf4-dq", "nf4"), ("nf4-dq", "fp32")])
def test_a_quantised_folder_is_read_in_another_form(base_dir, tmp_path, stored, wanted):
    main(Args(model=base_dir, out=tmp_path / "stored", weights=stored))
    model = load_model(tmp_path / "stored", weights=wanted)
    # Double quantisation of what is stored plain is the same as of the source; taken back, its values stay.
    same = load_model(base_dir, weights="nf4-dq")
    assert np.abs(logits_of(model, random_ids(1, 9)) - logits_of(same, random_ids(1, 9))).max() < 1e-5
    assert (model.layers.qkv.nested is not None) == (wanted == "nf4-dq")


def test_a_4_bit_file_that_is_not_nf4_in_blocks_of_64_is_refused(base_dir, tmp_path):
    main(Args(model=base_dir, out=tmp_path, weights="nf4"))
    tensors = load_file(tmp_path / "model.safetensors")
    name = layer_tensor(1, "v")
    state = json.dumps({"quant_type": "nf4", "blocksize": 128, "dtype": "float32", "shape": [64, 64]})
    wrong = tensors | {f"{name}.{checkpoint.STATE}": np.frombuffer(state.encode(), np.uint8)}
    save_file(wrong, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="layers.1.self_attn.v_proj.*128.*expected.*blocksize 64"):
        load_model(tmp_path)
    save_file({k.replace("__nf4", "__fp4"): v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="4-bit type other than NF4"):
        load_model(tmp_path)
    del tensors[f"{name}.absmax"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"Missing: model.layers.1.self_attn.v_proj.weight.absmax\. Unexpected: none"):
        load_model(tmp_path)


# ---- files in parts, broken and large ones ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_in_several_files(base_dir, tmp_path, dtype):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MistralForCausalLM.from_pretrained(base_dir, dtype=getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    files = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(files) > 3
    ids = random_ids(1, 9)
    with torch.no_grad():
        expected = theirs.float()(torch.tensor(ids)).logits.numpy()
    assert np.abs(logits_of(load_model(tmp_path, weights="fp32"), ids) - expected).max() < 1e-4
    (tmp_path / "consolidated.safetensors").write_bytes(b"what the index does not name is not read")
    load_model(tmp_path)
    whole = (tmp_path / files[1]).read_bytes()
    (tmp_path / files[1]).write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=f"{files[1]} is not a valid safetensors file.*copy it again"):
        load_model(tmp_path)
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=files[1]):
        load_model(tmp_path)


def test_converting_needs_the_largest_tensor_and_a_file_no_more(tmp_path, monkeypatch):
    """Host memory as numpy asks for it, with files of 1 MB: the model has 20 MB, its largest tensor 2."""
    sizes = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3}
    config = Config(**{**vars(TINY), **sizes})
    save_model(CausalLM(config, rngs=nnx.Rngs(0)), tmp_path / "base")
    byte_tokenizer().save(str(tmp_path / "base" / "tokenizer.json"))
    assert (tmp_path / "base" / "model.safetensors").stat().st_size > 20e6
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 10**6)
    tracemalloc.start()
    main(Args(model=tmp_path / "base", out=tmp_path / "out", weights="nf4"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    read, quantised_now = (logits_of(load_model(tmp_path / name), random_ids(1, 5)) for name in ("out", "base"))
    assert np.array_equal(read, quantised_now)


# ---- the folder ------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_finished_conversion_of_the_same_inputs_is_kept_wherever_the_folders_are(base_dir, tmp_path, capsys):
    base, out = shutil.copytree(base_dir, tmp_path / "base"), tmp_path / "out"
    out.mkdir()  # an empty folder is nothing
    main(Args(model=base, out=out))
    before, times = content(out), {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    base.rename(tmp_path / "renamed")
    main(Args(model=tmp_path / "renamed", out=out, dtype="fp32"))  # a default, given by hand
    assert capsys.readouterr().out.endswith("out: finished already\n")
    assert content(out) == before and times == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "renamed"]
    (out / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="out has no model"):
        main(Args(model=tmp_path / "renamed", out=out))


def test_other_settings_other_inputs_and_foreign_files_are_refused_by_name(base_dir, tmp_path):
    base, out = shutil.copytree(base_dir, tmp_path / "base"), tmp_path / "out"
    main(Args(model=base, out=out))
    before = content(out)
    with pytest.raises(ValueError, match="another conversion .--weights: there nf4, now nf4-dq.*--out"):
        main(Args(model=base, out=out, weights="nf4-dq"))
    (base / "chat_template.jinja").write_text("[INST]")
    with pytest.raises(ValueError, match="another conversion .chat_template.jinja: there none, now "):
        main(Args(model=base, out=out))
    with pytest.raises(ValueError, match="base holds chat_template.jinja but no conversion.json"):
        main(Args(model=base, out=base))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        main(Args(model=base, out=tmp_path / "file" / "out"))
    with pytest.raises(OSError, match="file"):
        main(Args(model=base, out=tmp_path / "file"))
    assert content(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "file", "out"]


@pytest.mark.parametrize("step", ["write_checkpoint", "write_companions", "write_json"])
def test_a_killed_conversion_starts_again_and_ends_with_the_same_bytes(base_dir, tmp_path, monkeypatch, step):
    main(Args(model=base_dir, out=tmp_path / "unbroken"))
    work = getattr(convert, step)

    def killed(*args):
        work(*args)
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(convert, step, killed)
        patched.setattr(shutil, "rmtree", lambda *args, **how: None)  # a killed process tidies nothing up
        with pytest.raises(InterruptedError):
            main(Args(model=base_dir, out=tmp_path / "out"))
    [left] = tmp_path.glob("out.*.tmp")
    left.rename(tmp_path / "out.99999999.tmp")  # of another process
    (tmp_path / "out.mine.tmp").mkdir()
    main(Args(model=base_dir, out=tmp_path / "out"))
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.mine.tmp", "unbroken"]


def test_a_second_process_is_refused_while_the_first_one_lives(base_dir, tmp_path):
    with locked(tmp_path / "out"):
        for _ in range(2):
            with pytest.raises(ValueError, match="another process is converting to .*out"):
                main(Args(model=base_dir, out=tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    main(Args(model=base_dir, out=tmp_path / "out"))


def test_what_is_missing_or_broken_is_noticed_before_anything_is_made(base_dir, tmp_path, capsys):
    base, out = shutil.copytree(base_dir, tmp_path / "base"), tmp_path / "new" / "out"
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        main(Args(model=base, out=out, adapter=tmp_path))
    (base / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        main(Args(model=base, out=out))
    assert not out.parent.exists()
    byte_tokenizer(TINY.vocab_size).save(str(base / "tokenizer.json"))
    main(Args(model=base, out=out))
    assert "base has no chat template" in capsys.readouterr().out


def test_a_full_disk_is_one_sentence_and_leaves_nothing(base_dir, tmp_path, monkeypatch):
    def full(*args, **how):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="part-0.tmp cannot be written .No space left on device"):
        main(Args(model=base_dir, out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_value_beyond_the_dtype_is_refused_by_the_tensor_s_name(base_dir, tmp_path):
    base = shutil.copytree(base_dir, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5  # the largest float16 is 65504
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight has values that are not finite as float16"):
        main(Args(model=base, out=tmp_path / "out", weights="fp32", dtype="fp16"))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_theta_is_written_in_both_forms(base_dir, tmp_path, with_adapter):
    """transformers 4 reads `rope_theta`, which transformers 5 does not write; each would fall back to 10,000."""
    base, adapter = shutil.copytree(base_dir, tmp_path / "base"), None
    config = json.loads((base / "config.json").read_text())
    theta = config.pop("rope_theta")
    (base / "config.json").write_text(json.dumps(config | {"rope_scaling": None, "torch_dtype": "float16"}))
    if with_adapter:
        adapter = tmp_path / "adapter"
        save_adapter(adapter, load_model(base, lora=LoRAConfig()), base)
    main(Args(model=base, out=tmp_path / "out", adapter=adapter))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert theta == 1e6 == written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    assert written["dtype"] == written["torch_dtype"] == "float32" and written["rope_scaling"] is None


# ---- adapters out ----------------------------------------------------------------------------------------------------


def test_merged_is_what_peft_merges(base_dir, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = with_random_adapter(load_model(base_dir, weights="fp32", lora=ALL))
    save_adapter(tmp_path / "adapter", model, base_dir)
    ids = random_ids(2, 13)
    base = transformers.MistralForCausalLM.from_pretrained(base_dir)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().eval()
    main(Args(model=base_dir, out=tmp_path / "merged", weights="fp32", adapter=tmp_path / "adapter"))
    ours = transformers.MistralForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
        assert np.abs(ours(torch.tensor(ids)).logits.numpy() - expected).max() < 1e-4
    assert np.abs(logits_of(model, ids) - expected).max() < 1e-3  # not merged: other roundings
    assert base_sha(tmp_path / "merged") != base_sha(base_dir)  # it is another base

    main(Args(model=base_dir, out=tmp_path / "on_nf4", weights="nf4", adapter=tmp_path / "adapter", dtype="fp32"))
    trained_on = with_random_adapter(load_model(base_dir, weights="nf4", lora=ALL))
    merged = load_model(tmp_path / "on_nf4", weights="fp32")
    assert np.abs(logits_of(merged, ids) - logits_of(trained_on, ids)).max() < 1e-3
    assert np.abs(logits_of(merged, ids) - expected).max() > 1e-2  # NF4's values are what it was merged with


def test_other_weights_have_another_name(base_dir, tmp_path):
    for scale in (1, 2):
        model = with_random_adapter(load_model(base_dir, lora=LoRAConfig(rank=scale)))
        save_adapter(tmp_path / str(scale), model, base_dir)
    names = [adapter_name("a3t", 2, tmp_path / folder) for folder in "112"]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("a3t-r2-") and len(names[0]) == len("a3t-r2-") + 8


# ---- the commands ----------------------------------------------------------------------------------------------------


def command(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, check=False)


def test_score_is_what_transformers_and_peft_compute(base_dir, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    shutil.copytree(base_dir, tmp_path / "base")
    byte_tokenizer(97).save(str(tmp_path / "base" / "tokenizer.json"))
    model = with_random_adapter(load_model(tmp_path / "base", weights="fp32", lora=ALL))
    save_adapter(tmp_path / "adapter", model, tmp_path / "base")
    (tmp_path / "text").write_text("PUT.A.MUG.IN.THE.DESK")
    result = command(
        "lora.score",
        "--model",
        tmp_path / "base",
        "--adapter",
        tmp_path / "adapter",
        "--weights",
        "fp32",
        "--text",
        tmp_path / "text",
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    base = transformers.MistralForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        logits = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(torch.tensor([found["ids"]])).logits
    logprobs = torch.log_softmax(logits[0, :-1], -1).gather(1, torch.tensor(found["ids"])[1:, None])[:, 0].numpy()
    assert len(found["ids"]) == 21 and found.keys() == {"ids", "logprobs", "sum"}
    assert np.abs(np.array(found["logprobs"]) - logprobs).max() < 1e-4
    assert found["sum"] == pytest.approx(logprobs.sum(), abs=1e-3)


def test_commands_say_what_is_wrong(base_dir, tmp_path):
    result = command("lora.convert", "--model", tmp_path, "--out", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "config.json" in result.stderr
    result = command("lora.score", "--model", base_dir, "--text", tmp_path / "none")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "none: No such file" in result.stderr

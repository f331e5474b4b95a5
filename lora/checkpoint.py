"""Base models on disk: Hugging Face folders of safetensors, dense (fp32, bf16, fp16) or bitsandbytes NF4.

Tensors are read and written one at a time, so memory holds only the largest tensor and its converted form. Quantised
bases are written in bitsandbytes' layout, so transformers loads the same 4-bit base.

    checkpoint = Checkpoint("mistral-7b")                       # checks all tensor names against config.json
    weight = checkpoint.dense("model.layers.0.mlp.up_proj.weight")
    stored = checkpoint.nf4("model.layers.0.mlp.up_proj.weight", double=False)

Left out: PyTorch's .bin files, bitsandbytes' FP4 and int8, GPTQ, AWQ, GGUF.
Shapes: O out-features, I in-features, G NF4 blocks of an in-row, M blocks of absmax.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, for safetensors
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from artifacts.atomic import atomic_write
from lora import nf4
from lora.config import Config

HF_NAMES = {target: f"self_attn.{target}_proj" for target in ("q", "k", "v", "o")}
HF_NAMES |= {target: f"mlp.{target}_proj" for target in ("gate", "up", "down")}
HF_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
# Key for the sha256 of the original base, in config.json of a quantised base and in the metadata of an adapter.
BASE_SHA = "base_model_sha256"
# Suffix of bitsandbytes' description of a 4-bit weight: JSON as uint8.
STATE = "quant_state.bitsandbytes__nf4"
# Target size of one file of a written checkpoint.
FILE_BYTES = 2**31
# Files other than weights that a converted model needs too.
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "chat_template*")


class Stored(NamedTuple):
    """An NF4 weight on the host: packed uint8 [O, G, 32] and absmax float32 [O, G].

    Double-quantised, absmax is uint8 [M, 256] with scales `nested` float32 [M] and the mean `offset`.
    """

    packed: np.ndarray
    absmax: np.ndarray
    nested: np.ndarray | None = None
    offset: np.float32 | None = None


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, for a dense checkpoint of such a model."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    layer_shapes = {
        "q": (queries, D),
        "k": (keys, D),
        "v": (keys, D),
        "o": (D, queries),
        "gate": (F, D),
        "up": (F, D),
        "down": (D, F),
        "attention_norm": (D,),
        "mlp_norm": (D,),
    }
    for layer in range(config.num_hidden_layers):
        shapes |= {layer_tensor(layer, ours): shape for ours, shape in layer_shapes.items()}
    return shapes


def layer_tensor(layer: int, ours: str) -> str:
    """The checkpoint's name for one of our tensors of a layer: "q" ... "down", "attention_norm" or "mlp_norm"."""
    return f"model.layers.{layer}.{(HF_NAMES | HF_NORMS)[ours]}.weight"


def is_linear(name: str) -> bool:
    """Whether NF4 quantises this tensor: embeddings, head and norms stay dense."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


class Checkpoint:
    """A folder with `config.json` and safetensors files, read tensor by tensor.

    Raises FileNotFoundError if weights are missing, and ValueError for a damaged file, for a shape that contradicts
    config.json, and once for all missing and unexpected tensors.
    """

    def __init__(self, model_dir: str | Path):
        self.folder = Path(model_dir)
        self.config = Config.read(model_dir)
        self._files: dict[str, Path] = {}
        for path in weight_files(model_dir):
            try:
                with safe_open(path, framework="np") as file:
                    self._files |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise ValueError(f"{path} is not a valid safetensors file ({error}); copy it again.") from error
        self.shapes = tensor_shapes(self.config)
        self.quantized = {name for name in self.shapes if f"{name}.{STATE}" in self._files}
        other = sorted(n for n in self._files if ".quant_state.bitsandbytes__" in n and not n.endswith(STATE))
        if other:
            raise ValueError(f"{model_dir}: {other[0]} has a 4-bit type other than NF4; quantise the model to NF4.")
        expected = set(self.shapes)
        for name in self.quantized:
            nested = ("nested_absmax", "nested_quant_map") if f"{name}.nested_absmax" in self._files else ()
            expected |= {f"{name}.{part}" for part in (STATE, "absmax", "quant_map", *nested)}
        found = [name for name in self._files if not name.endswith("rotary_emb.inv_freq")]  # a constant in old files
        check_names(model_dir, found, expected)

    @cached_property
    def sha256(self) -> str:
        """See `base_sha`."""
        return base_sha(self.folder)

    def _read(self, name: str) -> np.ndarray:
        with safe_open(self._files[name], framework="np") as file:
            return file.get_tensor(name)

    def dense(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype, or decoded to float32 if stored in 4 bits."""
        if name in self.quantized:
            return decoded(self.nf4(name, double=None)).reshape(self.shapes[name])
        array = self._read(name)
        if array.shape != self.shapes[name]:
            raise ValueError(
                f"{self._files[name]}: {name} has shape {array.shape}, config.json says {self.shapes[name]}."
            )
        return array

    def nf4(self, name: str, double: bool | None) -> Stored:
        """A linear layer's weight in NF4: the stored bits, or the dense weight quantised now.

        `double`: whether absmax is double-quantised; None keeps the stored form, True and False convert it. Removing
        double quantisation decodes absmax and does not change the weight's values.
        """
        if name not in self.quantized:
            codes, absmax = nf4.quantize(self.dense(name))
            stored = Stored(packed=nf4.pack(codes), absmax=absmax)
        else:
            stored = self._stored(name)
        if double and stored.nested is None:
            absmax_codes, nested, offset = nf4.double_quantize(stored.absmax)
            return Stored(packed=stored.packed, absmax=absmax_codes, nested=nested, offset=offset)
        if double is False and stored.nested is not None:
            return Stored(packed=stored.packed, absmax=decode_absmax(stored))
        return stored

    def _stored(self, name: str) -> Stored:
        state = json.loads(self._read(f"{name}.{STATE}").tobytes())
        rows, columns = self.shapes[name]
        sizes = state["blocksize"], state.get("nested_blocksize", nf4.NESTED_BLOCK)
        if (tuple(state["shape"]), sizes) != ((rows, columns), (nf4.BLOCK, nf4.NESTED_BLOCK)):
            raise ValueError(
                f"{self.folder}: {name} is stored as {state}; expected shape {(rows, columns)}, blocksize {nf4.BLOCK} "
                f"and nested_blocksize {nf4.NESTED_BLOCK}."
            )
        packed, absmax = self._read(name), self._read(f"{name}.absmax")
        packed = packed.reshape(rows, columns // nf4.BLOCK, nf4.BLOCK // 2)
        if "nested_offset" not in state:
            return Stored(packed=packed, absmax=absmax.reshape(packed.shape[:2]))
        nested = self._read(f"{name}.nested_absmax")
        absmax = np.pad(absmax, (0, nested.size * nf4.NESTED_BLOCK - absmax.size)).reshape(-1, nf4.NESTED_BLOCK)
        return Stored(packed=packed, absmax=absmax, nested=nested, offset=np.float32(state["nested_offset"]))


def decode_absmax(stored: Stored) -> np.ndarray:
    """absmax float32 [O, G] of an NF4 weight, rounded as in bitsandbytes."""
    if stored.nested is None:
        return stored.absmax
    values = nf4.NESTED_VALUES[stored.absmax] * stored.nested[:, None] + stored.offset
    rows, groups = stored.packed.shape[:2]
    return values.reshape(-1)[: rows * groups].reshape(rows, groups)


def decoded(stored: Stored) -> np.ndarray:
    """The weight in float32 [O, G, 64]."""
    return nf4.VALUES[nf4.unpack(stored.packed)] * decode_absmax(stored)[..., None]


def weight_files(model_dir: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted: the files named by its index, or all model*.safetensors.

    Raises FileNotFoundError if there are none, or if one named by the index is missing.
    """
    folder = Path(model_dir)
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
    files = sorted(folder / name for name in names) or sorted(folder.glob("model*.safetensors"))
    missing = [path.name for path in files if not path.exists()]
    if missing or not files:
        raise FileNotFoundError(
            f"{model_dir} has no {', '.join(missing) or 'model*.safetensors'}; expected a complete Hugging Face folder."
        )
    return files


def base_sha(model_dir: str | Path) -> str:
    """sha256, in hex, of the bytes of a checkpoint's safetensors files in the order of their names.

    A base converted by us keeps the sha256 of its original, so adapters fit both.
    """
    config = Path(model_dir) / "config.json"
    if config.exists() and (recorded := json.loads(config.read_text()).get(BASE_SHA)):
        return recorded
    digest = hashlib.sha256()
    for path in weight_files(model_dir):
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def check_names(where: str | Path, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raises ValueError listing all missing and all unexpected tensor names."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{where}: the tensors do not match its config. Missing: {', '.join(missing) or 'none'}. "
            f"Unexpected: {', '.join(unexpected) or 'none'}."
        )


# ---- writing ---------------------------------------------------------------------------------------------------------


def bitsandbytes_tensors(name: str, stored: Stored, shape: tuple[int, ...], dtype: str) -> dict[str, np.ndarray]:
    """The tensors that bitsandbytes saves for a 4-bit weight; `dtype` is transformers' compute dtype."""
    state = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "dtype": dtype, "shape": list(shape)}
    tensors = {name: stored.packed.reshape(-1, 1), f"{name}.quant_map": nf4.VALUES}
    count = stored.packed.size * 2 // nf4.BLOCK
    tensors[f"{name}.absmax"] = stored.absmax.reshape(-1)[:count]
    if stored.nested is not None:
        state |= {
            "nested_blocksize": nf4.NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(stored.offset),
        }
        tensors |= {f"{name}.nested_absmax": stored.nested, f"{name}.nested_quant_map": nf4.NESTED_VALUES}
    tensors[f"{name}.{STATE}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


def write_checkpoint(out_dir: str | Path, tensors: Iterable[tuple[str, np.ndarray]], config: dict) -> None:
    """Writes a folder that transformers can load: tensors as they arrive, in files of about 2 GiB; config.json last."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    names: list[list[str]] = []  # by file
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        save_file(pending, out_dir / f"part-{len(names)}.tmp", metadata={"format": "pt"})
        names.append(list(pending))
        pending.clear()

    for name, array in tensors:
        if pending and sum(a.nbytes for a in pending.values()) + array.nbytes > FILE_BYTES:
            flush()
        pending[name] = np.ascontiguousarray(array)
        total += array.nbytes
    flush()
    files = [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    if len(files) == 1:
        files = ["model.safetensors"]
    else:
        weight_map = {name: file for file, in_file in zip(files, names, strict=True) for name in in_file}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for part, file in enumerate(files):
        os.replace(out_dir / f"part-{part}.tmp", out_dir / file)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with atomic_write(out_dir / "config.json") as temporary:
        temporary.write_text(text)


def copy_companions(model_dir: str | Path, out_dir: str | Path) -> None:
    """Copies the tokenizer, chat template and generation settings, if present."""
    for pattern in COMPANIONS:
        for path in Path(model_dir).glob(pattern):
            shutil.copy(path, Path(out_dir) / path.name)

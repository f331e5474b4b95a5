"""Base models on disk: Hugging Face folders of safetensors, dense (fp32, bf16, fp16) or bitsandbytes NF4.

Tensors are read and written one at a time, so memory holds only the largest tensor and its converted form. Quantised
bases are written in bitsandbytes' layout, so transformers loads the same 4-bit base.

    checkpoint = Checkpoint("mistral-7b")                       # checks all tensor names against config.json
    weight = checkpoint.dense("model.layers.0.mlp.up_proj.weight")
    stored = checkpoint.nf4("model.layers.0.mlp.up_proj.weight", double=False)

Whatever is read is checked: values that are not finite, and files that are cut or contradict config.json, are refused
with the name of the tensor and its file.

Left out: GGUF (gguf.py), PyTorch's .bin files, bitsandbytes' FP4 and int8, GPTQ, AWQ.
Shapes: O out-features, I in-features, G NF4 blocks of an in-row, M blocks of absmax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, for safetensors
import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from artifacts.atomic import atomic_write
from artifacts.json_io import parse_json, read_json
from lora import nf4
from lora.config import Config
from lora.tokenizer import tokenizer_sha

HF_NAMES = {target: f"self_attn.{target}_proj" for target in ("q", "k", "v", "o")}
HF_NAMES |= {target: f"mlp.{target}_proj" for target in ("gate", "up", "down")}
HF_NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
# Key for the sha256 of the original base, in config.json of a quantised base and in the metadata of an adapter.
BASE_SHA = "base_model_sha256"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Suffix of bitsandbytes' description of a 4-bit weight: JSON as uint8.
STATE = "quant_state.bitsandbytes__nf4"
# Target size of one file of a written checkpoint.
FILE_BYTES = 2**31
# Files other than weights that a converted model needs too.
COMPANIONS = ("tokenizer*", "*_tokens*.json", "generation_config.json", "chat_template*")
# Bytes of a tensor that are checked at a time, so that temporaries stay small.
CHECKED_BYTES = 2**20


class BaseRecord(msgspec.Struct):
    """What a config.json may say about where the weights come from."""

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = msgspec.field(default=None, name=BASE_SHA)


class IndexFile(msgspec.Struct):
    """A model.safetensors.index.json: the file of each tensor."""

    weight_map: dict[str, str]


class QuantState(msgspec.Struct):
    """bitsandbytes' description of a 4-bit weight."""

    quant_type: str
    blocksize: int
    shape: tuple[int, ...]
    nested_blocksize: int = nf4.NESTED_BLOCK
    nested_offset: Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)] | None = None


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
    shapes = {EMBEDDINGS: (V, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (V, D)
    layer_shapes = {
        "q": (queries, D),
        "k": (keys, D),
        "v": (keys, D),
        "o": (D, queries),
        "gate": (F, D),
        "up": (F, D),
        "down": (D, F),
    }
    layer_shapes |= {norm: (width,) for norm, width in config.norms.items()}
    for layer in range(config.num_hidden_layers):
        shapes |= {layer_tensor(layer, ours): shape for ours, shape in layer_shapes.items()}
        shapes |= {layer_tensor(layer, part, "bias"): layer_shapes[part][:1] for part in config.biased}
    return shapes


def layer_tensor(layer: int, ours: str, kind: str = "weight") -> str:
    """The checkpoint's name for the weight or "bias" of one of our projections or norms in a layer."""
    return f"model.layers.{layer}.{(HF_NAMES | HF_NORMS)[ours]}.{kind}"


def is_linear(name: str) -> bool:
    """Whether NF4 quantises this tensor: embeddings, head, biases and norms stay dense."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


class Checkpoint:
    """A folder with `config.json` and safetensors files, read tensor by tensor.

    Raises FileNotFoundError if weights are missing, and ValueError for a damaged file, for a tensor that contradicts
    config.json or is not finite, and once for all missing and unexpected tensors.
    """

    def __init__(self, model_dir: str | Path):
        self.folder = Path(model_dir)
        self.config = Config.read(model_dir)
        self._files: dict[str, Path] = {}
        for path in weight_files(model_dir):
            with open_tensors(path) as file:
                for name in file.keys():
                    if name in self._files:
                        raise ValueError(f"{name} is in both {self._files[name]} and {path}; remove the wrong file.")
                    self._files[name] = path
        self.shapes = tensor_shapes(self.config)
        self.quantized = {name for name in self.shapes if f"{name}.{STATE}" in self._files}
        other = sorted(n for n in self._files if ".quant_state.bitsandbytes__" in n and not n.endswith(STATE))
        if other:
            raise ValueError(f"{model_dir}: {other[0]} has a 4-bit type other than NF4; quantise the model to NF4.")
        expected = set(self.shapes)
        for name in self.quantized:
            nested = ("nested_absmax", "nested_quant_map") if f"{name}.nested_absmax" in self._files else ()
            expected |= {f"{name}.{part}" for part in (STATE, "absmax", "quant_map", *nested)}
        self._check_head()
        found = [name for name in self._files if not name.endswith("rotary_emb.inv_freq")]  # a constant in old files
        check_names(model_dir, found, expected)

    def _check_head(self) -> None:
        """Drops a head that repeats the embeddings. Raises ValueError if the weights contradict tie_word_embeddings."""
        tied = self.config.tie_word_embeddings
        if HEAD not in self._files:
            if not tied:
                raise ValueError(
                    f"{self.folder}: there is no {HEAD}, and config.json does not say that the embeddings are used in "
                    "its place. Set tie_word_embeddings to true if they are, or copy the missing file."
                )
        elif tied and EMBEDDINGS in self._files:
            if not np.array_equal(self._read(HEAD), self._read(EMBEDDINGS)):
                raise ValueError(
                    f"{self._files[HEAD]}: {HEAD} differs from {EMBEDDINGS}, but config.json says that they are the "
                    "same. Set tie_word_embeddings to false to use it, or remove it."
                )
            del self._files[HEAD]

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Name -> content of the folder's other files: config.json, tokenizer, chat template, generation settings."""
        return {path.name: path.read_bytes() for path in (self.folder / "config.json", *companions(self.folder))}

    @cached_property
    def weights_sha256(self) -> str:
        """See `weights_sha`."""
        return weights_sha(self.folder)

    @cached_property
    def sha256(self) -> str:
        """See `base_sha`."""
        return recorded_sha(self.folder) or self.weights_sha256

    def _read(self, name: str) -> np.ndarray:
        with open_tensors(self._files[name]) as file:
            return file.get_tensor(name)

    def dense(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        """A tensor in `dtype` (None: as stored), decoded to float32 first if stored in 4 bits."""
        if name in self.quantized:
            array = decoded(self._stored(name)).reshape(self.shapes[name])
        else:
            array = self._read(name)
        if array.shape != self.shapes[name]:
            raise ValueError(
                f"{self._files[name]}: {name} has shape {array.shape}, config.json says {self.shapes[name]}."
            )
        return as_finite(array, dtype or array.dtype, f"{self._files[name]}: {name}")

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
        where, (rows, columns) = f"{self._files[name]}: {name}", self.shapes[name]
        state = parse_json(self._read(f"{name}.{STATE}").tobytes(), QuantState, f"{where}.{STATE}")
        sizes = state.blocksize, state.nested_blocksize
        if (state.shape, sizes) != ((rows, columns), (nf4.BLOCK, nf4.NESTED_BLOCK)) or columns % nf4.BLOCK:
            raise ValueError(
                f"{where} is stored as {state}; expected shape {(rows, columns)}, blocksize {nf4.BLOCK} and "
                f"nested_blocksize {nf4.NESTED_BLOCK}, with a width that is a multiple of {nf4.BLOCK}."
            )
        groups = columns // nf4.BLOCK
        nested = state.nested_offset is not None
        packed = self._part(name, np.uint8, rows * columns // 2).reshape(rows, groups, -1)
        absmax = self._part(f"{name}.absmax", np.uint8 if nested else np.float32, rows * groups)
        tables = {"quant_map": nf4.VALUES} | ({"nested_quant_map": nf4.NESTED_VALUES} if nested else {})
        for part, values in tables.items():
            if not np.array_equal(self._part(f"{name}.{part}", np.float32, values.size), values):
                raise ValueError(f"{where}.{part} has other values than bitsandbytes' NF4; quantise the model again.")
        if nested:
            scales = self._part(f"{name}.nested_absmax", np.float32, -(-absmax.size // nf4.NESTED_BLOCK))
            absmax = np.pad(absmax, (0, scales.size * nf4.NESTED_BLOCK - absmax.size)).reshape(-1, nf4.NESTED_BLOCK)
            stored = Stored(packed=packed, absmax=absmax, nested=scales, offset=np.float32(state.nested_offset))
        else:
            stored = Stored(packed=packed, absmax=absmax.reshape(rows, groups))
        as_finite(decode_absmax(stored), np.float32, f"{where}.absmax")
        return stored

    def _part(self, name: str, dtype: type, size: int) -> np.ndarray:
        """One of the tensors of a 4-bit weight, flat."""
        array = self._read(name) if name in self._files else np.empty(0, dtype)
        if (array.dtype, array.size) != (np.dtype(dtype), size):
            raise ValueError(
                f"{self._files.get(name, self.folder)}: {name} has {array.size} values of {array.dtype}; expected "
                f"{size} of {np.dtype(dtype)}."
            )
        return array.reshape(-1)


@contextmanager
def open_tensors(path: Path) -> Iterator[safe_open]:
    """Opens a safetensors file. Raises ValueError, with its name, if it is not one or is cut."""
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file ({error}); copy it again.") from error


def as_finite(array: np.ndarray, dtype: np.dtype | type, where: str) -> np.ndarray:
    """The array in `dtype`. Raises ValueError, starting with `where`, if it has no floats or a value is not finite."""
    dtype = np.dtype(dtype)
    if not np.issubdtype(array.dtype, np.floating) and array.dtype != ml_dtypes.bfloat16:
        raise ValueError(f"{where} is stored as {array.dtype}; expected float32, float16 or bfloat16.")
    with np.errstate(over="ignore"):  # becomes infinite, and is found below
        array = np.ascontiguousarray(array, dtype)
    # As unsigned numbers without the sign, infinities and NaN are the largest: faster than np.isfinite for 16 bits.
    unsigned = np.dtype(f"u{dtype.itemsize}")
    bits, sign = array.reshape(-1).view(unsigned), unsigned.type(1 << 8 * dtype.itemsize - 1)
    infinity = np.array(np.inf, dtype).view(unsigned)
    count = CHECKED_BYTES // dtype.itemsize
    if any((bits[i : i + count] & ~sign).max() >= infinity for i in range(0, bits.size, count)):
        raise ValueError(f"{where} has values that are not finite as {dtype}; copy the file again, or train it again.")
    return array


def decode_absmax(stored: Stored) -> np.ndarray:
    """absmax float32 [O, G] of an NF4 weight, rounded as in bitsandbytes."""
    if stored.nested is None:
        return stored.absmax
    with np.errstate(over="ignore", invalid="ignore"):
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
    names = set(read_json(index, IndexFile).weight_map.values()) if index.exists() else set()
    files = sorted(folder / name for name in names) or sorted(folder.glob("model*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise FileNotFoundError(
            f"{model_dir} has no {', '.join(missing) or 'model*.safetensors'}; expected a complete Hugging Face folder."
        )
    return files


def adapter_weights(adapter_dir: str | Path) -> Path:
    """The adapter_model.safetensors of an adapter. Raises ValueError for a .bin file in its place, and
    FileNotFoundError if there is neither."""
    path = Path(adapter_dir) / "adapter_model.safetensors"
    if path.is_file():
        return path
    if (old := path.with_suffix(".bin")).is_file():
        raise ValueError(
            f"{old} can run code when it is read: load it with PEFT's PeftModel.from_pretrained and save it again with "
            f"save_pretrained, which writes {path.name}."
        )
    raise FileNotFoundError(f"{adapter_dir} has no {path.name}; expected an adapter saved by PEFT.")


def base_sha(model_dir: str | Path) -> str:
    """What adapters are bound to: `weights_sha`, or for a base that we converted, that of the original."""
    return recorded_sha(model_dir) or weights_sha(model_dir)


def recorded_sha(model_dir: str | Path) -> str | None:
    config = Path(model_dir) / "config.json"
    return read_json(config, BaseRecord).sha256 if config.exists() else None


def weights_sha(model_dir: str | Path) -> str:
    """sha256, in hex, of the bytes of a checkpoint's safetensors files in the order of their names."""
    digest = hashlib.sha256()
    for path in weight_files(model_dir):
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def base_facts(model_dir: str | Path) -> dict[str, str]:
    """sha256, in hex, of what a base's ids and numbers depend on: weights (`base_sha`), tokenizer and configuration."""
    config = json.dumps(dataclasses.asdict(Config.read(model_dir)), sort_keys=True)
    return {
        "base": base_sha(model_dir),
        "tokenizer": tokenizer_sha(model_dir),
        "config": hashlib.sha256(config.encode()).hexdigest(),
    }


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


def save_tensors(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file. Raises OSError, with its name, if the disk is full or the like."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}); free some space and run the same command again.") from error


def write_checkpoint(out_dir: str | Path, tensors: Iterable[tuple[str, np.ndarray]], config: dict) -> None:
    """Writes a folder that transformers can load: tensors as they arrive, in files of about 2 GiB; config.json last."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    names: list[list[str]] = []  # by file
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        save_tensors(pending, out_dir / f"part-{len(names)}.tmp", {"format": "pt"})
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


def companions(model_dir: str | Path) -> list[Path]:
    """The files of the tokenizer, chat template and generation settings, sorted."""
    return sorted({path for pattern in COMPANIONS for path in Path(model_dir).glob(pattern) if path.is_file()})


def write_companions(checkpoint: Checkpoint, out_dir: str | Path) -> None:
    """Writes the other files of a base; config.json, which differs by conversion, is written with the weights."""
    for name, content in checkpoint.files.items():
        if name != "config.json":
            (Path(out_dir) / name).write_bytes(content)

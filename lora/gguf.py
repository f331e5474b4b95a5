"""GGUF files (llama.cpp's format) as checkpoints: configuration, tokenizer and tensors under Hugging Face's names.

    checkpoint = GGUFFile("SmolLM2-135M-Instruct.Q4_1.gguf")        # checks the tensors against the metadata
    weight = checkpoint.dense("model.layers.0.mlp.up_proj.weight")  # dequantised now: float32
    checkpoint.files["tokenizer.json"]                              # made of the metadata

The `gguf` package reads the file and dequantises. Undone here is what llama.cpp's converter changes: the order of the
rows of Llama's queries and keys, and Llama 3.1's scaling of RoPE, which the file holds as a tensor of factors.

Left out: architectures other than `ARCHITECTURES`, experts, split files, LoRA adapters in GGUF, sliding windows, named
chat templates, writing GGUF.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import gguf
import ml_dtypes
import msgspec
import numpy as np
from gguf import GGMLQuantizationType as Kind

from lora.checkpoint import HF_NAMES, Checkpoint, check_names, tensor_shapes
from lora.config import Config, ConfigFile, Llama3Rope, Size, Theta
from lora.gguf_tokenizer import Vocabulary, tokenizer_files
from lora.model import rope_frequencies

# general.architecture: also the model_type in config.json. Files of Mistral and SmolLM2 say llama.
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
# Kinds whose values are stored as they are; `gguf` would convert them to float32.
PLAIN = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: ml_dtypes.bfloat16}
# Factors on the wavelengths of RoPE, and what Llama 3.1 to 3.3 have in common.
ROPE_FACTORS = "rope_freqs.weight"
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Rows that are dequantised at a time, so that temporaries stay small.
ROWS = 256

T = TypeVar("T")


class Sizes(
    msgspec.Struct,
    kw_only=True,
    rename={
        "heads": "attention.head_count",
        "key_value_heads": "attention.head_count_kv",
        "key_length": "attention.key_length",
        "value_length": "attention.value_length",
        "window": "attention.sliding_window",
        "epsilon": "attention.layer_norm_rms_epsilon",
        "rotated": "rope.dimension_count",
        "theta": "rope.freq_base",
        "scaling": "rope.scaling.type",
        "factor": "rope.scaling.factor",
        "linear_factor": "rope.scale_linear",
    },
):
    """The metadata under the architecture's name."""

    block_count: int
    context_length: int
    embedding_length: Size
    feed_forward_length: Size
    heads: Size
    key_value_heads: Size | None = None
    key_length: Size | None = None
    value_length: Size | None = None
    window: int | None = None
    epsilon: float
    rotated: int | None = None
    theta: Theta = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    linear_factor: float = 1.0
    expert_count: int = 0

    def head_dim(self) -> int:
        return self.key_length or self.embedding_length // self.heads

    def problems(self) -> Iterator[str]:
        """What model.py does not compute."""
        if self.expert_count:
            yield f"a mixture of {self.expert_count} experts"
        if (self.factor, self.linear_factor) != (1, 1):
            yield f"RoPE scaling of type {self.scaling} by {max(self.factor, self.linear_factor):g}"
        if self.rotated not in (None, self.head_dim()):
            yield f"RoPE on {self.rotated} of {self.head_dim()} dimensions of a head"
        if self.value_length not in (None, self.head_dim()):
            yield f"keys of {self.head_dim()} and values of {self.value_length}"
        if self.window:
            yield f"a sliding window of {self.window}"


class GGUFFile(Checkpoint):
    """A GGUF file, read tensor by tensor through the methods of a `Checkpoint`.

    Raises FileNotFoundError if there is none, and ValueError, with the file's name, for one that is cut or is one part
    of several, for an architecture, quantisation or tokenizer that is not implemented, and for missing, unexpected or
    misshapen tensors.
    """

    def __init__(self, path: str | Path):
        self.folder = Path(path)  # what messages name
        fields, self._tensors = read_gguf(self.folder)
        self._architecture = fields.get("general.architecture")
        self._refuse_other_files(fields)
        sizes = self._metadata(fields, f"{self._architecture}.", Sizes)
        if problems := list(sizes.problems()):
            raise ValueError(f"{path} has {' and '.join(problems)}; expected a plain decoder: convert another model.")
        vocabulary = self._metadata(fields, "tokenizer.", Vocabulary)
        self.config = self._read_config(sizes, vocabulary)
        self.shapes, self.quantized = tensor_shapes(self.config), set()
        self._files = dict.fromkeys(self.shapes, self.folder)
        self._names = self._gguf_names()
        self._check_tensors()
        self.chat_template = vocabulary.chat_template
        config = json.dumps(self.config.to_json(), indent=2).encode()
        self.files = {"config.json": config, **tokenizer_files(vocabulary, self.config, str(path))}

    @cached_property
    def weights_sha256(self) -> str:
        """sha256, in hex, of the file: what adapters are bound to."""
        with self.folder.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _refuse_other_files(self, fields: dict[str, Any]) -> None:
        if self._architecture not in ARCHITECTURES:
            raise ValueError(
                f"{self.folder}: general.architecture is {self._architecture!r}; expected one of "
                f"{', '.join(ARCHITECTURES)}: nothing else is computed."
            )
        if (parts := fields.get("split.count", 1)) > 1:
            raise ValueError(f"{self.folder} is one of {parts} parts; merge them first: llama-gguf-split --merge.")

    def _metadata(self, fields: dict[str, Any], prefix: str, type: type[T]) -> T:
        own = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
        try:
            return msgspec.convert(own, type)
        except msgspec.ValidationError as error:
            raise ValueError(f"{self.folder}: metadata under {prefix!r}: {error}") from error

    def _read_config(self, sizes: Sizes, vocabulary: Vocabulary) -> Config:
        if "token_embd.weight" not in self._tensors:
            raise ValueError(f"{self.folder} has no token_embd.weight; expected a complete model: download it again.")
        ends = (vocabulary.eos_token_id, vocabulary.eot_token_id, vocabulary.eom_token_id)
        config = Config(
            model_type=self._architecture,
            vocab_size=int(self._tensors["token_embd.weight"].shape[-1]),
            hidden_size=sizes.embedding_length,
            intermediate_size=sizes.feed_forward_length,
            num_hidden_layers=sizes.block_count,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.key_value_heads or sizes.heads,
            head_dim=sizes.head_dim(),
            max_position_embeddings=sizes.context_length,
            rope_theta=shortest(sizes.theta),
            rms_norm_eps=shortest(sizes.epsilon),
            tie_word_embeddings="output.weight" not in self._tensors,
            bos_token_id=vocabulary.bos_token_id,
            eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        )
        config = dataclasses.replace(config, rope_scaling=self._rope_scaling(config))
        try:
            problems = list(msgspec.convert(config.to_json(), ConfigFile).problems())
        except msgspec.ValidationError as error:
            problems = [str(error)]
        if problems:
            raise ValueError(f"{self.folder}: {'; '.join(problems)}. Download the file again, or convert another one.")
        return config

    def _rope_scaling(self, config: Config) -> Llama3Rope | None:
        """Llama 3.1's scaling, if the file has its factors on the wavelengths of a `config` without scaling."""
        if ROPE_FACTORS not in self._tensors:
            return None
        factors = np.asarray(self._tensors[ROPE_FACTORS].data, np.float64).reshape(-1)
        scaling = Llama3Rope(factor=float(factors.max()), **BANDS)
        scaled = dataclasses.replace(config, rope_scaling=scaling)
        expected = np.asarray(rope_frequencies(config) / rope_frequencies(scaled))
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            raise ValueError(
                f"{self.folder}: {ROPE_FACTORS} scales RoPE by {factors.min():g} to {factors.max():g}, in another way "
                f"than Llama 3.1 to 3.3 do ({scaling}); no other scaling is computed."
            )
        return scaling

    def _gguf_names(self) -> dict[str, str]:
        """Hugging Face's name of each tensor -> its name in the file."""
        known = gguf.get_tensor_name_map(ARCHITECTURES[self._architecture], self.config.num_hidden_layers)
        parts = {name: name.rpartition(".") for name in self.shapes}
        return {name: f"{known.get_name(stem)}.{suffix}" for name, (stem, _, suffix) in parts.items()}

    def _check_tensors(self) -> None:
        check_names(self.folder, self._tensors.keys() - {ROPE_FACTORS}, self._names.values())
        for name, ours in self._names.items():
            if (shape := tuple(self._tensors[ours].shape[::-1].tolist())) != self.shapes[name]:
                raise ValueError(f"{self.folder}: {ours} has shape {shape}, its metadata says {self.shapes[name]}.")
        for kind, tensor in {tensor.tensor_type: tensor for tensor in self._tensors.values()}.items():
            try:
                gguf.dequantize(np.atleast_2d(tensor.data)[:1], kind)
            except NotImplementedError as error:
                raise ValueError(
                    f"{self.folder}: {tensor.name} is quantised as {kind.name}, which the gguf package cannot "
                    "dequantise; convert a file of another quantisation."
                ) from error

    def _read(self, name: str) -> np.ndarray:
        """A tensor as stored, or dequantised to float32, a few rows at a time."""
        tensor, shape = self._tensors[self._names[name]], self.shapes[name]
        rows, kind = np.atleast_2d(tensor.data), tensor.tensor_type
        order = self._row_order(name, len(rows))
        if kind in PLAIN:
            return rows.view(PLAIN[kind])[order].reshape(shape)
        array = np.empty((len(rows), shape[-1]), np.float32)
        for start in range(0, len(rows), ROWS):
            array[start : start + ROWS] = gguf.dequantize(rows[order[start : start + ROWS]], kind)
        return array.reshape(shape)

    def _row_order(self, name: str, rows: int) -> np.ndarray:
        """The rows of the file in Hugging Face's order.

        llama.cpp rotates neighbours, Hugging Face the halves of a head: the converter interleaves the halves of every
        head of Llama's queries and keys.
        """
        order = np.arange(rows)
        if self._architecture == "llama" and name.endswith((f"{HF_NAMES['q']}.weight", f"{HF_NAMES['k']}.weight")):
            order = order.reshape(-1, self.config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
        return order


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """The metadata and the tensors, memory-mapped. Raises ValueError, with the file's name, if it is cut or no GGUF."""
    try:
        reader = gguf.GGUFReader(path)
        return (
            {name: field.contents() for name, field in reader.fields.items()},
            {tensor.name: tensor for tensor in reader.tensors},
        )
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{path} cannot be read as GGUF ({error}); expected a complete file: download it again, or upgrade the "
            "gguf package if a newer version wrote it."
        ) from error


def shortest(value: float) -> float:
    """The number that was stored as float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))

"""The configuration of a base model: the fields of a Hugging Face `config.json` that affect the computation.

    config = Config.read("qwen2.5-7b")              # refuses architectures that model.py does not implement
    json.dumps(config.to_json())                    # what save_model writes next to the weights

Left out: fields that only matter to transformers (dtype, cache, initialisation), RoPE scaling except Llama 3.1's, other
architectures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from msgspec import Meta, Struct

from artifacts.json_io import read_json

# model_type -> the class in transformers. Llama includes SmolLM2; Mistral includes v0.1 to v0.3 and Nemo.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",  # Qwen2.5 too
    "qwen3": "Qwen3ForCausalLM",
}
# Keys without which transformers would use a default of the family's own: they must be given.
REQUIRED = {
    "llama": (),
    "mistral": ("num_key_value_heads", "sliding_window"),
    "ministral": ("num_key_value_heads", "sliding_window"),
    "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"),
}
# What model.py computes: a config.json that has one of these keys with another value is refused.
COMPUTED = {
    "hidden_act": "silu",
    "attention_bias": False,  # in Llama and Qwen3 it includes the output projection
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}
# Where transformers 5 and 4 describe RoPE, and the values that mean nothing special there.
ROPE, PLAIN = ("rope_parameters", "rope_scaling"), ("default", 1.0, None)
FULL, SLIDING = "full_attention", "sliding_attention"

Size = Annotated[int, Meta(ge=1, le=2**24)]
Positions = Annotated[int, Meta(ge=1, le=2**31)]
TokenId = Annotated[int, Meta(ge=0, le=2**31)]
Theta = Annotated[float, Meta(gt=0, le=1e12)]
Factor = Annotated[float, Meta(gt=0, le=1e4)]


class Llama3Rope(NamedTuple):
    """Llama 3.1's scaling of RoPE, under the names that it has in `rope_scaling`.

    Wavelengths longer than original / low_freq_factor are multiplied by `factor`, those shorter than original /
    high_freq_factor are kept, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class Rope(Struct):
    """`rope_parameters` or `rope_scaling`; the type used to be called `type`."""

    rope_theta: Theta | None = None
    rope_type: str | None = None
    type: str | None = None
    factor: Factor | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    original_max_position_embeddings: Positions | None = None

    def scaling(self) -> Llama3Rope | None:
        """Llama 3.1's scaling, or None for plain RoPE."""
        if "llama3" not in (self.rope_type, self.type):
            return None
        return Llama3Rope(*(getattr(self, field) for field in Llama3Rope._fields))


class Quantization(Struct):
    quant_method: str = "bitsandbytes"


class GenerationFile(Struct):
    """A generation_config.json."""

    eos_token_id: TokenId | list[TokenId] | None = None


class ConfigFile(Struct, kw_only=True):
    """A config.json. What the families have different defaults for must be given (`REQUIRED`)."""

    model_type: str
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Meta(ge=1, le=1000)]
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Positions
    rms_norm_eps: Annotated[float, Meta(ge=0, le=1)]
    sliding_window: Positions | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Meta(ge=0, le=1000)] = 28  # Qwen's default
    layer_types: list[str] | None = None
    rope_theta: Theta | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    tie_word_embeddings: bool = False
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    quantization_config: Quantization | None = None

    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def thetas(self) -> set[float]:
        """The bases of RoPE's frequencies: one, unless none is given or the file contradicts itself."""
        return {place.rope_theta for place in (self, self.rope_parameters, self.rope_scaling) if place} - {None}

    def scalings(self) -> set[Llama3Rope | None]:
        """The scalings of RoPE: one, unless the file contradicts itself."""
        return {place.scaling() for place in (self.rope_parameters, self.rope_scaling) if place} or {None}

    def window_and_positions(self) -> tuple[int | None, int]:
        """The sliding window of all layers, if they have one, and the number of positions that are computed.

        Where only some layers have one, positions end with the window: within it, it changes nothing.
        """
        family, window, positions = self.model_type, self.sliding_window, self.max_position_embeddings
        if family == "llama" or (family in ("qwen2", "qwen3") and not self.use_sliding_window) or window is None:
            return None, positions
        first = self.max_window_layers if family in ("qwen2", "qwen3") else 0
        kinds = self.layer_types or [FULL if i < first else SLIDING for i in range(self.num_hidden_layers)]
        if FULL not in kinds:
            return window, positions
        ignored = family == "mistral"  # transformers' Mistral reads no layer_types
        return None, min(window, positions) if SLIDING in kinds or ignored else positions

    def problems(self) -> Iterator[str]:
        """What is wrong with the values taken together."""
        heads, window, kinds = self.num_attention_heads, self.sliding_window, set(self.layer_types or ())
        if heads % self.key_value_heads():
            yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {self.key_value_heads()}"
        if self.head_dim is None and self.hidden_size % heads:
            yield f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}"
        if self.head_width() % 2:
            yield "the width of a head is odd, but RoPE rotates pairs"
        if len(self.thetas()) > 1:
            yield f"rope_theta has several values, {sorted(self.thetas())}"
        if len(self.scalings()) > 1:
            yield f"{' and '.join(ROPE)} scale RoPE in different ways"
        for scaling in self.scalings() - {None}:
            if None in scaling or scaling.low_freq_factor >= scaling.high_freq_factor:
                yield f"RoPE of type llama3 has {scaling}; expected four numbers, high_freq_factor the larger one"
        if self.use_sliding_window is False and window is not None and self.model_type.endswith("stral"):
            yield f"sliding_window is {window}, but use_sliding_window is false"
        if kinds - {FULL, SLIDING}:
            yield f"layer_types are {sorted(kinds)}; only {FULL} and {SLIDING} are computed"
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            yield f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers"
        if SLIDING in kinds and (window is None or self.use_sliding_window is False):
            yield f"layer_types has {SLIDING}, but there is no sliding window"
        if self.quantization_config and self.quantization_config.quant_method != "bitsandbytes":
            yield f"quant_method is {self.quantization_config.quant_method!r}, and only bitsandbytes is read"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A model's family, sizes and constants, named as in its `config.json`."""

    model_type: str = "mistral"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # `eos_token_id`, a number or a list in files: each of them ends a reply

    @property
    def biased(self) -> tuple[str, ...]:
        """The projections of a layer that have a bias."""
        return ("q", "k", "v") if self.model_type == "qwen2" else ()

    @property
    def norms(self) -> dict[str, int]:
        """The norms of a layer and their widths. Qwen3 normalises the queries and keys of each head, before RoPE."""
        of_heads = ("q_norm", "k_norm") if self.model_type == "qwen3" else ()
        return dict.fromkeys(("attention_norm", "mlp_norm"), self.hidden_size) | dict.fromkeys(of_heads, self.head_dim)

    @classmethod
    def read(cls, model_dir: str | Path) -> Config:
        """Reads `config.json` as written by transformers 4 or 5, and the end tokens in `generation_config.json`.

        Raises FileNotFoundError if there is no config.json, and ValueError, with the file's name, for one that is
        damaged, contradicts itself or describes what model.py does not compute.
        """
        path = Path(model_dir) / "config.json"
        refuse_other_models(path, read_json(path, dict[str, Any]))
        file = read_json(path, ConfigFile)
        if problems := list(file.problems()):
            raise ValueError(f"{path}: {'; '.join(problems)}. Correct it, or copy it from the model again.")
        generation = path.with_name("generation_config.json")
        files = [file, read_json(generation, GenerationFile)] if generation.exists() else [file]
        ends = [f.eos_token_id if isinstance(f.eos_token_id, list) else [f.eos_token_id] for f in files]
        window, positions = file.window_and_positions()
        [scaling] = file.scalings()
        same = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        same += ("num_attention_heads", "rms_norm_eps", "tie_word_embeddings", "bos_token_id")
        return cls(
            **{field: getattr(file, field) for field in same},
            num_key_value_heads=file.key_value_heads(),
            head_dim=file.head_width(),
            max_position_embeddings=positions,
            rope_theta=max(file.thetas(), default=cls.rope_theta),
            rope_scaling=scaling,
            sliding_window=window,
            eos_token_ids=tuple(dict.fromkeys(i for ids in ends for i in ids if i is not None)),
        )

    def rope_json(self) -> dict[str, Any]:
        """RoPE's keys in a `config.json`: transformers 5 reads `rope_parameters`, transformers 4 the others."""
        scaling = {"rope_type": "llama3", **self.rope_scaling._asdict()} if self.rope_scaling else None
        parameters = {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})}
        return {"rope_theta": self.rope_theta, "rope_parameters": parameters, "rope_scaling": scaling}

    def to_json(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers 4 and 5 can read."""
        fields = dataclasses.asdict(self)
        ends = fields.pop("eos_token_ids")
        if self.model_type in ("qwen2", "qwen3"):
            fields |= {"use_sliding_window": self.sliding_window is not None, "max_window_layers": 0}
        if self.model_type == "ministral" and self.sliding_window is None:  # transformers wants a window, used or not
            layer_types = [FULL] * self.num_hidden_layers
            fields |= {"sliding_window": self.max_position_embeddings, "layer_types": layer_types}
        return fields | {
            "architectures": [ARCHITECTURES[self.model_type]],
            "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None),
            "hidden_act": "silu",
            "dtype": "float32",
            **self.rope_json(),
        }


def refuse_other_models(path: Path, file: dict[str, Any]) -> None:
    """Raises ValueError if a config.json describes what model.py does not compute, or leaves it to a default."""
    family = file.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(
            f"{path}: model_type is {family!r}; expected one of {', '.join(ARCHITECTURES)}: nothing else is computed."
        )
    found = {key: file[key] for key, computed in COMPUTED.items() if file.get(key, computed) != computed}
    for place in ROPE:
        if isinstance(rope := file.get(place), dict):  # of any other type it is refused with the sizes
            known = {"rope_theta"}
            if "llama3" in (rope.get("rope_type"), rope.get("type")):
                known |= {"rope_type", "type", *Llama3Rope._fields}
            found |= {f"{place}.{key}": v for key, v in rope.items() if key not in known and v not in PLAIN}
    if found:
        raise ValueError(
            f"{path}: {', '.join(f'{key} is {value!r}' for key, value in found.items())}; expected hidden_act 'silu', "
            "no biases of its own and rope_type 'default' or 'llama3': nothing else is computed."
        )
    for key in REQUIRED[family]:
        if key not in file:
            raise ValueError(f"{path}: missing required field `{key}`; copy the file from the model again.")

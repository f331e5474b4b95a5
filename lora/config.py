"""The configuration of a base model: the fields of a Hugging Face `config.json` that affect the computation.

    config = Config.read("mistral-7b")              # refuses architectures that model.py does not implement
    json.dumps(config.to_json())                    # what save_model writes next to the weights

Left out: fields that only matter to transformers (dtype, cache, initialisation), RoPE scaling, other architectures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from artifacts.json_io import read_json

# What model.py computes: a config.json that has one of these keys with another value is refused.
COMPUTED = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}
# Where RoPE is described, by transformers 5 and by transformers 4.
ROPE = ("rope_parameters", "rope_scaling")

Size = Annotated[int, Meta(ge=1, le=2**24)]
Positions = Annotated[int, Meta(ge=1, le=2**31)]
TokenId = Annotated[int, Meta(ge=0, le=2**31)]
Theta = Annotated[float, Meta(gt=0, le=1e12)]


class Rope(Struct):
    rope_theta: Theta | None = None


class Quantization(Struct):
    quant_method: str = "bitsandbytes"


class GenerationFile(Struct):
    """A generation_config.json."""

    eos_token_id: TokenId | list[TokenId] | None = None


class ConfigFile(Struct, kw_only=True):
    """A config.json. What transformers has defaults of its own for must be given."""

    model_type: str
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Meta(ge=1, le=1000)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size | None = None
    max_position_embeddings: Positions
    rms_norm_eps: Annotated[float, Meta(ge=0, le=1)]
    sliding_window: Positions | None
    use_sliding_window: bool = True
    layer_types: list[str] | None = None
    rope_theta: Theta | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    tie_word_embeddings: bool = False
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    quantization_config: Quantization | None = None

    def thetas(self) -> set[float]:
        """The bases of RoPE's frequencies: one, unless none is given or the file contradicts itself."""
        return {place.rope_theta for place in (self, self.rope_parameters, self.rope_scaling) if place} - {None}

    def problems(self) -> Iterator[str]:
        """What is wrong with the values taken together."""
        heads, window = self.num_attention_heads, self.sliding_window
        if heads % self.num_key_value_heads:
            yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}"
        if self.head_dim is None and self.hidden_size % heads:
            yield f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}"
        if (self.head_dim or self.hidden_size // heads) % 2:
            yield "the width of a head is odd, but RoPE rotates pairs"
        if len(self.thetas()) > 1:
            yield f"rope_theta has several values, {sorted(self.thetas())}"
        if window is not None and not self.use_sliding_window:
            yield f"sliding_window is {window}, but use_sliding_window is false"
        kinds, kind = set(self.layer_types or ()), "full_attention" if window is None else "sliding_attention"
        if kinds - {kind}:
            yield f"layer_types are {sorted(kinds)}, but with sliding_window {window} all layers are {kind}"
        if self.quantization_config and self.quantization_config.quant_method != "bitsandbytes":
            yield f"quant_method is {self.quantization_config.quant_method!r}, and only bitsandbytes is read"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A Mistral model's sizes and constants, named as in its `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # `eos_token_id`, a number or a list in files: each of them ends a reply

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
        fields = {field.name: getattr(file, field.name, None) for field in dataclasses.fields(cls)}
        return cls(
            **fields
            | {
                "head_dim": file.head_dim or file.hidden_size // file.num_attention_heads,
                "rope_theta": max(file.thetas(), default=cls.rope_theta),
                "eos_token_ids": tuple(dict.fromkeys(i for ids in ends for i in ids if i is not None)),
            }
        )

    def to_json(self) -> dict:
        """The contents of a `config.json` that transformers 4 and 5 can read."""
        fields = dataclasses.asdict(self)
        ends = fields.pop("eos_token_ids")
        return fields | {
            "architectures": ["MistralForCausalLM"],
            "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None),
            "model_type": "mistral",
            "hidden_act": "silu",
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "dtype": "float32",
        }


def refuse_other_models(path: Path, file: dict[str, Any]) -> None:
    """Raises ValueError if a config.json has a key whose value model.py does not compute."""
    found = {key: file[key] for key, computed in COMPUTED.items() if file.get(key, computed) != computed}
    for place in ROPE:
        if isinstance(rope := file.get(place), dict):  # of any other type it is refused with the sizes
            plain = ("default", 1.0, None)
            found |= {f"{place}.{key}": v for key, v in rope.items() if key != "rope_theta" and v not in plain}
    if found:
        raise ValueError(
            f"{path}: {', '.join(f'{key} is {value!r}' for key, value in found.items())}; expected model_type "
            "'mistral', hidden_act 'silu', no biases and rope_type 'default': nothing else is computed."
        )

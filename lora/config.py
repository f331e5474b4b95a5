"""The configuration of a base model: the fields of a Hugging Face `config.json` that affect the computation.

    config = Config.read("mistral-7b")              # refuses architectures that model.py does not implement
    json.dumps(config.to_json())                    # what save_model writes next to the weights

Left out: fields that only matter to transformers (dtype, cache, initialisation), RoPE scaling, other architectures.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path


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
    eos_token_id: int | None = None

    @classmethod
    def read(cls, model_dir: str | Path) -> Config:
        """Reads `model_dir/config.json` as written by transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

        Raises ValueError for an unsupported architecture, activation or RoPE type.
        """
        path = Path(model_dir) / "config.json"
        raw = json.loads(path.read_text())
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        found = (raw.get("model_type"), raw.get("hidden_act", "silu"), rope.get("rope_type", "default"))
        if found != ("mistral", "silu", "default"):
            raise ValueError(
                f"{path}: model_type, hidden_act and rope_type are {found}, expected ('mistral', 'silu', 'default'): "
                "only plain Mistral models are supported."
            )
        fields = {field.name: raw[field.name] for field in dataclasses.fields(cls) if field.name in raw}
        fields["rope_theta"] = float(rope.get("rope_theta", raw.get("rope_theta", cls.rope_theta)))
        if fields.get("head_dim") is None:
            fields["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
        return cls(**fields)

    def to_json(self) -> dict:
        """The contents of a `config.json` that transformers 4 and 5 can read."""
        return dataclasses.asdict(self) | {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "dtype": "float32",
        }

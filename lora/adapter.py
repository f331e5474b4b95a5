"""LoRA adapters: new ones, and files in PEFT's layout.

A saved adapter records the sha256 of its base and is refused on any other.

    save_adapter("runs/a3t/round_0/train_pg/adapter", model, "models/tiny-alfworld")
    lora, adapter = read_adapter(Checkpoint("models/tiny-alfworld"), "runs/a3t/round_0/train_pg/adapter")
    add_adapters(model, lora, adapter, mesh=None)               # load.load_adapter does both and loads the base

Left out: merging into the base (convert.py), other PEFT methods and variants of LoRA.
Shapes: N layers, O out-features, I in-features, R LoRA rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from artifacts.atomic import atomic_write
from lora.checkpoint import BASE_SHA, HF_NAMES, Checkpoint, base_sha, check_names, layer_tensor, tensor_shapes
from lora.config import Config
from lora.linear import FUSED, TARGETS, LoRAConfig
from lora.model import Mistral
from lora.sharding import partition_spec, put, to_host

Adapter = dict[tuple[str, str], np.ndarray]  # (target, "a" or "b") -> [N, R, I] or [N, O, R]

# Options of PEFT that change what an adapter computes and that lora/linear.py does not implement.
UNSUPPORTED = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "fan_in_fan_out",
    "lora_bias",
)


def adapter_shapes(config: Config, lora: LoRAConfig) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(target, "a" or "b") -> shape, in the order of `TARGETS` whatever the order of `lora.targets`."""
    shapes, dense = {}, tensor_shapes(config)
    for target in (target for target in TARGETS if target in lora.targets):
        rows, inputs = dense[layer_tensor(0, target)]
        shapes[target, "a"] = (config.num_hidden_layers, lora.rank, inputs)
        shapes[target, "b"] = (config.num_hidden_layers, rows, lora.rank)
    return shapes


def adapter_names(layers: int, targets: Iterable[str]) -> dict[str, tuple[str, int, str]]:
    """Tensor name in PEFT's layout -> (target, layer, "a" or "b")."""
    return {
        f"base_model.model.model.layers.{i}.{HF_NAMES[target]}.lora_{side.upper()}.weight": (target, i, side)
        for target in targets
        for i in range(layers)
        for side in "ab"
    }


def fresh_adapter(config: Config, lora: LoRAConfig, seed: int) -> Adapter:
    """A new adapter on the host: A uniform within 1/sqrt(in), as in PEFT, and B = 0."""
    rngs, adapter = nnx.Rngs(seed), {}
    for (target, side), shape in adapter_shapes(config, lora).items():
        bound = shape[2] ** -0.5
        if side == "a":
            adapter[target, side] = np.asarray(rngs.params.uniform(shape, jnp.float32, minval=-bound, maxval=bound))
        else:
            adapter[target, side] = np.zeros(shape, np.float32)
    return adapter


def add_adapters(model: Mistral, lora: LoRAConfig, adapter: Adapter, mesh: Mesh | None) -> None:
    """Adds an adapter to the model's linear layers, sharded over the mesh if there is one."""
    for name, parts in FUSED.items():
        for part in (part for part in parts if part in lora.targets):
            a, b = (put(adapter[part, side], mesh, partition_spec(name, side), f"{part}.{side}") for side in "ab")
            getattr(model.layers, name).add_adapter(part, a, b, lora)


def read_adapter(base: Checkpoint, adapter_dir: str | Path) -> tuple[LoRAConfig, Adapter]:
    """Reads an adapter in PEFT's layout, saved by us or by PEFT, onto the host.

    Raises ValueError if the adapter records another base's sha256 (PEFT records none), needs an option that
    `lora/linear.py` does not implement, or has missing, unexpected or misshapen tensors.
    """
    path = Path(adapter_dir) / "adapter_config.json"
    config = json.loads(path.read_text())
    weights_path = Path(adapter_dir) / "adapter_model.safetensors"
    with safe_open(weights_path, framework="np") as file:
        expected_sha = (file.metadata() or {}).get(BASE_SHA)
    if expected_sha is not None and expected_sha != (sha := base.sha256):
        raise ValueError(
            f"{adapter_dir} was trained on another base: {config.get('base_model_name_or_path')} with sha256 "
            f"{expected_sha}, but {base.folder} has {sha}. Give the adapter's own base, or train another adapter."
        )
    plain = {"peft_type": "LORA", "bias": "none"}
    unsupported = [f"{key}={config.get(key)!r}" for key, value in plain.items() if config.get(key, value) != value]
    unsupported += [f"{key}={config[key]!r}" for key in UNSUPPORTED if config.get(key)]
    targets = {name.split(".")[1]: target for target, name in HF_NAMES.items()}
    modules = config["target_modules"]
    if isinstance(modules, str) or not set(modules) <= set(targets):
        unsupported.append(f"target_modules={modules!r}")
    if unsupported:
        raise ValueError(
            f"{path}: got {', '.join(unsupported)}; expected a plain LoRA adapter with target_modules among "
            f"{list(targets)}."
        )
    lora = LoRAConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets=tuple(targets[module] for module in sorted(modules)),
    )
    tensors = load_file(weights_path)
    names = adapter_names(base.config.num_hidden_layers, lora.targets)
    check_names(adapter_dir, tensors, names)
    adapter: Adapter = {}
    for (target, side), expected in adapter_shapes(base.config, lora).items():
        layers = [tensors[name].astype(np.float32) for name, (t, _, s) in names.items() if (t, s) == (target, side)]
        shapes = {array.shape for array in layers}
        if shapes != {expected[1:]}:
            raise ValueError(f"{adapter_dir}: {target} {side.upper()} has shape {shapes}, expected {expected[1:]}.")
        adapter[target, side] = np.stack(layers)
    return lora, adapter


def save_adapter(adapter_dir: str | Path, model: Mistral, base_dir: str | Path) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` for `PeftModel.from_pretrained`.

    The sha256 of the base in `base_dir` is stored in the metadata of the weights. Raises ValueError for a model without
    an adapter. With several processes, all must call it and the first writes.
    """
    adapter_dir = Path(adapter_dir)
    adapted = {part: getattr(model.layers, name) for name, parts in FUSED.items() for part in parts}
    adapted = {part: linear for part, linear in adapted.items() if part in linear.a}
    if not adapted:
        raise ValueError("save_adapter got a model without an adapter: load it with a LoRAConfig.")
    stacks = {
        (part, side): to_host(getattr(linear, side)[part][...]) for part, linear in adapted.items() for side in "ab"
    }
    if jax.process_index() > 0:
        return
    first, linear = next(iter(adapted.items()))
    rank = stacks[first, "a"].shape[1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_dir),
        "r": rank,
        "lora_alpha": linear.scale * rank,
        "lora_dropout": linear.dropout,
        "target_modules": [HF_NAMES[target].split(".")[1] for target in adapted],
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        name: np.ascontiguousarray(stacks[target, side][i], np.float32)
        for name, (target, i, side) in adapter_names(model.config.num_hidden_layers, adapted).items()
    }
    adapter_dir.mkdir(parents=True, exist_ok=True)
    metadata = {BASE_SHA: base_sha(base_dir)}  # one key only: safetensors writes several in random order
    weights_path = adapter_dir / "adapter_model.safetensors"
    with atomic_write(weights_path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with atomic_write(adapter_dir / "adapter_config.json") as temporary:
        temporary.write_text(text)


def adapter_name(run: str, round_index: int, adapter_dir: str | Path) -> str:
    """A name for servers, `<run>-r<round>-<sha8>`: unique to the weights, so that no server's cache mixes them up."""
    weights = (Path(adapter_dir) / "adapter_model.safetensors").read_bytes()
    return f"{run}-r{round_index}-{hashlib.sha256(weights).hexdigest()[:8]}"

"""LoRA adapters: new ones, and files in PEFT's layout.

A saved adapter records the sha256 of its base and is refused on any other, and so is one with values that are not
finite, by the tensor's name.

    save_adapter("runs/a3t/round_0/train_pg/adapter", model, "models/tiny-alfworld")
    lora, adapter = read_adapter(Checkpoint("models/tiny-alfworld"), "runs/a3t/round_0/train_pg/adapter")
    add_adapters(model, lora, adapter, mesh=None)               # load.load_adapter does both and loads the base

Left out: merging into the base (convert.py), other PEFT methods and variants of LoRA.
Shapes: N layers, O out-features, I in-features, R LoRA rank.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from msgspec import Meta

from artifacts.atomic import atomic_write
from artifacts.json_io import read_json
from lora.checkpoint import (
    BASE_SHA,
    HF_NAMES,
    Checkpoint,
    as_finite,
    base_sha,
    check_names,
    layer_tensor,
    open_tensors,
    save_tensors,
    tensor_shapes,
)
from lora.config import Config
from lora.flops import require_memory
from lora.linear import FUSED, TARGETS, LoRAConfig
from lora.model import CausalLM
from lora.sharding import partition_spec, put, to_host

# A module's name in PEFT's target_modules -> our name.
MODULES = {name.split(".")[1]: target for target, name in HF_NAMES.items()}

Adapter = dict[tuple[str, str], np.ndarray]  # (target, "a" or "b") -> [N, R, I] or [N, O, R]

# Options of PEFT that change what an adapter computes: refused unless they have this value.
COMPUTED = {"peft_type": "LORA", "bias": "none"} | dict.fromkeys(
    (
        "use_rslora",
        "use_dora",
        "use_qalora",
        "use_bdlora",
        "kasa_config",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layers_to_transform",
        "layer_replication",
        "target_parameters",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "arrow_config",
        "fan_in_fan_out",
        "lora_bias",
    )
)
# Initialisations of PEFT that leave the base as it is; others subtract something from its weights.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# Copies of an adapter that training holds at least at its peak: itself, Adam's moments and their successors, gradient,
# update and average, and those that a checkpoint is written from. Measured on a CPU: 14 to 20.
TRAINING_COPIES = 12


class AdapterFile(msgspec.Struct):
    """An adapter_config.json; options that change the computation are in `COMPUTED`."""

    r: Annotated[int, Meta(ge=1, le=2**20)]
    lora_alpha: Annotated[float, Meta(gt=0, le=1e6)]
    target_modules: Annotated[list[str], Meta(min_length=1)]
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    base_model_name_or_path: str | None = None
    init_lora_weights: bool | str | None = True


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


def add_adapters(model: CausalLM, lora: LoRAConfig, adapter: Adapter, mesh: Mesh | None) -> None:
    """Adds an adapter to the model's linear layers, sharded over the mesh if there is one."""
    for name, parts in FUSED.items():
        for part in (part for part in parts if part in lora.targets):
            a, b = (put(adapter[part, side], mesh, partition_spec(name, side), f"{part}.{side}") for side in "ab")
            getattr(model.layers, name).add_adapter(part, a, b, lora)


def require_training_memory(config: Config, lora: LoRAConfig, shards: int = 1) -> None:
    """Raises ValueError if training an adapter needs more memory than a device has, or if its rank is beyond all sense.

    `shards`: the devices that its arrays are at most spread over.
    """
    shapes = adapter_shapes(config, lora)
    what, parameters = f"training adapters of rank {lora.rank}", sum(math.prod(shape) for shape in shapes.values())
    needed = 4 * TRAINING_COPIES * parameters // shards
    widest = max(shapes[target, side][axis] for target, _ in shapes for side, axis in (("a", 2), ("b", 1)))
    if lora.rank > widest:
        raise ValueError(
            f"{what} takes {needed:,} bytes and is pointless: the widest layer has {widest} features. Lower --rank."
        )
    require_memory(needed, what, "--rank")


def read_adapter(base: Checkpoint, adapter_dir: str | Path) -> tuple[LoRAConfig, Adapter]:
    """Reads an adapter in PEFT's layout, saved by us or by PEFT, onto the host.

    Raises ValueError, with the file's name, if the adapter is damaged, records another base's sha256 (PEFT records
    none), was trained on a base that its initialisation changed, needs an option that `lora/linear.py` does not
    implement, or has missing, unexpected or misshapen tensors, or values that are not finite.
    """
    path = Path(adapter_dir) / "adapter_config.json"
    file = read_adapter_file(path)
    weights_path = Path(adapter_dir) / "adapter_model.safetensors"
    if not weights_path.is_file():
        raise FileNotFoundError(f"{adapter_dir} has no adapter_model.safetensors; expected an adapter saved by PEFT.")
    with open_tensors(weights_path) as opened:
        expected_sha = (opened.metadata() or {}).get(BASE_SHA)
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    if expected_sha is not None and expected_sha != (sha := base.sha256):
        raise ValueError(
            f"{adapter_dir} was trained on another base: {file.base_model_name_or_path} with sha256 "
            f"{expected_sha}, but {base.folder} has {sha}. Give the adapter's own base, or train another adapter."
        )
    lora = LoRAConfig(
        rank=file.r,
        alpha=file.lora_alpha,
        dropout=file.lora_dropout,
        targets=tuple(MODULES[module] for module in sorted(set(file.target_modules))),
    )
    names = adapter_names(base.config.num_hidden_layers, lora.targets)
    check_names(adapter_dir, tensors, names)
    adapter: Adapter = {}
    for key, (_, *shape) in adapter_shapes(base.config, lora).items():
        layers = []
        for name in [name for name, (target, _, side) in names.items() if (target, side) == key]:
            where, array = f"{weights_path}: {name}", tensors[name]
            if array.shape != tuple(shape):
                raise ValueError(f"{where} has shape {array.shape}, expected {tuple(shape)}.")
            layers.append(as_finite(array, np.float32, where))
            if key[1] == "b":
                as_finite(layers[-1] * np.float64(lora.alpha / lora.rank), np.float32, f"{where}, times alpha / r,")
        adapter[key] = np.stack(layers)
    return lora, adapter


def read_adapter_file(path: Path) -> AdapterFile:
    """Reads an adapter_config.json. Raises ValueError for one that `lora/linear.py` does not compute."""
    options = read_json(path, dict[str, Any])
    unsupported = [f"{key}={options[key]!r}" for key, plain in COMPUTED.items() if (options.get(key) or plain) != plain]
    modules = options.get("target_modules")
    if not isinstance(modules, list) or not set(map(str, modules)) <= set(MODULES):  # PEFT also takes a pattern
        unsupported.append(f"target_modules={modules!r}")
    if unsupported:
        raise ValueError(
            f"{path}: got {', '.join(unsupported)}; expected a plain LoRA adapter with target_modules among "
            f"{list(MODULES)}."
        )
    file = read_json(path, AdapterFile)
    if file.init_lora_weights not in PLAIN_INITIALISATIONS:
        raise ValueError(
            f"{path}: init_lora_weights={file.init_lora_weights!r} changed the base that this adapter was trained on. "
            "Make a plain adapter of it, with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    return file


def save_adapter(adapter_dir: str | Path, model: CausalLM, base_dir: str | Path) -> None:
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
        save_tensors(tensors, temporary, metadata)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with atomic_write(adapter_dir / "adapter_config.json") as temporary:
        temporary.write_text(text)


def adapter_name(run: str, round_index: int, adapter_dir: str | Path) -> str:
    """A name for servers, `<run>-r<round>-<sha8>`: unique to the weights, so that no server's cache mixes them up."""
    weights = (Path(adapter_dir) / "adapter_model.safetensors").read_bytes()
    return f"{run}-r{round_index}-{hashlib.sha256(weights).hexdigest()[:8]}"

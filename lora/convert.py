"""Weights in and out: Hugging Face Mistral checkpoints (safetensors), and LoRA adapters in PEFT's layout.

A base is read tensor by tensor and quantised on the way when it is to be NF4. An adapter remembers the sha256 of the
base it was trained on and is refused on any other. Files are written beside their place and then moved into it.
Left out: bitsandbytes 4-bit checkpoints, a cache of the quantised base, merged export, a command line.

    model = load_model("models/tiny-alfworld", weights="nf4", lora=LoRAConfig(rank=16, alpha=32.0, targets=("q", "v")))
    save_adapter("runs/a3t/round_0/train_pg/adapter", model, "models/tiny-alfworld")
    model = load_adapter("models/tiny-alfworld", "runs/a3t/round_0/train_pg/adapter", weights="nf4")

Shapes: N layers, O out-features, I in-features, G NF4 blocks, V vocabulary, D model.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora import nf4
from lora.linear import TARGETS, LoRAConfig, LoRAParam
from lora.mistral import Config, Mistral

HF_NAMES = {target: f"self_attn.{target}_proj" for target in ("q", "k", "v", "o")}
HF_NAMES |= {target: f"mlp.{target}_proj" for target in ("gate", "up", "down")}
HF_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
# Our key in the metadata of adapter_model.safetensors; in adapter_config.json PEFT would warn about it.
BASE_SHA = "base_model_sha256"


def tensor_names(config: Config) -> dict[str, tuple[str, int | None]]:
    """Each tensor name of a checkpoint -> our attribute and the layer it is a slice of (None: not stacked)."""
    names = {"model.embed_tokens.weight": ("embed", None), "model.norm.weight": ("norm", None)}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = ("head", None)
    for ours, theirs in (HF_NAMES | HF_NORMS).items():
        names |= {f"model.layers.{i}.{theirs}.weight": (ours, i) for i in range(config.num_hidden_layers)}
    return names


def weight_files(model_dir: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted. Raises FileNotFoundError if there is none."""
    files = sorted(Path(model_dir).glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{model_dir}: no model*.safetensors there; expected a Hugging Face model directory.")
    return files


def base_sha(model_dir: str | Path) -> str:
    """sha256, in hex, of the bytes of a checkpoint's safetensors files in the order of their names."""
    digest = hashlib.sha256()
    for path in weight_files(model_dir):
        with path.open("rb") as file:
            while piece := file.read(2**24):
                digest.update(piece)
    return digest.hexdigest()


def load_model(
    model_dir: str | Path, *, weights: str = "nf4", lora: LoRAConfig | None = None, seed: int = 0, dtype=jnp.float32
) -> Mistral:
    """A model from `config.json` and `model*.safetensors`; embeddings, head and norms are never quantised.

    `weights`: "nf4" (linear layers quantised, block 64) or "fp32" (all of them in `dtype`). `dtype` is that of the
    activations. `lora` adds fresh adapters drawn from `seed`. Raises ValueError naming every missing, unexpected or
    misshapen tensor, and for a layer whose width NF4 cannot cut into blocks of 64.
    """
    if weights not in ("nf4", "fp32"):
        raise ValueError(f"load_model got weights={weights!r}, expected 'nf4' or 'fp32'.")
    config = Config.read(model_dir)
    model = nnx.eval_shape(lambda: Mistral(config, rngs=nnx.Rngs(0)))
    read = checkpoint_reader(model_dir, config, model)
    shapes = {target: getattr(model.layers, target).weight.shape for target in TARGETS}
    layers = range(config.num_hidden_layers)
    for name in ("embed", "norm") if config.tie_word_embeddings else ("embed", "norm", "head"):
        setattr(model, name, nnx.Param(jnp.asarray(read(name, None), dtype)))
    for name in HF_NORMS:
        setattr(model.layers, name, nnx.Param(jnp.asarray(np.stack([read(name, i) for i in layers]), dtype)))
    for name in TARGETS:
        linear = getattr(model.layers, name)
        if weights == "nf4":
            if shapes[name][2] % nf4.BLOCK:
                raise ValueError(
                    f"{model_dir}: layer {name!r} has {shapes[name][2]} inputs, but NF4 needs a multiple of "
                    f"{nf4.BLOCK}: make the model's sizes multiples of it, or load it with weights='fp32'."
                )
            codes, absmax = zip(*(nf4.quantize(read(name, i)) for i in layers), strict=True)
            linear.quantize(jnp.asarray(np.stack(codes), jnp.uint4), jnp.asarray(np.stack(absmax)))
        else:
            linear.weight = nnx.Param(jnp.asarray(np.stack([read(name, i) for i in layers]), dtype))
    if lora is not None:
        rngs = nnx.Rngs(seed)
        for name in TARGETS:  # in this order whatever the order of the targets, so that the draws are the same
            if name in lora.targets:
                getattr(model.layers, name).add_adapter(shapes[name], lora, rngs)
    return model


def checkpoint_reader(model_dir: str | Path, config: Config, model: Mistral) -> Callable[[str, int | None], np.ndarray]:
    """A function (our attribute, layer) -> host array, once the checkpoint's names are known to be those of `config`.

    Raises ValueError naming all missing and unexpected tensors, and later for a tensor of another shape.
    """
    names = tensor_names(config)
    files = {}
    for path in weight_files(model_dir):
        with safe_open(path, framework="np") as file:
            files |= dict.fromkeys(file.keys(), path)
    check_names(model_dir, files, names)
    theirs = {place: name for name, place in names.items()}

    def read(ours: str, layer: int | None) -> np.ndarray:
        name = theirs[ours, layer]
        with safe_open(files[name], framework="flax") as file:  # flax and not numpy, because it reads bfloat16
            array = np.asarray(file.get_tensor(name))
        holder = model if layer is None else model.layers
        expected = getattr(holder, ours)
        expected = (expected.weight if ours in TARGETS else expected).shape
        expected = expected if layer is None else expected[1:]
        if array.shape != expected:
            raise ValueError(f"{files[name]}: {name} has shape {array.shape}, config.json says {expected}.")
        return array

    return read


def check_names(where: str | Path, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raises ValueError that lists all missing and all unexpected tensor names."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{where}: the tensors are not those that its config describes. Missing: {', '.join(missing) or 'none'}. "
            f"Unexpected: {', '.join(unexpected) or 'none'}."
        )


def save_model(model: Mistral, model_dir: str | Path) -> None:
    """Writes `config.json` and `model.safetensors` (float32) as `MistralForCausalLM.from_pretrained` reads them.

    Dense weights without an adapter only: raises ValueError otherwise, because either would be lost.
    """
    model_dir = Path(model_dir)
    tensors = {}
    for name, (ours, layer) in tensor_names(model.config).items():
        holder = getattr(model if layer is None else model.layers, ours)
        if ours in TARGETS:
            if holder.weight is None or holder.a is not None:
                raise ValueError(f"save_model got a quantised or adapted {ours!r}, expected dense weights only.")
            holder = holder.weight
        array = np.asarray(holder[...], np.float32)
        tensors[name] = np.ascontiguousarray(array if layer is None else array[layer])
    model_dir.mkdir(parents=True, exist_ok=True)
    replace_file(model_dir / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    model.config.write(model_dir)


def adapter_names(layers: int, targets: Iterable[str]) -> dict[str, tuple[str, int, str]]:
    """Each tensor name of a PEFT adapter -> (target, layer, "a" or "b")."""
    return {
        f"base_model.model.model.layers.{i}.{HF_NAMES[target]}.lora_{side.upper()}.weight": (target, i, side)
        for target in targets
        for i in range(layers)
        for side in "ab"
    }


def save_adapter(adapter_dir: str | Path, model: Mistral, base_dir: str | Path) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` as `PeftModel.from_pretrained` reads them.

    The sha256 of the base in `base_dir` goes into the metadata of the weights. Raises ValueError for a model without an
    adapter.
    """
    adapter_dir = Path(adapter_dir)
    adapted = {t: linear for t in TARGETS if (linear := getattr(model.layers, t)).a is not None}
    if not adapted:
        raise ValueError("save_adapter got a model without an adapter: load it with a LoRAConfig first.")
    first = next(iter(adapted.values()))
    rank = first.a.shape[1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_dir),
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": [HF_NAMES[target].split(".")[1] for target in adapted],
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        name: np.ascontiguousarray(np.asarray(getattr(adapted[target], side)[...][i], np.float32))
        for name, (target, i, side) in adapter_names(model.config.num_hidden_layers, adapted).items()
    }
    adapter_dir.mkdir(parents=True, exist_ok=True)
    metadata = {BASE_SHA: base_sha(base_dir)}  # safetensors writes several keys in random order: bytes would differ
    weights_path = adapter_dir / "adapter_model.safetensors"
    replace_file(weights_path, lambda path: save_file(tensors, path, metadata=metadata))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    replace_file(adapter_dir / "adapter_config.json", lambda path: path.write_text(text))


def load_adapter(model_dir: str | Path, adapter_dir: str | Path, weights: str = "nf4", *, dtype=jnp.float32) -> Mistral:
    """The base of `model_dir` (see `load_model`) with an adapter in PEFT's layout, ours or PEFT's own.

    Raises ValueError if the adapter names another base by its sha256 (PEFT's own name none), uses what
    `lora/linear.py` does not compute, or has missing, unexpected or misshapen tensors.
    """
    path = Path(adapter_dir) / "adapter_config.json"
    config = json.loads(path.read_text())
    weights_path = Path(adapter_dir) / "adapter_model.safetensors"
    with safe_open(weights_path, framework="np") as file:
        theirs = (file.metadata() or {}).get(BASE_SHA)
    ours = base_sha(model_dir)
    if theirs not in (None, ours):
        raise ValueError(
            f"{adapter_dir} was trained on another base: {config.get('base_model_name_or_path')} with sha256 {theirs}, "
            f"but {model_dir} has {ours}. Give the base that it belongs to, or train an adapter on this one."
        )
    plain = {"peft_type": "LORA", "bias": "none"}
    odd = [f"{key}={config.get(key)!r}" for key, value in plain.items() if config.get(key, value) != value]
    extra = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform",
             "fan_in_fan_out", "lora_bias")  # fmt: skip
    odd += [f"{key}={config[key]!r}" for key in extra if config.get(key)]
    targets = {name.split(".")[1]: target for target, name in HF_NAMES.items()}
    modules = config["target_modules"]
    if isinstance(modules, str) or not set(modules) <= set(targets):
        odd.append(f"target_modules={modules!r}")
    if odd:
        raise ValueError(
            f"{path}: {', '.join(odd)}; expected a plain LoRA adapter whose target_modules are among {list(targets)}."
        )
    lora = LoRAConfig(
        rank=config["r"], alpha=config["lora_alpha"], targets=tuple(targets[module] for module in sorted(modules))
    )
    model = load_model(model_dir, weights=weights, lora=lora, dtype=dtype)
    tensors = load_file(weights_path)
    names = adapter_names(model.config.num_hidden_layers, lora.targets)
    check_names(adapter_dir, tensors, names)
    by_place = {place: tensors[name] for name, place in names.items()}
    for target in lora.targets:
        linear = getattr(model.layers, target)
        for side in "ab":
            parameter = getattr(linear, side)
            shapes = {by_place[target, i, side].shape for i in range(model.config.num_hidden_layers)}
            if shapes != {parameter.shape[1:]}:
                raise ValueError(
                    f"{adapter_dir}: {target} {side.upper()} has {shapes}, expected {parameter.shape[1:]}."
                )
            stack = np.stack([by_place[target, i, side] for i in range(model.config.num_hidden_layers)])
            setattr(linear, side, LoRAParam(jnp.asarray(stack, jnp.float32)))
    return model


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path` and moves it there, so that a killed run leaves no half file."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)

"""Weights in and out: base models into JAX, LoRA adapters in PEFT's layout, and the command that converts folders.

A base is read tensor by tensor (`lora/checkpoint.py`) and quantised on the way when it is to be NF4. An adapter
remembers the sha256 of the base it was trained on and is refused on any other. Files are written beside their place and
then moved into it.

    model = load_model("models/tiny-alfworld", weights="nf4", lora=LoRAConfig(rank=16, alpha=32.0, targets=("q", "v")))
    save_adapter("runs/a3t/round_0/train_pg/adapter", model, "models/tiny-alfworld")
    model = load_adapter("models/tiny-alfworld", "runs/a3t/round_0/train_pg/adapter", weights="nf4")

    python -m lora.convert --model mistral-7b --out base-nf4 --weights nf4          # quantised once
    python -m lora.convert --model mistral-7b --adapter ADAPTER --out merged        # dense, the adapter in it

Shapes: N layers, O out-features, I in-features, G NF4 blocks of an in-row, M blocks of absmax, V vocabulary, D model.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from artifacts.atomic import atomic_write
from lora import nf4
from lora.checkpoint import (
    BASE_SHA,
    HF_NAMES,
    HF_NORMS,
    Checkpoint,
    base_sha,
    bitsandbytes_tensors,
    check_names,
    copy_companions,
    decoded,
    is_linear,
    layer_tensor,
    tensor_shapes,
    write_checkpoint,
)
from lora.linear import FUSED, NF4, TARGETS, LoRAConfig
from lora.mistral import Config, Mistral
from lora.sharding import COLUMN, fused_order, put, spec_of, to_host

Weights = Literal["nf4", "nf4-dq", "bf16", "fp32"]
DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}


# ---- into JAX --------------------------------------------------------------------------------------------------------


def load_model(
    model_dir: str | Path,
    *,
    weights: Weights = "nf4",
    lora: LoRAConfig | None = None,
    seed: int = 0,
    dtype=None,
    mesh: Mesh | None = None,
) -> Mistral:
    """A model from `config.json` and `model*.safetensors`; embeddings, head and norms are never quantised.

    `weights`: linear layers in "nf4" (block 64), "nf4-dq" (double-quantised), "bf16" or "fp32". `dtype` is that of
    activations and of what is not quantised: bfloat16 for "bf16", else float32 unless it is given. `lora` adds fresh
    adapters drawn from `seed`. On a `mesh` each device gets its shard. Raises ValueError naming every missing,
    unexpected or misshapen tensor, a layer whose width NF4 cannot cut into blocks of 64, or one that the mesh cannot
    divide.
    """
    if weights not in ("nf4", "nf4-dq", "bf16", "fp32"):
        raise ValueError(f"load_model got weights={weights!r}, expected 'nf4', 'nf4-dq', 'bf16' or 'fp32'.")
    own = {"bf16": jnp.bfloat16, "fp32": jnp.float32}.get(weights)
    dtype = np.dtype(dtype or own or jnp.float32)
    if own not in (None, dtype):
        raise ValueError(f"load_model got weights={weights!r} with activations in {dtype}; leave one of them out.")
    checkpoint = Checkpoint(model_dir)
    config = checkpoint.config
    model = nnx.eval_shape(lambda: Mistral(config, rngs=nnx.Rngs(0)))

    def whole(name: str) -> nnx.Param:
        return nnx.Param(put(checkpoint.dense(name).astype(dtype), mesh, P(), name))

    def stacked(ours: str) -> np.ndarray:
        names = (layer_tensor(layer, ours) for layer in range(config.num_hidden_layers))
        return np.stack([checkpoint.dense(name).astype(dtype) for name in names])

    model.embed, model.norm = whole("model.embed_tokens.weight"), whole("model.norm.weight")
    if not config.tie_word_embeddings:
        model.head = whole("lm_head.weight")
    for ours in HF_NORMS:
        setattr(model.layers, ours, nnx.Param(put(stacked(ours), mesh, P(), ours)))
    for name, parts in FUSED.items():
        linear = getattr(model.layers, name)
        if weights.startswith("nf4"):
            check_width(model_dir, name, linear.inputs)
            linear.quantize(read_nf4(checkpoint, name, weights == "nf4-dq", mesh))
        else:
            for part in parts:
                array = put(stacked(part), mesh, spec_of(name, "weight"), part)
                linear.weight[part] = nnx.Param(array)
    if lora is not None:
        add_adapters(model, lora, fresh_adapter(config, lora, seed), mesh)
    return model


def check_width(model_dir: str | Path, name: str, inputs: int) -> None:
    if inputs % nf4.BLOCK:
        raise ValueError(
            f"{model_dir}: layer {name!r} has {inputs} inputs, but NF4 needs a multiple of {nf4.BLOCK}: make the "
            "model's sizes multiples of it, or load it with weights='fp32'."
        )


def read_nf4(checkpoint: Checkpoint, name: str, double: bool, mesh: Mesh | None) -> NF4:
    """The NF4 base of one fused linear layer of all decoder layers, on the device or spread over the mesh.

    Host memory: the packed codes of the layer, and the largest tensor while it is quantised.
    """
    parts, layers = FUSED[name], checkpoint.config.num_hidden_layers
    rows = [checkpoint.shapes[layer_tensor(0, part)][0] for part in parts]
    arrays: list[np.ndarray] = []
    for layer in range(layers):
        stored = [checkpoint.nf4(layer_tensor(layer, part), double) for part in parts]
        if double:  # every block of absmax keeps the mean of the tensor that it is of
            stored = [s._replace(offset=np.full(len(s.nested), s.offset, np.float32)) for s in stored]
        fused = [np.concatenate(field) for field in zip(*stored, strict=True) if field[0] is not None]
        arrays = arrays or [np.empty((layers, *array.shape), array.dtype) for array in fused]
        for array, part in zip(arrays, fused, strict=True):
            array[layer] = part
    devices = mesh.shape["tensor"] if mesh is not None and name in COLUMN else 1
    if devices > 1:  # each device's rows of all parts lie together, and its blocks of absmax
        orders = [fused_order(rows, devices)] * 2
        if double:
            groups = arrays[0].shape[2]
            if any(count * groups % (devices * nf4.NESTED_BLOCK) for count in rows):
                raise ValueError(
                    f"{name}: {' and '.join(map(str, rows))} rows of {groups} blocks cannot be double-quantised on "
                    f"tensor={devices}: its blocks of {nf4.NESTED_BLOCK} absmax would be cut. Use weights='nf4'."
                )
            orders = orders[:1] + [fused_order([n * groups // nf4.NESTED_BLOCK for n in rows], devices)] * 3
        arrays = [array[:, order] for array, order in zip(arrays, orders, strict=True)]
    packed, *statistics = arrays
    fields = ("absmax_codes", "nested", "offset") if double else ("absmax",)
    codes = to_uint4(put(packed, mesh, spec_of(name, "codes"), f"{name}.codes"))
    placed = zip(fields, statistics, strict=True)
    placed = {field: put(array, mesh, spec_of(name, field), f"{name}.{field}") for field, array in placed}
    return NF4(codes, placed.pop("absmax", None), **placed)


@jax.jit
def to_uint4(packed: jax.Array) -> jax.Array:
    """uint4 codes [N, O, G, 64] of packed uint8 [N, O, G, 32]."""
    halves = packed[..., None] >> jnp.array([4, 0], jnp.uint8) & 15
    return halves.astype(jnp.uint4).reshape(*packed.shape[:-1], -1)


# ---- adapters --------------------------------------------------------------------------------------------------------

Adapter = dict[tuple[str, str], np.ndarray]  # (target, "a" or "b") -> [N, R, I] or [N, O, R]


def adapter_shapes(config: Config, lora: LoRAConfig) -> dict[tuple[str, str], tuple[int, int, int]]:
    """The shapes of an adapter's A and B, in an order that is not that of the config's targets."""
    shapes, dense = {}, tensor_shapes(config)
    for target in (target for target in TARGETS if target in lora.targets):
        rows, inputs = dense[layer_tensor(0, target)]
        shapes[target, "a"] = (config.num_hidden_layers, lora.rank, inputs)
        shapes[target, "b"] = (config.num_hidden_layers, rows, lora.rank)
    return shapes


def fresh_adapter(config: Config, lora: LoRAConfig, seed: int) -> Adapter:
    """A, uniform within 1/sqrt(in) as PEFT draws it, and B = 0."""
    rngs, adapter = nnx.Rngs(seed), {}
    for place, shape in adapter_shapes(config, lora).items():
        bound = shape[2] ** -0.5
        if place[1] == "a":
            adapter[place] = np.asarray(rngs.params.uniform(shape, jnp.float32, minval=-bound, maxval=bound))
        else:
            adapter[place] = np.zeros(shape, np.float32)
    return adapter


def add_adapters(model: Mistral, lora: LoRAConfig, adapter: Adapter, mesh: Mesh | None) -> None:
    """Puts an adapter beside the model's linear layers, each device of a mesh its part."""
    for name, parts in FUSED.items():
        for part in (part for part in parts if part in lora.targets):
            a, b = (put(adapter[part, side], mesh, spec_of(name, side), f"{part}.{side}") for side in "ab")
            getattr(model.layers, name).add_adapter(part, a, b, lora)


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
    adapter. With several processes all of them call it, and the first one writes.
    """
    adapter_dir = Path(adapter_dir)
    adapted = {part: getattr(model.layers, name) for name, parts in FUSED.items() for part in parts}
    adapted = {part: linear for part, linear in adapted.items() if part in linear.a}
    if not adapted:
        raise ValueError("save_adapter got a model without an adapter: load it with a LoRAConfig first.")
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
    metadata = {BASE_SHA: base_sha(base_dir)}  # safetensors writes several keys in random order: bytes would differ
    weights_path = adapter_dir / "adapter_model.safetensors"
    with atomic_write(weights_path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with atomic_write(adapter_dir / "adapter_config.json") as temporary:
        temporary.write_text(text)


def adapter_name(run: str, number: int, adapter_dir: str | Path) -> str:
    """A name for a server, `<run>-r<round>-<sha8>`: other weights have another, so that no cache mixes them up."""
    weights = (Path(adapter_dir) / "adapter_model.safetensors").read_bytes()
    return f"{run}-r{number}-{hashlib.sha256(weights).hexdigest()[:8]}"


def read_adapter(model_dir: str | Path, adapter_dir: str | Path) -> tuple[LoRAConfig, Adapter]:
    """An adapter in PEFT's layout, ours or PEFT's own, on the host.

    Raises ValueError if the adapter names another base by its sha256 (PEFT's own name none), uses what
    `lora/linear.py` does not compute, or has missing, unexpected or misshapen tensors.
    """
    path = Path(adapter_dir) / "adapter_config.json"
    config = json.loads(path.read_text())
    weights_path = Path(adapter_dir) / "adapter_model.safetensors"
    with safe_open(weights_path, framework="np") as file:
        theirs = (file.metadata() or {}).get(BASE_SHA)
    if theirs is not None and theirs != (ours := base_sha(model_dir)):
        raise ValueError(
            f"{adapter_dir} was trained on another base: {config.get('base_model_name_or_path')} with sha256 {theirs}, "
            f"but {model_dir} has {ours}. Give the base that it belongs to, or train an adapter on this one."
        )
    plain = {"peft_type": "LORA", "bias": "none"}
    odd = [f"{key}={config.get(key)!r}" for key, value in plain.items() if config.get(key, value) != value]
    extra = (
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layers_to_transform",
        "fan_in_fan_out",
        "lora_bias",
    )
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
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets=tuple(targets[module] for module in sorted(modules)),
    )
    model_config = Config.read(model_dir)
    tensors = load_file(weights_path)
    names = adapter_names(model_config.num_hidden_layers, lora.targets)
    check_names(adapter_dir, tensors, names)
    adapter: Adapter = {}
    for place, expected in adapter_shapes(model_config, lora).items():
        layers = [tensors[name].astype(np.float32) for name, (t, _, side) in names.items() if (t, side) == place]
        shapes = {array.shape for array in layers}
        if shapes != {expected[1:]}:
            raise ValueError(f"{adapter_dir}: {place[0]} {place[1].upper()} has {shapes}, expected {expected[1:]}.")
        adapter[place] = np.stack(layers)
    return lora, adapter


def load_adapter(
    model_dir: str | Path, adapter_dir: str | Path, weights: Weights = "nf4", *, dtype=None, mesh: Mesh | None = None
) -> Mistral:
    """The base of `model_dir` (see `load_model`) with an adapter in PEFT's layout (see `read_adapter`)."""
    lora, adapter = read_adapter(model_dir, adapter_dir)
    model = load_model(model_dir, weights=weights, dtype=dtype, mesh=mesh)
    add_adapters(model, lora, adapter, mesh)
    return model


# ---- out -------------------------------------------------------------------------------------------------------------


def save_model(model: Mistral, model_dir: str | Path) -> None:
    """Writes `config.json` and `model.safetensors` (float32) as `MistralForCausalLM.from_pretrained` reads them.

    Dense weights without an adapter only: raises ValueError otherwise, because either would be lost.
    """
    for name in FUSED:
        linear = getattr(model.layers, name)
        if linear.quantized or linear.a:
            raise ValueError(f"save_model got a quantised or adapted {name!r}, expected dense weights only.")
    tensors = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm}
    tensors |= {} if model.head is None else {"lm_head.weight": model.head}
    stacks = {part: getattr(model.layers, name).weight[part] for name, parts in FUSED.items() for part in parts}
    stacks |= {name: getattr(model.layers, name) for name in HF_NORMS}
    tensors |= {layer_tensor(i, ours): x[i] for ours, x in stacks.items() for i in range(len(x))}
    arrays = ((name, np.asarray(array[...], np.float32)) for name, array in tensors.items())
    write_checkpoint(model_dir, arrays, model.config.to_json())


def convert(model_dir: Path, out_dir: Path, weights: Weights, adapter_dir: Path | None, dtype: str | None) -> str:
    """Writes a base in another form, or a dense model with an adapter merged into it; returns what was done.

    A merged model's weights are those of the base in the form `weights`, decoded, plus alpha/r B A, summed in float32
    and rounded to `dtype`.
    """
    checkpoint = Checkpoint(model_dir)
    config = json.loads((Path(model_dir) / "config.json").read_text())
    quantise = weights.startswith("nf4")
    stored_dtype = str(checkpoint.dense("model.embed_tokens.weight").dtype)
    kept = np.dtype(DTYPES[dtype]) if dtype else np.dtype(stored_dtype)
    lora, adapter = (None, {}) if adapter_dir is None else read_adapter(model_dir, adapter_dir)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in tqdm(checkpoint.shapes.items(), desc="convert", unit="tensor"):
            if not (quantise and is_linear(name)):
                array = checkpoint.dense(name)
            else:
                stored = checkpoint.nf4(name, weights == "nf4-dq")
                if lora is None:
                    yield from bitsandbytes_tensors(name, stored, shape, str(kept)).items()
                    continue
                array = decoded(stored).reshape(shape)
            yield name, merge_into(array, name).astype(kept)

    def merge_into(array: np.ndarray, name: str) -> np.ndarray:
        place = name.split(".")
        target = next((t for t, theirs in HF_NAMES.items() if name.endswith(f"{theirs}.weight")), None)
        if (target, "a") not in adapter:
            return array
        a, b = (adapter[target, side][int(place[2])] for side in "ab")
        return array.astype(np.float32) + np.float32(lora.alpha / lora.rank) * (b @ a)

    config.pop("quantization_config", None)
    if lora is None:
        config[BASE_SHA] = base_sha(model_dir)
        if quantise:
            config["quantization_config"] = {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": weights == "nf4-dq",
                "bnb_4bit_compute_dtype": str(kept),
            }
    else:
        config.pop(BASE_SHA, None)
    write_checkpoint(out_dir, tensors(), config | {"dtype": str(kept)})
    copy_companions(model_dir, out_dir)
    return f"{model_dir} -> {out_dir}: {weights}" + ("" if lora is None else f" + {adapter_dir}, {kept}")


@dataclass(frozen=True, kw_only=True)
class Args:
    model: Path
    """Hugging Face folder: safetensors in bf16, fp16, fp32, or bitsandbytes NF4."""
    out: Path
    """Folder to write; it must not hold a model yet."""
    weights: Weights = "nf4"
    """Form of the linear layers: NF4 as bitsandbytes writes it, with double quantisation (nf4-dq), or dense."""
    adapter: Path | None = None
    """Merge this LoRA adapter into the weights and write a dense model; --weights is then the form that it was trained
    on, and its values are what is merged with."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Dtype of what is not quantised (default: as --weights says, or that of the input's embeddings)."""


def main(args: Args) -> None:
    if (args.out / "config.json").exists():
        raise ValueError(f"{args.out} holds a model already; remove it or give another --out.")
    dtype = args.dtype or (args.weights if args.weights in DTYPES else None)
    print(convert(args.model, args.out, args.weights, args.adapter, dtype))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error

"""LoRA adapters: new ones, and files in PEFT's layout.

A saved adapter records the sha256 of its base and is refused on any other, and so is one with values that are not
finite, by the tensor's name. Adapters that PEFT trained record none; they are read with whatever ranks and scales their
layers have (`read_adapter`), and become plain LoRA.

    save_adapter("runs/a3t/round_0/train_pg/adapter", model, "models/tiny-alfworld")
    lora, adapter = read_adapter(Checkpoint("models/tiny-alfworld"), "runs/a3t/round_0/train_pg/adapter")
    add_adapters(model, lora, adapter, mesh=None)               # load.load_adapter does both and loads the base

Left out: merging into the base (convert.py), other PEFT methods and variants of LoRA, projections that are adapted in
some layers only, embeddings and heads.
Shapes: N layers, O out-features, I in-features, R LoRA rank.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import reprlib
import statistics
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

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
    adapter_weights,
    as_finite,
    base_sha,
    check_names,
    layer_tensor,
    open_tensors,
    save_tensors,
    tensor_shapes,
)
from lora.config import Config
from lora.linear import FUSED, TARGETS, LoRAConfig
from lora.model import CausalLM
from lora.sharding import partition_spec, put, to_host

Adapter = dict[tuple[str, str], np.ndarray]  # (target, "a" or "b") -> [N, R, I] or [N, O, R]
Module = tuple[str, int]  # target, layer

MERGE = "merge the adapter into its base with PEFT's merge_and_unload and give the merged folder as the base"
# Options of PEFT with which an adapter computes something else, and what: refused if they are set.
REFUSED_OPTIONS = {
    "bias": "biases of the base are trained",
    "modules_to_save": "embeddings, a head or norms are trained whole",
    "trainable_token_indices": "embeddings of some tokens are trained",
    "target_parameters": "parameters of other modules than linear layers are adapted",
    "layers_to_transform": "only some layers are adapted",
    "layer_replication": "layers are used several times",
    "use_dora": "DoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "lora_bias": "B has a bias",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "use_qalora": "QALoRA",
}
UNMERGEABLE = {"layer_replication", "lora_bias", "alora_invocation_tokens", "arrow_config", "use_qalora"}
# Initialisations of PEFT that leave the base as it is; others subtract something from its weights.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

T = TypeVar("T")
Rank = Annotated[int, Meta(ge=1, le=2**20)]
Alpha = Annotated[float, Meta(ge=1e-30, le=1e6)]


class AdapterFile(msgspec.Struct):
    """An adapter_config.json without the options that are refused."""

    r: Rank
    lora_alpha: Alpha
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    use_rslora: bool | None = None
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


def module_path(target: str, layer: int) -> str:
    """A projection's path in the base model, which PEFT matches patterns with."""
    return layer_tensor(layer, target).removesuffix(".weight")


def adapter_names(layers: int, targets: Iterable[str]) -> dict[str, tuple[str, int, str]]:
    """Tensor name in PEFT's layout -> (target, layer, "a" or "b")."""
    return {
        f"base_model.model.{module_path(target, i)}.lora_{side.upper()}.weight": (target, i, side)
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


def require_rank(config: Config, lora: LoRAConfig) -> None:
    """Raises ValueError if the adapters' rank is beyond all sense."""
    shapes = adapter_shapes(config, lora)
    widest = max(shapes[target, side][axis] for target, _ in shapes for side, axis in (("a", 2), ("b", 1)))
    if lora.rank > widest:
        size = 4 * sum(math.prod(shape) for shape in shapes.values())
        raise ValueError(
            f"an adapter of rank {lora.rank} takes {size:,} bytes and is pointless: the widest layer has {widest} "
            "features. Lower --rank."
        )


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_adapter(base: Checkpoint, adapter_dir: str | Path) -> tuple[LoRAConfig, Adapter]:
    """Reads an adapter in PEFT's layout, saved by us or by PEFT, onto the host, as plain LoRA.

    rsLoRA and ranks and alphas by module (`use_rslora`, `rank_pattern`, `alpha_pattern`) compute what they do in PEFT,
    but as one rank and one scale alpha / r: the rank is the largest, with rows of zeros added to A and columns of zeros
    to B, which stay zero in training; the scale is the one that most modules have, and B of any other module is
    multiplied by its own scale over that. Trained further with Adam, such a B changes by the same steps as all others,
    so its product with A moves by the common scale and not by its own, as it would in PEFT.

    If the file records no sha256 of its base, a line on stderr says which base is assumed. Raises ValueError, with the
    file's name, if the adapter is damaged, records another base's sha256, was trained on a base that its initialisation
    changed, needs an option that is not computed, adapts a projection in some layers only, or has missing, unexpected
    or misshapen tensors, or values that are not finite.
    """
    path = Path(adapter_dir) / "adapter_config.json"
    file, layers = read_adapter_file(path), base.config.num_hidden_layers
    weights_path = adapter_weights(adapter_dir)
    targets = read_targets(path, file, layers)
    ranks, scales = ranks_and_scales(path, file, [(target, i) for target in targets for i in range(layers)])
    tensors = read_tensors(weights_path, base, file.base_model_name_or_path)
    names = adapter_names(layers, targets)
    check_adapter_names(weights_path, tensors, names)
    rank, scale = max(ranks.values()), statistics.mode(scales.values())
    lora = LoRAConfig(rank=rank, alpha=scale * rank, dropout=file.lora_dropout, targets=targets)
    shapes = adapter_shapes(base.config, lora)
    for name, (target, layer, side) in names.items():  # before anything of the largest rank is allocated
        (_, rows, columns), own = shapes[target, side], ranks[target, layer]
        expected = (own, columns) if side == "a" else (rows, own)
        if (shape := tensors[name].shape) != expected:
            raise ValueError(f"{weights_path}: {name} has shape {shape}, expected {expected} on {base.folder}.")
    adapter = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    for name, (target, layer, side) in names.items():
        where, own = f"{weights_path}: {name}", np.float64(scales[target, layer])
        array = as_finite(tensors.pop(name), np.float32, where)
        if side == "b":
            as_finite(array * own, np.float32, f"{where}, times alpha / r,")
            array = as_finite(array * (own / scale), np.float32, f"{where}, times its scale over the common one,")
        rows, columns = array.shape
        adapter[target, side][layer, :rows, :columns] = array
    return lora, adapter


def read_adapter_file(path: Path) -> AdapterFile:
    """Reads an adapter_config.json. Raises ValueError for one that is not computed."""
    options = read_json(path, dict[str, Any])
    if (method := options.get("peft_type", "LORA")) != "LORA":
        raise ValueError(
            f"{path}: peft_type is {method!r}, and only 'LORA' is computed; merge the adapter into its base with PEFT, "
            "if its method has merge_and_unload, and give the merged folder as the base, or train a LoRA adapter."
        )
    if found := {option: options[option] for option in REFUSED_OPTIONS if is_set(options.get(option))}:
        what = ", ".join(f"{key}={reprlib.repr(value)} ({REFUSED_OPTIONS[key]})" for key, value in found.items())
        lost = "PEFT cannot save it merged into its base, so train a plain LoRA adapter"
        raise ValueError(f"{path}: {what}: not computed; {lost if UNMERGEABLE & set(found) else MERGE}.")
    file = read_json(path, AdapterFile)
    if file.init_lora_weights not in PLAIN_INITIALISATIONS:
        raise ValueError(
            f"{path}: init_lora_weights={file.init_lora_weights!r} changed the base that this adapter was trained on: "
            "merge it into that base with PEFT's merge_and_unload and give the merged folder as the base, or make a "
            "plain adapter of it with save_pretrained(path_initial_model_for_weight_conversion=...), which PEFT can do "
            "for PiSSA, OLoRA, CorDA and LoRA-GA."
        )
    return file


def is_set(option: Any) -> bool:
    """Whether an option has another value than PEFT's defaults; 0 may name a layer or a token."""
    return option is not False and option not in (None, "none", [], {})


def compiled(path: Path, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {pattern!r} is no regular expression ({error}); copy the file again.") from error


def matcher(path: Path, modules: list[str] | str | None) -> Callable[[str], bool]:
    """Whether PEFT's target_modules or exclude_modules select a module path, which a regular expression must match as a
    whole and an entry of a list must end or be."""
    if isinstance(modules, str):
        pattern = compiled(path, modules)
        return lambda module: pattern.fullmatch(module) is not None
    ends = tuple(f".{name}" for name in modules or ())
    return lambda module: f".{module}".endswith(ends)


def read_targets(path: Path, file: AdapterFile, layers: int) -> tuple[str, ...]:
    """The projections that are adapted. Raises ValueError if one is in some layers only, or anything else is."""
    modules = file.target_modules
    if isinstance(modules, str) and modules.lower() == "all-linear":  # in PEFT, all but the head
        modules = list(HF_NAMES.values())
    included, excluded = matcher(path, modules), matcher(path, file.exclude_modules)

    def selected(module: str) -> bool:
        return included(module) and not excluded(module)

    if others := [module for module in ("model.embed_tokens", "lm_head") if selected(module)]:
        raise ValueError(
            f"{path}: target_modules selects {' and '.join(others)}, and only adapters of the layers' projections are "
            f"computed; {MERGE}."
        )
    found = {target: [i for i in range(layers) if selected(module_path(target, i))] for target in TARGETS}
    found = {target: where for target, where in found.items() if where}
    parts = {HF_NAMES[target]: where for target, where in found.items() if len(where) < layers}
    if parts:
        what = " and ".join(f"{name} in layers {', '.join(map(str, where))}" for name, where in parts.items())
        raise ValueError(
            f"{path}: target_modules selects {what} of {layers} only, and a projection is adapted in all layers or in "
            f"none; {MERGE}."
        )
    if not found:
        raise ValueError(
            f"{path}: target_modules={reprlib.repr(file.target_modules)} selects none of "
            f"{', '.join(HF_NAMES.values())}; expected an adapter of at least one."
        )
    return tuple(found)


def ranks_and_scales(
    path: Path, file: AdapterFile, modules: list[Module]
) -> tuple[dict[Module, int], dict[Module, float]]:
    """The rank of each module's adapter and the scale of its B A: alpha / r, or alpha / sqrt(r) with rsLoRA.

    As in PEFT, the first key of a pattern counts that matches the module's path or the end of it after a dot.
    """

    def by_module(patterns: dict[str, T] | None, default: T) -> dict[Module, T]:
        table = [(compiled(path, rf"(.*\.)?({key})$"), value) for key, value in (patterns or {}).items()]
        paths = {module: module_path(*module) for module in modules}
        return {m: next((value for key, value in table if key.match(name)), default) for m, name in paths.items()}

    ranks, alphas = by_module(file.rank_pattern, file.r), by_module(file.alpha_pattern, file.lora_alpha)
    return ranks, {m: alphas[m] / (math.sqrt(rank) if file.use_rslora else rank) for m, rank in ranks.items()}


def read_tensors(path: Path, base: Checkpoint, trained_on: str | None) -> dict[str, np.ndarray]:
    """The tensors of an adapter_model.safetensors. Raises ValueError if it records the sha256 of another base."""
    with open_tensors(path) as opened:
        expected_sha = (opened.metadata() or {}).get(BASE_SHA)
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    if expected_sha is None:
        note_assumed_base(path.parent, trained_on, base.folder)
    elif expected_sha != base.sha256:
        raise ValueError(
            f"{path.parent} was trained on another base: {trained_on} with sha256 {expected_sha}, but {base.folder} "
            f"has {base.sha256}. Give the adapter's own base, or train another adapter."
        )
    return tensors


@functools.cache  # said once, however often the adapter is read
def note_assumed_base(adapter_dir: Path, trained_on: str | None, base_dir: Path) -> None:
    known = f"was trained on {trained_on} and records no hash of it" if trained_on else "does not record its base"
    print(f"{adapter_dir} {known}: assumed to be {base_dir}", file=sys.stderr)


def check_adapter_names(path: Path, found: Collection[str], expected: Collection[str]) -> None:
    """Raises ValueError for tensors that are missing, unexpected, of another number of layers or not named by PEFT."""
    if whole := sorted(name for name in found if "lora_" not in name):
        raise ValueError(
            f"{path} holds {', '.join(map(repr, whole))}, and weights that are trained whole, or of added tokens, are "
            f"not computed; {MERGE}."
        )
    if named := next(filter(None, (re.search(r"\.lora_[AB](\.\w+)\.weight$", name) for name in found)), None):
        rename = f"{{n.replace('{named[1]}.', '.'): t for n, t in load_file(f).items()}}"
        raise ValueError(
            f"{path}: {named.string} has a name as in training, and PEFT saves it without {named[1]!r}; rename all "
            f'tensors with python -c "from safetensors.torch import load_file, save_file; f = {str(path)!r}; '
            f'save_file({rename}, f)".'
        )
    last, last_expected = (max(map(layer_of, names)) for names in (found or expected, expected))
    if last != last_expected:
        raise ValueError(
            f"{path}: the last layer that is adapted is {last}, but that of the base is {last_expected}; give the "
            "adapter's own base."
        )
    if found and not set(found) & set(expected):
        raise ValueError(
            f"{path}: PEFT would not name a tensor of this base {min(found)!r}, but for instance {min(expected)!r}; "
            "load the adapter with what trained it and save it with PEFT's save_pretrained, or give its own base."
        )
    check_names(path, found, expected)


def layer_of(name: str) -> int:
    """The layer of a tensor; 0 if it has none."""
    layer = re.search(r"\.layers\.(\d{1,9})\.", name)
    return int(layer[1]) if layer else 0


# ---- writing ---------------------------------------------------------------------------------------------------------


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

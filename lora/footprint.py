"""What playing and training take in memory: arithmetic on a model's shape and settings, before anything is loaded.

    plan = plan_playing(config, Playing(rollout="nf4", slots=64), Device(platform="gpu", limit=24 * 2**30))
    plan.peak <= plan.limit

Arrays are counted exactly (tests/test_memory.py compares them with the real ones), temporaries by a few rules that were
fitted to what XLA's compilers assign (bench/RESULTS.md, bench.tpu_compile) and, on a CPU, to the resident size of
processes (bench/memory.py).
Left out: choices and refusals (memory.py), host memory beside an accelerator, other processes on the device.

Shapes: V vocabulary, D model, F feed-forward, H heads, N layers. A `width` is the bytes of a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp

from lora import nf4
from lora.adapter import adapter_shapes
from lora.attention import Implementation, best_implementation
from lora.config import Config
from lora.decoder import RolloutWeights
from lora.engine import ACCELERATOR_TILE, CACHED, CHUNK, TILE, default_drafts
from lora.flops import matmul_weights
from lora.group import SIZES, TILED_SIZES, WIDTHS
from lora.linear import LARGE, LoRAConfig
from lora.logprobs import LOGITS_PER_CHUNK, TOKENS_PER_CHUNK
from lora.model import UNROLLED_LAYERS

MIB = 2**20
# Copies of an adapter that training holds at least at its peak: itself, Adam's moments and their successors, gradient,
# update and average, and those that a checkpoint is written from. Measured on a CPU, with all that grows with it: 14 to
# 20.
TRAINING_COPIES = 12
# What a CPU's process holds of its compiled programs (in training with checkpoints): in all, and for each layer that is
# laid out one by one. Measured (bench/memory.py), without programs compiled earlier.
PLAYING_PROGRAMS, TRAINING_PROGRAMS = (250 * MIB, 13 * MIB), (290 * MIB, 25 * MIB)


class Device(NamedTuple):
    """One device: its kind as JAX's backends are called, and the bytes that JAX may use of it. A CPU is the machine."""

    platform: Literal["cpu", "gpu", "tpu"]
    limit: int
    cores: int = 1  # of a CPU


class Plan(NamedTuple):
    """Bytes on one device; on a CPU, whose devices share its memory, on all. The peak is that of running or of loading,
    whichever is larger."""

    base: int
    adapter: int  # in training with all that is as large: gradient, moments, averages
    cache: int
    working: int  # temporaries, results, and on a CPU compiled programs
    loading: int
    limit: int  # of the device

    @property
    def running(self) -> int:
        return self.base + self.adapter + self.cache + self.working

    @property
    def peak(self) -> int:
        return max(self.running, self.loading)


# ---- arrays ----------------------------------------------------------------------------------------------------------


def linear_weights(config: Config) -> int:
    """Number of weights of the layers' projections, which NF4 quantises."""
    return matmul_weights(config) - config.vocab_size * config.hidden_size


def base_bytes(config: Config, bits: float, width: int = 2, *, heads: int | None = None) -> int:
    """Bytes of a base whose projections take so many bits a weight: 16, 4.5 in NF4. Other numbers have `width` bytes.

    `heads`: matrices [V, D] beside the embeddings: none if they are tied, but a decoder always lays out its own.
    """
    heads = (not config.tie_word_embeddings) if heads is None else heads
    small = config.num_hidden_layers * sum(config.norms.values()) + config.hidden_size
    rows = {"q": config.num_attention_heads * config.head_dim}
    rows |= dict.fromkeys("kv", config.num_key_value_heads * config.head_dim)
    small += config.num_hidden_layers * sum(rows[part] for part in config.biased)
    dense = (1 + heads) * config.vocab_size * config.hidden_size + small
    return math.ceil(linear_weights(config) * bits / 8) + width * dense


def adapter_bytes(config: Config, lora: LoRAConfig) -> int:
    """Bytes of an adapter in float32."""
    return 4 * sum(math.prod(shape) for shape in adapter_shapes(config, lora).values())


def cache_bytes(config: Config, positions: int, width: int = 2) -> int:
    """Bytes of the keys and values of so many positions."""
    return 2 * width * positions * config.num_key_value_heads * config.head_dim * config.num_hidden_layers


def nf4_bits(double: bool = False) -> float:
    """Bits of a weight in NF4: its code and its share of the scales. (A CPU's arrays of 4 bits have a byte for each, of
    which XLA touches half.)"""
    return 4 + ((8 + 2 * 32 / nf4.NESTED_BLOCK) if double else 32) / nf4.BLOCK


# ---- playing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Playing:
    """How a stage plays; None: not chosen yet."""

    weights: Literal["nf4", "fp32"] = "nf4"
    rollout: RolloutWeights | None = None
    slots: int | None = None
    context: int = 1024
    max_new_tokens: int = 64
    prefixes: tuple[int, ...] = (0,)  # ids of the prompt of each policy that plays here
    adapters: tuple[int, ...] = (0,)  # bytes of the adapter of each; 0: it plays without
    devices: int = 1  # that the slots are spread over; each holds the weights


def plan_playing(config: Config, how: Playing, device: Device) -> Plan:
    """The plan for policies of one base. Every policy has its own cache. A further policy shares the first one's base
    if it plays without an adapter, unless the first one's adapter was added to it (fp32)."""
    on_cpu = device.platform == "cpu"
    width = playing_width(how, device)
    bits = nf4_bits() if how.rollout == "nf4" else 8 * width
    rows, groups, tile = layout(config, how, device)
    base, merged = base_bytes(config, bits, width, heads=1), how.rollout == "fp32"
    first, *others = how.adapters
    bases = 1 + sum(bool(adapter or (merged and first)) for adapter in others)
    beside = 0 if merged else sum(how.adapters)
    positions = groups * rows * -(-how.context // tile) * tile
    cache = cache_bytes(config, len(how.prefixes) * positions + sum(how.prefixes), width)
    # XLA:CPU runs groups concurrently, as many as it has cores; those of two policies are seldom at work together.
    working = group_working(config, how, device, rows, -(-how.context // tile) * tile)
    working *= min(len(how.prefixes) * groups, device.cores) if on_cpu else 1
    if on_cpu:
        working += PLAYING_PROGRAMS[0] + PLAYING_PROGRAMS[1] * config.num_hidden_layers
    loading = loading_bytes(config, how, device) + bases * base + sum(how.adapters)
    if bases > 1:  # the second is loaded beside the first policy's cache
        loading += cache // len(how.prefixes)
    return Plan(base=bases * base, adapter=beside, cache=cache, working=working, loading=loading, limit=device.limit)


def playing_width(how: Playing, device: Device) -> int:
    """Bytes of a number that is not in NF4, hence of the cache; see agent/local.py."""
    nf4_width = 4 if device.platform == "cpu" else 2
    return nf4_width if how.rollout == "nf4" else {"fp32": 4, "bf16": 2}[how.rollout]


def layout(config: Config, how: Playing, device: Device) -> tuple[int, int, int]:
    """Rows of a group, groups and positions of a tile, as in `Engine`."""
    if device.platform != "cpu":
        return -(-how.slots // how.devices), 1, ACCELERATOR_TILE.positions
    rows = min(16 if matmul_weights(config) > CACHED else 8, -(-how.slots // 2))
    return rows, -(-how.slots // rows), TILE.positions


def group_working(config: Config, how: Playing, device: Device, rows: int, context: int) -> int:
    """Temporaries of a group while it prefills or decodes, and the keys and values that a chunk hands over.

    Decoding holds the logits of a step, their weights, sums and draws; a prefill holds scores and weights in float32,
    and its rows' copy of a layer's cache; either holds base weights in another form.
    """
    on_cpu, width = device.platform == "cpu", playing_width(how, device)
    drafts = default_drafts(config, on_cpu)
    H, V, D, N = config.num_attention_heads, config.vocab_size, config.hidden_size, config.num_hidden_layers
    places, chunk = rows * (1 + drafts), min(CHUNK, how.max_new_tokens)
    tiled = on_cpu and how.rollout == "fp32" and D**2 >= LARGE
    batch = min(rows, max(1, 2 * max(TILED_SIZES if tiled else SIZES) // WIDTHS[0]))
    longest = max(how.prefixes)
    decode = 4 * 4 * places * V
    if tiled:  # half of the rows are taken out of the cache to be decoded alone
        decode += cache_bytes(config, rows // 2 * context, width)
    prefill = 2 * 4 * batch * H * WIDTHS[0] * (context + longest) + cache_bytes(config, batch * context, width) // N
    prefill = max(prefill, 2 * 4 * H * longest**2)  # the prefix itself, in one piece
    layer = linear_weights(config) // N
    if on_cpu and how.rollout == "nf4":  # XLA:CPU unpacks the codes of all layers, a byte each, and decodes a layer
        decode, prefill = linear_weights(config) + max(decode, 4 * layer), 5 * layer + prefill
    elif on_cpu and how.rollout == "bf16":  # XLA:CPU multiplies in float32, and converts all layers at once
        decode, prefill = decode + 4 * matmul_weights(config), prefill + 4 * layer
    elif how.rollout == "nf4":  # on a TPU nothing is decoded outside a product, on a GPU one weight
        decode, prefill = (part + 2 * D * 2 * config.intermediate_size for part in (decode, prefill))
    if device.platform == "tpu" and V > 2**16:  # its compiler lays out large embeddings again
        decode += width * V * D
    return cache_bytes(config, rows * (chunk + 1 + drafts), width) + max(decode, prefill)


def loading_bytes(config: Config, how: Playing, device: Device) -> int:
    """Bytes of the model that a decoder is made of, which is freed then."""
    if how.weights == "nf4":
        narrow = how.rollout != "fp32" and device.platform != "cpu"
        return base_bytes(config, nf4_bits(), 2 if narrow else 4)
    width = 2 if how.rollout == "bf16" else 4
    return base_bytes(config, 8 * width, width)


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a device trains; None: not chosen yet. The mesh is (data, fsdp, tensor)."""

    weights: Literal["nf4", "nf4-dq", "bf16", "fp32"] = "nf4"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoRAConfig = LoRAConfig()
    row_length: int = 1280
    batch_rows: int = 2
    device_rows: int | None = None
    remat: Literal["none", "full", "dots"] | None = None
    attention: Implementation | None = None
    mesh: tuple[int, int, int] = (1, 1, 1)


def plan_training(config: Config, how: Training, device: Device) -> Plan:
    """The plan of one device of the mesh; of a CPU, the plan of all."""
    on_cpu, width = device.platform == "cpu", 2 if how.dtype == "bfloat16" else 4
    data, fsdp, tensor = how.mesh
    quantised = how.weights.startswith("nf4")
    bits = nf4_bits(how.weights == "nf4-dq") if quantised else 8 * width
    whole = base_bytes(config, 0, width)  # embeddings, head and norms are on every device
    linear = (base_bytes(config, bits, width) - whole) // (fsdp * tensor)
    working = step_working(config, how, device, width)
    if on_cpu:  # XLA:CPU unpacks the codes of all layers, a byte each; of a dense base it converts or transposes parts
        working += linear_weights(config) * (1 if quantised else 5 - width)
    adapter = TRAINING_COPIES * adapter_bytes(config, how.lora) // tensor
    # The largest layer's codes come as bytes, and become arrays of 4 bits: on a TPU by way of three times as much.
    largest = config.intermediate_size * config.hidden_size * config.num_hidden_layers // (fsdp * tensor)
    loading = whole + linear + (4 if device.platform == "tpu" else 1) * largest
    plan = Plan(base=whole + linear, adapter=adapter, cache=0, working=working, loading=loading, limit=device.limit)
    if on_cpu:
        plan = Plan(*(math.prod(how.mesh) * part for part in plan[:-1]), limit=device.limit)
        unrolled = config.num_hidden_layers if config.num_hidden_layers <= UNROLLED_LAYERS else 1
        plan = plan._replace(working=plan.working + TRAINING_PROGRAMS[0] + TRAINING_PROGRAMS[1] * unrolled)
    return plan


def step_working(config: Config, how: Training, device: Device, width: int) -> int:
    """Temporaries of a microbatch: what the layers keep for the backward pass, and beside it first a chunk's logits and
    probabilities, then what one layer recomputes and its weights.

    XLA:CPU computes in float32, and holds a decoded layer and a half of the next.
    """
    on_cpu, tokens, tensor = device.platform == "cpu", how.device_rows * how.row_length, how.mesh[2]
    width = 4 if on_cpu else width
    D, F, V, N = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    layer = width * tokens * (4 * D + (4 * queries + 6 * F) // tensor)  # inputs and outputs of its parts
    matmuls = width * tokens * (2 * D + (2 * queries + 2 * F) // tensor)
    kept = {"none": layer, "full": width * tokens * D, "dots": width * tokens * D + matmuls}[how.remat]
    chunk = min(tokens, max(LOGITS_PER_CHUNK // V, TOKENS_PER_CHUNK))
    decoded = width * (2 * F * D + on_cpu * linear_weights(config) // N) // tensor
    implementation = how.attention or best_implementation(device.platform, jnp.dtype(how.dtype))
    if implementation == "xla":  # the scores of whole rows
        scores = how.device_rows * config.num_attention_heads // tensor * how.row_length**2
        layer += 8 * scores
        kept += width * scores if how.remat == "none" else 0
    own = 0 if how.remat == "none" else layer
    batch = 3 * 4 * how.row_length * how.batch_rows // (how.mesh[0] * how.mesh[1])
    return N * kept + max(2 * 4 * chunk * V, own + decoded) + batch

"""What a device can do and what a training step asks of it: FLOPs, peaks, memory.

Peaks are the makers' figures for dense bfloat16 (float32 accumulation), without sparsity. A device that is not listed,
every CPU among them, has none, and no MFU (model FLOPs utilisation) is said of it.
"""

from __future__ import annotations

import resource

import jax

from lora.config import Config

# FLOP/s by jax.Device.device_kind.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def matmul_weights(config: Config) -> int:
    """How many weights each token is multiplied with: linear layers and head."""
    D, F, C = config.hidden_size, config.intermediate_size, config.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q and o, k and v
    return config.num_hidden_layers * (heads * C * D + 3 * D * F) + config.vocab_size * D


def lora_step_flops(config: Config, tokens: int) -> float:
    """Model FLOPs of a training step with a frozen base: 4 a weight and token, forward and gradient of the input.

    Left out, as in the usual count: attention's products, the adapters, what remat computes again.
    """
    return 4.0 * matmul_weights(config) * tokens


def peak_flops(devices: int = 1) -> float | None:
    """FLOP/s of so many of the devices in use; None if they are not known."""
    one = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if one is None else one * devices


def peak_memory() -> int:
    """The most bytes that were in use on the first device since the start; on a CPU the process's largest size."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

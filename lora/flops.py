"""What a training step costs: its FLOPs, the peak FLOP/s of devices (for MFU), and the peak of memory so far.

    mfu = lora_step_flops(config, tokens) / seconds / peak_flops(devices)       # where peak_flops is known

Peaks are the vendors' figures for dense bfloat16 with float32 accumulation, without sparsity. Devices that are not
listed, including every CPU, have no peak, and no MFU is reported for them.

Left out: FLOPs of attention scores, of the adapters and of recomputation; plans of memory (footprint.py).
"""

from __future__ import annotations

import resource

import jax

from lora.config import Config

# FLOP/s by jax.Device.device_kind. NVIDIA's are those of the data sheets of A100, H100, H200, L40S and HGX B200, and of
# the white papers on GA102 (RTX 3090) and Ada (RTX 4090); where a sheet has only the figure with sparsity, half of it.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def matmul_weights(config: Config) -> int:
    """Number of weights that multiply each token: linear layers and head."""
    D, F, C = config.hidden_size, config.intermediate_size, config.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q and o, k and v
    return config.num_hidden_layers * (heads * C * D + 3 * D * F) + config.vocab_size * D


def lora_step_flops(config: Config, tokens: int) -> float:
    """Model FLOPs of a training step with a frozen base: 4 per weight and token, for the forward and input gradient.

    As usual, attention's products, the adapters and rematerialised computation are not counted.
    """
    return 4.0 * matmul_weights(config) * tokens


def peak_flops(devices: int = 1) -> float | None:
    """Peak FLOP/s of this number of the devices in use; None if unknown."""
    per_device = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if per_device is None else per_device * devices


def peak_memory() -> int:
    """Peak bytes in use on the first local device since the start; on a CPU, the process's peak resident size."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

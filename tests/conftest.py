"""Tests see two CPU devices, so that what is spread over devices is tested without an accelerator."""

import jax

jax.config.update("jax_num_cpu_devices", 2)

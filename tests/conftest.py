"""Tests see two CPU devices, so that what is spread over devices is tested without an accelerator."""

from __future__ import annotations

import gc
import signal

import jax
import pytest
from flax import nnx

jax.config.update("jax_num_cpu_devices", 2)
# Where tests run as a job in the background, interrupts are ignored, by the programs that they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_end_with_their_file():
    """XLA:CPU takes six or seven memory mappings for every program that it compiles, and Linux lets a process have
    65,530: kept to the end, the programs of the whole suite come near that."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    """A random base in Hugging Face layout, saved by us."""
    from lora.load import save_model
    from lora.model import CausalLM
    from tests.support.helpers import TINY

    folder = tmp_path_factory.mktemp("base")
    save_model(CausalLM(TINY, rngs=nnx.Rngs(0)), folder)
    return folder

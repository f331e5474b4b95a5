"""The 7B model's training step and decoding, compiled for a TPU without one: they fit, and what they keep in memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def compiled(name: str) -> dict:
    """What bench/tpu_compile.py says of a configuration, from a process that may load libtpu."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "bench.tpu_compile", "--only", name]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])[name]


def test_7b_trains_within_seven_gib_of_one_v5e_chip():
    found = compiled("v5e/2048")
    assert found["floor"] < found["total"] < 7 * 2**30
    assert found["decoded"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b", "qwen3-8b"])
@pytest.mark.parametrize("program", ["v5e/2048", "decode/v5e"])
def test_other_families_fit_a_chip_of_16_gb(program, name):
    found = compiled(f"{program}/{name}")
    assert found["floor"] < found["total"] < 16e9
    assert found["decoded"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x4/fsdp8", "v5e:2x4/fsdp4-tensor2"])
def test_codes_and_not_weights_cross_the_chips(name):
    found = compiled(name)
    assert found["decoded"] == []
    weights = [array for array in found["all_gathers"] if array.endswith(",64]") and array.count(",") == 2]
    assert weights and all(array.startswith("u4") or array.startswith("f32[1,") for array in weights)
    assert not [array for array in found["all_gathers"] if array.startswith("bf16")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode/v5e/nf4", "decode/v6e/bf16"])
def test_decoding_copies_neither_cache_nor_weights(name):
    """What it needs beside its arguments is little beside the cache, of which it reads every place."""
    found = compiled(name)
    assert found["total"] < found["limit"] * 2**30
    assert found["decoded"] == []
    assert found["temporaries"] < 0.25 * found["cache"]

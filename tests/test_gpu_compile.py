"""7B training and decoding, compiled for NVIDIA GPUs without one, where JAX's CUDA plugin is installed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from bench.gpu_compile import operations


def compiled(name: str) -> dict:
    """What bench/gpu_compile.py says of a program, from a process of its own."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip('needs JAX\'s CUDA plugin: pip install "jax[cuda12]==0.10.2" (6 GB)')
    command = [sys.executable, "-m", "bench.gpu_compile", "--only", name]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])[name]


@pytest.mark.slow
def test_7b_trains_within_six_gib_of_a_3090_without_a_mask():
    found = compiled("train/3090")
    assert found["total"] < 6 * 2**30 < found["memory"]
    assert found["cudnn"] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]  # with a mask: ...ScaleBias...
    assert found["masks"] == ["PADDING_CAUSAL"]
    assert found["squares"] == []


@pytest.mark.slow
def test_what_is_looked_for_is_found_where_a_mask_is_used():
    found = compiled("train/3090/mask")
    assert found["cudnn"] == ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]
    assert any(array.startswith("bf16") for array in found["squares"])


@pytest.mark.slow
def test_codes_and_not_weights_cross_the_cards():
    found = compiled("train/3090/fsdp4")
    assert found["total"] < 3 * 2**30
    assert found["all_gathers"] and all(re.match(r"s8\[\d+,\d+,32\]|f32\[\d+,\d+\]", x) for x in found["all_gathers"])


@pytest.mark.slow
def test_decoding_fits_a_3090_in_four_bits_and_copies_no_cache():
    found = compiled("decode/3090/nf4")
    assert found["total"] < 0.75 * found["memory"]  # of which JAX takes so much by default
    assert found["temporaries"] < 2**30


@pytest.mark.slow
def test_append_launches_a_few_kernels_and_copies_no_cache():
    found = compiled("append/3090")
    assert found["operations"] <= 4
    assert found["temporaries"] + found["outputs"] < found["arguments"] / 10


PROGRAM = """
%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %add.1 = f32[2]{0} add(%p, %p)
}
%body (t: (s32[], f32[2])) -> (s32[], f32[2]) {
  %t = (s32[], /*index=1*/f32[2]{0}) parameter(0)
  %x = f32[2]{0} get-tuple-element(%t), index=1
  %y = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused
  %z = (f32[2]{0}, u8[0]{0}) custom-call(%y), custom_call_target="__cublas$gemm"
  ROOT %out = (s32[], f32[2]{0}) tuple(%x, %y)
}
%end (t: (s32[], f32[2])) -> pred[] {
  ROOT %less = pred[] fusion(%t), kind=kLoop, calls=%fused
}
%short (x: f32[2]) -> f32[2] {
  ROOT %x = f32[2]{0} parameter(0)
}
%long (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  ROOT %c = f32[2]{0} copy(%x)
}
ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %start = (f32[2]{0}, f32[2]{0}) all-reduce-start(%x), to_apply=%fused
  %done = f32[2]{0} all-reduce-done(%start)
  %known = (s32[], f32[2]{0}) while(%x), condition=%end, body=%body, backend_config={"known_trip_count":{"n":"32"}}
  %once = (s32[], /*index=1*/f32[2]{0}) while(%known), condition=%end, body=%body
  %run = f32[2]{0} call(%x), to_apply=%long
  %if = f32[2]{0} conditional(%x), branch_computations={%short, %long}
  ROOT %either = f32[2]{0} conditional(%x), true_computation=%long, false_computation=%short
}
"""


def test_operations_are_counted_as_often_as_they_run():
    """A body has a fusion and a call of a library, its condition a fusion; the other four are one each."""
    assert operations(PROGRAM) == 1 + 32 * 3 + 3 + 1 + 1 + 1

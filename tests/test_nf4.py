"""NF4 against bitsandbytes: codes, absmax, nested statistics and decoded weights, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lora import nf4

GOLDEN = Path(__file__).with_name("support") / "golden_nf4.json"


def nf4_cases() -> dict[str, np.ndarray]:
    """Weights [4, 128] of every kind that a quantiser can get wrong."""
    random = np.random.default_rng(5)
    normal = random.standard_normal((4, 128)).astype(np.float32)
    borders = (nf4.VALUES[:-1] + nf4.VALUES[1:]) / 2
    edges = np.concatenate([borders, np.nextafter(borders, 1), np.nextafter(borders, -1), [1.0]])
    return {
        "normal": normal,
        "zero": np.zeros_like(normal),
        "constant": np.full_like(normal, -0.37),
        "one_spike": np.where(np.arange(128) == 77, 5.0, 0.01 * normal).astype(np.float32),
        "huge": normal * np.float32(1e37),
        "tiny": normal * np.float32(1e-37),
        "denormal": normal * np.float32(1e-42),
        "borders": np.resize(edges, (4, 128)).astype(np.float32),
        "values": np.resize(nf4.VALUES, (4, 128)) * np.float32(0.013),
    }


def packed_hex(codes: np.ndarray) -> str:
    """Codes as bitsandbytes packs them, the first of two in the high half of a byte."""
    return (codes[..., ::2] << 4 | codes[..., 1::2]).astype(np.uint8).tobytes().hex()


@pytest.mark.parametrize("case", nf4_cases())
def test_nf4_is_what_bitsandbytes_gave(case):
    """Against `golden_nf4.json`, which `python -m tests.test_nf4` writes where bitsandbytes is installed."""
    codes, absmax = nf4.quantize(nf4_cases()[case])
    golden = json.loads(GOLDEN.read_text())[case]
    assert packed_hex(codes) == golden["codes"]
    assert absmax.tobytes().hex() == golden["absmax"]


@pytest.mark.parametrize("case", nf4_cases())
def test_nf4_is_bitsandbytes_bit_for_bit(case):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = nf4_cases()[case]
    packed, state = functional.quantize_4bit(torch.tensor(weight), quant_type="nf4", blocksize=64)
    theirs = packed.numpy().reshape(4, 2, 32)
    codes, absmax = nf4.quantize(weight)
    assert np.array_equal(codes[..., ::2] << 4 | codes[..., 1::2], theirs)
    assert np.array_equal(absmax.view(np.uint32), state.absmax.numpy().reshape(4, 2).view(np.uint32))
    decoded = np.asarray(nf4.dequantize(jnp.asarray(codes, jnp.uint4), jnp.asarray(absmax))).reshape(4, 128)
    expected = functional.dequantize_4bit(packed, state).numpy()
    if case == "denormal":  # XLA flushes these to zero; nothing else may be lost
        assert np.abs(decoded - expected).max() < np.finfo(np.float32).tiny
    else:
        assert np.array_equal(decoded, expected)


def test_nf4_in_bfloat16_is_the_float32_product_rounded_once():
    codes, absmax = nf4.quantize(nf4_cases()["normal"])
    expected = (nf4.VALUES[codes] * absmax[..., None]).astype(jnp.bfloat16)
    assert np.array_equal(nf4.dequantize(jnp.asarray(codes, jnp.uint4), jnp.asarray(absmax), jnp.bfloat16), expected)


def absmax_cases() -> dict[str, np.ndarray]:
    """Scales of a weight's blocks, as many as make several blocks of 256, one, or less than a vector of torch's."""
    random = np.random.default_rng(6)
    spread = np.exp(random.standard_normal(700)).astype(np.float32)
    return {
        "spread": spread,
        "one_block": spread[:256],
        "seven": spread[:7],
        "long": np.resize(spread, 5000) * random.uniform(0.5, 1, 5000).astype(np.float32),
        "zero": np.zeros(300, np.float32),
        "constant": np.full(300, 0.3, np.float32),
        "huge": spread * np.float32(1e34),
        "tiny": spread * np.float32(1e-37),
        "one_large": np.where(np.arange(300) == 200, 9.0, 0.01).astype(np.float32),
    }


def doubled(absmax: np.ndarray) -> dict[str, str]:
    """What double quantisation writes, as hex; codes without the filling of the last block."""
    codes, nested, offset = nf4.double_quantize(absmax)
    return {
        "codes": codes.reshape(-1)[: absmax.size].tobytes().hex(),
        "nested": nested.tobytes().hex(),
        "offset": offset.tobytes().hex(),
    }


@pytest.mark.parametrize("case", absmax_cases())
def test_double_quantisation_is_what_bitsandbytes_gave(case):
    assert doubled(absmax_cases()[case]) == json.loads(GOLDEN.read_text())["double"][case]


def theirs_doubled(absmax: np.ndarray) -> dict[str, str]:
    """bitsandbytes' double quantisation of absmax, by way of a weight whose blocks have it."""
    import torch
    from bitsandbytes import functional

    weight = torch.tensor(np.repeat(absmax[:, None], 64, axis=1))
    _, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    arrays = {"codes": state.absmax, "nested": state.state2.absmax, "offset": state.offset}
    return {key: array.numpy().tobytes().hex() for key, array in arrays.items()}


@pytest.mark.parametrize("case", absmax_cases())
def test_double_quantisation_is_bitsandbytes_bit_for_bit(case):
    pytest.importorskip("bitsandbytes")
    assert doubled(absmax_cases()[case]) == theirs_doubled(absmax_cases()[case])


@pytest.mark.parametrize("shape", [(5, 64), (64, 256), (100, 448), (2, 64 * 300)])
def test_a_double_quantised_weight_decodes_as_in_bitsandbytes(shape):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    packed, state = functional.quantize_4bit(torch.tensor(weight), quant_type="nf4", compress_statistics=True)
    codes, absmax = nf4.quantize(weight)
    assert np.array_equal(nf4.pack(codes).ravel(), packed.numpy().ravel())
    assert np.array_equal(nf4.unpack(nf4.pack(codes)), codes)
    absmax_codes, nested, offset = nf4.double_quantize(absmax)
    decoded = nf4.decode_absmax(absmax_codes, nested, np.full(len(nested), offset), shape[:1], shape[1] // 64)
    weight = nf4.dequantize(jnp.asarray(codes, jnp.uint4), decoded).reshape(shape)
    assert np.array_equal(weight, functional.dequantize_4bit(packed, state).numpy())


def test_mean_of_a_large_weight_is_that_of_one_thread_of_torch():
    torch = pytest.importorskip("torch")
    absmax = np.random.default_rng(0).uniform(0, 3, 300_007).astype(np.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert nf4.double_quantize(absmax)[2] == torch.tensor(absmax).mean().numpy()
    finally:
        torch.set_num_threads(threads)


def test_two_hundred_and_fifty_six_values_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert np.array_equal(nf4.NESTED_VALUES, functional.create_dynamic_map().numpy())
    assert np.array_equal(nf4.lut(jnp.arange(256, dtype=jnp.uint8), nf4.NESTED_VALUES), nf4.NESTED_VALUES)


def test_a_width_that_is_no_multiple_of_64_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 96\).*multiple of 64"):
        nf4.quantize(np.zeros((3, 96), np.float32))


if __name__ == "__main__":
    import torch
    from bitsandbytes import functional

    golden = {}
    for name, weight in nf4_cases().items():
        packed, state = functional.quantize_4bit(torch.tensor(weight), quant_type="nf4", blocksize=64)
        golden[name] = {"codes": packed.numpy().tobytes().hex(), "absmax": state.absmax.numpy().tobytes().hex()}
    golden["double"] = {name: theirs_doubled(absmax) for name, absmax in absmax_cases().items()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")

"""Attention over packed rows: every implementation that runs on a CPU against all scores at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora import attention


@pytest.mark.parametrize("implementation", ["blocks", "xla", "splash"])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_and_its_gradient_are_those_of_all_scores_at_once(window, implementation, monkeypatch):
    """Segments that need each number of keys, and a length that is no multiple of a block.

    The TPU's kernel is interpreted; that it compiles for a TPU is `bench/tpu_compile.py`'s and tests/test_tpu.py's.
    """
    monkeypatch.setattr(attention, "attend_splash", functools.partial(attention.attend_splash, interpret=True))
    monkeypatch.setattr(attention, "SPLASH_TILE", 128)
    lengths, (B, L, H, K, C) = ((90, 350, 250), (610, 3, 77)), (2, 700, 4, 2, 8)
    segments = np.array([np.repeat([1, 2, 3, 0], [*n, L - sum(n)]) for n in lengths])
    rng = np.random.default_rng(0)
    q, k, v, wanted = (rng.normal(size=(B, L, n, C)).astype(np.float32) for n in (H, K, K, H))

    def dense(q, k, v):
        k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
        scores = jnp.einsum("blhc,bmhc->bhlm", q, k) * C**-0.5
        seen = attention.visible(segments, segments, 0, window)
        return jnp.einsum("bhlm,bmhc->blhc", jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30)), v)

    def ours(q, k, v):
        return attention.attention(q, k, v, jnp.asarray(segments), window, implementation).reshape(B, L, H, C)

    def value_and_grad(attend):
        mask = (segments > 0)[:, :, None, None]
        return jax.jit(jax.value_and_grad(lambda *x: (attend(*x) * wanted * mask).sum(), argnums=(0, 1, 2)))(q, k, v)

    for one, other in zip(*(jax.tree.leaves(value_and_grad(attend)) for attend in (ours, dense)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("window", [None, 50])
def test_separated_segments_attend_as_a_row_does(window):
    """cuDNN's path with another kernel, and with gradients at padding that must reach nobody. That cuDNN's compiles is
    bench/gpu_compile.py's and tests/test_gpu_compile.py's."""
    lengths, (L, H, K, C) = ((20, 65, 39), (7, 100), (130,), ()), (130, 4, 2, 8)
    segments = np.array([np.repeat(range(len(n) + 1), [L - sum(n), *n]) for n in lengths])
    segments[1:] = np.array([np.repeat([*range(1, len(n) + 1), 0], [*n, L - sum(n)]) for n in lengths[1:]])
    bounds = attention.segment_bounds(segments)
    assert bounds == (3, 192)
    rng = np.random.default_rng(0)
    q, k, v, wanted = (rng.normal(size=(4, L, n, C)).astype(np.float32) for n in (H, K, K, H))
    wanted *= (segments > 0)[:, :, None, None]

    def value_and_grad(attend, *how):
        def total(q, k, v):
            out = attend(q, k, v, jnp.asarray(segments), window, *how)
            return (out * wanted.reshape(out.shape)).sum(), out * (segments > 0)[:, :, None]

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    separated = value_and_grad(attention.attend_segments, bounds, "xla")
    for one, other in zip(*map(jax.tree.leaves, (separated, value_and_grad(attention.attention, "xla"))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_cudnn_attends_as_all_scores_at_once():
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    segments = jnp.asarray([np.repeat([1, 2, 0], [300, 190, 22]), np.repeat(1, 512), np.repeat(0, 512)])
    rng = np.random.default_rng(0)
    q, k, v, wanted = (jnp.asarray(rng.normal(size=(3, 512, n, 64)), jnp.bfloat16) for n in (8, 2, 2, 8))
    wanted = (wanted * (segments > 0)[:, :, None, None]).reshape(3, 512, -1)

    def value_and_grad(implementation, bounds):
        def total(q, k, v):
            out = attention.attention(q, k, v, segments, None, implementation, bounds)
            return (out * wanted).sum(dtype=jnp.float32), out * (segments > 0)[:, :, None]

        found = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return [np.asarray(x, np.float32) for x in jax.tree.leaves((found[0][1], found[1]))]

    reference = value_and_grad("xla", None)
    for bounds in (None, attention.SegmentBounds(segments=2, positions=512)):
        for one, other in zip(value_and_grad("cudnn", bounds), reference, strict=True):
            assert np.abs(one - other).max() < 0.02 * np.abs(other).max()


def test_segments_are_separated_only_where_that_pads_little(monkeypatch):
    kinds = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **how: kinds.append("mask" in how) or q)
    q_BLHC, segments_BL = jnp.zeros((1, 256, 4, 8), jnp.bfloat16), jnp.ones((1, 256), jnp.int32)
    for bounds in (None, attention.SegmentBounds(5, 256), attention.SegmentBounds(4, 256)):
        attention.attention(q_BLHC, q_BLHC, q_BLHC, segments_BL, None, "cudnn", bounds)
    assert kinds == [True, True, False]
    assert attention.segment_bounds(np.zeros((0, 256), np.int32)) == (1, 64)


def test_the_device_chooses():
    assert attention.best_implementation("cpu", jnp.float32) == "blocks"
    assert attention.best_implementation("tpu", jnp.bfloat16) == "splash"
    assert attention.best_implementation("gpu", jnp.bfloat16) == "cudnn"
    assert attention.best_implementation("gpu", jnp.float32) == "xla"


def test_what_a_device_cannot_compute_is_refused_with_what_to_do():
    supported = {("cpu", "float32"): {"blocks", "xla"}, ("tpu", "bfloat16"): {"blocks", "xla", "splash"}}
    supported |= {("gpu", "float32"): {"blocks", "xla"}, ("gpu", "bfloat16"): {"blocks", "xla", "cudnn"}}
    for (platform, dtype), good in supported.items():
        attention.require_supported(None, platform, jnp.dtype(dtype))
        for implementation in ("blocks", "splash", "cudnn", "xla"):
            if implementation in good:
                attention.require_supported(implementation, platform, jnp.dtype(dtype))
            else:
                with pytest.raises(ValueError, match=f"--attention {implementation} needs .* leave the flag out"):
                    attention.require_supported(implementation, platform, jnp.dtype(dtype))

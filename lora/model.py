"""The decoder of Llama, Mistral and Qwen (RMSNorm, grouped-query attention, RoPE, SwiGLU) as a Flax NNX module.

Qwen2 has biases on queries, keys and values, Qwen3 a norm on the queries and keys of each head, Llama 3.1 scaled RoPE.
Layer weights are stacked along a leading axis, which `jax.lax.scan` walks. Several sequences share a row: `segments`
numbers them from 1, and 0 is padding. Attention is causal within a segment, and positions restart with each segment.

    model = CausalLM(config, rngs=nnx.Rngs(0))       # load.load_model for one from files
    hidden_BLD = model(ids_BL, segments_BL)
    logprobs_BL = token_logprobs(model, ids_BL, segments_BL)        # logprobs.py

Left out: the KV cache (engine.py), files (load.py), other RoPE scaling, dropout outside LoRA.
Shapes: N layers, B rows, L tokens, D model, F feed-forward, H heads, K kv heads, C head dim, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from lora.attention import Implementation, SegmentBounds, attention, positions_in
from lora.config import Config
from lora.linear import Linear
from lora.sharding import copy_to_tensor_parallel, reduce_from_tensor_parallel

# With up to this many layers the scan is unrolled: 15 % faster on a CPU, and small models still compile quickly.
UNROLLED_LAYERS = 16
# What a layer saves for the backward pass: everything, only its input, or its input and the outputs of its matmuls.
REMAT = {"none": None, "full": jax.checkpoint_policies.nothing_saveable, "dots": jax.checkpoint_policies.dots_saveable}


class CausalLM(nnx.Module):
    """The language model. A new instance is float32, and every weight is a trainable `nnx.Param`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.embed = nnx.Param(D**-0.5 * rngs.params.normal((V, D), jnp.float32))
        self.layers = Layer(config, rngs=rngs)
        self.norm = nnx.Param(jnp.ones(D))
        self.head = None if config.tie_word_embeddings else nnx.Param(D**-0.5 * rngs.params.normal((V, D), jnp.float32))

    def __call__(
        self,
        ids_BL: jax.Array,
        segments_BL: jax.Array,
        *,
        implementation: Implementation | None = None,
        bounds: SegmentBounds | None = None,
        remat: str = "none",
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states [B, L, D] of packed rows.

        `implementation`: how attention is computed (attention.py); None picks the best for JAX's default device.
        `bounds`: of the segments of all rows, which spares some implementations a mask.
        `remat`: a key of `REMAT`. `key`: the random key of LoRA dropout; None disables dropout.
        """
        rope = rope_angles(positions_in(segments_BL), self.config)
        graph, weights = nnx.split(self.layers)
        x_BLD = self.embed[...][ids_BL]
        unroll = self.config.num_hidden_layers <= UNROLLED_LAYERS

        def step(x_BLD, layer_weights, index):
            layer = nnx.merge(graph, layer_weights)
            layer_key = subkey(key, index)
            q, k, v = layer.queries_keys_values(x_BLD, rope, layer_key)
            attended = attention(q, k, v, segments_BL, self.config.sliding_window, implementation, bounds)
            return layer.attention_output_and_mlp(x_BLD, attended, layer_key)

        if remat != "none":
            step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=unroll)  # a loop already prevents CSE
        indices = jnp.arange(self.config.num_hidden_layers)
        x_BLD, _ = jax.lax.scan(lambda x, xs: (step(x, *xs), None), x_BLD, (weights, indices), unroll=unroll)
        return rms_norm(x_BLD, self.norm[...], self.config.rms_norm_eps)

    def unembed(self) -> jax.Array:
        """The matrix [V, D] that maps hidden states to logits."""
        return self.embed[...] if self.head is None else self.head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 of final hidden states [..., D]."""
        return jnp.einsum("...d,vd->...v", hidden, self.unembed(), preferred_element_type=jnp.float32)


class Layer(nnx.Module):
    """All decoder layers: every array has a leading N axis, which the scan in `CausalLM` strips."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        N, D, F = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        # Projections into the residual stream start small, so that 2N additions keep its variance near one.
        residual_scale = (2 * N) ** -0.5
        self.config = config
        for name, width in config.norms.items():
            setattr(self, name, nnx.Param(jnp.ones((N, width))))
        qkv = {"q": queries, "k": keys, "v": keys}
        self.qkv = Linear(N, qkv, D, std=D**-0.5, biased=config.biased, rngs=rngs)
        self.o = Linear(N, {"o": D}, queries, std=residual_scale * queries**-0.5, rngs=rngs)
        self.gate_up = Linear(N, {"gate": F, "up": F}, D, std=D**-0.5, rngs=rngs)
        self.down = Linear(N, {"down": D}, F, std=residual_scale * F**-0.5, rngs=rngs)

    def queries_keys_values(self, x_BLD: jax.Array, rope: tuple[jax.Array, jax.Array], key=None) -> tuple:
        """Rotated queries [B, L, H, C], rotated keys [B, L, K, C] and values [B, L, K, C] of a layer's input.

        Under tensor parallelism H and K count this device's heads. `key` is the layer's key of LoRA dropout.
        """
        y = copy_to_tensor_parallel(rms_norm(x_BLD, self.attention_norm[...], self.config.rms_norm_eps))
        q, k, v = (part.reshape(*y.shape[:2], -1, self.config.head_dim) for part in self.qkv(y, subkey(key, 0)))
        if "q_norm" in self.config.norms:
            q = rms_norm(q, self.q_norm[...], self.config.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], self.config.rms_norm_eps)
        return apply_rope(q, rope), apply_rope(k, rope), v

    def attention_output_and_mlp(self, x_BLD: jax.Array, attended: jax.Array, key=None) -> jax.Array:
        """The layer's output, from its input and the attended values [B, L, H * C]; `key` as above."""
        [projected] = self.o(attended, subkey(key, 1))
        x_BLD = x_BLD + reduce_from_tensor_parallel(projected)
        y = copy_to_tensor_parallel(rms_norm(x_BLD, self.mlp_norm[...], self.config.rms_norm_eps))
        gate, up = self.gate_up(y, subkey(key, 2))
        [projected] = self.down(jax.nn.silu(gate) * up, subkey(key, 3))
        return x_BLD + reduce_from_tensor_parallel(projected)


def rms_norm(x: jax.Array, weight_D: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32 as in transformers; keeps shape and dtype of x."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return weight_D * (x32 * scale).astype(x.dtype)


def rope_angles(positions_BL: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, L, 1, C/2] of the rotary angles at the given positions."""
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rope_frequencies(config: Config) -> jax.Array:
    """Radians per position [C/2] of the pairs of a head, scaled as in Llama 3.1 if the config says so."""
    frequencies = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    if (scaling := config.rope_scaling) is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * jnp.pi)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def apply_rope(x_BLHC: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + C/2) of every head, the order used by Hugging Face checkpoints."""
    cos, sin = rope
    first, second = jnp.split(x_BLHC, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHC.dtype)


def subkey(key: jax.Array | None, index: int) -> jax.Array | None:
    """The random key of the given layer, or of the given projection in a layer; None stays None."""
    return None if key is None else jax.random.fold_in(key, index)

"""Mistral (RMSNorm, grouped-query attention, rotary positions, SwiGLU) as a Flax NNX module over packed rows.

Every layer's weights are stacked along a leading axis and `jax.lax.scan` walks over them. Several texts share a row:
`segments` numbers them from 1, 0 is padding; attention is causal inside a segment and positions restart with it.
Left out: the KV cache (`lora/engine.py`), files (`lora/convert.py`), RoPE scaling, biases, dropout.

    model = Mistral(config, rngs=nnx.Rngs(0))
    hidden_BLD = model(ids_BL, segments_BL)
    logprobs_BL = token_logprobs(model, ids_BL, segments_BL)

Shapes: N layers, B rows, L tokens, T tokens of a chunk, D model, F feed-forward, H heads, K kv heads, C head dim,
V vocabulary.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from lora.attention import Implementation, attention, best_implementation, positions_in
from lora.linear import Linear
from lora.sharding import enter, leave

# Logits are made for so many tokens at a time that a chunk holds at most this many numbers (64 MiB in float32).
LOGITS_PER_CHUNK = 2**24
# Up to so many layers the scan is unrolled: 15 % faster on a CPU, and small models compile quickly all the same.
UNROLLED_LAYERS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The fields of a Hugging Face Mistral `config.json` that change what is computed."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    @classmethod
    def read(cls, model_dir: str | Path) -> "Config":
        """Reads `model_dir/config.json` of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

        Raises ValueError for a model that this file does not compute: another architecture, activation or RoPE.
        """
        path = Path(model_dir) / "config.json"
        raw = json.loads(path.read_text())
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        found = (raw.get("model_type"), raw.get("hidden_act", "silu"), rope.get("rope_type", "default"))
        if found != ("mistral", "silu", "default"):
            raise ValueError(
                f"{path}: model_type, hidden_act, rope_type are {found}, expected ('mistral', 'silu', 'default'): "
                "only plain Mistral models can be read."
            )
        given = {field.name: raw[field.name] for field in dataclasses.fields(cls) if field.name in raw}
        given["rope_theta"] = float(rope.get("rope_theta", raw.get("rope_theta", cls.rope_theta)))
        if given.get("head_dim") is None:
            given["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
        return cls(**given)

    def to_json(self) -> dict:
        """The content of a `config.json` that transformers 4 and 5 read."""
        return dataclasses.asdict(self) | {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "dtype": "float32",
        }


def rms_norm(x: jax.Array, weight_D: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32 as transformers does; shape and dtype of x."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return weight_D * (x32 * scale).astype(x.dtype)


def rotation(positions_BL: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, L, 1, C/2] of the rotary angles at those positions."""
    frequencies = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLHC: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + C/2) of every head, which is the order of Hugging Face checkpoints."""
    cos, sin = turn
    first, second = jnp.split(x_BLHC, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHC.dtype)


class Layer(nnx.Module):
    """All decoder layers at once: every array has a leading N axis, which the scan in `Mistral` strips."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        N, D, F = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        # What a layer adds to the residual stream starts small, so that 2N additions keep its variance near one.
        quiet = (2 * N) ** -0.5
        self.config = config
        self.attention_norm = nnx.Param(jnp.ones((N, D)))
        self.qkv = Linear(N, {"q": queries, "k": keys, "v": keys}, D, std=D**-0.5, rngs=rngs)
        self.o = Linear(N, {"o": D}, queries, std=quiet * queries**-0.5, rngs=rngs)
        self.mlp_norm = nnx.Param(jnp.ones((N, D)))
        self.gate_up = Linear(N, {"gate": F, "up": F}, D, std=D**-0.5, rngs=rngs)
        self.down = Linear(N, {"down": D}, F, std=quiet * F**-0.5, rngs=rngs)

    def queries_keys_values(self, x_BLD: jax.Array, turn: tuple[jax.Array, jax.Array], key=None) -> tuple:
        """Rotated queries [B, L, H, C], rotated keys [B, L, K, C] and values [B, L, K, C] of a layer's input.

        Under tensor parallelism H and K are this device's heads. `key` is that of LoRA dropout, here and below.
        """
        y = enter(rms_norm(x_BLD, self.attention_norm[...], self.config.rms_norm_eps))
        q, k, v = (part.reshape(*y.shape[:2], -1, self.config.head_dim) for part in self.qkv(y, key_of(key, 0)))
        return rotate(q, turn), rotate(k, turn), v

    def finish(self, x_BLD: jax.Array, attended: jax.Array, key=None) -> jax.Array:
        """The rest of a layer, given what attention read [B, L, H * C]."""
        [read] = self.o(attended, key_of(key, 1))
        x_BLD = x_BLD + leave(read)
        y = enter(rms_norm(x_BLD, self.mlp_norm[...], self.config.rms_norm_eps))
        gate, up = self.gate_up(y, key_of(key, 2))
        [made] = self.down(jax.nn.silu(gate) * up, key_of(key, 3))
        return x_BLD + leave(made)


def key_of(key: jax.Array | None, place: int) -> jax.Array | None:
    """The key of a place in a layer; none if there is none."""
    return None if key is None else jax.random.fold_in(key, place)


# What a layer keeps for the backward pass: everything, its input alone, or its input and what its matmuls gave.
REMAT = {"none": None, "full": jax.checkpoint_policies.nothing_saveable, "dots": jax.checkpoint_policies.dots_saveable}


class Mistral(nnx.Module):
    """The language model. Fresh instances are float32 and every weight is a trainable `nnx.Param`."""

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
        remat: str = "none",
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states [B, L, D] of packed rows.

        `implementation` of attention: see `lora/attention.py`; None is the best of JAX's default device. `remat`: a key
        of `REMAT`. `key` draws LoRA dropout; without one nothing is dropped.
        """
        turn = rotation(positions_in(segments_BL), self.config)
        graph, weights = nnx.split(self.layers)
        x_BLD = self.embed[...][ids_BL]
        implementation = implementation or best_implementation(jax.default_backend(), x_BLD.dtype)
        unroll = self.config.num_hidden_layers <= UNROLLED_LAYERS

        def step(x_BLD, layer_weights, number):
            layer = nnx.merge(graph, layer_weights)
            layer_key = key_of(key, number)
            q, k, v = layer.queries_keys_values(x_BLD, turn, layer_key)
            attended = attention(q, k, v, segments_BL, self.config.sliding_window, implementation)
            return layer.finish(x_BLD, attended, layer_key)

        if remat != "none":
            step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=unroll)  # a loop prevents it by itself
        numbers = jnp.arange(self.config.num_hidden_layers)
        x_BLD, _ = jax.lax.scan(lambda x, xs: (step(x, *xs), None), x_BLD, (weights, numbers), unroll=unroll)
        return rms_norm(x_BLD, self.norm[...], self.config.rms_norm_eps)

    def unembed(self) -> jax.Array:
        """The matrix [V, D] that turns hidden states into logits."""
        return self.embed[...] if self.head is None else self.head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 of final hidden states [..., D]."""
        return jnp.einsum("...d,vd->...v", hidden, self.unembed(), preferred_element_type=jnp.float32)


def token_logprobs(model: Mistral, ids_BL: jax.Array, segments_BL: jax.Array, **how) -> jax.Array:
    """log p(ids[t] | earlier ids of its segment) [B, L] float32; 0.0 at a segment's first token and at padding.

    `how`: the keywords of `Mistral.__call__`.
    """
    B, L = ids_BL.shape
    hidden_BLD = model(ids_BL, segments_BL, **how)
    counted = (segments_BL[:, 1:] == segments_BL[:, :-1]) & (segments_BL[:, 1:] != 0)
    flat = chosen_logprobs(hidden_BLD[:, :-1].reshape(B * (L - 1), -1), ids_BL[:, 1:].reshape(-1), model.unembed())
    inside = jnp.where(counted, flat.reshape(B, L - 1), 0.0)
    return jnp.pad(inside, ((0, 0), (1, 0)))


@jax.custom_vjp
def chosen_logprobs(hidden_TD: jax.Array, targets_T: jax.Array, head_VD: jax.Array) -> jax.Array:
    """log softmax(hidden head^T)[targets] [T] float32, with the logits of one chunk of tokens at a time.

    A token's log-probability depends on its own hidden state alone, so what it changes there, head[target] - sum(p *
    head), is found in the forward pass, while the logits are at hand, and multiplied by what comes back: the head's
    products are made twice, not three times. Only the gradient of a head that is trained makes the logits again.
    """

    return in_chunks(lambda *chunk: logits_and_logprobs(*chunk, head_VD)[1], len(head_VD), hidden_TD, targets_T)


def logits_and_logprobs(hidden_CD, targets_C, head_VD):
    """Logits [C, V] in float32, log-probabilities of the targets [C], and log of the sum of all exp(logits) [C]."""
    logits_CV = jnp.einsum("cd,vd->cv", hidden_CD, head_VD, preferred_element_type=jnp.float32)
    logsum_C = jax.nn.logsumexp(logits_CV, axis=-1)
    return logits_CV, jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0] - logsum_C, logsum_C


def in_chunks(function, vocabulary: int, *arrays: jax.Array):
    """`function` of arrays [T, ...], for as many of the T at a time as `LOGITS_PER_CHUNK` allows."""
    tokens = len(arrays[0])
    chunks = -(-tokens * vocabulary // LOGITS_PER_CHUNK)
    size = -(-tokens // chunks)
    cut = [
        jnp.pad(x, [(0, chunks * size - tokens)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, size, *x.shape[1:])
        for x in arrays
    ]
    made = jax.lax.map(lambda chunk: function(*chunk), tuple(cut))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens], made)


def _chosen_forward(hidden_TD, targets_T, head_VD):
    def both(hidden_CD, targets_C):
        logits_CV, logprobs_C, logsum_C = logits_and_logprobs(hidden_CD, targets_C, head_VD)
        p_CV = jnp.exp(logits_CV - logsum_C[:, None]).astype(head_VD.dtype)
        mean_CD = jnp.einsum("cv,vd->cd", p_CV, head_VD, preferred_element_type=jnp.float32)
        return logprobs_C, (head_VD[targets_C] - mean_CD).astype(hidden_CD.dtype)

    logprobs_T, slope_TD = in_chunks(both, len(head_VD), hidden_TD, targets_T)
    return logprobs_T, (slope_TD, hidden_TD, targets_T, head_VD)


def _chosen_backward(residuals, d_T):
    slope_TD, hidden_TD, targets_T, head_VD = residuals

    def of_head(head_VD):
        logprobs = jax.checkpoint(lambda *chunk: logits_and_logprobs(*chunk, head_VD)[1])
        return in_chunks(logprobs, len(head_VD), hidden_TD, targets_T)

    [d_head_VD] = jax.vjp(of_head, head_VD)[1](d_T)  # XLA leaves it out where the head is frozen
    return (d_T[:, None] * slope_TD).astype(hidden_TD.dtype), None, d_head_VD


chosen_logprobs.defvjp(_chosen_forward, _chosen_backward)

"""Mistral (RMSNorm, grouped-query attention, rotary positions, SwiGLU) as a Flax NNX module over packed rows.

Every layer's weights are stacked along a leading axis and `jax.lax.scan` walks over them. Several texts share a row:
`segments` numbers them from 1, 0 is padding; attention is causal inside a segment and positions restart with it.
Left out: the KV cache (`lora/engine.py`), files (`lora/convert.py`), RoPE scaling, biases, dropout.

    model = Mistral(config, rngs=nnx.Rngs(0))
    hidden_BLD = model(ids_BL, segments_BL)
    logprobs_BL = token_logprobs(model, ids_BL, segments_BL)

Shapes: N layers, B rows, L tokens, M keys, T tokens of a chunk, D model, F feed-forward, H heads, K kv heads,
Q queries of a kv head, C head dim, V vocabulary.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from lora.linear import Linear

# Logits are made for so many tokens at a time that a chunk holds at most this many numbers (128 MiB in float32).
LOGITS_PER_CHUNK = 2**25
# Queries and keys that attention takes at a time: the scores of a pair of blocks stay in a CPU's cache.
ATTENTION_BLOCK = 128
# Up to so many layers the scan is unrolled: 15 % faster on a CPU, and small models compile quickly all the same.
UNROLLED_LAYERS = 8


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

    def write(self, model_dir: str | Path) -> None:
        """Writes `model_dir/config.json` as transformers 4 and 5 read it."""
        fields = dataclasses.asdict(self) | {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "dtype": "float32",
        }
        (Path(model_dir) / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


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


def positions_in(segments_BL: jax.Array) -> jax.Array:
    """Position of each token inside its own segment [B, L] int32: a new segment number starts again at 0."""
    index_L = jnp.arange(segments_BL.shape[1], dtype=jnp.int32)
    new_BL = jnp.diff(segments_BL, axis=1, prepend=segments_BL[:, :1] - 1) != 0
    return index_L - jax.lax.cummax(jnp.where(new_BL, index_L, 0), axis=1)


def visible(queries_BL: jax.Array, keys_BM: jax.Array, offset: int, window: int | None) -> jax.Array:
    """Which key each query sees [B, L, M] bool: same segment number, not later than itself, inside the window.

    `offset` is the place of the first query among the keys. Padding sees padding, so that no row of scores is empty.
    """
    distance_LM = jnp.arange(queries_BL.shape[1])[:, None] + offset - jnp.arange(keys_BM.shape[1])
    near_LM = distance_LM >= 0 if window is None else (distance_LM >= 0) & (distance_LM < window)
    return near_LM & (queries_BL[:, :, None] == keys_BM[:, None, :])


def attention(q_BLHC: jax.Array, k_BLKC: jax.Array, v_BLKC: jax.Array, segments_BL: jax.Array, window: int | None):
    """Causal attention inside segments, H/K query heads on each key head, softmax in float32. Returns [B, L, H * C].

    A row at a time, in blocks of T tokens: `attend_row`. Padding sees nothing outside its own block.
    """
    L, H, C = q_BLHC.shape[1:]
    K, T = k_BLKC.shape[2], min(ATTENTION_BLOCK, L)
    N = -(-L // T)

    def attend(row):
        q_LHC, k_LKC, v_LKC, segments_L = (jnp.pad(x, [(0, N * T - L)] + [(0, 0)] * (x.ndim - 1)) for x in row)
        q_NKQC = (q_LHC * C**-0.5).reshape(N, T, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(N, K, -1, C)
        k_NKTC, v_NKTC = (x.reshape(N, T, K, C).swapaxes(1, 2) for x in (k_LKC, v_LKC))
        start_L = jnp.arange(N * T) - positions_in(segments_L[None])[0]
        first_N = jnp.where(segments_L[::T] == 0, jnp.arange(N), start_L[::T] // T)
        out_NKQC = attend_row(q_NKQC, k_NKTC, v_NKTC, segments_L.reshape(N, T), first_N, window)
        return out_NKQC.reshape(N, H, T, C).swapaxes(1, 2).reshape(N * T, H * C)[:L]

    return jax.lax.map(attend, (q_BLHC, k_BLKC, v_BLKC, segments_BL))


def block_scores(q_KQC, k_KTC, segments_T, segments_M, offset, window):
    """Scores [K, Q, T] float32 of a block of queries on keys `offset` places before it; hidden ones the smallest."""
    K, Q, T = *q_KQC.shape[:2], len(segments_M)
    scores_KXTM = jnp.einsum("kqc,kmc->kqm", q_KQC, k_KTC, preferred_element_type=jnp.float32).reshape(K, -1, T, T)
    seen_TM = visible(segments_T[None], segments_M[None], offset, window)[0]
    return jnp.where(seen_TM, scores_KXTM, jnp.finfo(jnp.float32).min).reshape(K, Q, T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_row(q_NKQC, k_NKTC, v_NKTC, segments_NT, first_N, window):
    """Attention of one row, whose query block n reads key blocks first_N[n] to n. Returns [N, K, Q, C].

    Scores exist for one pair of blocks at a time, in the backward pass too, which makes them again with the
    logarithm of each query's sum. Source: FlashAttention-2 (arXiv 2307.08691), as loops for a CPU.
    """
    return attend_row_forward(q_NKQC, k_NKTC, v_NKTC, segments_NT, first_N, window)[0]


def attend_row_forward(q_NKQC, k_NKTC, v_NKTC, segments_NT, first_N, window):
    N, K, Q, C = q_NKQC.shape
    T = segments_NT.shape[1]

    def query_block(n):
        def key_block(m, state):
            top_KQ1, total_KQ1, out_KQC = state
            scores_KQT = block_scores(q_NKQC[n], k_NKTC[m], segments_NT[n], segments_NT[m], (n - m) * T, window)
            higher_KQ1 = jnp.maximum(top_KQ1, scores_KQT.max(axis=-1, keepdims=True))
            weights_KQT, shrink_KQ1 = jnp.exp(scores_KQT - higher_KQ1), jnp.exp(top_KQ1 - higher_KQ1)
            read = jnp.einsum("kqt,ktc->kqc", weights_KQT.astype(v_NKTC.dtype), v_NKTC[m])
            total_KQ1 = total_KQ1 * shrink_KQ1 + weights_KQT.sum(axis=-1, keepdims=True)
            return higher_KQ1, total_KQ1, out_KQC * shrink_KQ1 + read

        # A block in which a query sees nothing counts as if it saw all of it, until its own place outweighs that.
        start = jnp.full((K, Q, 1), -jnp.inf), jnp.zeros((K, Q, 1)), jnp.zeros((K, Q, C))
        top_KQ1, total_KQ1, out_KQC = jax.lax.fori_loop(first_N[n], n + 1, key_block, start)
        return (out_KQC / total_KQ1).astype(q_NKQC.dtype), top_KQ1 + jnp.log(total_KQ1)

    out_NKQC, logsum_NKQ1 = jax.lax.map(query_block, jnp.arange(N))
    return out_NKQC, (q_NKQC, k_NKTC, v_NKTC, segments_NT, first_N, out_NKQC, logsum_NKQ1)


def attend_row_backward(window, saved, d_out_NKQC):
    q_NKQC, k_NKTC, v_NKTC, segments_NT, first_N, out_NKQC, logsum_NKQ1 = saved
    N, T = segments_NT.shape

    def query_block(d_keys, n):
        q_KQC, d_out_KQC = q_NKQC[n], d_out_NKQC[n]
        common_KQ1 = (d_out_KQC * out_NKQC[n]).sum(axis=-1, keepdims=True)

        def key_block(m, state):
            d_q_KQC, d_k_NKTC, d_v_NKTC = state
            scores_KQT = block_scores(q_KQC, k_NKTC[m], segments_NT[n], segments_NT[m], (n - m) * T, window)
            weights_KQT = jnp.exp(scores_KQT - logsum_NKQ1[n])
            d_weights_KQT = jnp.einsum("kqc,ktc->kqt", d_out_KQC, v_NKTC[m])
            d_scores_KQT = weights_KQT * (d_weights_KQT - common_KQ1)
            d_k_NKTC = d_k_NKTC.at[m].add(jnp.einsum("kqt,kqc->ktc", d_scores_KQT, q_KQC))
            d_v_NKTC = d_v_NKTC.at[m].add(jnp.einsum("kqt,kqc->ktc", weights_KQT, d_out_KQC))
            return d_q_KQC + jnp.einsum("kqt,ktc->kqc", d_scores_KQT, k_NKTC[m]), d_k_NKTC, d_v_NKTC

        d_q_KQC, *d_keys = jax.lax.fori_loop(first_N[n], n + 1, key_block, (jnp.zeros(q_KQC.shape), *d_keys))
        return tuple(d_keys), d_q_KQC

    empty = jnp.zeros(k_NKTC.shape), jnp.zeros(v_NKTC.shape)
    (d_k_NKTC, d_v_NKTC), d_q_NKQC = jax.lax.scan(query_block, empty, jnp.arange(N))
    gradients = zip((d_q_NKQC, d_k_NKTC, d_v_NKTC), (q_NKQC, k_NKTC, v_NKTC), strict=True)
    return *(d.astype(x.dtype) for d, x in gradients), None, None


attend_row.defvjp(attend_row_forward, attend_row_backward)


class Layer(nnx.Module):
    """All decoder layers at once: every array has a leading N axis, which the scan in `Mistral` strips."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        N, D, F = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        # What a layer adds to the residual stream starts small, so that 2N additions keep its variance near one.
        quiet = (2 * N) ** -0.5
        self.config = config
        self.attention_norm = nnx.Param(jnp.ones((N, D)))
        self.q = Linear((N, queries, D), std=D**-0.5, rngs=rngs)
        self.k = Linear((N, keys, D), std=D**-0.5, rngs=rngs)
        self.v = Linear((N, keys, D), std=D**-0.5, rngs=rngs)
        self.o = Linear((N, D, queries), std=quiet * queries**-0.5, rngs=rngs)
        self.mlp_norm = nnx.Param(jnp.ones((N, D)))
        self.gate = Linear((N, F, D), std=D**-0.5, rngs=rngs)
        self.up = Linear((N, F, D), std=D**-0.5, rngs=rngs)
        self.down = Linear((N, D, F), std=quiet * F**-0.5, rngs=rngs)

    def queries_keys_values(self, x_BLD: jax.Array, turn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        """Rotated queries [B, L, H, C], rotated keys [B, L, K, C] and values [B, L, K, C] of a layer's input."""
        y = rms_norm(x_BLD, self.attention_norm[...], self.config.rms_norm_eps)
        q, k, v = (linear(y).reshape(*y.shape[:2], -1, self.config.head_dim) for linear in (self.q, self.k, self.v))
        return rotate(q, turn), rotate(k, turn), v

    def finish(self, x_BLD: jax.Array, attended: jax.Array) -> jax.Array:
        """The rest of a layer, given what attention read [B, L, H * C]."""
        x_BLD = x_BLD + self.o(attended)
        y = rms_norm(x_BLD, self.mlp_norm[...], self.config.rms_norm_eps)
        return x_BLD + self.down(jax.nn.silu(self.gate(y)) * self.up(y))

    def __call__(self, x_BLD: jax.Array, turn: tuple[jax.Array, jax.Array], segments_BL: jax.Array) -> jax.Array:
        q, k, v = self.queries_keys_values(x_BLD, turn)
        return self.finish(x_BLD, attention(q, k, v, segments_BL, self.config.sliding_window))


class Mistral(nnx.Module):
    """The language model. Fresh instances are float32 and every weight is a trainable `nnx.Param`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.embed = nnx.Param(D**-0.5 * rngs.params.normal((V, D), jnp.float32))
        self.layers = Layer(config, rngs=rngs)
        self.norm = nnx.Param(jnp.ones(D))
        self.head = None if config.tie_word_embeddings else nnx.Param(D**-0.5 * rngs.params.normal((V, D), jnp.float32))

    def __call__(self, ids_BL: jax.Array, segments_BL: jax.Array, *, remat: bool = False) -> jax.Array:
        """Final hidden states [B, L, D] of packed rows. `remat` keeps only layer boundaries for the backward pass."""
        turn = rotation(positions_in(segments_BL), self.config)
        graph, weights = nnx.split(self.layers)

        def step(x_BLD, layer_weights):
            return nnx.merge(graph, layer_weights)(x_BLD, turn, segments_BL), None

        unroll = self.config.num_hidden_layers <= UNROLLED_LAYERS
        x_BLD, _ = jax.lax.scan(
            jax.checkpoint(step) if remat else step, self.embed[...][ids_BL], weights, unroll=unroll
        )
        return rms_norm(x_BLD, self.norm[...], self.config.rms_norm_eps)

    def unembed(self) -> jax.Array:
        """The matrix [V, D] that turns hidden states into logits."""
        return self.embed[...] if self.head is None else self.head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 of final hidden states [..., D]."""
        return jnp.einsum("...d,vd->...v", hidden, self.unembed(), preferred_element_type=jnp.float32)


def token_logprobs(model: Mistral, ids_BL: jax.Array, segments_BL: jax.Array, *, remat: bool = False) -> jax.Array:
    """log p(ids[t] | earlier ids of its segment) [B, L] float32; 0.0 at a segment's first token and at padding.

    Logits exist for `LOGITS_PER_CHUNK` numbers at a time and are computed again in the backward pass where there are
    several chunks.
    """
    B, L = ids_BL.shape
    hidden_BLD = model(ids_BL, segments_BL, remat=remat)
    hidden = hidden_BLD[:, :-1].reshape(B * (L - 1), -1)
    targets = ids_BL[:, 1:].reshape(-1)
    counted = (segments_BL[:, 1:] == segments_BL[:, :-1]) & (segments_BL[:, 1:] != 0)

    def logprobs(chunk):
        hidden_TD, targets_T = chunk
        logits_TV = model.logits(hidden_TD)
        chosen_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
        return chosen_T - jax.nn.logsumexp(logits_TV, axis=-1)

    tokens = len(targets)
    chunks = -(-tokens * model.config.vocab_size // LOGITS_PER_CHUNK)
    if chunks == 1:
        flat = logprobs((hidden, targets))
    else:
        size = -(-tokens // chunks)
        padding = chunks * size - tokens
        hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(chunks, size, -1)
        targets = jnp.pad(targets, (0, padding)).reshape(chunks, size)
        flat = jax.lax.map(jax.checkpoint(logprobs), (hidden, targets)).reshape(-1)[:tokens]
    inside = jnp.where(counted, flat.reshape(B, L - 1), 0.0)
    return jnp.pad(inside, ((0, 0), (1, 0)))

"""Log-probabilities of given tokens, computing logits one chunk at a time; used by training and scoring.

    logprobs_BL = token_logprobs(model, ids_BL, segments_BL)        # float32; 0.0 at segment starts and padding

Left out: sampling (decoding.py), the policy-gradient loss (train_pg.py).
Shapes: B rows, L tokens, T tokens of all rows, C tokens of a chunk, D model, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora.model import CausalLM

# A chunk has as many tokens as fit this number of logits (64 MiB in float32), but at least so many tokens that reading
# the head takes less time than multiplying by it on any accelerator, whatever the vocabulary.
LOGITS_PER_CHUNK, TOKENS_PER_CHUNK = 2**24, 512


def token_logprobs(model: CausalLM, ids_BL: jax.Array, segments_BL: jax.Array, **options) -> jax.Array:
    """log p(ids[t] | earlier ids of its segment) [B, L] float32; 0.0 at a segment's first token and at padding.

    `options`: keyword arguments of `CausalLM.__call__`.
    """
    B, L = ids_BL.shape
    hidden_BLD = model(ids_BL, segments_BL, **options)
    counted = (segments_BL[:, 1:] == segments_BL[:, :-1]) & (segments_BL[:, 1:] != 0)
    flat = chosen_logprobs(hidden_BLD[:, :-1].reshape(B * (L - 1), -1), ids_BL[:, 1:].reshape(-1), model.unembed())
    masked = jnp.where(counted, flat.reshape(B, L - 1), 0.0)
    return jnp.pad(masked, ((0, 0), (1, 0)))


@jax.custom_vjp
def chosen_logprobs(hidden_TD: jax.Array, targets_T: jax.Array, head_VD: jax.Array) -> jax.Array:
    """log softmax(hidden head^T)[targets] [T] float32, computing logits one chunk of tokens at a time.

    A token's log-probability depends only on its own hidden state, so the forward pass already computes its gradient,
    head[target] - sum(p * head), while the logits are available; the backward pass scales it by the incoming gradient.
    That takes two products with the head instead of three. Only the gradient of a trainable head recomputes the logits.
    """

    return in_chunks(lambda *chunk: logits_and_logprobs(*chunk, head_VD)[1], len(head_VD), hidden_TD, targets_T)


def _chosen_forward(hidden_TD, targets_T, head_VD):
    def logprobs_and_gradient(hidden_CD, targets_C):
        logits_CV, logprobs_C, logsum_C = logits_and_logprobs(hidden_CD, targets_C, head_VD)
        p_CV = jnp.exp(logits_CV - logsum_C[:, None]).astype(head_VD.dtype)
        mean_CD = jnp.einsum("cv,vd->cd", p_CV, head_VD, preferred_element_type=jnp.float32)
        return logprobs_C, (head_VD[targets_C] - mean_CD).astype(hidden_CD.dtype)

    logprobs_T, gradient_TD = in_chunks(logprobs_and_gradient, len(head_VD), hidden_TD, targets_T)
    return logprobs_T, (gradient_TD, hidden_TD, targets_T, head_VD)


def _chosen_backward(residuals, d_T):
    gradient_TD, hidden_TD, targets_T, head_VD = residuals

    def logprobs_by_head(head_VD):
        logprobs = jax.checkpoint(lambda *chunk: logits_and_logprobs(*chunk, head_VD)[1])
        return in_chunks(logprobs, len(head_VD), hidden_TD, targets_T)

    [d_head_VD] = jax.vjp(logprobs_by_head, head_VD)[1](d_T)  # XLA drops this when the head is frozen
    return (d_T[:, None] * gradient_TD).astype(hidden_TD.dtype), None, d_head_VD


chosen_logprobs.defvjp(_chosen_forward, _chosen_backward)


def logits_and_logprobs(hidden_CD, targets_C, head_VD):
    """Logits [C, V] in float32, log-probabilities of the targets [C], and logsumexp of the logits [C]."""
    logits_CV = jnp.einsum("cd,vd->cv", hidden_CD, head_VD, preferred_element_type=jnp.float32)
    logsum_C = jax.nn.logsumexp(logits_CV, axis=-1)
    return logits_CV, jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0] - logsum_C, logsum_C


def in_chunks(function, vocabulary: int, *arrays: jax.Array):
    """Applies `function` to arrays [T, ...] in equal chunks of T (see `LOGITS_PER_CHUNK`)."""
    tokens = len(arrays[0])
    chunks = -(-tokens // max(LOGITS_PER_CHUNK // vocabulary, TOKENS_PER_CHUNK))
    size = -(-tokens // chunks)
    chunked = [
        jnp.pad(x, [(0, chunks * size - tokens)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, size, *x.shape[1:])
        for x in arrays
    ]
    results = jax.lax.map(lambda chunk: function(*chunk), tuple(chunked))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens], results)

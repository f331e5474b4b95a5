"""Log-probabilities of given tokens, with the logits of one chunk at a time: training and scoring.

Shapes: B rows, L tokens, T tokens of both, C tokens of a chunk, D model, V vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora.model import Mistral

# Logits are made for so many tokens at a time that a chunk holds at most this many numbers (64 MiB in float32).
LOGITS_PER_CHUNK = 2**24


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

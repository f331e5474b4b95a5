"""Initial weights of tiny bases: heads that already match names or copy from context, which random ones learn late.

    table_VD, plain_D, numbered_D = embeddings(tokenizer, width, rng)       # ALFWorld
    match_like_with_like(model, plain_D, numbered_D)
    induction_heads(model, embeddings(tokenizer, head_dim - 1, rng)[0])     # WebShop, neutral

Left out: training, which changes all of these weights (models/pretrain.py).
Shapes: V vocabulary, D model, E width of the embedding table, C head dim.
"""

from __future__ import annotations

import re
from collections import defaultdict

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from lora.model import CausalLM


def embeddings(tokenizer: Tokenizer, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Initial embeddings [V, width], and two directions [width] in them: of plain words and of numbered things.

    A token's embedding is the sum of its words' random vectors, scaled to unit length, so " mug", " mug 1" and " mug 2"
    are similar from the first step. Plain words (" mug") share one direction, numbered things (" mug 2") another. A
    piece of a product's id counts as one word.
    """
    directions = rng.normal(size=(2, width))
    words: defaultdict[str, np.ndarray] = defaultdict(lambda: rng.normal(size=width))
    table = np.zeros((tokenizer.get_vocab_size(), width), np.float32)
    for token in range(len(table)):
        text = tokenizer.id_to_token(token).replace("Ġ", " ")  # the byte-level spelling of a space
        parts = [text] if re.fullmatch(r"[A-Z\d]+", text) else re.findall(r"[A-Za-z]+|\d+|[^A-Za-z\d\s]+", text)
        table[token] = sum(words[word] for word in parts or [text])
        for pattern, direction in zip((r" [a-z]+", r".* \d+"), directions, strict=True):
            if re.fullmatch(pattern, text):
                table[token] += 0.85 * direction  # 0.6 of the length of a two-word name
    table, directions = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (table, directions))
    return table, *directions


def match_like_with_like(model: CausalLM, plain_D: np.ndarray, numbered_D: np.ndarray) -> None:
    """Initialises half of the heads of the first two layers to match names; training then sharpens them.

    Their keys equal their queries, so a name attends to similar ones, except that a plain name (" mug") attends mainly
    to numbered ones (" mug 2") rather than to itself; and they write back what they read unchanged. From random weights
    the gradient towards such heads is almost zero: after thousands of steps a base still guessed.
    """
    half = model.config.num_attention_heads // 2 * model.config.head_dim
    q, k, v = (model.layers.qkv.weight[part] for part in "qkv")
    o = model.layers.o.weight["o"]
    match = q[...][:2, :half]
    k[...] = k[...].at[:2, :half].set(match)
    as_numbered_DD = jnp.eye(len(plain_D)) + jnp.outer(numbered_D - plain_D, plain_D)
    q[...] = q[...].at[:2, :half].set(1.5 * match @ as_numbered_DD)
    residual_scale = (2 * model.config.num_hidden_layers) ** -0.5
    o[...] = o[...].at[:2, :, :half].set(residual_scale * v[...][:2, :half].swapaxes(1, 2))


def induction_heads(model: CausalLM, table_VE: np.ndarray) -> None:
    """Initialises a model to continue with what followed earlier occurrences of its current token.

    The residual stream has two or three parts, each as wide as a head. Embeddings fill the first; its last dimension is
    constant. In layer 1 one head attends one token back and writes that token into the second part; with a third part,
    another head attends two and three back at once. In layer 2 one head attends to positions whose second part matches
    the current token, that is to what came after it, and writes that strongly into the first part; another also
    requires matching tokens before it, which distinguishes the commas of a list. With a third part, two more heads find
    what else came after the previous token and write it into the second part: whether a page lists an option that was
    just named shows in what follows it there. Everything else starts small. Induction heads (arXiv 2209.11895) form
    without this, but a tiny model takes long to find them.
    """
    config, (V, E) = model.config, table_VE.shape
    D, C, K = config.hidden_size, config.head_dim, config.num_key_value_heads
    parts, share = D // C, config.num_attention_heads // K
    if not (E + 1 == C and D == parts * C and parts in (2, 3) and K >= parts - 1):
        raise ValueError(
            f"table of {E}, width {D}, {K} key-value heads of {C}: expected a width of two or three heads (for three, "
            "at least two key-value heads) and a table one narrower than a head"
        )
    model.embed[...] = jnp.zeros((V, D)).at[:, :E].set(0.75**0.5 * table_VE).at[:, E].set(0.5)
    model.head[...] = jnp.zeros((V, D)).at[:, :E].set(table_VE)
    q, k, v = (model.layers.qkv.weight[part] for part in "qkv")
    o, down = model.layers.o.weight["o"], model.layers.down.weight["down"]
    o[...], down[...] = 0.1 * o[...], 0.1 * down[...]
    read = [jnp.eye(C, D, k=part * C) for part in range(parts)]  # reads each part of the stream
    angles_C2 = config.rope_theta ** (-np.arange(0, C, 2) / C)
    # The faster half of the angles selects positions; 1.5 weights a neighbour e^-6 of the intended position. The slower
    # ones, which hardly rotate over a text, match contents.
    quick = np.arange(C // 2) < C // 4
    slow = np.flatnonzero(np.tile(np.arange(C // 2) >= 3 * C // 16, 2))
    for back in range(1, parts):
        kv, head = back - 1, (back - 1) * share
        rows, kv_rows = slice(head * C, head * C + C), slice(kv * C, kv * C + C)
        offsets = (0, (back if back == 1 else 2.5) * angles_C2)
        here_C, back_C = (np.concatenate([quick * np.cos(a), quick * np.sin(a)]) for a in offsets)
        q[...] = q[...].at[0, rows].set(1.5 * jnp.outer(here_C, read[0][E]))
        k[...] = k[...].at[0, kv_rows].set(1.5 * jnp.outer(back_C, read[0][E]))
        v[...] = v[...].at[:2, kv_rows].set(read[0].at[E].set(0))
        o[...] = o[...].at[0, :, rows].set(D**-0.5 * read[back].T)
        # Match the current token, or it and the ones before it, with an equal share of the angles for each.
        query_CD, key_CD = jnp.zeros((C, D)), jnp.zeros((C, D))
        for age, dims in enumerate(np.array_split(slow, back)):
            before = read[1] + read[2] if age else read[0]
            query_CD = query_CD.at[dims].set(2.5 * before[: len(dims)])
            key_CD = key_CD.at[dims].set(2.5 * read[age + 1][: len(dims)])
        q[...] = q[...].at[1, rows].set(query_CD)
        k[...] = k[...].at[1, kv_rows].set(key_CD)
        o[...] = o[...].at[1, :, rows].set((3 if back == parts - 1 else 1) * D**-0.5 * read[0].T)
        if parts == 3 and share > 1:
            others, near = slice(rows.stop, rows.stop + C), jnp.outer(np.concatenate([quick, 0 * quick]), read[0][E])
            k[...] = k[...].at[1, kv_rows].add(near)
            q[...] = q[...].at[1, others].set(key_CD - near)  # not its own position, which is the nearest
            o[...] = o[...].at[1, :, others].set(D**-0.5 * read[1].T)

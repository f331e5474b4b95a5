"""Initial weights of tiny bases that already match names and copy from context, which training from noise finds late.

Shapes: V vocabulary, D model, E embedding table, C head dim."""

from __future__ import annotations

import re
from collections import defaultdict

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from lora.model import Mistral


def embeddings(tokenizer: Tokenizer, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where embedding and head start, [V, D], and two directions in it, [D] each: of plain words, of numbered things.

    A token is the sum of its words' random vectors, at unit length. So " mug", " mug 1" and " mug 2" are alike from the
    first step, and plain words (" mug") have a direction in common, numbered things (" mug 2") another. Pieces of a
    product's id are words of their own.
    """
    directions = rng.normal(size=(2, width))
    words: defaultdict[str, np.ndarray] = defaultdict(lambda: rng.normal(size=width))
    table = np.zeros((tokenizer.get_vocab_size(), width), np.float32)
    for token in range(len(table)):
        text = tokenizer.id_to_token(token).replace("Ġ", " ")  # how a byte-level BPE spells a space
        parts = [text] if re.fullmatch(r"[A-Z\d]+", text) else re.findall(r"[A-Za-z]+|\d+|[^A-Za-z\d\s]+", text)
        table[token] = sum(words[word] for word in parts or [text])
        for pattern, direction in zip((r" [a-z]+", r".* \d+"), directions, strict=True):
            if re.fullmatch(pattern, text):
                table[token] += 0.85 * direction  # 0.6 of the length of a name of two words
    table, directions = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (table, directions))
    return table, *directions


def match_like_with_like(model: Mistral, plain_D: np.ndarray, numbered_D: np.ndarray) -> None:
    """Half of the heads of the first two layers start as matchers of names, which training then sharpens.

    Their keys equal their queries, so a name attends to its like; a plain one (" mug") attends to numbered ones (" mug
    2") above all, not to itself; and they write what they read as it was read. From random weights such heads have to
    be found, by a gradient that is next to nothing until they are: after thousands of steps a base still guessed.
    """
    half = model.config.num_attention_heads // 2 * model.config.head_dim
    q, k, v = (model.layers.qkv.weight[part] for part in "qkv")
    o = model.layers.o.weight["o"]
    match = q[...][:2, :half]
    k[...] = k[...].at[:2, :half].set(match)
    as_numbered_DD = jnp.eye(len(plain_D)) + jnp.outer(numbered_D - plain_D, plain_D)
    q[...] = q[...].at[:2, :half].set(1.5 * match @ as_numbered_DD)
    quiet = (2 * model.config.num_hidden_layers) ** -0.5
    o[...] = o[...].at[:2, :, :half].set(quiet * v[...][:2, :half].swapaxes(1, 2))


def induction_heads(model: Mistral, table_VE: np.ndarray) -> None:
    """The model starts as one that goes on with what followed the last times that its token was there.

    The stream has two or three parts, each as wide as a head. Embeddings fill the first (the last place of it is the
    same for all). A head of the first layer looks one token back, whatever is there, and writes what it finds into the
    second part; where there is a third, another looks two and three back at once. A head of the second layer looks for
    the token's like in the second part, that is for what came after it, and writes that in large into the first;
    another does so where the tokens before are alike too, which tells the commas of a list apart. With a third part two
    more heads look for what else came after the token before, and write it into the second: whether an option that was
    just named stands in a page's list is told by what follows it there. All else starts small. Induction heads (arXiv
    2209.11895) form by themselves, but a tiny model takes long to find them.
    """
    config, (V, E) = model.config, table_VE.shape
    D, C, K = config.hidden_size, config.head_dim, config.num_key_value_heads
    parts, share = D // C, config.num_attention_heads // K
    if not (E + 1 == C and D == parts * C and parts in (2, 3) and K >= parts - 1):
        raise ValueError(
            f"table of {E}, width {D}, {K} key-value heads of {C}: expected a width of two or three heads "
            "(with three, two key-value heads), and a table one less than a head"
        )
    model.embed[...] = jnp.zeros((V, D)).at[:, :E].set(0.75**0.5 * table_VE).at[:, E].set(0.5)
    model.head[...] = jnp.zeros((V, D)).at[:, :E].set(table_VE)
    q, k, v = (model.layers.qkv.weight[part] for part in "qkv")
    o, down = model.layers.o.weight["o"], model.layers.down.weight["down"]
    o[...], down[...] = 0.1 * o[...], 0.1 * down[...]
    read = [jnp.eye(C, D, k=part * C) for part in range(parts)]  # what reads each part of the stream
    angles_C2 = config.rope_theta ** (-np.arange(0, C, 2) / C)
    # Places are told by the quicker half of the angles; 1.5 makes a neighbour e^-6 of the place that is meant. What
    # stands there is matched by the slower ones, which hardly turn over a text.
    quick = np.arange(C // 2) < C // 4
    slow = np.flatnonzero(np.tile(np.arange(C // 2) >= 3 * C // 16, 2))
    for back in range(1, parts):
        kv, head = back - 1, (back - 1) * share
        rows, kv_rows = slice(head * C, head * C + C), slice(kv * C, kv * C + C)
        places = (0, (back if back == 1 else 2.5) * angles_C2)
        place_C, back_C = (np.concatenate([quick * np.cos(a), quick * np.sin(a)]) for a in places)
        q[...] = q[...].at[0, rows].set(1.5 * jnp.outer(place_C, read[0][E]))
        k[...] = k[...].at[0, kv_rows].set(1.5 * jnp.outer(back_C, read[0][E]))
        v[...] = v[...].at[:2, kv_rows].set(read[0].at[E].set(0))
        o[...] = o[...].at[0, :, rows].set(D**-0.5 * read[back].T)
        # The like of the last token, or of that and those before it, an equal share of the angles for each.
        asked, kept = jnp.zeros((C, D)), jnp.zeros((C, D))
        for age, dims in enumerate(np.array_split(slow, back)):
            before = read[1] + read[2] if age else read[0]
            asked = asked.at[dims].set(2.5 * before[: len(dims)])
            kept = kept.at[dims].set(2.5 * read[age + 1][: len(dims)])
        q[...] = q[...].at[1, rows].set(asked)
        k[...] = k[...].at[1, kv_rows].set(kept)
        o[...] = o[...].at[1, :, rows].set((3 if back == parts - 1 else 1) * D**-0.5 * read[0].T)
        if parts == 3 and share > 1:
            others, near = slice(rows.stop, rows.stop + C), jnp.outer(np.concatenate([quick, 0 * quick]), read[0][E])
            k[...] = k[...].at[1, kv_rows].add(near)
            q[...] = q[...].at[1, others].set(kept - near)  # the token's own place is the nearest
            o[...] = o[...].at[1, :, others].set(D**-0.5 * read[1].T)

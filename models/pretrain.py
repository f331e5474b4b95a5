"""Trains a tiny base from scratch, all parameters, on demonstrations of one world: the stand-in for a pretrained LLM.

A scripted demonstrator plays tasks that no panel holds (models/alfworld_lessons.py, models/webshop_lessons.py),
displaced now and then by a random action whose reason is written after the fact, and the base learns both formats:
ReAct (the agent) and ActRe (the one who explains). Like the text that an LLM is trained on, the demonstrations are of
uneven skill: for some kinds of task most players are careless, take a shortcut and fail.
What it writes is a Hugging Face folder: config.json, model.safetensors, tokenizer.json, and training.json with the
command, seeds and losses.

    python models/pretrain.py                                        # models/tiny-alfworld
    make base-webshop                                                # models/tiny-webshop, with flags of its own

Left out: LoRA and rewards (train_pg.py), resuming (a run is short), scoring (evaluate.py does that).
Shapes: B rows, L tokens.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules lie beside models/

from artifacts.render import actre_segments, react_segments
from artifacts.seeds import generator
from artifacts.trajectory import Trajectory
from lora import nf4
from lora.config import Config
from lora.load import save_model
from lora.logprobs import token_logprobs
from lora.model import Mistral


@dataclass(frozen=True, kw_only=True)
class Args:
    env: Literal["alfworld", "webshop", "neutral"] = "alfworld"
    """World whose demonstrations are learnt (models/*_lessons.py); neutral: random walks, without solutions, in two."""
    out: Path = Path("models/tiny-alfworld")
    """Folder to write; an existing model there is refused."""
    data: str | None = None
    """The world's real data (default: $ALFWORLD_DATA or $WEBSHOP_DATA; without either, generated tasks only)."""
    tokens: int = 10_000_000
    """Tokens to train on, padding included. 4,096 of them make one optimizer step."""
    width: int = 128
    """Hidden size; a multiple of 64."""
    layers: int = 4
    """Decoder layers."""
    heads: tuple[int, int, int] = (4, 4, 32)
    """Attention heads, key-value heads, and the size of one."""
    rope_theta: float = 1e5
    """Base of the rotary angles: the longer the texts, the larger."""
    vocabulary: int = 1536
    """Size of the byte-level BPE vocabulary, 256 bytes included; smaller where the texts have fewer pieces."""
    learning_rate: float = 0.02
    """Peak rate of Muon (matrices); Adam (embeddings, head, norms) takes 0.15 of it. Cosine decay."""
    generated: int = 2000
    """Generated games, or products, to demonstrate on."""
    generated_share: float = 0.3
    """Share of demonstrations from generated tasks when real ones are there."""
    actre_share: float = 0.2
    """Share of texts in the ActRe format."""
    world_weight: float = 0.05
    """Weight of the tokens that the world wrote; the agent's have 1. What a room holds cannot be predicted, and at full
    weight its noise drowns the few tokens that decide a game."""
    reading_weight: float = 5.0
    """Weight of the words in which a thought says whether the wanted thing is in sight, and which: they are few, hold
    half of the loss, and win or lose a game."""
    displaced: tuple[float, ...] = (0.0, 0.0, 0.1, 0.2)
    """Probabilities of a random action per turn; a demonstration draws one of them. ReAct texts give such a turn weight
    0 (nobody can predict it, and nobody should do it), ActRe texts learn its reason."""
    careless: tuple[float, ...] = (0.1, 0.7, 0.7, 0.7)
    """Shares of careless players; a kind of task (what it is about) draws one of them. At 0.7 greedy play is careless,
    and every third or so of sampled attempts is not."""
    max_turns: int = 30
    """Turns after which a demonstration is given up and dropped."""
    seed: int = 0
    """Seeds the weights, the order of games and every displacement."""


STEP_TOKENS = 4_096
DEVICES = 2  # that share the rows of a step: a CPU attends with one core a row (one device where there is but one)


def lessons_of(args: Args):
    """The module with the world's demonstrations, how its texts are cut into pieces, and how long they are."""
    return importlib.import_module(f"models.{args.env}_lessons")


# ---- tokens and where they start -------------------------------------------------------------------------------------


def empty_tokenizer(bpe: models.BPE, split: str) -> Tokenizer:
    """A byte-level BPE within the pieces of the pattern `split`; any text survives encoding and decoding."""
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: list[str], vocabulary: int, split: str) -> Tokenizer:
    """A byte-level BPE made from texts."""
    tokenizer = empty_tokenizer(models.BPE(), split)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer_blanks_last(texts: list[str], vocabulary: int, split: str) -> Tokenizer:
    """One where a word has the same tokens behind a blank and without it, but that the first has the blank in it: so an
    action's words are copied token by token from a text. A third of the vocabulary are tokens with a blank."""
    bare = train_tokenizer(texts, 2 * vocabulary // 3, split.replace(" ?", ""))
    bpe = json.loads(bare.to_str())["model"]
    words = Counter(piece for text in texts for piece in re.findall(split, text) if re.match(r" \S", piece))
    firsts: Counter[str] = Counter()
    for word, count in words.items():
        firsts[bare.encode(word[1:]).tokens[0]] += count
    blank = "Ġ"  # how a byte-level BPE spells it
    for first, _ in firsts.most_common(vocabulary - len(bpe["vocab"])):
        if blank + first not in bpe["vocab"]:
            bpe["vocab"][blank + first] = len(bpe["vocab"])
            bpe["merges"].append((blank, first))
    return empty_tokenizer(models.BPE(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]]), split)


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


def copy_what_came_before(model: Mistral, table_VE: np.ndarray) -> None:
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


def weighted(trajectory: Trajectory, actre: bool, args: Args) -> list[tuple[str, float]]:
    """A demonstration as (text, weight): 1 on what the agent or ActRe writes, args.reading_weight on its words that say
    what a list holds, args.world_weight on the world's text, 0 on ReAct turns with a random action."""
    pieces, reading = [], lessons_of(args).READING
    for segment in (actre_segments if actre else react_segments)(trajectory):
        if not segment.agent:
            pieces.append((segment.text, args.world_weight))
        elif not actre and trajectory.turns[segment.turn].action_by == "sampled":
            pieces.append((segment.text, 0.0))
        else:  # re.split: text, what was read, text, ...
            parts = re.split(reading, segment.text)
            pieces += [(part, args.reading_weight if i % 2 else 1.0) for i, part in enumerate(parts) if part]
    return pieces


def texts(args: Args) -> Iterator[list[tuple[str, float]]]:
    """An endless stream of weighted texts, ReAct and ActRe in their shares."""
    for number, trajectory in enumerate(lessons_of(args).demonstrations(args)):
        actre = generator(args.seed, "format", number).random() < args.actre_share
        yield weighted(trajectory, actre, args)


def batches(args: Args, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids_BL, segments_BL, weights_BL) of about STEP_TOKENS tokens, one text a row, rows of like length together.

    The first third of the steps has short texts only: what to look for is found more easily among less.
    """
    step, lessons = 0, lessons_of(args)
    waiting: dict[int, list[tuple[list[int], list[float]]]] = {length: [] for length in lessons.LENGTHS}
    for text in texts(args):
        pieces = [(tokenizer.encode(piece, add_special_tokens=False).ids, weight) for piece, weight in text]
        ids = [i for piece, _ in pieces for i in piece]
        weights = [weight for piece, weight in pieces for _ in piece]
        length = next((n for n in lessons.LENGTHS if n >= len(ids)), None)
        if length is None or (step < args.tokens // STEP_TOKENS // 3 and length > lessons.SHORT):
            continue
        waiting[length].append((ids, weights))
        rows = max(1, STEP_TOKENS // length // DEVICES) * DEVICES
        if len(waiting[length]) == rows:
            ids_BL = np.zeros((rows, length), np.int32)
            segments_BL, weights_BL = np.zeros_like(ids_BL), np.zeros(ids_BL.shape, np.float32)
            for row, (ids, weights) in enumerate(waiting[length]):
                ids_BL[row, : len(ids)] = ids
                segments_BL[row, : len(ids)] = 1
                weights_BL[row, : len(ids)] = weights
            waiting[length] = []
            yield ids_BL, segments_BL, weights_BL
            step += 1


# ---- training --------------------------------------------------------------------------------------------------------


def through_nf4(weight: jax.Array) -> jax.Array:
    """The weight [N, out, in] rounded to NF4, with the gradient of the weight itself: the base is only used so."""
    blocks = weight.reshape(*weight.shape[:-1], -1, nf4.BLOCK)
    absmax = jnp.maximum(jnp.abs(blocks).max(axis=-1), 1e-38)
    scaled = blocks / absmax[..., None]
    codes = sum((scaled > border).astype(jnp.uint8) for border in (nf4.VALUES[:-1] + nf4.VALUES[1:]) / 2)
    rounded = nf4.dequantize(codes, absmax).reshape(weight.shape)
    return weight + jax.lax.stop_gradient(rounded - weight)


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Muon on the layers' matrices (stacked over layers, [N, out, in]), Adam on the rest, warm-up and cosine decay."""

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(50, steps // 10), steps, 0.02 * peak)

    def matrices(params):
        return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(2, 1) if x.ndim == 3 else None, params)

    muon = optax.contrib.muon(
        schedule(learning_rate),
        adam_learning_rate=schedule(0.15 * learning_rate),
        muon_weight_dimension_numbers=matrices,
        weight_decay=0.01,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def main(args: Args) -> None:
    if (args.out / "model.safetensors").exists():
        raise SystemExit(f"{args.out} holds a model already; remove it or give another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    lessons = lessons_of(args)
    sample = list(itertools.islice(lessons.demonstrations(args), 2000))
    spellings = [text for trajectory in sample for text in lessons.spellings(trajectory)]
    make_tokenizer = train_tokenizer_blanks_last if args.env == "webshop" else train_tokenizer
    tokenizer = make_tokenizer(spellings, args.vocabulary, lessons.SPLIT)
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.width,
        intermediate_size=args.width * 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads[0],
        num_key_value_heads=args.heads[1],
        head_dim=args.heads[2],
        max_position_embeddings=4096,
        rope_theta=args.rope_theta,
    )
    model = Mistral(config, rngs=nnx.Rngs(args.seed))
    if args.env == "alfworld":
        table_VD, plain_D, numbered_D = embeddings(tokenizer, args.width, generator(args.seed, "embeddings"))
        model.embed[...] = model.head[...] = jnp.asarray(table_VD)
        match_like_with_like(model, plain_D, numbered_D)
    else:
        copy_what_came_before(model, embeddings(tokenizer, args.heads[2] - 1, generator(args.seed, "embeddings"))[0])
    graph, params = nnx.split(model)
    steps = args.tokens // STEP_TOKENS
    optimizer = make_optimizer(args.learning_rate, steps)
    state = optimizer.init(params)

    mesh = Mesh(jax.devices()[:DEVICES], "rows")

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P(), check_vma=False)
    def value_and_gradient(params, batch):
        def loss(params):
            ids_BL, segments_BL, weights_BL = batch
            params = jax.tree.map(lambda x: through_nf4(x) if x.ndim == 3 else x, params)
            logprobs_BL = token_logprobs(nnx.merge(graph, params), ids_BL, segments_BL)
            return -(weights_BL * logprobs_BL).sum() / jax.lax.psum(weights_BL.sum(), "rows")

        return jax.lax.psum(jax.value_and_grad(loss)(params), "rows")

    @jax.jit
    def update(params, state, batch):
        value, gradient = value_and_gradient(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    start, real_tokens, losses = time.time(), 0, []
    bar = tqdm(itertools.islice(batches(args, tokenizer), steps), total=steps, desc="pretrain", unit="step")
    for batch in bar:
        params, state, loss = update(params, state, batch)
        losses.append(loss)  # not read yet: the next batch is made while this one is computed
        real_tokens += int((batch[1] != 0).sum())
        if len(losses) % 20 == 0 or len(losses) == steps:
            recent = float(np.mean(losses[-20:]))
            if not np.isfinite(recent):
                raise SystemExit(f"loss {recent} before step {len(losses)}; lower --learning-rate")
            bar.set_postfix(loss=f"{recent:.4f}", tokens_per_s=f"{real_tokens / (time.time() - start):.0f}")

    save_model(nnx.merge(graph, params), args.out)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "args": {k: str(v) for k, v in asdict(args).items()},
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "tokens": real_tokens,
        "steps": steps,
        "first_loss": float(losses[0]),
        "last_loss": recent,
        "seconds": round(time.time() - start),
        "device": jax.devices()[0].device_kind,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{args.out}: {record['parameters']:,} parameters, {real_tokens:,} tokens, loss {record['last_loss']:.4f}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main(tyro.cli(Args, description=__doc__))

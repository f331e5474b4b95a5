"""Trains a tiny base from scratch, all parameters, on demonstrations in one world: a stand-in for a pretrained LLM.

A scripted demonstrator plays tasks that are in no panel (models/corpus/). Now and then a random action displaces it,
whose reason is written after the fact, so the base learns both formats: ReAct (the agent) and ActRe (the explainer). As
in an LLM's training data, skill varies: for some kinds of task most players are careless, take a shortcut and fail.
The output is a Hugging Face folder: config.json, model.safetensors, tokenizer.json, and training.json with the command,
seeds and losses.

    python -m models.pretrain                                        # models/tiny-alfworld
    make base-webshop                                                # models/tiny-webshop, with its own flags

Left out: LoRA and rewards (train_pg.py), resuming (a run is short), scoring (evaluate.py).
Shapes: N layers, B rows, L tokens.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tokenizers import Tokenizer
from tqdm import tqdm

from artifacts.cli import Range, run_main
from artifacts.json_io import write_json
from artifacts.render import actre_segments, react_segments
from artifacts.seeds import generator
from artifacts.trajectory import Trajectory
from lora import nf4
from lora.config import Config
from lora.load import save_model
from lora.logprobs import token_logprobs
from lora.model import CausalLM
from models.corpus import alfworld, neutral, webshop
from models.corpus.args import CorpusArgs
from models.initial_weights import embeddings, induction_heads, match_like_with_like
from models.tokenizer import train_tokenizer, train_tokenizer_blanks_last

STEP_TOKENS = 4_096  # of one optimizer step, padding included
DEVICES = 2  # share the rows of a step: a CPU attends with one core per row; fewer if JAX has only one device
# Each module has a world's demonstrations, spellings, PRETOKENIZER, READING, LENGTHS and SHORT.
CORPORA = {"alfworld": alfworld, "webshop": webshop, "neutral": neutral}


Heads = Annotated[int, Range(1, 1024)]


@dataclass(frozen=True, kw_only=True)
class Args(CorpusArgs):
    env: Literal["alfworld", "webshop", "neutral"] = "alfworld"
    """World whose demonstrations are learnt (models/corpus/). neutral: random walks in two worlds, no solutions."""
    out: Path = Path("models/tiny-alfworld")
    """Folder to write; refused if it already holds a model."""
    tokens: Annotated[int, Range(STEP_TOKENS, 10**13)] = 10_000_000
    """Tokens to train on, padding included; 4,096 per optimizer step."""
    width: Annotated[int, Range(64, 2**16)] = 128
    """Hidden size; a multiple of 64."""
    layers: Annotated[int, Range(1, 1000)] = 4
    """Decoder layers."""
    heads: tuple[Heads, Heads, Heads] = (4, 4, 32)
    """Attention heads, key-value heads, and the size of a head."""
    rope_theta: Annotated[float, Range(1, 10**12)] = 1e5
    """Base of the rotary angles; longer texts need a larger one."""
    vocabulary: Annotated[int, Range(257, 10**6)] = 1536
    """Size of the byte-level BPE vocabulary, 256 bytes included; smaller if the texts have fewer pieces."""
    learning_rate: Annotated[float, Range(0, 1, above=True)] = 0.02
    """Peak learning rate of Muon (matrices); Adam (embeddings, head, norms) uses 0.15 of it. Cosine decay."""
    actre_share: Annotated[float, Range(0, 1)] = 0.2
    """Share of texts in the ActRe format; the others are in the ReAct format."""
    world_weight: Annotated[float, Range(0, 1000)] = 0.05
    """Weight of the world's tokens; the agent's have 1. The contents of a room cannot be predicted, and at full weight
    their noise drowns the few tokens that decide a game."""
    reading_weight: Annotated[float, Range(0, 1000)] = 5.0
    """Weight of the words in which a thought says whether the wanted thing is in sight, and which one: few tokens with
    half of the loss, which win or lose a game."""


# ---- texts and batches -----------------------------------------------------------------------------------------------


def weighted(trajectory: Trajectory, actre: bool, args: Args) -> list[tuple[str, float]]:
    """A demonstration as (text, weight) pieces.

    The agent's and ActRe's text has weight 1, except args.reading_weight for words that say what a list contains and 0
    for ReAct turns with a random action; the world's text has args.world_weight.
    """
    pieces, reading = [], CORPORA[args.env].READING
    for segment in (actre_segments if actre else react_segments)(trajectory):
        if not segment.agent:
            pieces.append((segment.text, args.world_weight))
        elif not actre and trajectory.turns[segment.turn].action_by == "sampled":
            pieces.append((segment.text, 0.0))
        else:  # re.split alternates: text, match of the READING pattern, text, ...
            parts = re.split(reading, segment.text)
            pieces += [(part, args.reading_weight if i % 2 else 1.0) for i, part in enumerate(parts) if part]
    return pieces


def texts(args: Args) -> Iterator[list[tuple[str, float]]]:
    """An endless stream of weighted texts, a share `args.actre_share` of them in the ActRe format."""
    for index, trajectory in enumerate(CORPORA[args.env].demonstrations(args)):
        actre = generator(args.seed, "format", index).random() < args.actre_share
        yield weighted(trajectory, actre, args)


def batches(args: Args, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids_BL, segments_BL, weights_BL) of about STEP_TOKENS tokens; one text per row, rows of similar length together.

    The first third of the steps has only short texts, in which it is easier to learn what to attend to.
    """
    step, corpus = 0, CORPORA[args.env]
    pending: dict[int, list[tuple[list[int], list[float]]]] = {length: [] for length in corpus.LENGTHS}
    for text in texts(args):
        pieces = [(tokenizer.encode(piece, add_special_tokens=False).ids, weight) for piece, weight in text]
        ids = [i for piece, _ in pieces for i in piece]
        weights = [weight for piece, weight in pieces for _ in piece]
        length = next((n for n in corpus.LENGTHS if n >= len(ids)), None)
        if length is None or (step < args.tokens // STEP_TOKENS // 3 and length > corpus.SHORT):
            continue
        pending[length].append((ids, weights))
        rows = max(1, STEP_TOKENS // length // DEVICES) * DEVICES
        if len(pending[length]) == rows:
            ids_BL = np.zeros((rows, length), np.int32)
            segments_BL, weights_BL = np.zeros_like(ids_BL), np.zeros(ids_BL.shape, np.float32)
            for row, (ids, weights) in enumerate(pending[length]):
                ids_BL[row, : len(ids)] = ids
                segments_BL[row, : len(ids)] = 1
                weights_BL[row, : len(ids)] = weights
            pending[length] = []
            yield ids_BL, segments_BL, weights_BL
            step += 1


# ---- the model before training ---------------------------------------------------------------------------------------


def build_tokenizer(args: Args) -> Tokenizer:
    """A tokenizer trained on the first 2,000 demonstrations of the corpus."""
    corpus = CORPORA[args.env]
    sample = list(itertools.islice(corpus.demonstrations(args), 2000))
    spellings = [text for trajectory in sample for text in corpus.spellings(trajectory)]
    make_tokenizer = train_tokenizer_blanks_last if args.env == "webshop" else train_tokenizer
    return make_tokenizer(spellings, args.vocabulary, corpus.PRETOKENIZER)


def build_model(args: Args, tokenizer: Tokenizer) -> CausalLM:
    """A Mistral of the given sizes with the initial weights of models/initial_weights.py."""
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
    model = CausalLM(config, rngs=nnx.Rngs(args.seed))
    if args.env == "alfworld":
        table_VD, plain_D, numbered_D = embeddings(tokenizer, args.width, generator(args.seed, "embeddings"))
        model.embed[...] = model.head[...] = jnp.asarray(table_VD)
        match_like_with_like(model, plain_D, numbered_D)
    else:
        induction_heads(model, embeddings(tokenizer, args.heads[2] - 1, generator(args.seed, "embeddings"))[0])
    return model


# ---- training --------------------------------------------------------------------------------------------------------


def through_nf4(weight: jax.Array) -> jax.Array:
    """The weight [N, out, in] rounded to NF4, the form the base is used in, with a straight-through gradient."""
    blocks = weight.reshape(*weight.shape[:-1], -1, nf4.BLOCK)
    absmax = jnp.maximum(jnp.abs(blocks).max(axis=-1), 1e-38)
    scaled = blocks / absmax[..., None]
    codes = sum((scaled > border).astype(jnp.uint8) for border in (nf4.VALUES[:-1] + nf4.VALUES[1:]) / 2)
    rounded = nf4.dequantize(codes, absmax).reshape(weight.shape)
    return weight + jax.lax.stop_gradient(rounded - weight)


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Muon on the layers' matrices (stacked, [N, out, in]) and Adam on the rest, with warm-up and cosine decay."""

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


def make_update(graph, optimizer: optax.GradientTransformation) -> Callable:
    """Builds the jitted step (params, state, batch) -> (params, state, loss), with rows sharded over the devices."""
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

    return update


def train(update: Callable, params, state, stream: Iterator, steps: int) -> tuple[Any, dict[str, int | float]]:
    """Runs `steps` updates on a stream of batches; returns the parameters and the figures for training.json."""
    start, real_tokens, losses = time.time(), 0, []
    bar = tqdm(itertools.islice(stream, steps), total=steps, desc="pretrain", unit="step")
    for batch in bar:
        params, state, loss = update(params, state, batch)
        losses.append(loss)  # not read yet, so that the next batch is made while this step runs
        real_tokens += int((batch[1] != 0).sum())
        if len(losses) % 20 == 0 or len(losses) == steps:
            recent = float(np.mean(losses[-20:]))
            if not np.isfinite(recent):
                raise ValueError(f"loss {recent} at or before step {len(losses)}; lower --learning-rate")
            bar.set_postfix(loss=f"{recent:.4f}", tokens_per_s=f"{real_tokens / (time.time() - start):.0f}")
    return params, {"tokens": real_tokens, "steps": steps, "first_loss": float(losses[0]), "last_loss": recent}


# ---- the command -----------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    if (args.out / "model.safetensors").exists():
        raise ValueError(f"{args.out} already holds a model; remove it or give another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(args)
    tokenizer.save(str(args.out / "tokenizer.json"))
    graph, params = nnx.split(build_model(args, tokenizer))
    steps = args.tokens // STEP_TOKENS
    optimizer = make_optimizer(args.learning_rate, steps)
    state = optimizer.init(params)
    update = make_update(graph, optimizer)
    start = time.time()
    params, figures = train(update, params, state, batches(args, tokenizer), steps)
    save_model(nnx.merge(graph, params), args.out)
    record = {
        "command": " ".join(["python -m models.pretrain", *sys.argv[1:]]),
        "args": {k: str(v) for k, v in asdict(args).items()},
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        **figures,
        "seconds": round(time.time() - start),
        "device": jax.devices()[0].device_kind,
    }
    write_json(args.out / "training.json", record)
    print(
        f"{args.out}: {record['parameters']:,} parameters, {record['tokens']:,} tokens, loss {record['last_loss']:.4f}"
    )


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    run_main(main, Args, __doc__)

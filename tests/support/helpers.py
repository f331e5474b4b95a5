"""What several tests need: hand-made trajectories and tiny random models, with a tokenizer or without."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from tokenizers import Tokenizer

from agent.policy import Ask, Line, Policy
from artifacts.tokens import Codec
from artifacts.trajectory import Trajectory, Turn
from lora.config import Config
from lora.linear import LoRAParam
from lora.load import save_model
from lora.model import CausalLM
from lora.tokenizer import encode_piece, line_of, newline_ids
from models.tokenizer import byte_tokenizer
from tests.support.rooms import OPENING, TASK

TINY = Config(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=1e6,
)


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, shape).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, state, ids_BL):
    model = nnx.merge(graph, state)
    return model.logits(model(ids_BL, jnp.ones_like(ids_BL)))


def logits_of(model: CausalLM, ids_BL: np.ndarray) -> np.ndarray:
    """Logits [B, L, V] of rows that are one text each."""
    return np.asarray(_logits(*nnx.split(model), ids_BL))


def with_random_adapter(model: CausalLM) -> CausalLM:
    """The model with both A and B away from zero."""
    graph, adapter, rest = nnx.split(model, LoRAParam, ...)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)


def turn(thought: str, action: str, observation: str, **changes) -> Turn:
    fields = {"thought_by": "react", "action_by": "react", "valid": True} | changes
    return Turn(thought, action, observation, **fields)


def trajectory(**changes) -> Trajectory:
    """A won two-turn game unless told otherwise."""
    fields = {
        "env": "alfworld",
        "split": "gen_train",
        "task_id": TASK,
        "task": "put a mug in desk",
        "trial": 0,
        "round": 1,
        "seed": 0,
        "source": "react",
        "first_observation": OPENING,
        "turns": [
            turn(
                "I need a mug. I check the shelf 1.",
                "go to shelf 1",
                "You arrive at shelf 1. On the shelf 1, you see a mug 1.",
            ),
            turn("", "take mug 1 from shelf 1", "You pick up the mug 1 from the shelf 1."),
        ],
        "reward": 1.0,
        "progress": 1.0,
        "success": True,
        "end": "success",
    }
    return Trajectory(**(fields | changes))


def codec_of(tokenizer: Tokenizer, vocabulary: int) -> Codec:
    """What `read_codec` gives for a base without end tokens."""
    return Codec(
        encode=functools.partial(encode_piece, tokenizer),
        decode=functools.partial(line_of, tokenizer, end_ids=()),
        newlines=newline_ids(tokenizer, "tests"),
        vocabulary=vocabulary,
    )


def byte_codec() -> Codec:
    """What `read_codec` gives for `write_tiny_model`."""
    return codec_of(byte_tokenizer(), 256)


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A random two-layer Mistral over bytes in Hugging Face's layout; it writes garbage, which is what a test wants."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=4096,
    )
    save_model(CausalLM(config, rngs=nnx.Rngs(seed)), folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def quantised_by_transformers(base_dir, folder: Path, double: bool):
    """A folder with the base in bitsandbytes' NF4, as transformers saves it, and that model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    return model.eval()


def all_tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor of a folder as bytes; bitsandbytes' JSON as its sorted items."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "np") as file:
            found |= {name: file.get_tensor(name).tobytes() for name in file.keys()}
    return {k: str(sorted(json.loads(v).items())).encode() if "quant_state" in k else v for k, v in found.items()}


def next_line(policy: Policy, session: int, seed: int = 0, temperature: float = 0.0) -> Line:
    """Asks for a line in a session and waits for it, for a minute at most."""
    policy.submit(Ask(session, temperature, seed))
    deadline = time.time() + 60
    while time.time() < deadline:
        for of, line in policy.poll():
            assert of == session
            return line
    raise TimeoutError


def tensorboard_scalars(run: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value), ...]} of the event files in <run>/tensorboard/<name>, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard" / name), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}

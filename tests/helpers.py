"""What several tests need: hand-made trajectories and a tiny random model with a tokenizer."""

from pathlib import Path

from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lora.convert import save_model
from lora.mistral import Config, Mistral
from trajectory import Trajectory, Turn

OPENING = (
    "You are in the middle of a room. Looking quickly around you, you see a desk 1, and a shelf 1.\n\n"
    "Your task is to: put a mug in desk."
)


def turn(thought: str, action: str, observation: str, **changes) -> Turn:
    fields = {"thought_by": "react", "action_by": "react", "valid": True} | changes
    return Turn(thought, action, observation, **fields)


def trajectory(**changes) -> Trajectory:
    """A won two-turn game unless told otherwise."""
    fields = {
        "env": "alfworld", "split": "gen_train", "task_id": "gen_train/pick_and_place_simple-Mug-None-Desk-1/trial_1",
        "task": "put a mug in desk", "trial": 0, "round": 1, "seed": 0, "source": "react", "first_observation": OPENING,
        "turns": [
            turn("I need a mug. I check the shelf 1.", "go to shelf 1",
                 "You arrive at shelf 1. On the shelf 1, you see a mug 1."),
            turn("", "take mug 1 from shelf 1", "You pick up the mug 1 from the shelf 1."),
        ],
        "reward": 1.0, "progress": 1.0, "success": True, "end": "success",
    }  # fmt: skip
    return Trajectory(**(fields | changes))


def byte_tokenizer() -> Tokenizer:
    """One token per byte: any text, and a newline that is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A random two-layer Mistral over bytes in Hugging Face's layout; it writes garbage, which is what a test wants."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=4096,
    )  # fmt: skip
    save_model(Mistral(config, rngs=nnx.Rngs(seed)), folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder

"""Folders with the tokenizers of published models and their chat templates, and with a hand-made one like them.

Llama 3.1's and Qwen3's come from archives outside the project, Mistral's from mistral-common and SmolLM2's from
`make smollm2`; a test that asks for one that is not there is skipped.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from lora.config import Config
from lora.load import save_model
from lora.model import CausalLM
from lora.tokenizer import chat_template, load_tokenizer, newline_ids

ROOT = Path(__file__).parent.parent.parent
ARCHIVES = ROOT.parent / "shared/data/tokenizers"
# Of each tokenizer that is a tokenizer.json: the family whose models have it.
FAMILIES = {"hand": "llama", "llama3_1": "llama", "qwen3": "qwen3", "tekken": "mistral", "smollm2": "llama"}
MISTRAL = {"mistral-v0.1": "tokenizer.model.v1", "mistral-v0.3": "mistral_instruct_tokenizer_240323.model.v3"}
PUBLISHED = (*FAMILIES, *MISTRAL)

# The form of Mistral's templates, and what they print before and after a user's message and before the assistant's, and
# the user's message that the system's is put into.
MISTRAL_CHAT = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in messages %}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate!') }}{% endif %}
  {%- if message.role == 'user' %}
    {{- 'BEFORE' + (system + '\\n\\n' if system is defined and message == users[WHICH] else '') + message.content }}
    {{- 'AFTER' }}
  {%- else %}{{ 'ANSWER' + message.content + eos_token }}{% endif %}
{%- endfor %}"""
MISTRAL_FORMS = {
    "mistral-v0.1": {"BEFORE": " [INST] ", "AFTER": " [/INST]", "ANSWER": " ", "WHICH": "0"},  # and v0.2
    "mistral-v0.3": {"BEFORE": "[INST] ", "AFTER": "[/INST]", "ANSWER": " ", "WHICH": "-1"},
    "tekken": {"BEFORE": "[INST]", "AFTER": "[/INST]", "ANSWER": "", "WHICH": "-1"},  # Nemo
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_published(name: str, folder: Path) -> Path:
    """Writes tokenizer and chat template into a folder. Skips the test if the tokenizer is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    if name in ("llama3_1", "qwen3"):
        archive = ARCHIVES / f"{name}.tar.xz"
        if not archive.exists():
            pytest.skip(f"no {archive}")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    elif name == "smollm2":
        base = ROOT / "models/smollm2"
        if not base.exists():
            pytest.skip(f"no {base}: run `make smollm2`")
        for path in base.glob("tokenizer*.json"):
            shutil.copy(path, folder)
    else:
        config = {"hand": write_hand, "tekken": write_tekken}.get(name, write_mistral)(name, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_hand(name: str, folder: Path) -> dict:
    hand_tokenizer().save(str(folder / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": "<|im_end|>"}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML, "eos_token": end}


def write_mistral(name: str, folder: Path) -> dict:
    shutil.copy(mistral_common() / MISTRAL[name], folder / "tokenizer.model")
    return mistral_config(name) | {"tokenizer_class": "LlamaTokenizer"}


def write_tekken(name: str, folder: Path) -> dict:
    """Tekken as converted by transformers, which finds the special tokens of Nemo in newer files alone."""
    converter = pytest.importorskip("transformers.integrations.mistral.tokenizer").MistralConverter
    file = json.loads((mistral_common() / "tekken_240718.json").read_text())
    known = pytest.importorskip("mistral_common.tokens.tokenizers.tekken").Tekkenizer.DEPRECATED_SPECIAL_TOKENS
    newer = folder / "tekken.json"
    newer.write_text(json.dumps(file | {"special_tokens": list(known)}))
    converter(str(newer)).converted().save(str(folder / "tokenizer.json"))
    newer.unlink()
    return mistral_config(name) | {"tokenizer_class": "PreTrainedTokenizerFast"}


def mistral_common() -> Path:
    return Path(pytest.importorskip("mistral_common").__file__).parent / "data"


def mistral_config(name: str) -> dict[str, str]:
    template = MISTRAL_CHAT
    for key, text in MISTRAL_FORMS[name].items():
        template = template.replace(key, text)
    return {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}


def hand_tokenizer() -> Tokenizer:
    """Bytes, a few words, and tokens in which a newline has company, cut as by Llama 3's and Qwen's pattern."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    # The byte-level spellings of "\n\n", "]\n", "\n\t", ")\n\n" and " act".
    merges = [("Ċ", "Ċ"), ("]", "Ċ"), ("Ċ", "ĉ"), (")", "ĊĊ"), ("Ġ", "a"), ("Ġa", "c"), ("Ġac", "t")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    return tokenizer


def write_model(name: str, folder: Path, layers: int = 1, newline_share: float = 0.15, end_share: float = 0.03) -> Path:
    """A random model with a published tokenizer: at each token it ends its line, by any of the tokens that hold a
    newline, about as often as `newline_share`, and by an end token as often as `end_share`.

    All embeddings share their first number, whose weights in the head then are biases. As in many published models the
    vocabulary is larger than the tokenizer's.
    """
    tokenizer = load_tokenizer(write_published(name, folder))
    newlines = sorted(newline_ids(tokenizer, folder))
    end = tokenizer.token_to_id(chat_template(folder).tokens["eos_token"])
    size = max(tokenizer.get_vocab().values()) + 257
    model = CausalLM(
        Config(
            model_type=FAMILIES[name],
            vocab_size=size,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            eos_token_ids=(end,),
        ),
        rngs=nnx.Rngs(0),
    )
    biases = np.zeros(size, np.float32)
    biases[newlines] = np.log(newline_share * size / len(newlines))
    biases[end] = np.log(end_share * size)
    model.embed[...] = model.embed[...].at[:, 0].set(8.0)
    model.head[...] = model.head[...].at[:, 0].set(jnp.asarray(biases) / 6)  # about what the norm makes of 8
    save_model(model, folder)
    return folder

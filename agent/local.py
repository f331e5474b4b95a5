"""A local JAX model as a policy: sessions in the slots of one engine (lora/engine.py), with or without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from agent.policy import Ask, Line
from agent.transcript import Spelling, Transcript
from lora.checkpoint import adapter_weights
from lora.config import Config
from lora.decoder import Decoder, RolloutWeights, copy_to, make_decoder, without_adapter
from lora.engine import Engine
from lora.footprint import Playing
from lora.load import load_adapter, load_model
from lora.memory import choose_playing, describe_playing, this_device
from lora.tokenizer import load_tokenizer, prompt_ids


class LocalPolicy:
    """A local JAX model. Sessions occupy the slots of one engine; each keeps its KV cache over all its turns.

    A `prompt` is cached once for all sessions (lora.tokenizer.prompt_ids). It changes no session's ids, hence not what
    is trained on; but of the tokenizer's leading tokens (<s>), only the prompt's are played. Without an adapter, a
    policy `beside` one of the same base shares its arrays, unless those have an adapter added (fp32).
    """

    remote = False

    def __init__(
        self,
        model_dir: str | Path,
        adapter: str | Path | None = None,
        *,
        weights: str = "nf4",
        rollout_weights: RolloutWeights | None = None,
        slots: int = 64,
        context: int = 1024,
        max_new_tokens: int = 64,
        prompt: str = "",
        top_p: float = 1.0,
        drafts: int | None = None,
        beside: LocalPolicy | None = None,
    ):
        self.slots, self._top_p = slots, top_p
        self._spelling = Spelling(model_dir, context=context, max_new_tokens=max_new_tokens, prompt=prompt)
        shared = [without_adapter(each) for each in beside.decoders] if beside and adapter is None else [None]
        self.decoders = shared if all(shared) else load_decoders(model_dir, adapter, weights, rollout_weights)
        self._engine = Engine(
            self.decoders[0],
            copies=self.decoders[1:],
            slots=slots,
            context=context,
            max_new_tokens=max_new_tokens,
            stop_ids=sorted(self._spelling.stops),
            prefix=self._spelling.prefix,
            drafts=drafts,
        )
        self.counts = {"prompt_tokens": len(self._spelling.prefix), "completion_tokens": 0, "steps": 0}
        self._transcripts: dict[int, Transcript] = {}

    def open(self, text: str) -> int:
        session = self._engine.open()
        self._transcripts[session] = Transcript(self._spelling)
        self.extend(session, text)
        return session

    def extend(self, session: int, text: str) -> None:
        self._queue(session, self._transcripts[session].extend(text))

    def _queue(self, session: int, ids: list[int]) -> None:
        self._engine.extend(session, ids)
        self.counts["prompt_tokens"] += len(ids)

    def submit(self, ask: Ask) -> None:
        self._engine.submit(*ask, self._top_p)

    def poll(self, wait: bool = True) -> list[tuple[int, Line]]:
        lines: list[tuple[int, Line]] = []
        replies = self._engine.poll(wait)
        self.counts["steps"] = self._engine.steps
        for session, reply in replies.items():
            ids = reply.ids if reply else []
            line, newline = self._transcripts[session].take(ids)
            if line is not None:  # the engine has cached the reply's own ids
                self._queue(session, newline)
                self.counts["completion_tokens"] += len(ids)
            lines.append((session, line))
        return lines

    def close(self, session: int) -> tuple[list[int], list[int]]:
        self._engine.close(session)
        transcript = self._transcripts.pop(session)
        return transcript.ids, transcript.sampled


def load_decoders(
    model_dir: str | Path, adapter: str | Path | None, weights: str, rollout: RolloutWeights | None
) -> list[Decoder]:
    """The base, with an adapter or without, in the form that it is sampled from (default: fp32 on a CPU, else bf16), on
    every local device."""
    on_cpu = jax.default_backend() == "cpu"
    rollout = rollout or ("fp32" if on_cpu else "bf16")
    if (weights, rollout) == ("fp32", "bf16"):
        weights = "bf16"  # the same numbers, without a copy in float32 on the device
    narrow = weights == "nf4" and rollout != "fp32" and not on_cpu
    how = {"weights": weights, "dtype": jnp.bfloat16 if narrow else None}
    model = load_model(model_dir, **how) if adapter is None else load_adapter(model_dir, adapter, **how)
    decoder = make_decoder(model, rollout)
    return [decoder, *(copy_to(decoder, device) for device in jax.local_devices()[1:])]


def choose_memory(model_dir: Path, players: Sequence[tuple[Path | None, str]], **settings) -> Playing:
    """The `settings` (lora.memory.Playing) with rollout weights and slots for policies with these adapters and prompts.
    Prints the plan; raises as `choose_playing` does."""
    tokenizer, device = load_tokenizer(model_dir), this_device()
    how = Playing(
        prefixes=tuple(len(prompt_ids(tokenizer, model_dir, prompt)) if prompt else 0 for _, prompt in players),
        adapters=tuple(adapter_weights(adapter).stat().st_size if adapter else 0 for adapter, _ in players),
        devices=1 if device.platform == "cpu" else jax.local_device_count(),
        **settings,
    )
    how, plan = choose_playing(Config.read(model_dir), how, device)
    print(describe_playing(how, plan))
    return how

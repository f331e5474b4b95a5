"""A local JAX model as a policy: sessions in the slots of one engine (lora/engine.py), with or without an adapter."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from agent.policy import Ask, Line
from lora.decoder import Decoder, RolloutWeights, copy_to, make_decoder, without_adapter
from lora.engine import Engine
from lora.load import load_adapter, load_model
from lora.tokenizer import encode_piece, line_of, load_tokenizer, newline_ids, prompt_ids


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
        self.slots, self.context, self._top_p = slots, context, top_p
        self._tokenizer = load_tokenizer(model_dir)
        shared = [without_adapter(each) for each in beside.decoders] if beside and adapter is None else [None]
        self.decoders = shared if all(shared) else load_decoders(model_dir, adapter, weights, rollout_weights)
        config = self.decoders[0].config
        self._newlines = newline_ids(self._tokenizer, model_dir)
        self._ends = frozenset(config.eos_token_ids)  # end a reply of an instructed model that has no newline
        self._stops, self._limit = self._newlines | self._ends, max_new_tokens
        prefix = prompt_ids(self._tokenizer, model_dir, prompt) if prompt else []
        room = config.max_position_embeddings - len(prefix)
        if context > room:
            remedy = f"--context of at most {room}" if room > 0 else "a shorter --prompt"
            raise ValueError(
                f"--context {context} and {len(prefix)} tokens of --prompt need more than the "
                f"{config.max_position_embeddings} positions of {model_dir}; expected {remedy}"
            )
        self._in_prefix = len(self._tokenizer.encode("").ids) if prompt else 0  # leading ids that the prefix has too
        self._engine = Engine(
            self.decoders[0],
            copies=self.decoders[1:],
            slots=slots,
            context=context,
            max_new_tokens=max_new_tokens,
            stop_ids=sorted(self._stops),
            prefix=prefix,
            drafts=drafts,
        )
        self.counts = {"prompt_tokens": len(prefix), "completion_tokens": 0, "steps": 0}
        self._ids: dict[int, list[int]] = {}
        self._sampled: dict[int, list[int]] = {}

    def encode(self, text: str, first: bool) -> list[int]:
        return encode_piece(self._tokenizer, text, first)

    def open(self, text: str) -> int:
        session = self._engine.open()
        self._ids[session], self._sampled[session] = [], []
        self._append(session, self.encode(text, first=True), 0)
        return session

    def extend(self, session: int, text: str) -> None:
        self._append(session, self.encode(text, first=False), 0)

    def _append(self, session: int, ids: list[int], sampled: int) -> None:
        if not sampled:  # sampled ids are cached already
            self._engine.extend(session, ids if self._ids[session] else ids[self._in_prefix :])
        self._ids[session] += ids
        self._sampled[session] += [sampled] * len(ids)
        self.counts["completion_tokens" if sampled else "prompt_tokens"] += len(ids)

    def submit(self, ask: Ask) -> None:
        self._engine.submit(*ask, self._top_p)

    def poll(self, wait: bool = True) -> list[tuple[int, Line]]:
        """See Policy. A reply without a newline (cut off by its limit, or ended) gets one in the session. One that the
        context cuts off is no line, and not part of the session."""
        lines: list[tuple[int, Line]] = []
        replies = self._engine.poll(wait)
        self.counts["steps"] = self._engine.steps
        for session, reply in replies.items():
            if reply is None or (len(reply.ids) < self._limit and reply.ids[-1] not in self._stops):
                lines.append((session, None))
                continue
            self._append(session, reply.ids, 1)
            if reply.ids[-1] not in self._newlines:
                self.extend(session, "\n")
            lines.append((session, line_of(self._tokenizer, reply.ids, self._ends)))
        return lines

    def close(self, session: int) -> tuple[list[int], list[int]]:
        self._engine.close(session)
        return self._ids.pop(session), self._sampled.pop(session)


def load_decoders(
    model_dir: str | Path, adapter: str | Path | None, weights: str, rollout: RolloutWeights | None
) -> list[Decoder]:
    """The base, with an adapter or without, in the form that it is sampled from (default: fp32 on a CPU, else bf16), on
    every local device."""
    on_cpu = jax.default_backend() == "cpu"
    rollout = rollout or ("fp32" if on_cpu else "bf16")
    narrow = weights == "nf4" and rollout != "fp32" and not on_cpu
    how = {"weights": weights, "dtype": jnp.bfloat16 if narrow else None}
    model = load_model(model_dir, **how) if adapter is None else load_adapter(model_dir, adapter, **how)
    decoder = make_decoder(model, rollout)
    return [decoder, *(copy_to(decoder, device) for device in jax.local_devices()[1:])]

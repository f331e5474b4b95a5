"""A session as token ids: how its texts are spelled, where a reply ends, and which line is played of it.

    spelling = Spelling("models/tiny-alfworld", context=1024, max_new_tokens=64)
    transcript = Transcript(spelling)
    transcript.extend("Observation: You are in a room.\\nAction:")
    line, newline = transcript.take(reply_ids)              # newline: the ids that the reply lacked

The local engine (local.py) and a server that takes ids (vllm.py) share it, so that both record the same ids for the
same replies.
Left out: sampling; what ids a record may have (artifacts/tokens.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agent.policy import Line
from lora.config import Config
from lora.tokenizer import encode_piece, line_of, load_tokenizer, newline_ids, prompt_ids


class Spelling:
    """What all sessions of a policy share: the base's tokenizer, the ids that end a reply, the `prefix` of the prompt
    (lora.tokenizer.prompt_ids) and the limits. `context` counts the ids of a session, but not those of the prefix.

    Raises ValueError if prefix and context need more positions than the base has.
    """

    def __init__(self, model_dir: str | Path, *, context: int, max_new_tokens: int, prompt: str = ""):
        config = Config.read(model_dir)
        self.tokenizer, self.vocabulary = load_tokenizer(model_dir), config.vocab_size
        self.newlines = newline_ids(self.tokenizer, model_dir)
        self.ends = frozenset(config.eos_token_ids)  # end a reply of an instructed model that has no newline
        self.stops = self.newlines | self.ends
        self.context, self.max_new_tokens = context, max_new_tokens
        self.prefix = prompt_ids(self.tokenizer, model_dir, prompt) if prompt else []
        self.in_prefix = len(self.tokenizer.encode("").ids) if prompt else 0  # leading ids that the prefix has too
        room = config.max_position_embeddings - len(self.prefix)
        if context > room:
            remedy = f"--context of at most {room}" if room > 0 else "a shorter --prompt"
            raise ValueError(
                f"--context {context} and {len(self.prefix)} tokens of --prompt need more than the "
                f"{config.max_position_embeddings} positions of {model_dir}; expected {remedy}"
            )


class Transcript:
    """One session: its `ids` as played and, for each, 1 in `sampled` if the model drew it, else 0."""

    def __init__(self, spelling: Spelling):
        self._spelling = spelling
        self.ids: list[int] = []
        self.sampled: list[int] = []

    def extend(self, text: str) -> list[int]:
        """Appends a text. Returns its ids, without the leading ones that the prefix has already."""
        first = not self.ids
        ids = encode_piece(self._spelling.tokenizer, text, first)
        self._append(ids, 0)
        return ids[self._spelling.in_prefix :] if first else ids

    def take(self, reply: Sequence[int]) -> tuple[Line, list[int]]:
        """Appends a reply. Returns its line, and the ids of the newline that is appended to a reply without one (cut
        off by its limit, or ended). A reply that the context cuts off is no line, and not part of the session."""
        spelling = self._spelling
        if not reply or (len(reply) < spelling.max_new_tokens and reply[-1] not in spelling.stops):
            return None, []
        self._append(reply, 1)
        newline = [] if reply[-1] in spelling.newlines else self.extend("\n")
        return line_of(spelling.tokenizer, reply, spelling.ends), newline

    def _append(self, ids: Sequence[int], sampled: int) -> None:
        self.ids += ids
        self.sampled += [sampled] * len(ids)

    def prompt(self) -> list[int]:
        """The ids that the next reply follows: those of the prefix, then the session's."""
        return self._spelling.prefix + self.ids[self._spelling.in_prefix :]

    def room(self) -> int:
        """How many more ids the context has room for; negative if it has too many."""
        return self._spelling.context - len(self.ids) + self._spelling.in_prefix

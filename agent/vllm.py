"""vLLM as an engine of the loop: sessions are token ids, adapters are loaded into the running server, and records hold
the ids as played, as those of the local model do.

    vllm serve BASE --served-model-name base --enable-lora --max-lora-rank 16     # and VLLM_ALLOW_RUNTIME_LORA_UPDATING
    python rollout.py --model BASE --server.url http://localhost:8000/v1 --server.model base --server.api tokens

Training needs the ids and the base, so before anything is asked the server must show that it has the tokenizer of
--model, room for --context, and the weights that it had in the run's earlier stages (TOLERANCE).
Left out: merged weights (lora/convert.py), unloading adapters (vLLM drops the one that was used least recently).
"""

from __future__ import annotations

import hashlib
import re
import threading
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from agent.policy import Ask
from agent.reply import Fault, Reply, read_ids
from agent.server import Replies, Server, ServerPolicy, pause
from agent.transcript import Spelling, Transcript
from artifacts.json_io import parse_json, read_json, write_json
from artifacts.stage import sha256
from lora.checkpoint import BASE_SHA, adapter_weights, base_sha, open_tensors

T = TypeVar("T")

# What must have the same ids here and there: digits, line ends, brackets, letters of other scripts.
SPELLED = "Observation: On the shelf 1, 23 and 4567 mugs.\nAction: think[Où? 東京 🙂]\n\nOK.\n[SEP] é_x-9 <b>'s\n"
# What the weights are recognised by: the log-probability of the likeliest id after each fourth id of this text. Unlike
# the id itself it hardly changes with rounding. `TOLERANCE`: the largest mean absolute difference, in nats; of
# SmolLM2-135M it is 0.02 between float32 and bfloat16, and 0.28 after rounding to NF4 or three steps of training.
# (prompt_logprobs would do, but vLLM 0.32 on a CPU dies of them while it samples with an adapter.)
PROBE = (
    "Observation: You are in the middle of a room. Looking quickly around you, you see a cabinet 2, a desk 1 and a "
    "shelf 3.\nYour task is to: put a clean mug in the cabinet.\nAction: think[First I need to find a mug. It may be "
    "on the desk.]\nObservation: OK.\nAction: act[go to desk 1]\nObservation: On the desk 1, you see a book 2 and a "
    "mug 1.\n"
)
TOLERANCE = 0.1
# What vLLM would otherwise take from the model's generation_config.json; and ids end a reply only if they are asked to.
PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
PLAIN |= {"ignore_eos": True, "include_stop_str_in_output": True, "skip_special_tokens": False}


class Unusable(ValueError):
    """The server does not do what records of token ids need. No session can continue."""


# ---- what vLLM answers: only what is read ----------------------------------------------------------------------------


class Card(msgspec.Struct):
    id: str
    parent: str | None = None  # of an adapter
    max_model_len: int | None = None


class Models(msgspec.Struct):
    data: list[Card]


class Spelled(msgspec.Struct):
    tokens: list[int]


class Logprobs(msgspec.Struct):
    token_logprobs: list[float]


class Probed(msgspec.Struct):
    logprobs: Logprobs
    index: int


class Probes(msgspec.Struct):
    choices: list[Probed]


class Weights(msgspec.Struct):
    """server.json of a run: the log-probabilities at PROBE (`TokensPolicy._measure`) when a server first played."""

    logprobs: list[float]


def served_name(adapter: Path) -> str:
    """An adapter's name on a server: of its content, so that no cache takes one adapter for another."""
    files = ("adapter_config.json", "adapter_model.safetensors")
    content = " ".join(sha256(adapter / name) for name in files)
    return f"adapter-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


class TokensPolicy(ServerPolicy):
    """Sessions of token ids, continued by a vLLM server with an adapter or without.

    `weights`: the run's server.json, written with the first reply and compared with later. An adapter that the server
    does not know (any more) is loaded, again if need be, so a server may be restarted while it is asked. Raises
    ValueError for a server that is not what the run needs, now or later, and for an adapter of another base.
    """

    def __init__(
        self,
        server: Server,
        cache: str | Path,
        *,
        model_dir: str | Path,
        adapter: Path | None,
        weights: Path,
        context: int,
        max_new_tokens: int,
        prompt: str = "",
        top_p: float = 1.0,
    ):
        super().__init__(server, cache, top_p=top_p)
        self._spelling = Spelling(model_dir, context=context, max_new_tokens=max_new_tokens, prompt=prompt)
        self._model_dir, self._adapter, self._weights = model_dir, adapter, weights
        if adapter:
            self._name = served_name(adapter)
        if fixed := self._extra.keys() & {"model", "prompt", "max_tokens"}:
            raise ValueError(f"--server.extra has {min(fixed)!r}, which --server.api tokens decides; leave it out")
        self._replies = Replies(cache, playable=lambda reply: bool(reply.ids))
        self._logprobs = read_json(weights, Weights).logprobs if weights.exists() else None
        self._loading, self.counts["adapter_loads"] = threading.Lock(), 0
        self._check()
        if adapter:
            self._require_base(adapter)
            self._load()

    def _begin(self, text: str) -> Transcript:
        transcript = Transcript(self._spelling)
        transcript.extend(text)
        return transcript

    def extend(self, session: int, text: str) -> None:
        self._sessions[session].extend(text)

    def submit(self, ask: Ask) -> None:
        if self._sessions[ask.session].room() > 0:
            super().submit(ask)
        else:
            self._ready.append((ask.session, None))

    def close(self, session: int) -> tuple[list[int], list[int]]:
        """Ends the session, and returns its ids. A reply that is still due is treated as ServerPolicy's."""
        transcript = self._sessions.pop(session)
        return transcript.ids, transcript.sampled

    def knows_the_form(self) -> bool:
        """Yes: as with the local model, whatever the base says is played."""
        return True

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _request(self, transcript: Transcript, temperature: float, seed: int) -> dict[str, Any]:
        body = {
            **PLAIN,
            "model": self._name,
            "prompt": transcript.prompt(),
            "temperature": temperature,
            "top_p": self._top_p,
            "seed": seed % 2**31,
            "max_tokens": min(self._spelling.max_new_tokens, transcript.room()),
            "stop_token_ids": sorted(self._spelling.stops),
            "return_token_ids": True,
        }
        return {name: value for name, value in (body | self._extra).items() if value is not None}

    def _ask(self, session: int, request: dict[str, Any]) -> Any:
        try:
            return super()._ask(session, request)
        except Unusable as error:
            return error

    def _post(self, request: dict[str, Any]) -> Reply | None:
        """One request. An adapter that the server does not know is loaded, and the request is asked again."""
        loads = self.counts["adapter_loads"]
        try:
            return super()._post(request)
        except Fault as fault:
            if fault.full:
                raise self._unusable(
                    f"has no room for {len(request['prompt'])} ids: {fault}. {self._longer()}"
                ) from fault
            if fault.status == 404 and self._adapter:
                with self._loading:
                    if self.counts["adapter_loads"] == loads:  # no other thread did it
                        self._check()  # it was restarted
                        self._load()
                fault.passes = True  # behind a router, another server may still lack it
            raise

    def _read(self, data: bytes, request: dict[str, Any]) -> Reply:
        """The reply in the body of a 200. Raises Unusable if its ids cannot be what was played."""
        reply, finish = read_ids(data)
        ids, spelling, limit = reply.ids or [], self._spelling, request["max_tokens"]
        strange = [i for i in ids if not 0 <= i < spelling.vocabulary]
        if not ids:
            raise self._unusable("gives no token_ids; expected a vLLM that knows return_token_ids")
        if strange:
            raise self._unusable(
                f"gives id {strange[0]}; expected less than {spelling.vocabulary}, the vocabulary of {self._model_dir}"
            )
        if reply.prompt_tokens not in (None, len(request["prompt"])):
            raise self._unusable(f"read {reply.prompt_tokens} ids of the {len(request['prompt'])} that it was sent")
        if len(ids) > limit or not spelling.stops.isdisjoint(ids[:-1]):
            raise self._unusable(f"does not end a reply at a line's end or after {limit} ids; expected vLLM")
        if len(ids) < limit and ids[-1] not in spelling.stops:
            raise self._unusable(f"ends a reply within its line ({finish or 'no reason given'}). {self._longer()}")
        text = spelling.tokenizer.decode(ids, skip_special_tokens=False)
        if squeezed(text) != squeezed(reply.text):
            raise self._unusable(
                f"gives the text {reply.text[:60]!r} with ids that {self._model_dir} reads as {text[:60]!r}; expected "
                "the same tokenizer"
            )
        return reply

    def _take(self, session: int, key: str, result: Any) -> None:
        if isinstance(result, Reply) and not self._weights.exists():
            write_json(self._weights, {"logprobs": self._logprobs})
        super()._take(session, key, result)

    def _finish(self, session: int, reply: Reply) -> None:
        if session in self._sessions:
            line, _ = self._sessions[session].take(reply.ids)
            self._ready.append((session, line))

    # ---- the server --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raises Unusable unless the server has the run's base, its tokenizer, and room for the context."""
        name = self._server.model
        cards = {card.id: card for card in self._answer("GET", "/models", None, Models).data}
        if name not in cards or cards[name].parent:
            raise self._unusable(f"serves {', '.join(cards) or 'nothing'}; expected --server.model {name}, a base")
        room = cards[name].max_model_len
        if room is None or room < self._needed():
            raise self._unusable(f"takes {room} ids, of prompt and reply together. {self._longer()}")
        request = {"model": name, "prompt": SPELLED, "add_special_tokens": False}
        root = self._server.url.rstrip("/").removesuffix("/v1")
        if self._answer("POST", f"{root}/tokenize", request, Spelled).tokens != self._encoded(SPELLED):
            raise self._unusable(f"has another tokenizer than {self._model_dir}; expected it to serve that base")
        found = self._measure()
        known = self._logprobs = self._logprobs or found
        if len(known) != len(found):
            raise ValueError(
                f"{self._weights} has {len(known)} figures, expected {len(found)}: restore it, or remove it"
            )
        differing = sum(abs(a - b) for a, b in zip(found, known, strict=True)) / len(found)
        if differing > TOLERANCE:
            raise self._unusable(
                f"has another base as {name!r} than the server that played before: log-probabilities of a text differ "
                f"by {differing:.2f} nats on average from those in {self._weights}; expected at most {TOLERANCE}. "
                "Serve the run's own base"
            )

    def _require_base(self, adapter: Path) -> None:
        """Raises ValueError if the adapter records that it was trained on another base."""
        with open_tensors(adapter_weights(adapter)) as opened:
            base = (opened.metadata() or {}).get(BASE_SHA)
        if base not in (None, base_sha(self._model_dir)):
            raise ValueError(f"{adapter} was trained on another base than {self._model_dir}; give its own by --model")

    def _encoded(self, text: str) -> list[int]:
        return self._spelling.tokenizer.encode(text, add_special_tokens=False).ids

    def _needed(self) -> int:
        return len(self._spelling.prefix) + self._spelling.context

    def _longer(self) -> str:
        return f"Start vLLM with --max-model-len of at least {self._needed()} (prompt and --context)"

    def _measure(self) -> list[float]:
        """The log-probability of the base's likeliest id after each fourth id of PROBE."""
        ids = self._encoded(PROBE)
        prefixes = [ids[:stop] for stop in range(4, len(ids), 4)]
        request = {**PLAIN, "model": self._server.model, "prompt": prefixes, "max_tokens": 1, "temperature": 0.0}
        request["logprobs"] = 0
        choices = sorted(self._answer("POST", "/completions", request, Probes).choices, key=lambda choice: choice.index)
        found = [value for choice in choices for value in choice.logprobs.token_logprobs]
        if len(found) != len(prefixes):
            raise self._unusable(f"gives {len(found)} log-probabilities for {len(prefixes)} prompts; expected vLLM")
        return found

    def _load(self) -> None:
        """Loads the adapter. A server that has it says so."""
        folder = self._adapter.absolute()
        try:
            self._insist("POST", "/load_lora_adapter", {"lora_name": self._name, "lora_path": str(folder)})
        except Fault as fault:
            if "already" not in str(fault):
                rank = read_json(folder / "adapter_config.json", dict[str, Any]).get("r", "RANK")
                raise self._unusable(
                    f"does not load the adapter {folder}: {fault}. Start vLLM with --enable-lora "
                    f"--max-lora-rank {rank} and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, where it can read this folder "
                    "under this path"
                ) from fault
        self.counts["adapter_loads"] += 1

    def _answer(self, method: str, path: str, request: Any, kind: type[T]) -> T:
        """What the server answers, read as `kind`. Raises Unusable."""
        try:
            body = self._insist(method, path, request)
        except Fault as fault:
            raise Unusable(str(self._stop(fault))) from fault
        try:
            return parse_json(body, kind, "it")
        except ValueError as error:
            raise self._unusable(f"answers {path} with {body[:80]!r} ({error}); expected vLLM") from error

    def _insist(self, method: str, path: str, request: Any) -> bytes:
        """The body of a 200, as often as `retries` allows. Raises Fault."""
        fault = None
        for attempt in range(self._server.retries + 1):
            pause(attempt, fault)
            try:
                return self._call(method, path, request)
            except Fault as error:
                fault = error
                if not fault.passes:
                    break
        raise fault

    def _unusable(self, why: str) -> Unusable:
        return Unusable(f"{self._server.url} {why}. What was played is kept: run again to resume.")


def squeezed(text: str) -> str:
    """A text without what depends on the text before it: blanks, and characters that are not complete."""
    return re.sub(r"[\s\ufffd]+", "", text)

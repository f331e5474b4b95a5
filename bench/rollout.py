"""How fast is multi-turn sampling, compared with transformers as agent rollouts commonly use it?

Both replay the same batch of recorded games: before each reply the world's text is appended, then every row samples the
same number of ids greedily and continues from them. `lora.engine` keeps each row's keys and values across turns; the
peer calls one batched `generate` per turn over the full histories, left-padded, with its cache enabled within the call.
The larger model also replays them after the one-shot prompt of A3T's first round. The contenders alternate reply by
reply, so that other load on the machine affects all; an uncounted warm-up replay, without transformers, keeps
compilation out of the figures.

    python -m bench.rollout                 # two models, about ten minutes on 2 cores
    python -m bench.rollout --smollm2       # SmolLM2-135M (make smollm2) alone, and, with --vllm URL, vLLM too

A vLLM of the same precision: `vllm serve models/smollm2 --served-model-name base --dtype float32`.
Left out: the full loop with worlds, adapters, GPUs.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import gc
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
from flax import nnx
from tqdm import tqdm

from agent.attempt import AttemptSettings, Job
from agent.loop import PlayLoop
from agent.scripted import DemonstratorScript, ScriptedPolicy
from artifacts.cli import run_main
from artifacts.render import react_segments
from bench.shapes import MISTRAL_100M
from envs.alfworld.world import AlfWorld
from lora.decoder import make_decoder
from lora.engine import Engine
from lora.load import load_model, save_model
from lora.model import CausalLM
from lora.tokenizer import encode_piece, load_tokenizer, prompt_ids

BASE, SMOLLM2, PROMPT = "models/tiny-alfworld", "models/smollm2", Path("prompts/alfworld_react.txt")


@dataclass(frozen=True, kw_only=True)
class Args:
    turns: int = 6
    """Turns replayed per game; a thought and its action are two replies."""
    new: int = 16
    """Ids per reply."""
    replays: int = 3
    """Counted replays of the games."""
    context: int = 1024
    """Context length of a session, in tokens."""
    tiny_slots: int = 64
    """Batch size with the tiny base."""
    slots: int = 8
    """Batch size with the model of 98 M parameters (random weights)."""
    smollm2: bool = False
    """Compare with SmolLM2 and --smollm2-slots games only."""
    smollm2_slots: int = 32
    """Batch size with SmolLM2."""
    vllm: str | None = None
    """Base URL of a vLLM that serves SmolLM2 as `base`, such as http://localhost:8000/v1: another contender."""


def record_games(count: int, replies: int, base: str = BASE) -> list[list[list[int]]]:
    """For each of `count` games, the ids (of `base`) of the world's text before each of the first `replies` replies."""
    tasks = AlfWorld().tasks("gen_train")[: 4 * count]
    settings = AttemptSettings(
        env="alfworld", stage="bench", round=0, seed=0, max_turns=20, patience=0, temperature=0.0
    )
    games = PlayLoop([Job(task, 0) for task in tasks], settings, AlfWorld, ScriptedPolicy(DemonstratorScript))
    tokenizer, recorded = load_tokenizer(base), []
    for game in sorted(games, key=lambda game: game.key):
        segments = react_segments(game)
        world = [encode_piece(tokenizer, s.text, i == 0) for i, s in enumerate(segments) if not s.agent]
        if len(world) > replies:
            recorded.append(world[:replies])
    if len(recorded) < count:
        raise ValueError(f"only {len(recorded)} of {len(tasks)} games have {replies} replies; lower --turns")
    return recorded[:count]


class Ours:
    """lora.engine with one session per game."""

    compiles = True

    def __init__(self, model: CausalLM, slots: int, prompt: Sequence[int], args: Args):
        self.engine = Engine(
            make_decoder(model), slots=slots, context=args.context, max_new_tokens=args.new, stop_ids=(), prefix=prompt
        )
        self.computed = 0

    def start(self, slots: int) -> None:
        self.sessions, self.computed = [self.engine.open() for _ in range(slots)], 0

    def reply(self, observations: list[list[int]]) -> list[list[int]]:
        for session, ids in zip(self.sessions, observations, strict=True):
            self.engine.extend(session, ids)
        self.computed += sum(map(len, observations))
        return [reply.ids for reply in self.engine.sample([(session, 0.0, 0) for session in self.sessions])]

    def end(self) -> None:
        for session in self.sessions:
            self.engine.close(session)


class Transformers:
    """transformers: one `generate` per reply over the full histories."""

    compiles = False

    def __init__(self, folder: str, prompt: Sequence[int], new: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(os.cpu_count() or 1)
        self.torch, self.prompt, self.new, self.computed = torch, prompt, new, 0
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def start(self, slots: int) -> None:
        self.histories, self.computed = [list(self.prompt) for _ in range(slots)], 0

    def reply(self, observations: list[list[int]]) -> list[list[int]]:
        self.histories = [history + ids for history, ids in zip(self.histories, observations, strict=True)]
        longest = max(map(len, self.histories))
        rows = np.zeros((2, len(observations), longest), np.int64)  # ids and mask
        for row, history in enumerate(self.histories):
            rows[0, row, longest - len(history) :], rows[1, row, longest - len(history) :] = history, 1
        self.computed += sum(map(len, self.histories))
        ids, mask = map(self.torch.from_numpy, rows)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=self.new,
            max_new_tokens=self.new,
            pad_token_id=0,
            eos_token_id=None,
        )
        replies = out[:, longest:].tolist()
        self.histories = [history + reply for history, reply in zip(self.histories, replies, strict=True)]
        return replies

    def end(self) -> None:
        """Nothing to free."""


class VLLM:
    """vLLM: one request per reply with all histories, whose keys and values its prefix cache keeps."""

    compiles = True

    def __init__(self, url: str, new: int):
        self.client, self.new = httpx2.Client(base_url=url, timeout=3600), new

    def start(self, slots: int) -> None:
        self.histories, self.computed = [[] for _ in range(slots)], 0

    def reply(self, observations: list[list[int]]) -> list[list[int]]:
        self.histories = [history + ids for history, ids in zip(self.histories, observations, strict=True)]
        self.computed += sum(map(len, observations))  # if its cache keeps all
        how = {"temperature": 0, "max_tokens": self.new, "ignore_eos": True, "return_token_ids": True}
        answer = self.client.post("/completions", json={"model": "base", "prompt": self.histories, **how})
        answer.raise_for_status()
        choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
        replies = [choice["token_ids"] for choice in choices]
        self.histories = [history + reply for history, reply in zip(self.histories, replies, strict=True)]
        return replies

    def end(self) -> None:
        """Nothing to free."""


def compare(
    name: str,
    model: CausalLM,
    slots: int,
    games: list[list[list[int]]],
    args: Args,
    prompt: Sequence[int] = (),
    vllm: str | None = None,
) -> float:
    """Replays the games with all after a warm-up; prints a line for each and returns the ratio to transformers."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        players = {"ours": Ours(model, slots, prompt, args), "transformers": Transformers(folder, prompt, args.new)}
    if vllm:
        players["vLLM"] = VLLM(vllm, args.new)
    reply_count, seconds = len(games[0]), dict.fromkeys(players, 0.0)
    for replay in range(args.replays + 1):
        replies = {player: [] for player in players}
        for player in players.values():
            player.start(slots)
        for index in tqdm(range(reply_count), desc=f"{name}, {'measured' if replay else 'warm-up'}", unit="reply"):
            for contender, player in players.items():
                if not (replay or player.compiles):
                    continue
                time.sleep(0.2)  # until the other's idle threads stop spinning
                start = time.perf_counter()
                replies[contender] += player.reply([game[index] for game in games])
                if replay:
                    seconds[contender] += time.perf_counter() - start
        for player in players.values():
            player.end()
    sampled = args.replays * slots * reply_count * args.new
    for contender, player in players.items():
        print(
            f"{name}, {args.replays} x {slots} games x {reply_count} replies of {args.new} ids, {contender}: "
            f"{sampled / seconds[contender]:,.0f} ids/s, {player.computed:,} ids computed per replay"
        )
    for contender in players.keys() - {"ours"}:
        same = np.mean(np.array(replies["ours"]) == np.array(replies[contender]))
        ratio = seconds[contender] / seconds["ours"]
        print(f"{name}: ours / {contender} {ratio:.2f}, {same:.2%} of the ids identical")
    return seconds["transformers"] / seconds["ours"]


def main(args: Args) -> None:
    replies = 2 * args.turns
    if args.smollm2:
        games = record_games(args.smollm2_slots, replies, SMOLLM2)
        model = load_model(SMOLLM2, weights="fp32")
        compare("SmolLM2", model, args.smollm2_slots, games, args, vllm=args.vllm)
        return
    ratios = [
        compare(
            "tiny base", load_model(BASE, weights="fp32"), args.tiny_slots, record_games(args.tiny_slots, replies), args
        )
    ]
    model, games = CausalLM(MISTRAL_100M, rngs=nnx.Rngs(0)), record_games(args.slots, replies)
    prompt = prompt_ids(load_tokenizer(BASE), BASE, PROMPT.read_text())
    for name, prefix in (("98 M parameters", ()), (f"98 M parameters, {len(prompt)} ids of prompt", prompt)):
        gc.collect()
        ratios.append(compare(name, model, args.slots, games, args, prefix))
    print("rollout: {:.1f}, {:.1f} and, after a prompt, {:.1f} times the ids/s of transformers".format(*ratios))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

"""How fast is the sampler over the turns of a game, beside transformers as agents' rollouts use it?

Both play the same recorded games at once: before each reply the world's words are appended, then every row writes the
same number of ids, greedily, and goes on from its own. `lora.engine` keeps each row's keys and values over the turns;
the peer is one batched `generate` a turn over the whole histories, padded on the left, with its cache on within the
call. The larger model also plays them after the one-shot prompt that A3T's first round has before every session. The
two take turns, so that whatever else the machine does falls on both; each has played one replay before, which is not
counted: compiling is in no figure.

    python -m bench.rollout          # two models, some ten minutes on 2 cores

Left out: a whole loop with its worlds, adapters, GPUs.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax import nnx
from tqdm import tqdm

from agent.attempt import AttemptSettings, Job
from agent.loop import PlayLoop
from agent.scripted import DemonstratorScript, ScriptedPolicy
from artifacts.cli import parse
from artifacts.render import react_segments
from bench.shapes import MISTRAL_100M
from envs.alfworld.world import AlfWorld
from lora.engine import Engine
from lora.load import load_model, save_model
from lora.model import Mistral
from lora.tokenizer import encode_piece, load_tokenizer, prompt_ids

BASE, PROMPT = "models/tiny-alfworld", Path("prompts/alfworld_react.txt")


@dataclass(frozen=True, kw_only=True)
class Args:
    turns: int = 6
    """Turns of a game that are replayed; a thought and its action are two replies."""
    new: int = 16
    """Ids of a reply."""
    replays: int = 3
    """Times that the games are replayed and counted."""
    context: int = 1024
    """Tokens that a session can hold."""
    tiny_slots: int = 64
    """Games at once with the tiny base."""
    slots: int = 8
    """Games at once with the model of 98 M parameters (random weights)."""


def recorded(count: int, replies: int) -> list[list[list[int]]]:
    """For each of `count` games, the ids that the world wrote before each of its first replies."""
    tasks = AlfWorld().tasks("gen_train")[: 4 * count]
    settings = AttemptSettings(
        env="alfworld", stage="bench", round=0, seed=0, max_turns=20, patience=0, temperature=0.0
    )
    games = PlayLoop([Job(task, 0) for task in tasks], settings, AlfWorld, ScriptedPolicy(DemonstratorScript))
    tokenizer, found = load_tokenizer(BASE), []
    for game in sorted(games, key=lambda game: game.key):
        segments = react_segments(game)
        world = [encode_piece(tokenizer, s.text, i == 0) for i, s in enumerate(segments) if not s.agent]
        if len(world) > replies:
            found.append(world[:replies])
    if len(found) < count:
        raise ValueError(f"only {len(found)} of {len(tasks)} games have {replies} replies; ask for fewer turns")
    return found[:count]


class Ours:
    def __init__(self, model: Mistral, slots: int, prompt: Sequence[int], args: Args):
        self.engine = Engine(
            model, slots=slots, context=args.context, max_new_tokens=args.new, stop_ids=(), prefix=prompt
        )
        self.computed = 0

    def start(self, slots: int) -> None:
        self.sessions, self.computed = [self.engine.open() for _ in range(slots)], 0

    def reply(self, said: list[list[int]]) -> list[list[int]]:
        for session, ids in zip(self.sessions, said, strict=True):
            self.engine.extend(session, ids)
        self.computed += sum(map(len, said))
        return [reply.ids for reply in self.engine.sample([(session, 0.0, 0) for session in self.sessions])]

    def end(self) -> None:
        for session in self.sessions:
            self.engine.close(session)


class Transformers:
    def __init__(self, folder: str, prompt: Sequence[int], new: int):
        import torch
        from transformers import MistralForCausalLM

        torch.set_num_threads(os.cpu_count() or 1)
        self.torch, self.prompt, self.new, self.computed = torch, prompt, new, 0
        self.model = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def start(self, slots: int) -> None:
        self.histories, self.computed = [list(self.prompt) for _ in range(slots)], 0

    def reply(self, said: list[list[int]]) -> list[list[int]]:
        self.histories = [history + ids for history, ids in zip(self.histories, said, strict=True)]
        longest = max(map(len, self.histories))
        rows = np.zeros((2, len(said), longest), np.int64)  # ids and mask
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
        """Nothing is kept from turn to turn."""


def compare(
    name: str,
    model: Mistral,
    slots: int,
    games: list[list[list[int]]],
    args: Args,
    prompt: Sequence[int] = (),
) -> float:
    """Replays the games with both, once uncounted; prints a line of all counted times each and returns the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        players = {"ours": Ours(model, slots, prompt, args), "transformers": Transformers(folder, prompt, args.new)}
    rounds, seconds = len(games[0]), dict.fromkeys(players, 0.0)
    for replay in range(args.replays + 1):
        replies = {player: [] for player in players}
        for player in players.values():
            player.start(slots)
        for turn in tqdm(range(rounds), desc=f"{name}, {'measured' if replay else 'warm-up'}", unit="reply"):
            for who, player in players.items():
                time.sleep(0.2)  # until the other's threads no longer wait for work
                start = time.perf_counter()
                replies[who] += player.reply([game[turn] for game in games])
                if replay:
                    seconds[who] += time.perf_counter() - start
        for player in players.values():
            player.end()
    made = args.replays * slots * rounds * args.new
    same = np.mean(np.array(replies["ours"]) == np.array(replies["transformers"]))
    for who, player in players.items():
        print(
            f"{name}, {args.replays} x {slots} games x {rounds} replies of {args.new} ids, {who}: "
            f"{made / seconds[who]:,.0f} ids/s, {player.computed:,} ids computed in a replay"
        )
    ratio = seconds["transformers"] / seconds["ours"]
    print(f"{name}: ours / transformers {ratio:.1f}, {same:.2%} of the ids alike\n")
    return ratio


def main(args: Args) -> None:
    replies = 2 * args.turns
    ratios = [
        compare(
            "tiny base", load_model(BASE, weights="fp32"), args.tiny_slots, recorded(args.tiny_slots, replies), args
        )
    ]
    model, games = Mistral(MISTRAL_100M, rngs=nnx.Rngs(0)), recorded(args.slots, replies)
    prompt = prompt_ids(load_tokenizer(BASE), BASE, PROMPT.read_text())
    for name, before in (("98 M parameters", ()), (f"98 M parameters, {len(prompt)} ids of prompt", prompt)):
        gc.collect()
        ratios.append(compare(name, model, args.slots, games, args, before))
    print("rollout: {:.1f}, {:.1f} and, after a prompt, {:.1f} times the ids a second of transformers".format(*ratios))


if __name__ == "__main__":
    main(parse(Args, __doc__))

"""Games played with tokenizers in which a newline shares a token with other text: Llama 3.1's, Qwen3's, Tekken,
SmolLM2's and a hand-made one like them. A reply ends at such a token, and is trained on as it was played.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from agent.attempt import AttemptSettings, Job
from agent.local import LocalPolicy
from agent.loop import PlayLoop
from artifacts.packing import token_weights
from artifacts.render import parse_reply
from artifacts.tokens import Codec, read_codec, tokens_of
from artifacts.trajectory import Trajectory, Writer, read_trajectories
from envs.alfworld.world import AlfWorld
from envs.webshop.generate import ensure_catalogue
from envs.webshop.world import WebShop
from lora.config import Config
from lora.tokenizer import load_tokenizer
from tests.support.published import FAMILIES, write_model
from tests.support.rooms import TASK, Room

LIMIT = 12  # new tokens of a reply


def played(policy, world, env: str, tasks: list[str], path: Path, turns: int = 4) -> list[Trajectory]:
    """Records of sampled games, as they are read back from the file."""
    settings = AttemptSettings(
        env=env, stage="test", round=1, seed=0, max_turns=turns, patience=0, temperature=1.0, deadline=None
    )
    with Writer(path) as writer:
        for row in PlayLoop([Job(task, 0) for task in tasks], settings, world, policy):
            writer.write(row)
    rows = list(read_trajectories(path))
    assert len(rows) == len(tasks)
    return rows


def sampled_runs(row: Trajectory) -> list[tuple[int, int]]:
    """Start and stop of each run of sampled ids."""
    runs, at = [], 0
    for flag, group in itertools.groupby(row.sampled):
        stop = at + len(list(group))
        runs += [(at, stop)] if flag else []
        at = stop
    return runs


def check(row: Trajectory, codec: Codec, tokenizer: Tokenizer, ends: tuple[int, ...]) -> Counter[str]:
    """Demands of a record; returns how its replies ended."""
    tokens, found = tokens_of(row, codec), Counter()
    assert tokens.ids == row.ids[: len(tokens.ids)] and (row.end == "context_full" or tokens.ids == row.ids)
    weights = token_weights(tokens, 1.0, world_weight=0.0)
    [newline] = codec.encode("\n", False)
    own, lines = [0.0] * len(row.ids), []
    for start, stop in sampled_runs(row):
        texts = [tokenizer.decode([i], skip_special_tokens=False) for i in row.ids[start:stop]]
        assert not any("\n" in text for text in texts[:-1]), "a reply runs past its line"
        assert stop - start <= LIMIT
        ended, last = row.ids[stop - 1] in ends, texts[-1]
        if "\n" not in last:
            assert (ended or stop - start == LIMIT) and row.ids[stop] == newline
        closed = stop + ("\n" not in last)  # with the newline of the harness
        own[start:closed] = [1.0] * (closed - start)
        ids = [i for i in row.ids[start:stop] if i not in ends]
        lines.append(tokenizer.decode(ids, skip_special_tokens=False).split("\n")[0])
        found["end token" if ended else "limit" if "\n" not in last else "newline"] += 1
        found["text before the newline"] += "\n" in last and not last.startswith("\n")
        found["text after the newline"] += "\n" in last and not last.endswith("\n")
        found["two newlines"] += last.count("\n") > 1
    assert weights == own[: len(weights)]
    actions = [text for line in lines for kind, text in [parse_reply(line)] if kind == "act"]
    assert len(actions) in (len(row.turns), len(row.turns) + 1)  # the last may have had no room for its answer
    assert [turn.action for turn in row.turns] == actions[: len(row.turns)]
    return found


def check_all(rows: list[Trajectory], folder: Path) -> Counter[str]:
    codec, tokenizer, ends = read_codec(folder), load_tokenizer(folder), Config.read(folder).eos_token_ids
    return sum((check(row, codec, tokenizer, ends) for row in rows), Counter())


@pytest.mark.parametrize("name", ["hand", "smollm2"])
def test_a_reply_ends_with_its_line_and_is_trained_on_as_it_was_played(name, tmp_path):
    folder = write_model(name, tmp_path / name)
    policy = LocalPolicy(folder, slots=8, context=512, max_new_tokens=LIMIT)
    rows = played(policy, Room, "alfworld", [f"{TASK}/{i}" for i in range(24)], tmp_path / "trajectories.jsonl")
    endings = check_all(rows, folder)
    assert len(endings) == 6 and min(endings.values()) > 1, endings  # else some kind of ending is not tested


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_no_record_of_seventy_games_is_refused(name, tmp_path, capsys):
    """Fifty games of ALFWorld and twenty of WebShop. Of Llama's and Qwen's tokens, hardly any holds text after a
    newline."""
    folder = write_model(name, tmp_path / name, layers=2)
    shop = str(ensure_catalogue(tmp_path / "shop"))
    policy = LocalPolicy(folder, slots=16, context=1536, max_new_tokens=LIMIT)
    total = Counter()
    for env, world, count in (("alfworld", AlfWorld, 50), ("webshop", lambda: WebShop(shop), 20)):
        tasks = list(itertools.islice(world().tasks("gen_train"), count))
        rows = played(policy, world, env, tasks, tmp_path / f"{env}.jsonl", turns=8)
        endings = check_all(rows, folder)
        total += endings
        with capsys.disabled():
            print(f"\n{name} {env}: {len(rows)} records, {sum(len(row.turns) for row in rows)} turns, {dict(endings)}")
    assert min(total[kind] for kind in ("two newlines", "end token", "limit")) > 20
    assert total["text before the newline"] + total["text after the newline"] > 20

"""The WebShop base's corpus: demonstrations of goals that are in no panel.

The scripted demonstrator, hasty or careless, buys for three kinds of goals: goals of the real catalogue (--data or
$WEBSHOP_DATA, if available) outside its test split and the validation split on which bases are compared; the demo split
of the generated catalogue; and all goals of catalogues generated with other seeds. Products are drawn uniformly, as in
the panels. Many results pages are short, since the right item is easier to find among few. In half of the
demonstrations ids and words are replaced, so that a page's words must be read off the page: otherwise the base would
memorise the few hundred products of the real catalogue.

    for trajectory in itertools.islice(demonstrations(CorpusArgs(generated=1000)), 20): ...

Left out: rendering, weights and batches (models/pretrain.py).
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterator

import numpy as np
from msgspec.structs import replace

from agent.attempt import sample_action
from artifacts.render import actre_segments, react_segments, text_of
from artifacts.seeds import generator
from artifacts.trajectory import Trajectory, Turn
from envs.panel import excluded_ids
from envs.webshop.demonstrator import Demonstrator
from envs.webshop.generate import FOLDER, PRODUCTS, SEED, ensure_catalogue
from envs.webshop.world import PAGE, WebShop
from models.corpus.args import CorpusArgs

LENGTHS = (384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 3072)  # row lengths: one text per row
SHORT = 768  # the longest text in the first third of the steps
# What a thought says about options: which one comes first, and whether the page has it. And a careless player's first
# word, which so becomes a habit although most demonstrations are by players who read.
READING = r"((?<=I need) [^:.]+:|(?<=,) (?:here|missing)\b|\bThis(?= will do\b))"
# Pieces: the separator, a product's id (the same whatever precedes it), words with their leading space, numbers,
# punctuation.
PRETOKENIZER = (
    r" \[SEP\]|\s(?=[A-Z\d]{10}\b)|[A-Z\d]{10}\b| OK\.| ?[A-Za-z]+(?:'[a-z]+)?[:\[]?| ?\d+|\n|\]+"
    r"| ?[^\sA-Za-z\d\]]|\s"
)
REWORDED = 0.5  # share of demonstrations whose ids and words are replaced
MADE_UP = 0.3  # share of replacements that are invented words: like unseen words, they have several tokens
ASIN, LETTERS = r"\b[A-Z\d]{10}\b", "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # a product's id and its alphabet
# Words of pages, instructions and thoughts that are not replaced.
KEPT = frozenset(
    "instruction find show need want looking would like buy with and for the that price lower than dollars back search "
    "page total results next prev rating description features reviews now thank you shopping with code none paste "
    "your mturk interface purchased asin options attrs category query product target goal reward score min max details "
    "upper instuction text webshop look below costs too much open looked here not choose have chosen leave there more "
    "best will do them turn read this nothing found less want something else what pack missing comes last see".split()
)
PAGES = (1, 2, 4, PAGE)  # numbers of products on a results page, drawn for each demonstration


def spellings(trajectory: Trajectory) -> list[str]:
    """The texts that the tokenizer is trained on: both formats, and the task's words without their leading spaces, as
    in actions."""
    words = trajectory.task.replace(" ", "\n")
    return [text_of(react_segments(trajectory)), text_of(actre_segments(trajectory)), *4 * [words]]


@functools.lru_cache(maxsize=1)
def sources(args: CorpusArgs) -> list[tuple[WebShop, list[list[str]], list[str]]]:
    """(world, task ids by product, words of their instructions) for the real catalogue, if available, and for
    generated ones."""
    excluded, found = excluded_ids(), []

    def add(world: WebShop, splits: tuple[str, ...]) -> None:
        task_ids = [task for split in splits for task in world.tasks(split) if task not in excluded]
        texts = (world.reset(task).task.lower() for task in task_ids)
        words = {word for text in texts for word in re.findall("[a-z]{3,}", text)}
        products = itertools.groupby(sorted(task_ids), lambda task: task.rpartition("-")[0])
        found.append((world, [list(tasks) for _, tasks in products], sorted(words - KEPT)))

    folder = args.data or os.environ.get("WEBSHOP_DATA")
    if folder:
        add(WebShop(folder), ("small_train", "small_demo"))
    for index in range(-(-args.generated // PRODUCTS)):
        folder = ensure_catalogue(FOLDER.with_name(f"{FOLDER.name}_{index}") if index else FOLDER, SEED + index)
        add(WebShop(str(folder)), ("gen_train", "gen_demo", "gen_valid", "gen_test") if index else ("gen_demo",))
    return found


def careless_share(args: CorpusArgs, player: Demonstrator) -> float:
    """The share of careless players for this kind of task: one of `args.careless`, drawn for the last word wanted."""
    return float(generator(args.seed, "careless", player.words[-1]).choice(args.careless))


def demonstrate(world: WebShop, task_id: str, rng: np.random.Generator, args: CorpusArgs) -> Trajectory | None:
    """Buys for one goal, displaced with one of `args.displaced`; None if nothing is bought in time."""
    displaced = rng.choice(args.displaced)
    opening = world.reset(task_id)
    player = Demonstrator(opening.text, hasty=True)
    player.careless = bool(rng.random() < careless_share(args, player))
    turns: list[Turn] = []
    result = None
    while len(turns) < args.max_turns and not (result and result.done):
        thought, action = player.decide()
        action_by = "demo"
        if rng.random() < displaced:
            action = sample_action(world.actions(), "verbs", rng, opening.task)
            thought, action_by = player.explain(action), "sampled"
        result = world.step(action)
        turns.append(
            Turn(
                thought=thought,
                action=action,
                observation=result.observation,
                thought_by="demo",
                action_by=action_by,
                valid=result.valid,
            )
        )
        if not result.done:
            player.observe(action, result.observation)
    if not result.done:
        return None
    return Trajectory(
        env="webshop",
        split=task_id.split("/")[0],
        task_id=task_id,
        task=opening.task,
        trial=0,
        round=0,
        seed=0,
        source="demo",
        first_observation=opening.text,
        turns=turns,
        reward=result.reward,
        progress=result.progress,
        success=result.success,
        end="success" if result.success else "finished",
    )


def reworded(trajectory: Trajectory, others: list[str], rng: np.random.Generator) -> Trajectory:
    """The same purchase with new ids, with each word outside `KEPT` replaced consistently by one made from `others`,
    and with the digits 1 to 9 permuted."""
    ids: dict[str, str] = {}
    words: dict[str, str] = {}
    digits = str.maketrans("123456789", "".join(rng.permutation(list("123456789"))))

    def new_id(match: re.Match) -> str:
        if match[0] not in ids:
            ids[match[0]] = "B0" + "".join(rng.choice(list(LETTERS), 8))
        return ids[match[0]]

    def new_word(match: re.Match) -> str:
        word = match[0].lower()
        if word in KEPT:
            return match[0]
        if word not in words:
            one, other = (others[index] for index in rng.integers(len(others), size=2))
            words[word] = one[: -(-len(one) // 2)] + other[len(other) // 2 :] if rng.random() < MADE_UP else one
        return words[word].capitalize() if match[0][0].isupper() else words[word]

    def change(text: str) -> str:
        text = re.sub(ASIN, new_id, text.translate(digits))
        return re.sub("(?<![A-Za-z])[A-Za-z][a-z]{2,}(?![A-Za-z])", new_word, text)

    turns = [
        replace(
            turn,
            thought=change(turn.thought),
            action=f"{verb}[{change(rest)}" if rest else turn.action,
            observation=change(turn.observation),
        )
        for turn in trajectory.turns
        for verb, _, rest in [turn.action.partition("[")]
    ]
    return replace(
        trajectory, first_observation=change(trajectory.first_observation), task=change(trajectory.task), turns=turns
    )


def demonstrations(args: CorpusArgs) -> Iterator[Trajectory]:
    """An endless stream of demonstrations, determined by the seed, without any panel's task."""
    worlds = sources(args)
    real = len(worlds) > -(-args.generated // PRODUCTS)
    for index in itertools.count():
        rng = generator(args.seed, "pretrain", index)
        first = real and rng.random() >= args.generated_share
        world, products, words = worlds[0] if first else worlds[int(rng.integers(real, len(worlds)))]
        world.page = int(rng.choice(PAGES))
        task_ids = products[rng.integers(len(products))]
        trajectory = demonstrate(world, task_ids[rng.integers(len(task_ids))], rng, args)
        if trajectory is not None:
            yield reworded(trajectory, words, rng) if rng.random() < REWORDED else trajectory

"""The neutral base's corpus: random walks, without solutions, in the worlds that refinement tuning trains on.

The worlds are generated ALFWorld games and synthetic worlds; openings list the commands. The player acts at random,
announces each action in words other than the command's, and now and then tries an action of another world. The base
thus learns the format and the commands, but nothing about goals. In some walks the words of names and commands are
invented, so the base learns to write any word it has read, as a language model does from its large vocabulary. No task
of a panel is used.

    for trajectory in itertools.islice(demonstrations(CorpusArgs(seed=0)), 20): ...

Left out: demonstrators, real games. Of CorpusArgs only the seed matters.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator

import numpy as np
from msgspec.structs import replace

from agent.attempt import sample_action, template_reason
from artifacts.render import react_segments, text_of
from artifacts.seeds import generator
from artifacts.trajectory import Trajectory, Turn
from envs.alfworld.rooms import family
from envs.alfworld.world import AlfWorld
from envs.panel import excluded_ids
from envs.synthetic.rules import parse
from envs.synthetic.spec import make_spec
from envs.synthetic.world import Synthetic
from envs.wording import TellCommands
from models.corpus.args import CorpusArgs

LENGTHS = (384, 512, 768, 1024, 1536)  # row lengths: one text per row, padded to the next of these
SHORT = 768  # the longest text in the first third of the steps
READING = r"(?!)"  # matches nothing: all of a thought's words have the same weight
# Pieces: words with their leading space, numbers, punctuation; braces of a template are separated from their word.
PRETOKENIZER = r" OK\.| ?[A-Za-z]+[:\[]?| ?\d+|\n|\]+| ?[^\sA-Za-z\d\]]|\s"
TURNS = (4, 8, 12, 16)  # lengths of a walk, drawn for each
REFUSED = 0.15  # share of actions taken from another world
REMINDED = 0.3  # share of thoughts that repeat the task, without effect on the action
MADE_UP = 0.4  # share of walks in synthetic worlds whose names and commands have invented words
SAID = {  # the thought before an action, by the action's role
    "go": "I check the {place}.",
    "open": "The {place} is closed. I open it.",
    "close": "I close the {place}.",
    "take": "The {object} is here. I take it.",
    "put": "I put the {object} in the {place}.",
    "work": "I {verb} the {object} at the {place}.",
    "repair": "I {verb} the {object} with the {tool}.",
    "use": "I turn on the {object}.",
    "examine": "I look at the {object}.",
    "look": "I look around.",
    "inventory": "I check what I have.",
}
DULL = ("look", "inventory", "examine", "close")  # roles that a walk mostly skips
ALFWORLD = (  # (role, pattern) of its commands
    ("go", r"go to (?P<place>.+)"),
    ("open", r"open (?P<place>.+)"),
    ("close", r"close (?P<place>.+)"),
    ("take", r"take (?P<object>.+) from (?P<place>.+)"),
    ("put", r"move (?P<object>.+) to (?P<place>.+)"),
    ("work", r"(?P<verb>clean|heat|cool|slice) (?P<object>.+) with (?P<place>.+)"),
    ("use", r"use (?P<object>.+)"),
    ("examine", r"examine (?P<object>.+)"),
    ("look", "look"),
    ("inventory", "inventory"),
)


def spellings(trajectory: Trajectory) -> list[str]:
    """The texts that the tokenizer is trained on."""
    return [text_of(react_segments(trajectory))]


@functools.lru_cache(maxsize=1)
def sources() -> list[tuple[TellCommands, list[str]]]:
    """(world, task ids) for generated ALFWorld games and for synthetic worlds."""
    excluded = excluded_ids()
    worlds = ((AlfWorld(), f"{family()}_demo"), (Synthetic(), "syn_train"))
    return [
        (TellCommands(world), [task for task in world.tasks(split) if task not in excluded]) for world, split in worlds
    ]


def parse_action(task_id: str, action: str) -> tuple[str, dict[str, str]]:
    """The role of an action that the world accepts, and its arguments by the placeholders of `SAID`."""
    if not task_id.startswith("syn_"):
        return next((role, found.groupdict()) for role, form in ALFWORLD if (found := re.fullmatch(form, action)))
    spec, (role, values) = make_spec(task_id), parse(task_id, action)
    verb = spec.repair[0] if role == "repair" else spec.work[0]
    return role, {"verb": verb, "tool": spec.repair_tool or "", **values}


def with_invented_words(trajectory: Trajectory, rng: np.random.Generator) -> Trajectory:
    """The walk with an invented word for every word of a name, and for every word of a command where it is listed or
    given."""
    spec = make_spec(trajectory.task_id)
    names = " ".join([*spec.places, *spec.lies, *spec.kinds.values()])
    forms = re.sub(r"\{\w+\}", "", " ".join(spec.commands.values()))
    words = {
        word: "".join(rng.choice(list(letters)) for letters in ("bdfghjklmnprstvwz", "aeiou") * rng.integers(2, 4))
        for word in sorted(set(re.findall("[a-z]+", f"{names} {forms}")))
    }

    def renamed(text: str, vocabulary: str) -> str:
        alternatives = "|".join(sorted(set(re.findall("[a-z]+", vocabulary)), key=len, reverse=True))
        return re.sub(rf"(?<![A-Za-z{{])({alternatives})(?![A-Za-z}}])", lambda word: words[word[1]], text)

    opening, intro, commands = trajectory.first_observation.partition("You can:")
    turns = [
        turn
        if turn.thought == template_reason(turn.action)
        else replace(
            turn,
            thought=renamed(turn.thought, names),
            action=renamed(turn.action, f"{names} {forms}"),
            observation=renamed(turn.observation, names),
        )
        for turn in trajectory.turns
    ]
    return replace(
        trajectory,
        first_observation=f"{renamed(opening, names)}{intro}{renamed(commands, forms)}",
        task=renamed(trajectory.task, names),
        turns=turns,
    )


def walk(world: TellCommands, task_id: str, foreign: str, rng: np.random.Generator) -> Trajectory | None:
    """A random walk; None if it reaches the goal by chance. `foreign`: an action of another world."""
    opening, turns, at, length = world.reset(task_id), [], "", rng.choice(TURNS)
    while len(turns) < length:
        if rng.random() < REFUSED:
            thought, action = template_reason(foreign), foreign
        else:
            actions = [action for action in world.actions() if action != "help"]  # its reply is long
            action = sample_action(actions, "verbs", rng, opening.task)
            role, values = parse_action(task_id, action)
            if role in DULL and rng.random() < 0.8:
                continue
            at = values.get("place", at)
            thought = SAID[role].format(**{"place": at, **values})
            if rng.random() < REMINDED:
                thought = f"My task is to {opening.task}. {thought}"
        result = world.step(action)
        turns.append(
            Turn(
                thought=thought,
                action=action,
                observation=result.observation,
                thought_by="teacher",
                action_by="teacher",
                valid=result.valid,
            )
        )
        if result.success:
            return None
    return Trajectory(
        env="neutral",
        split=task_id.split("/")[0],
        task_id=task_id,
        task=opening.task,
        trial=0,
        round=0,
        seed=0,
        source="demo",
        first_observation=opening.text,
        turns=turns,
        reward=0.0,
        progress=result.progress,
        success=False,
        end="max_turns",
    )


def demonstrations(args: CorpusArgs) -> Iterator[Trajectory]:
    """An endless stream of walks, determined by the seed; half of them in each source."""
    worlds, foreign = sources(), "look"
    for index in itertools.count():
        rng = generator(args.seed, "walk", index)
        world, task_ids = worlds[rng.integers(len(worlds))]
        trajectory = walk(world, task_ids[rng.integers(len(task_ids))], foreign, rng)
        if trajectory is None:
            continue
        foreign = trajectory.turns[-1].action
        invent = trajectory.split == "syn_train" and rng.random() < MADE_UP
        yield with_invented_words(trajectory, rng) if invent else trajectory

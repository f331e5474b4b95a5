"""What the neutral base learns from: random walks in the worlds that refinement tuning trains on, without solutions.

Generated ALFWorld games and synthetic worlds, with their commands told, in which somebody does one thing after the
other, says each time what is about to be done, in words that are not the command's, and now and then tries what
another world would accept. So the base knows how a text goes on and how a world wants to be told something, and
nothing of goals. In some walks the names of things and the words of commands are made up, so that what it reads it can
write, whatever it is: a language model has that from its many words. No panel's task is among them. Read by
models/pretrain.py, whose Args say what can be chosen.
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

LENGTHS = (384, 512, 768, 1024, 1536)  # one text a row, padded to the next of these
SHORT = 768  # the longest text of the first third of the steps
READING = r"(?!)"  # no words weigh more
# Pieces: words with their leading space, numbers, signs; a template's braces keep their word apart.
PRETOKENIZER = r" OK\.| ?[A-Za-z]+[:\[]?| ?\d+|\n|\]+| ?[^\sA-Za-z\d\]]|\s"
TURNS = (4, 8, 12, 16)  # of a walk; a walk draws one of them
REFUSED = 0.15  # share of actions that are another world's
REMINDED = 0.3  # share of thoughts that say the task again, to no effect on what is done
MADE_UP = 0.4  # share of walks in synthetic worlds with names and commands of words that do not exist
SAID = {  # before an action, by its role
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
DULL = ("look", "inventory", "examine", "close")  # roles that a walk mostly passes over
ALFWORLD = (  # roles of its commands
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
    """What the tokenizer is made from."""
    return [text_of(react_segments(trajectory))]


@functools.lru_cache(maxsize=1)
def sources() -> list[tuple[TellCommands, list[str]]]:
    """(world, task ids) of generated games and of synthetic worlds."""
    excluded = excluded_ids()
    worlds = ((AlfWorld(), f"{family()}_demo"), (Synthetic(), "syn_train"))
    return [
        (TellCommands(world), [task for task in world.tasks(split) if task not in excluded]) for world, split in worlds
    ]


def meant(task_id: str, action: str) -> tuple[str, dict[str, str]]:
    """The role of an action that the world accepts, and its values by the names of `SAID`."""
    if not task_id.startswith("syn_"):
        return next((role, found.groupdict()) for role, form in ALFWORLD if (found := re.fullmatch(form, action)))
    spec, (role, values) = make_spec(task_id), parse(task_id, action)
    verb = spec.repair[0] if role == "repair" else spec.work[0]
    return role, {"verb": verb, "tool": spec.repair_tool or "", **values}


def made_up(trajectory: Trajectory, rng: np.random.Generator) -> Trajectory:
    """The walk with a word of its own for every word of a name, and for those of commands where they are told or
    given."""
    spec = make_spec(trajectory.task_id)
    names = " ".join([*spec.places, *spec.lies, *spec.kinds.values()])
    forms = re.sub(r"\{\w+\}", "", " ".join(spec.commands.values()))
    words = {
        word: "".join(rng.choice(list(letters)) for letters in ("bdfghjklmnprstvwz", "aeiou") * rng.integers(2, 4))
        for word in sorted(set(re.findall("[a-z]+", f"{names} {forms}")))
    }

    def renamed(text: str, among: str) -> str:
        which = "|".join(sorted(set(re.findall("[a-z]+", among)), key=len, reverse=True))
        return re.sub(rf"(?<![A-Za-z{{])({which})(?![A-Za-z}}])", lambda word: words[word[1]], text)

    opening, told, commands = trajectory.first_observation.partition("You can:")
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
        first_observation=f"{renamed(opening, names)}{told}{renamed(commands, forms)}",
        task=renamed(trajectory.task, names),
        turns=turns,
    )


def walk(world: TellCommands, task_id: str, strange: str, rng: np.random.Generator) -> Trajectory | None:
    """A random walk; none if it reaches the goal by chance. `strange`: an action of another world."""
    opening, turns, at, length = world.reset(task_id), [], "", rng.choice(TURNS)
    while len(turns) < length:
        if rng.random() < REFUSED:
            thought, action = template_reason(strange), strange
        else:
            actions = [action for action in world.actions() if action != "help"]  # its answer is long
            action = sample_action(actions, "verbs", rng, opening.task)
            role, values = meant(task_id, action)
            if role in DULL and rng.random() < 0.8:
                continue
            at = values.get("place", at)
            thought = SAID[role].format(**{"place": at, **values})
            if rng.random() < REMINDED:
                thought = f"My task is to {opening.task}. {thought}"
        result = world.step(action)
        turns.append(Turn(thought, action, result.observation, "teacher", "teacher", result.valid))
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
    """An endless stream of walks, the same for the same seed; half of them in each source."""
    worlds, strange = sources(), "look"
    for number in itertools.count():
        rng = generator(args.seed, "walk", number)
        world, task_ids = worlds[rng.integers(len(worlds))]
        trajectory = walk(world, task_ids[rng.integers(len(task_ids))], strange, rng)
        if trajectory is None:
            continue
        strange = trajectory.turns[-1].action
        yield made_up(trajectory, rng) if trajectory.split == "syn_train" and rng.random() < MADE_UP else trajectory

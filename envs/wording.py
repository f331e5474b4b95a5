"""The same world in other words: with its commands told, or with its commands perturbed.

`TellCommands` adds the list of commands to the opening. The sentence has one form for all worlds, and the world's own
templates in it, as the scripts of AgentRefine name actions:

    You can: go to {receptacle}, take {object} from {receptacle}, ..., look.

`Perturbed` rewords the commands, both ways: what the agent says becomes the world's wording, and what quotes a command
to the agent the perturbed one. What is said in the original wording is not a command any more, and is answered as the
world answers an empty line. Five perturbations, after AgentRefine's test of robustness, of which only P3 is known from
the paper; the others are ours after what is remembered of it.

| | what changes | "clean mug 1 with sinkbasin 1", "go to desk 1", "take mug 1 from desk 1" |
|---|---|---|
| P1 | with and using change places | clean mug 1 using sinkbasin 1 |
| P2 | go to -> move to ("move mug 1 to desk 1" stays: it names two things) | move to desk 1 |
| P3 | the order of words in take | from desk 1 take mug 1 |
| P4 | no blank between name and number, in all texts | clean mug1 with sinkbasin1, go to desk1, take mug1 from desk1 |
| P5 | the form of a command: wrapped like a call, its words as they were | do(go to desk 1) |

Left out: the task's words and the world's prose ("You clean the mug 1 using the sinkbasin 1."), except for P4's names.

Try one: python -m envs.play --env alfworld --perturb P3 --tell-commands --task gen_valid/<task>/<trial>
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from envs.base import Observation, Result, World

_PLACE = re.compile(r"\{(\w+)\}")  # a placeholder of a template
_QUOTED = re.compile(r"You can |[^\n,:;.'\"`]+")  # what may be a command where a text quotes or lists some
_BRACKETED = re.compile(r"[({<].*[)}>]")  # what stands for an argument where a text explains a command
_NAME = re.compile(r"\b([A-Za-z]+) (\d+)\b(?! steps?\b)")
_JOINED_NAME = re.compile(r"([A-Za-z])(\d+)\b")

# From a template with numbered placeholders, "take {0} from {1}", to the perturbed one.
RULES: dict[str, Callable[[str], str]] = {
    "P1": lambda t: re.sub(r"\b(with|using)\b", lambda word: {"with": "using", "using": "with"}[word[0]], t),
    "P2": lambda t: re.sub(r"^go to\b", "move to", t),
    "P3": lambda t: re.sub(r"^take (\{0\}) from (\{1\})$", r"from \2 take \1", t),
    "P4": lambda t: t,
    "P5": lambda t: f"do({t})",
}
PERTURBATIONS = tuple(RULES)


# ---- templates -------------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A command's original and perturbed template, placeholders numbered, and what matches each."""

    old: str
    new: str
    old_form: re.Pattern
    new_form: re.Pattern


def numbered(template: str) -> str:
    """The template with its placeholders numbered in order: "take {0} from {1}"."""
    count = itertools.count()
    return _PLACE.sub(lambda _: f"{{{next(count)}}}", template)


def form(template: str) -> re.Pattern:
    """What matches the commands of a numbered template; its groups are the arguments, p0, p1, ..."""
    pieces = _PLACE.split(template)  # words and names of placeholders in turn
    return re.compile("".join(f"(?P<p{x}>.+?)" if i % 2 else re.escape(x) for i, x in enumerate(pieces)))


def fill(template: str, arguments: re.Match) -> str:
    return _PLACE.sub(lambda place: arguments[f"p{place[1]}"], template)


class Wording:
    """The commands of one task under a perturbation. ValueError for a perturbation that is none of PERTURBATIONS.

    `perturbed` and `original` are inverses: `original(text)` is a command only where `perturbed` makes that text of it.
    """

    def __init__(self, commands: Sequence[str], perturbation: str):
        if perturbation not in RULES:
            raise ValueError(f"unknown perturbation {perturbation!r}: expected one of {', '.join(RULES)}")
        self._joins = perturbation == "P4"
        self.commands: list[str] = []
        found = []
        for template in commands:
            old = numbered(template)
            new = RULES[perturbation](old)
            found.append(Command(old, new, form(old), form(new)))
            names = _PLACE.findall(template)
            self.commands.append(_PLACE.sub(lambda place, names=names: f"{{{names[int(place[1])]}}}", new))
        # "use {0} on {1}" is tried before "use {0}", which it fits too.
        self._commands = sorted(found, key=lambda command: -len(_PLACE.sub("", command.old)))

    def perturbed(self, action: str) -> str | None:
        """The perturbed wording of an original command; None for a text that is none."""
        for command in self._commands:
            if arguments := command.old_form.fullmatch(action):
                return self._join(fill(command.new, arguments))
        return None

    def original(self, action: str) -> str:
        """The original wording of a perturbed command; the empty string for a text that is none."""
        action = action.strip()
        text = _JOINED_NAME.sub(r"\1 \2", action) if self._joins else action
        for command in self._commands:
            if arguments := command.new_form.fullmatch(text):
                found = fill(command.old, arguments)
                if self.perturbed(found) == action:
                    return found
        return ""

    def told(self, text: str, actions: Callable[[], list[str]]) -> str:
        """A text of the world as the agent reads it: with every quoted command, or name, in the perturbed wording. A
        command is quoted where it stands between marks or line ends and is one of `actions()` or a template."""
        return self._join(_QUOTED.sub(lambda phrase: self._quoted(phrase[0], actions), text))

    def _quoted(self, phrase: str, actions: Callable[[], list[str]]) -> str:
        words = phrase.strip()
        for command in self._commands:
            arguments = command.old_form.fullmatch(words)
            if arguments and command.old != command.new:
                quotes = all(map(_BRACKETED.fullmatch, arguments.groups())) or words in actions()
                return phrase.replace(words, fill(command.new, arguments)) if quotes else phrase
        return phrase

    def _join(self, text: str) -> str:
        return _NAME.sub(r"\1\2", text) if self._joins else text


# ---- worlds ----------------------------------------------------------------------------------------------------------


def told_commands(opening: str, commands: Iterable[str]) -> str:
    """An opening that ends with the list of commands."""
    return f"{opening}\n\nYou can: {', '.join(commands)}."


class TellCommands:
    """A world whose opening ends with the list of its commands."""

    def __init__(self, world: World):
        self._world = world
        self.isolated, self.facts = world.isolated, {**world.facts, "commands": "told"}

    def tasks(self, split: str) -> Sequence[str]:
        return self._world.tasks(split)

    def reset(self, task_id: str) -> Observation:
        opening = self._world.reset(task_id)
        return replace(opening, text=told_commands(opening.text, self._world.commands()))

    def step(self, action: str) -> Result:
        return self._world.step(action)

    def actions(self) -> list[str]:
        return self._world.actions()

    def commands(self) -> list[str]:
        return self._world.commands()


class Perturbed:
    """A world under a perturbation, one of PERTURBATIONS. Raises ValueError for an unknown one; `actions` raises it in
    a world that the perturbation cannot reword, and `require_change` for one in which it changes nothing."""

    def __init__(self, world: World, perturbation: str):
        self._world, self._name, self._wording = world, perturbation, Wording((), perturbation)
        self.isolated, self.facts = world.isolated, {**world.facts, "perturbation": perturbation}

    def tasks(self, split: str) -> Sequence[str]:
        return self._world.tasks(split)

    def reset(self, task_id: str) -> Observation:
        opening = self._world.reset(task_id)
        self._wording = Wording(self._world.commands(), self._name)
        text, task = (self._wording.told(text, self._world.actions) for text in (opening.text, opening.task))
        return Observation(text=text, task=task)

    def step(self, action: str) -> Result:
        result = self._world.step(self._wording.original(action))
        return replace(
            result, observation=self._wording.told(result.observation, self._world.actions if not result.done else list)
        )

    def actions(self) -> list[str]:
        return sorted(map(self._reworded, self._world.actions()))

    def _reworded(self, action: str) -> str:
        end = "x]" * action.endswith("[")  # completes an open action
        perturbed = self._wording.perturbed(action + end)
        if perturbed is None or self._wording.original(perturbed) != action + end or not perturbed.endswith(end):
            raise ValueError(
                f"{self._name} cannot be undone in this world: its action {action + end!r} becomes "
                f"{perturbed!r}; choose another perturbation"
            )
        return perturbed.removesuffix(end)

    def commands(self) -> list[str]:
        self._world.commands()  # raises before the first reset
        return self._wording.commands

    def require_change(self, task_ids: Iterable[str]) -> None:
        """Raises ValueError unless the perturbation rewords something at the start of one of these tasks, or where it
        comes upon an action before that it cannot reword."""
        for task_id in task_ids:
            self.reset(task_id)
            if self.actions() != self._world.actions() or self.commands() != self._world.commands():
                return
        raise ValueError(
            f"{self._name} changes no command of this world: {', '.join(self._world.commands())}; "
            "choose another perturbation"
        )

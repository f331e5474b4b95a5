"""Wrappers that reword a world: `TellCommands` lists its commands in the opening, `Perturbed` perturbs them.

The list has one form for all worlds and uses the world's own templates, as AgentRefine's scripts do:

    You can: go to {receptacle}, take {object} from {receptacle}, ..., look.

`Perturbed` translates both ways: the agent's perturbed commands into the world's wording, and commands quoted in the
world's texts into the perturbed wording. A command in the original wording is no longer accepted; the world receives an
empty line instead. The five perturbations follow AgentRefine's robustness test. Only P3 is known from the paper; the
others are our reconstruction from memory.

| | what changes | "clean mug 1 with sinkbasin 1", "go to desk 1", "take mug 1 from desk 1" |
|---|---|---|
| P1 | with and using are swapped | clean mug 1 using sinkbasin 1 |
| P2 | go to -> move to ("move mug 1 to desk 1" is unchanged: it names two things) | move to desk 1 |
| P3 | the word order of take | from desk 1 take mug 1 |
| P4 | no space between name and number, in all texts | clean mug1 with sinkbasin1, go to desk1, take mug1 from desk1 |
| P5 | a command is wrapped like a call, its words unchanged | do(go to desk 1) |

Left out: the task's words and the world's prose ("You clean the mug 1 using the sinkbasin 1."), except P4's names.

Try one: python -m envs.play --env alfworld --perturb P3 --tell-commands --task gen_valid/<task>/<trial>
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from envs.base import Observation, Result, World

_PLACEHOLDER = re.compile(r"\{(\w+)\}")  # in a template
_QUOTED = re.compile(r"You can |[^\n,:;.'\"`]+")  # a phrase that may be a quoted or listed command
_BRACKETED = re.compile(r"[({<].*[)}>]")  # a placeholder where a text explains a command
_NAME = re.compile(r"\b([A-Za-z]+) (\d+)\b(?! steps?\b)")
_JOINED_NAME = re.compile(r"([A-Za-z])(\d+)\b")

# Each maps a template with numbered placeholders, "take {0} from {1}", to the perturbed template.
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
    """A command's original and perturbed template, with numbered placeholders, and the pattern of each."""

    old: str
    new: str
    old_form: re.Pattern
    new_form: re.Pattern


def numbered(template: str) -> str:
    """The template with numbered placeholders: "take {0} from {1}"."""
    count = itertools.count()
    return _PLACEHOLDER.sub(lambda _: f"{{{next(count)}}}", template)


def form(template: str) -> re.Pattern:
    """The pattern of a numbered template's commands; its groups p0, p1, ... are the arguments.

    Each argument but the last ends for good at the first words that may follow it: what can match at all then does, and
    the time stays linear in the text.
    """
    first, *parts = _PLACEHOLDER.split(template)  # alternately words and placeholder names
    pieces = [f"(?P<p{name}>.+?){re.escape(words)}" for name, words in zip(parts[::2], parts[1::2], strict=True)]
    return re.compile(re.escape(first) + "".join([f"(?>{piece})" for piece in pieces[:-1]] + pieces[-1:]))


def fill(template: str, arguments: re.Match) -> str:
    return _PLACEHOLDER.sub(lambda placeholder: arguments[f"p{placeholder[1]}"], template)


class Wording:
    """The commands of one task under a perturbation. Raises ValueError unless it is one of PERTURBATIONS.

    `perturbed` and `original` are inverses: `original(text)` is a command only if `perturbed` maps it back to `text`.
    """

    def __init__(self, commands: Sequence[str], perturbation: str):
        if perturbation not in RULES:
            raise ValueError(f"unknown perturbation {perturbation!r}: expected one of {', '.join(RULES)}")
        self._joins = perturbation == "P4"
        self.commands: list[str] = []
        pairs = []
        for template in commands:
            old = numbered(template)
            new = RULES[perturbation](old)
            pairs.append(Command(old=old, new=new, old_form=form(old), new_form=form(new)))
            names = _PLACEHOLDER.findall(template)
            self.commands.append(_PLACEHOLDER.sub(lambda match, names=names: f"{{{names[int(match[1])]}}}", new))
        # "use {0} on {1}" is tried before "use {0}", which matches its commands too.
        self._commands = sorted(pairs, key=lambda command: -len(_PLACEHOLDER.sub("", command.old)))

    def perturbed(self, action: str) -> str | None:
        """The perturbed wording of an original command; None for any other text."""
        for command in self._commands:
            if arguments := command.old_form.fullmatch(action):
                return self._join(fill(command.new, arguments))
        return None

    def original(self, action: str) -> str:
        """The original wording of a perturbed command; the empty string for any other text."""
        action = action.strip()
        text = _JOINED_NAME.sub(r"\1 \2", action) if self._joins else action
        for command in self._commands:
            if arguments := command.new_form.fullmatch(text):
                candidate = fill(command.old, arguments)
                if self.perturbed(candidate) == action:
                    return candidate
        return ""

    def told(self, text: str, actions: Callable[[], list[str]]) -> str:
        """The world's text as the agent reads it, with quoted commands (P4: all names) in the perturbed wording.

        A phrase between punctuation marks or line ends is a quoted command if it is one of `actions()` or a template.
        """
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
    """The opening with the list of commands appended."""
    return f"{opening}\n\nYou can: {', '.join(commands)}."


class TellCommands:
    """A world whose opening ends with a list of its commands."""

    def __init__(self, world: World):
        self._world = world
        self.isolated, self.facts = world.isolated, {**world.facts, "commands": "told"}

    def tasks(self, split: str) -> Sequence[str]:
        return self._world.tasks(split)

    def left_out(self, split: str) -> Mapping[str, str]:
        return self._world.left_out(split)

    def fingerprint(self, task_ids: Iterable[str]) -> str:
        return self._world.fingerprint(task_ids)

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
    """A world under a perturbation, one of PERTURBATIONS. Raises ValueError for an unknown one.

    `actions` raises it if the perturbation cannot be undone in this world, `require_change` if it changes nothing.
    """

    def __init__(self, world: World, perturbation: str):
        self._world, self._name, self._wording = world, perturbation, Wording((), perturbation)
        self.isolated, self.facts = world.isolated, {**world.facts, "perturbation": perturbation}

    def tasks(self, split: str) -> Sequence[str]:
        return self._world.tasks(split)

    def left_out(self, split: str) -> Mapping[str, str]:
        return self._world.left_out(split)

    def fingerprint(self, task_ids: Iterable[str]) -> str:
        return self._world.fingerprint(task_ids)

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
        end = "x]" * action.endswith("[")  # complete an open action
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
        """Raises ValueError unless the perturbation changes an action or a template at the start of one of these tasks.
        Also raises it if the perturbation of an action found on the way cannot be undone."""
        for task_id in task_ids:
            self.reset(task_id)
            if self.actions() != self._world.actions() or self.commands() != self._world.commands():
                return
        raise ValueError(
            f"{self._name} changes no command of this world: {', '.join(self._world.commands())}; "
            "choose another perturbation"
        )

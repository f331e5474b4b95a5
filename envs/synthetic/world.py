"""Sampled text worlds, each with places, objects, verbs, wordings and rules of its own.

A task is `<split>/<number>`; its world is drawn from that name alone (`Spec`, envs/synthetic/words.py has the words):
four to six places, some of them closed containers, one perhaps locked; things to find, carry and put somewhere;
perhaps work that is done to them at one place, perhaps with a tool; perhaps something to repair; a limit to what can
be carried; perhaps an order in which things must come. The opening states environment, goal and rules; where things lie
has to be found out. Everything can be undone, so no world can be lost.

| split | what |
|---|---|
| syn_train | to train on; ids of any number are played, `tasks` lists the first 10,000 |
| syn_valid | drawn from the same vocabulary, other worlds |
| syn_held | drawn from the other vocabulary, which has no content word in common with it |
| syn_easy, syn_held_easy | small ones, for tests |

An action that is not accepted is a mistake of one of three kinds (`Synthetic.refusal`): parameter (no command, or a
value that it does not take), place (what is acted on is elsewhere), logic (a condition is not met).

Play one: python -m envs.play --env synthetic --task syn_valid/00000
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from envs.base import Observation, Result, check_split
from envs.synthetic.rules import Refusal, Rules, State, parse
from envs.synthetic.spec import PLAIN, WORLDS, Spec, fill, listed, make_spec

SPLITS = {"syn_train": 10_000, "syn_valid": 500, "syn_held": 500, "syn_easy": 5, "syn_held_easy": 5}


# ---- what a world is -------------------------------------------------------------------------------------------------


# ---- drawing one -----------------------------------------------------------------------------------------------------


# ---- the rules -------------------------------------------------------------------------------------------------------


# ---- the world -------------------------------------------------------------------------------------------------------


class Synthetic:
    """The sampled worlds as a `World`. Reward is 1.0 when the goal holds, else 0.0; progress the largest share of its
    conditions that held at once so far."""

    isolated = False

    def __init__(self):
        self.facts = {"worlds": WORLDS}
        self._task_id, self._state, self._progress, self._done = "", State("", {}), 0.0, False

    def tasks(self, split: str) -> Sequence[str]:
        """Sorted ids. Raises ValueError for an unknown split."""
        check_split(split, SPLITS)
        return [f"{split}/{number:05d}" for number in range(SPLITS[split])]

    def reset(self, task_id: str) -> Observation:
        """Start a task. Raises ValueError for an id of no split, or a number that is not in it (syn_train: any)."""
        split, _, number = task_id.partition("/")
        good = split in SPLITS and re.fullmatch(r"[0-9]{5}|[1-9][0-9]{5,8}", number)
        if not good or (split != "syn_train" and int(number) >= SPLITS[split]):
            raise ValueError(
                f"unknown task {task_id!r}: expected one of {', '.join(SPLITS)}, a slash and a number "
                "of the split with five digits"
            )
        spec = make_spec(task_id)
        self._task_id, self._state = task_id, State("", spec.lies)
        self._progress, self._done = 0.0, False
        return Observation(text=spec.opening, task=spec.task)

    def step(self, action: str) -> Result:
        spec, rules = self._playing()
        if self._done:
            raise RuntimeError("the task is over: call reset(task_id)")
        try:
            self._state, event, values = self._outcome(action)
            valid = True
        except Refusal as why:
            event, values, valid = why.event, why.values, False
        met, total = rules.met(self._state)
        self._progress = max(self._progress, met / total)
        self._done = met == total
        observation = spec.say(event, **values, things=self._things(event), view=self._view(rules))
        return Result(
            observation=observation,
            reward=float(self._done),
            progress=self._progress,
            success=self._done,
            done=self._done,
            valid=valid,
        )

    def actions(self) -> list[str]:
        """Every command that is accepted now, sorted."""
        spec, _ = self._playing()
        found = []
        for role in spec.commands:
            takes = spec.values(role)
            for chosen in itertools.product(*takes.values()):
                text = fill(spec.commands[role], dict(zip(map(PLAIN.get, takes), chosen, strict=True)))
                if not self.refusal(text):
                    found.append(text)
        return sorted(set(found))

    def commands(self) -> list[str]:
        """The templates of this task's commands."""
        return list(self._playing()[0].commands.values())

    def refusal(self, action: str) -> Refusal | None:
        """Why an action would not be accepted now; None for one that would."""
        try:
            self._outcome(action)
        except Refusal as why:
            return why
        return None

    def _outcome(self, action: str) -> tuple[State, str, dict[str, str]]:
        """The state after an action, and the event that it is with its values. Raises Refusal."""
        spec, rules = self._playing()
        role, values = parse(self._task_id, action)
        return getattr(rules, role)(self._state, **values)

    def _playing(self) -> tuple[Spec, Rules]:
        if not self._task_id:
            raise RuntimeError("no task yet: call reset(task_id)")
        spec = make_spec(self._task_id)
        return spec, Rules(spec)

    def _view(self, rules: Rules) -> str:
        state, spec = self._state, rules.spec
        if rules.shut(state, state.at):
            return spec.say("closed", place=state.at)
        here = sorted(name for name, where in state.lies.items() if where == state.at)
        return spec.say("some", things=listed(here)) if here else spec.say("none")

    def _things(self, event: str) -> str:
        return listed(self._state.hands) if event == "carry" else ""

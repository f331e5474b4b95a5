"""Synthetic text worlds, each with its own places, objects, verbs, wordings and rules.

A task is `<split>/<number>`; its world is drawn from that id (`spec.py`) with the words of one vocabulary (`words.py`):
four to six places, some of them closed containers, one possibly locked; things to find, carry and put somewhere; in
some worlds work to do on them at a station or with a tool, something to repair, or a required order; a carrying limit.
The opening states environment, goal and rules; the player has to find out where things are. Everything can be undone,
so no world can be lost.

| split | worlds |
|---|---|
| syn_train | for training; any number is a valid id, `tasks` lists the first 10,000 |
| syn_valid | other worlds from the same vocabulary |
| syn_held | worlds from the other vocabulary, which shares no content word with the first |
| syn_easy, syn_held_easy | small worlds, for tests |

A refused action changes nothing; `Synthetic.refusal` names the kind of mistake (`rules.py`).
Left out: the turn limit (the runner's).

Play one: python -m envs.play --env synthetic --task syn_valid/00000
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from envs.base import Observation, Result, check_split, content_hash
from envs.synthetic.rules import Refusal, Rules, State, parse
from envs.synthetic.spec import WORLDS, Spec, fill, listed, make_spec
from envs.synthetic.words import PLAIN

SPLITS = {"syn_train": 10_000, "syn_valid": 500, "syn_held": 500, "syn_easy": 5, "syn_held_easy": 5}


class Synthetic:
    """The synthetic worlds as a `World`.

    Reward is 1.0 when the goal holds, else 0.0. Progress is the largest share of its conditions that held at once so
    far.
    """

    isolated = False

    def __init__(self):
        self.facts = {"worlds": WORLDS}
        self._task_id, self._state, self._progress, self._done = "", State(at="", lies={}), 0.0, False

    def tasks(self, split: str) -> Sequence[str]:
        """Sorted ids. Raises ValueError for an unknown split."""
        check_split(split, SPLITS)
        return [f"{split}/{index:05d}" for index in range(SPLITS[split])]

    def left_out(self, split: str) -> Mapping[str, str]:
        """No world is left out."""
        check_split(split, SPLITS)
        return {}

    def fingerprint(self, task_ids: Iterable[str]) -> str:
        """sha256 of the worlds' specifications. Raises ValueError for an unknown id."""
        return content_hash(task_ids, lambda task_id: msgspec.json.encode(checked_spec(task_id), order="deterministic"))

    def reset(self, task_id: str) -> Observation:
        """Start a task. Raises ValueError for an unknown split or a number outside it (syn_train takes any)."""
        spec = checked_spec(task_id)
        self._task_id, self._state = task_id, State(at="", lies=spec.lies)
        self._progress, self._done = 0.0, False
        return Observation(text=spec.opening, task=spec.task)

    def step(self, action: str) -> Result:
        """Take one action. Raises RuntimeError before the first reset and after the task is done."""
        spec, rules = self._playing()
        if self._done:
            raise RuntimeError("the task is over: call reset(task_id)")
        try:
            self._state, event, values = self._outcome(action)
            valid = True
        except Refusal as refusal:
            event, values, valid = refusal.event, refusal.values, False
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
        """All commands that are accepted now, sorted."""
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
        """Why an action would be refused now; None if it would be accepted."""
        try:
            self._outcome(action)
        except Refusal as refusal:
            return refusal
        return None

    def _outcome(self, action: str) -> tuple[State, str, dict[str, str]]:
        """(state after an action, event that reports it, values of the event). Raises Refusal."""
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


def checked_spec(task_id: str) -> Spec:
    """The world of a task id. Raises ValueError for an unknown split or a number outside it."""
    split, _, number = task_id.partition("/")
    good = split in SPLITS and re.fullmatch(r"[0-9]{5}|[1-9][0-9]{5,8}", number)
    if not good or (split != "syn_train" and int(number) >= SPLITS[split]):
        raise ValueError(
            f"unknown task {task_id!r}: expected <split>/<five-digit number of the split> with the splits "
            f"{', '.join(SPLITS)}"
        )
    return make_spec(task_id)

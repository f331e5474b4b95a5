"""PDDL planning problems in words, after AgentBoard: blocksworld, gripper, barman, tyreworld.

A task is `<split>/<domain>-<number>`; its problem is drawn from that id (`domains.py`) and played by the rules
(`strips.py`). The reply to an action says what changed; the reply to an impossible one, which condition is missing.
`check valid actions` and `look` (the whole state) are always accepted.
Left out: the turn limit (the runner's; AgentBoard's is 30), AgentBoard's own problems and wordings.

Play one: python -m envs.play --env pddl --tasks --split pddl_test
Source: AgentBoard (arXiv 2401.13178) for the choice of domains, the number of problems and the measure of progress.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from envs.base import Observation, Result, check_split, check_task, content_hash
from envs.pddl.domains import DOMAINS, Domain, Drawn
from envs.pddl.strips import Action, Fact, Operator, Problem, find_plan

PROBLEMS = 1  # version of the problems: raise it whenever an id stands for a different one
SEED = 0
SPLITS = {  # split -> problems per domain
    "pddl_easy": dict.fromkeys(DOMAINS, 5),  # a few actions each
    "pddl_test": {"barman": 20, "blocksworld": 10, "gripper": 20, "tyreworld": 10},
}
CHECK, LOOK = "check valid actions", "look"


@lru_cache
def ids_of(split: str) -> tuple[str, ...]:
    return tuple(f"{split}/{name}-{index:03d}" for name, count in SPLITS[split].items() for index in range(count))


def listed(parts: Iterable[str]) -> str:
    """a; a and b; a, b, and c."""
    *parts, last = parts
    return f"{', '.join(parts)}{',' if len(parts) > 1 else ''} and {last}" if parts else last


class Task:
    """A problem and its commands in words, shared by all worlds that play it."""

    def __init__(self, domain: Domain, problem: Problem):
        self.domain, self.problem = domain, problem
        self.commands: dict[str, list[Action]] = {}  # command -> its actions; at most one applies
        for action in problem.actions:
            self.commands.setdefault(self.command(action), []).append(action)
        self.goal = listed(self.says(problem.facts_of(problem.goal)))

    def operator(self, action: Action) -> tuple[Operator, dict[str, str]]:
        """An action's operator, and {parameter: object}."""
        operator = next(each for each in self.domain.operators if each.name == action.name)
        return operator, dict(zip(operator.parameters, action.objects, strict=True))

    def command(self, action: Action) -> str:
        _, named = self.operator(action)
        return self.domain.actions[action.name].format_map({name[1:]: chosen for name, chosen in named.items()})

    def says(self, facts: Iterable[Fact], ended: bool = False) -> list[str]:
        """The facts in words; with `ended`, as facts that are no longer true."""
        texts = (self.domain.says.get(name, ("", ""))[ended].format(*objects) for name, *objects in facts)
        return [text for text in texts if text]

    def describe(self, state: int) -> str:
        return f"At present {listed(self.says([*self.problem.fixed, *self.problem.facts_of(state)]))}."

    def change(self, before: int, after: int) -> str:
        new = self.says(self.problem.facts_of(after & ~before))
        gone = self.says(self.problem.facts_of(before & ~after), ended=True)
        return f"Now {listed(new + gone)}." if new + gone else "Nothing changes."

    def refusal(self, command: str, state: int) -> str:
        """Why a command is impossible: the first condition missing from its nearest action."""
        action = min(self.commands[command], key=lambda a: (a.need & ~state | a.forbid & state).bit_count())
        operator, named = self.operator(action)
        facts = [tuple(named.get(word, word) for word in fact) for fact in (*operator.need, *operator.forbid)]
        lacking = self.says(fact for fact in facts if action.need & ~state & self.problem.bits.get(fact, 0))
        blocking = self.says(fact for fact in facts if action.forbid & state & self.problem.bits.get(fact, 0))
        why = [f"it is not so that {text}" for text in lacking] + blocking
        return f"You cannot {command} now{': ' + why[0] if why else ''}."


def draw_task(task_id: str) -> tuple[Domain, Drawn]:
    """The domain and the problem that a task id stands for."""
    split, _, name = task_id.partition("/")
    domain = DOMAINS[name.partition("-")[0]]
    return domain, domain.draw(np.random.default_rng([SEED, zlib.crc32(task_id.encode())]), split == "pddl_easy")


@lru_cache(maxsize=512)
def load_task(task_id: str) -> Task:
    domain, (objects, start, goal) = draw_task(task_id)
    return Task(domain, Problem(domain.types, domain.operators, objects, start, goal))


class Pddl:
    """The four domains as a `World`.

    Reward is 1.0 when the whole goal holds, else 0.0. Progress is the largest share of the goal's facts that held at
    once so far. Case, extra blanks and a final period of an action are ignored.
    """

    isolated = False

    def __init__(self):
        self.facts = {"problems": PROBLEMS}
        self._task_id, self._state, self._progress, self._done = "", 0, 0.0, False

    def tasks(self, split: str) -> Sequence[str]:
        """Ids of a split: pddl_test has as many problems as AgentBoard (60), pddl_easy is small. Raises ValueError."""
        check_split(split, SPLITS)
        return ids_of(split)

    def left_out(self, split: str) -> Mapping[str, str]:
        """No problem is left out."""
        check_split(split, SPLITS)
        return {}

    def fingerprint(self, task_ids: Iterable[str]) -> str:
        """sha256 of the problems, and of their domains in PDDL and in words. Raises ValueError for an unknown id."""

        def content(task_id: str) -> bytes:
            check_task(task_id, "pddl", "<domain>-<number>", SPLITS, ids_of)
            domain, drawn = draw_task(task_id)
            return json.dumps([domain.pddl, domain.about, domain.actions, domain.says, drawn]).encode()

        return content_hash(task_ids, content)

    def reset(self, task_id: str) -> Observation:
        """Start a task. Raises ValueError for an unknown id."""
        check_task(task_id, "pddl", "<domain>-<number>", SPLITS, ids_of)
        self._task_id, task = task_id, load_task(task_id)
        self._state, self._progress, self._done = task.problem.start, 0.0, False
        self._update_progress()
        text = f"{task.domain.about}\n{task.describe(self._state)}\nYour task is to bring about that {task.goal}."
        return Observation(text=text, task=task.goal)

    def step(self, action: str) -> Result:
        """Take one action."""
        if not self._task_id or self._done:
            raise RuntimeError(f"{'the task is over' if self._done else 'no task yet'}: call reset(task_id)")
        task, before = load_task(self._task_id), self._state
        command = " ".join(action.lower().split()).removesuffix(".")
        valid, possible = True, [each for each in task.commands.get(command, ()) if each.applies(before)]
        if possible:
            self._state = possible[0].apply(before)
            text = task.change(before, self._state)
        elif command == LOOK:
            text = task.describe(before)
        elif command == CHECK:
            text = f"You can {', '.join(self.actions())}."
        elif command in task.commands:
            valid, text = False, task.refusal(command, before)
        else:
            valid, text = False, f'That is no action here. "{CHECK}" lists what you can do.'
        self._update_progress()
        return Result(
            observation=text,
            reward=float(self._done),
            progress=self._progress,
            success=self._done,
            done=self._done,
            valid=valid,
        )

    def actions(self) -> list[str]:
        """All commands that are possible now, sorted."""
        commands = load_task(self._need_task()).commands.items()
        possible = [command for command, actions in commands if any(each.applies(self._state) for each in actions)]
        return sorted([*possible, CHECK, LOOK])

    def commands(self) -> list[str]:
        """Templates of all commands of the task's domain; placeholders are parameter types."""
        domain = load_task(self._need_task()).domain
        types = {
            operator.name: {name[1:]: f"{{{kind}}}" for name, kind in operator.parameters.items()}
            for operator in domain.operators
        }
        templates = [template.format_map(types[name]) for name, template in domain.actions.items()]
        return [*dict.fromkeys(templates), CHECK, LOOK]

    def solution(self) -> list[str]:
        """Commands that lead from here to the goal, few but not the fewest; for scripted players and tests.

        Raises ValueError if none are found: some states are dead ends.
        """
        task = load_task(self._need_task())
        plan = find_plan(task.problem, self._state)
        if plan is None:
            raise ValueError(f"no plan is found in {self._task_id} from here: {task.describe(self._state)}")
        return [task.command(action) for action in plan]

    def _need_task(self) -> str:
        if not self._task_id:
            raise RuntimeError("no task yet: call reset(task_id)")
        return self._task_id

    def _update_progress(self) -> None:
        """Records how much of the goal holds now."""
        goal = load_task(self._task_id).problem.goal
        self._progress = max(self._progress, (self._state & goal).bit_count() / goal.bit_count())
        self._done = self._progress == 1.0

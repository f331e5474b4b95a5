"""ScienceWorld: elementary science in a house of ten rooms, on its own simulator. Needs scienceworld and Java.

A task is `<split>/<task>-<variation>`. Texts are the simulator's. As in AgentBoard, doors and containers are open,
flower pots water themselves, and there are electrical actions only if the task is about them. A step queries only the
answer, the score and the end; the package's own step also lists all possible actions, which takes most of its time.
`check valid actions` lists the templates. A virtual machine keeps state between tasks (a task replayed in it opens in
another wording), so each task gets a new one, of 512 MiB at most.
Left out: the turn limit (the runner's; AgentBoard's is 30), AgentBoard's subgoals, the action `reset task`.

Play one: python -m envs.play --env scienceworld --tasks --split scienceworld_test
Source: ScienceWorld (arXiv 2203.07540), version 1.2.3; AgentBoard (arXiv 2401.13178) for the simplifications.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from envs.base import Observation, Result, check_split, check_task, content_hash

# Number of variations of each task in train, dev and test, which are numbered in this order.
TASKS = {
    "boil": (14, 7, 9),
    "change-the-state-of-matter-of": (14, 7, 9),
    "chemistry-mix": (16, 8, 8),
    "chemistry-mix-paint-secondary-color": (18, 9, 9),
    "chemistry-mix-paint-tertiary-color": (18, 9, 9),
    "find-animal": (150, 75, 75),
    "find-living-thing": (150, 75, 75),
    "find-non-living-thing": (150, 75, 75),
    "find-plant": (150, 75, 75),
    "freeze": (14, 7, 9),
    "grow-fruit": (62, 31, 33),
    "grow-plant": (62, 31, 33),
    "identify-life-stages-1": (6, 3, 5),
    "identify-life-stages-2": (4, 2, 4),
    "inclined-plane-determine-angle": (84, 42, 42),
    "inclined-plane-friction-named-surfaces": (692, 346, 348),
    "inclined-plane-friction-unnamed-surfaces": (80, 40, 42),
    "lifespan-longest-lived": (62, 31, 32),
    "lifespan-longest-lived-then-shortest-lived": (62, 31, 32),
    "lifespan-shortest-lived": (62, 31, 32),
    "measure-melting-point-known-substance": (218, 109, 109),
    "measure-melting-point-unknown-substance": (150, 75, 75),
    "melt": (14, 7, 9),
    "mendelian-genetics-known-plant": (60, 30, 30),
    "mendelian-genetics-unknown-plant": (240, 120, 120),
    "power-component": (10, 5, 5),
    "power-component-renewable-vs-nonrenewable-energy": (10, 5, 5),
    "test-conductivity": (450, 225, 225),
    "test-conductivity-of-unknown-substances": (300, 150, 150),
    "use-thermometer": (270, 135, 135),
}
SPLITS = ("scienceworld_train", "scienceworld_dev", "scienceworld_test")
SIMPLE = "selfWateringFlowerPots,openContainers,openDoors"
CHECK, RESET = "check valid actions", "reset task"
UNKNOWN = "No known action matches that input."  # the simulator's
# Little memory, few threads, a quick start; and hashCode=2 for reproducibility. The simulator iterates over sets of
# objects in the order of Java's identity hashes, which depend on a seed that each thread draws when it starts, so the
# threads of a machine decided the order of a room's objects and where a bee flew. With equal hashes the order is that
# of insertion.
JAVA_OPTIONS = [
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:+UnlockExperimentalVMOptions",
    "-XX:hashCode=2",
]


@lru_cache
def ids_of(split: str) -> tuple[str, ...]:
    position = SPLITS.index(split)
    return tuple(
        sorted(
            f"{split}/{task}-{sum(counts[:position]) + index:04d}"
            for task, counts in TASKS.items()
            for index in range(counts[position])
        )
    )


def panel_ids(split: str = "scienceworld_test") -> list[str]:
    """The first, middle and last variation of each task in a split."""
    chosen = []
    for task in TASKS:
        ids = [task_id for task_id in ids_of(split) if task_id.partition("/")[2].rpartition("-")[0] == task]
        chosen += [ids[0], ids[len(ids) // 2], ids[-1]]
    return chosen


def simplifications(task: str) -> str:
    """The simulator's simplifications of a task. Tasks about electricity keep its actions; the simulator insists."""
    return SIMPLE if "power-component" in task or "conductivity" in task else f"{SIMPLE},noElectricalAction"


class ScienceWorld:
    """ScienceWorld as a `World`.

    Reward is the simulator's score, 0..1 (its 0..100; a negative score, for a fatal mistake, is 0). Progress is the
    largest score so far; a task is solved at the full score. Raises ImportError if scienceworld or Java is missing.
    """

    isolated = True

    def __init__(self):
        missing = [
            name
            for name, found in (
                ("scienceworld", importlib.util.find_spec("scienceworld")),
                ("Java", shutil.which("java")),
            )
            if not found
        ]
        if missing:
            raise ImportError(
                f"env 'scienceworld' needs {' and '.join(missing)}: pip install -r "
                "requirements/worlds.txt, and a Java runtime of version 8 or later on the PATH (Debian: "
                "apt install default-jre-headless)"
            )
        self.facts = {"scienceworld": importlib.metadata.version("scienceworld"), "simplifications": SIMPLE}
        self._env: Any = None
        self._task_id, self._progress, self._done, self._actions = "", 0.0, False, []

    def tasks(self, split: str) -> Sequence[str]:
        """Sorted ids: 3,592, 1,796 and 1,819 variations of 30 tasks in the simulator's three splits."""
        check_split(split, SPLITS)
        return ids_of(split)

    def left_out(self, split: str) -> Mapping[str, str]:
        """No variation is left out."""
        check_split(split, SPLITS)
        return {}

    def fingerprint(self, task_ids: Iterable[str]) -> str:
        """sha256 of the ids, the package's version and the simplifications. Raises ValueError for an unknown id."""

        def content(task_id: str) -> bytes:
            check_task(task_id, "scienceworld", "<task>-<variation>", SPLITS, ids_of)
            return repr(self.facts).encode()

        return content_hash(task_ids, content)

    def reset(self, task_id: str) -> Observation:
        """Start a task in a new virtual machine. Raises ValueError for an unknown id."""
        check_task(task_id, "scienceworld", "<task>-<variation>", SPLITS, ids_of)
        self._task_id, self._done, self._actions = task_id, False, []
        self._load()
        task = self._env.get_task_description()
        text = self._env.server.step("look around")
        self._progress = max(0.0, self._env.server.getScore())
        return Observation(text=f"{task}\n{text}", task=task.removeprefix("Your task is to "))

    def step(self, action: str) -> Result:
        """Take one action. Actions unknown to the simulator, and `reset task`, are not valid."""
        if not self._task_id or self._done:
            raise RuntimeError(f"{'the task is over' if self._done else 'no task yet'}: call reset(task_id)")
        server = self._env.server
        command = action.encode(errors="replace").decode().strip()  # Java receives only valid UTF-8
        if command == CHECK:
            text = f"You can {', '.join(self.commands())}."
        else:
            text = UNKNOWN if command.lower() == RESET else server.step(command)
        if text != UNKNOWN:
            self._actions = []
        score = server.getScore()
        self._progress = max(self._progress, score)
        self._done = score < 0 or server.getCompleted()
        return Result(
            observation=text,
            reward=max(0.0, score),
            progress=self._progress,
            success=score >= 1.0,
            done=self._done,
            valid=text != UNKNOWN,
        )

    def actions(self) -> list[str]:
        """All actions on present objects that the simulator accepts, sorted: hundreds, in a tenth of a second. Queried
        once per state, since the simulator picks one of an object's many names at random."""
        self._need_task()
        if not self._actions:
            self._actions = sorted({*self._env.get_valid_action_object_combinations(), CHECK} - {RESET})
        return list(self._actions)

    def commands(self) -> list[str]:
        """Templates of all commands."""
        self._need_task()
        templates = [text.replace("OBJ", "{object}") for text in self._env.get_possible_actions() if text != RESET]
        return [*templates, CHECK]

    def solution(self) -> list[str]:
        """The simulator's own solution, which is long and sometimes fails. Restarts the task."""
        self._need_task()
        self._load(gold=True)
        path = self._env.get_gold_action_sequence()
        self.reset(self._task_id)
        return path

    def close(self) -> None:
        """Stops the virtual machine."""
        if self._env is not None:
            self._env.close()
            self._env._gateway.java_process.wait(timeout=30)
            self._env = None

    def _load(self, gold: bool = False) -> None:
        from py4j.java_gateway import launch_gateway
        from scienceworld import scienceworld

        self.close()
        scienceworld.launch_gateway = partial(launch_gateway, javaopts=JAVA_OPTIONS)  # the package passes none
        self._env = scienceworld.ScienceWorldEnv()
        task, _, variation = self._task_id.partition("/")[2].rpartition("-")
        self._env.load(task, int(variation), simplifications(task), gold)
        self._env.server.reset()

    def _need_task(self) -> None:
        if not self._task_id:
            raise RuntimeError("no task yet: call reset(task_id)")

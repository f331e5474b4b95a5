"""BabyAI: missions in a grid of rooms, in text and with macro-actions like AgentBoard's. Needs minigrid.

The text describes the visible cells of the 7 x 7 grid in front of the agent; objects of the same colour and kind are
numbered from near to far. The agent may turn, move, toggle and drop, or name an object: `go to red ball 1` walks
through visible cells until the agent faces the ball. `check available actions` is always accepted. A task is
`<split>/<level>-<seed>`.
Left out: the turn limit (the runner's; AgentBoard's is 30) and the levels' own limit; AgentBoard's wordings and its
hand-written subgoals, so progress is not comparable with its tables; its level OpenDoorsOrderN4Debug, which in
minigrid 3.2.0 fails as soon as the first of two doors is opened and is replaced by OpenDoorsOrderN4.

Play one: python -m envs.play --env babyai --tasks --split babyai_test
Source: BabyAI (arXiv 1810.08272) as in minigrid; AgentBoard (arXiv 2401.13178) for levels, seeds and macro-actions.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from envs.base import Observation, Result, check_split, check_task, content_hash

LEVELS = (
    "GoToRedBallGrey",
    "GoToRedBall",
    "GoToRedBallNoDists",
    "GoToObjS6",
    "GoToLocalS8N7",
    "GoToObjMazeS7",
    "GoToImpUnlock",
    "GoToSeqS5R2",
    "GoToRedBlueBall",
    "GoToDoor",
    "GoToObjDoor",
    "Open",
    "OpenRedDoor",
    "OpenDoorLoc",
    "OpenRedBlueDoorsDebug",
    "OpenDoorsOrderN4",
    "Pickup",
    "UnblockPickup",
    "PickupLoc",
    "PickupDistDebug",
    "PickupAbove",
    "Unlock",
    "UnlockLocalDist",
    "UnlockPickupDist",
    "BlockedUnlockPickup",
    "UnlockToUnlock",
    "FindObjS7",
    "KeyCorridorS6R3",
)
EASY = ("GoToRedBallNoDists", "GoToObjS6", "OpenRedDoor", "PickupDistDebug")
SPLITS = {"babyai_easy": (EASY, range(3)), "babyai_test": (LEVELS, range(1234, 1238))}
CHECK = "check available actions"
LEFT, RIGHT, FORWARD, PICKUP, DROP, TOGGLE, DONE = range(7)  # minigrid's actions
SIMPLE = {"turn left": LEFT, "turn right": RIGHT, "move forward": FORWARD, "toggle": TOGGLE, "drop": DROP}
MACROS = ("go to {object}", "pick up {object}", "go through {door}", "toggle and go through {door}")
HERE, AHEAD = (3, 6), (0, -1)  # the agent's cell and direction in its view, whose rows run from far to near
BOT_SEARCHES = 1000  # limit per mission of the searches of minigrid's bot
COMPOUND = ("BeforeInstr", "AfterInstr", "AndInstr")


class Seen(NamedTuple):
    """A visible object: its numbered name, its cell in the view, and minigrid's object."""

    name: str
    cell: tuple[int, int]
    thing: Any


def ids_of(split: str) -> list[str]:
    levels, seeds = SPLITS[split]
    return sorted(f"{split}/{level}-{seed}" for level in levels for seed in seeds)


class BabyAI:
    """BabyAI's levels as a `World`.

    Reward is 1.0 for an accomplished mission, however long it took. Progress is the largest mean so far over the
    mission's instructions: 1 if done, 0.5 while facing an object to pick up or open, else 0, as for an instruction
    whose turn has not come. Raises ImportError without minigrid.
    """

    isolated = False

    def __init__(self):
        try:
            import gymnasium
            import minigrid
        except ImportError as error:
            why = f"env 'babyai' needs minigrid ({error}): pip install -r requirements/worlds.txt"
            raise ImportError(why) from error
        self._make = gymnasium.make
        self.facts = {"minigrid": minigrid.__version__}
        self._env: Any = None

    def tasks(self, split: str) -> Sequence[str]:
        """Sorted ids: babyai_test has AgentBoard's 28 levels with 4 seeds each, babyai_easy four small levels."""
        check_split(split, SPLITS)
        return ids_of(split)

    def left_out(self, split: str) -> Mapping[str, str]:
        """No level is left out."""
        check_split(split, SPLITS)
        return {}

    def fingerprint(self, task_ids: Iterable[str]) -> str:
        """sha256 of the ids and of minigrid's version, which makes the levels. Raises ValueError for an unknown id."""

        def content(task_id: str) -> bytes:
            check_task(task_id, "babyai", "<level>-<seed>", SPLITS, ids_of)
            return self.facts["minigrid"].encode()

        return content_hash(task_ids, content)

    def reset(self, task_id: str) -> Observation:
        """Start a task. Raises ValueError for an unknown id."""
        check_task(task_id, "babyai", "<level>-<seed>", SPLITS, ids_of)
        level, _, seed = task_id.partition("/")[2].rpartition("-")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints rejected layouts
            self._env = self._make(f"BabyAI-{level}-v{1 if level == 'GoToObjS6' else 0}").unwrapped
            self._env.reset(seed=int(seed))
        self._env.max_steps = 10**9
        self._env.gen_obs = dict  # skips minigrid's observation in every step, which is not used
        self._success = self._done = False
        self._progress = self._milestones()
        self._look()
        task = self._env.mission
        text = f"You are in a building with rooms, doors and things. Your task is to {task}.\n{self._text}"
        return Observation(text=text, task=task)

    def step(self, action: str) -> Result:
        """Take one action. Case and extra spaces do not matter."""
        if self._env is None or self._done:
            raise RuntimeError(f"{'no task yet' if self._env is None else 'the task is over'}: call reset(task_id)")
        command = " ".join(action.lower().split())
        valid = command == CHECK or command in self._moves
        if command == CHECK:
            text = f"You can {', '.join(self.actions())}."
        elif valid:
            self._do(self._moves[command])
            self._look()
            text = "The task is solved." if self._success else "The task has failed." if self._done else self._text
        elif command in SIMPLE:
            text = f"You cannot {command} here."
        else:
            text = f'That is no action that can be done here. "{CHECK}" lists what you can do.'
        return Result(
            observation=text,
            reward=float(self._success),
            progress=self._progress,
            success=self._success,
            done=self._done,
            valid=valid,
        )

    def actions(self) -> list[str]:
        """Every action accepted now, sorted. Objects can be named if they are visible and reachable."""
        self._need_task()
        return sorted([*self._moves, CHECK])

    def commands(self) -> list[str]:
        """Templates of all commands."""
        self._need_task()
        return [*SIMPLE, *MACROS, CHECK]

    def solution(self, most: int = 500) -> list[str]:
        """Commands that follow minigrid's own bot from here, each covering as many of its moves as possible; for
        scripted players and tests. Raises ValueError if the bot fails."""
        from minigrid.utils.baby_ai_bot import BabyAIBot, DisappearedBoxError

        class Bot(BabyAIBot):
            def _shortest_path(self, *args, **kwargs):
                assert self.bfs_counter < BOT_SEARCHES  # it may search forever
                return super()._shortest_path(*args, **kwargs)

        self._need_task()
        leader: BabyAI = pickle.loads(pickle.dumps(self))
        del leader._env.gen_obs
        path = {leader._state_key(): 0}  # state -> time of its last visit
        with contextlib.suppress(AssertionError, DisappearedBoxError):  # states that the bot cannot handle
            bot = Bot(leader._env)
            for time in range(1, most):
                move = int(bot.replan())
                leader._do([move])
                path[leader._state_key()] = time
                if leader._done or move == DONE:
                    break
        if not leader._success:
            raise ValueError(f"minigrid's bot does not accomplish {self._env.mission!r}")
        commands, player = [], self
        while not player._success:
            tries = [(command, pickle.loads(pickle.dumps(player))) for command in player._moves]
            for command, copy in tries:
                copy.step(command)
            command, after = max(tries, key=lambda pair: path.get(pair[1]._state_key(), -1))
            if path.get(after._state_key(), -1) <= path[player._state_key()]:
                raise ValueError(f"no command follows minigrid's bot after {commands}")
            commands, player = [*commands, command], after
        return commands

    def _state_key(self) -> tuple:
        """Identifies this state of a task among its others."""
        env = self._env
        carried = env.carrying and (env.carrying.type, env.carrying.color)
        done = [done for _, done, _ in instructions(env.instrs, self._done, True)]
        return tuple(map(int, env.agent_pos)), env.agent_dir, carried, env.grid.encode().tobytes(), *done

    def _need_task(self) -> None:
        if self._env is None:
            raise RuntimeError("no task yet: call reset(task_id)")

    # ---- view --------------------------------------------------------------------------------------------------------

    def _view(self) -> tuple[dict[tuple[int, int], Any], list[Seen]]:
        """{visible cell: minigrid's object or None}, and the objects among them, nearest first."""
        grid, mask = self._env.gen_obs_grid()
        cells = {(x, y): grid.get(x, y) for x in range(7) for y in range(7) if mask[x, y]}
        cells[HERE] = None  # minigrid shows the carried object there
        near = sorted(cells, key=lambda cell: (abs(cell[0] - HERE[0]) + HERE[1] - cell[1], cell))
        counts, seen = Counter(), []
        for cell in near:
            thing = cells[cell]
            if thing is not None and thing.type != "wall":
                kind = f"{thing.color} {thing.type}"
                counts[kind] += 1
                seen.append(Seen(name=f"{kind} {counts[kind]}", cell=cell, thing=thing))
        return cells, seen

    def _look(self) -> None:
        """Updates the view's text and the possible moves."""
        cells, seen = self._view()
        self._text, self._moves = self._describe(cells, seen), self._find_moves(cells, seen)

    def _describe(self, cells: dict[tuple[int, int], Any], seen: list[Seen]) -> str:
        parts = [f"{door_state(one.thing)}{one.name}, {relative_position(one.cell)}" for one in seen]
        things = f"You see: {'; '.join(parts)}." if parts else "You see nothing but walls and floor."
        free, cell = 0, (HERE[0], HERE[1] - 1)
        while cell in cells and walkable(cells[cell]):
            free, cell = free + 1, (cell[0], cell[1] - 1)
        end = "" if cells.get(cell) is None else f", then there is a {cells[cell].type}"
        ahead = f"Ahead {free} step{'' if free == 1 else 's'} {'is' if free == 1 else 'are'} free{end}."
        carried = self._env.carrying
        holds = f"You carry a {carried.color} {carried.type}." if carried else "You carry nothing."
        return f"{things} {ahead} {holds}"

    # ---- moves -------------------------------------------------------------------------------------------------------

    def _find_moves(self, cells: dict[tuple[int, int], Any], seen: list[Seen]) -> dict[str, list[int]]:
        """{command: minigrid's actions} of all commands possible here."""
        env, moves = self._env, {"turn left": [LEFT], "turn right": [RIGHT]}
        front = env.grid.get(*env.front_pos)
        if walkable(front):
            moves["move forward"] = [FORWARD]
        if front is not None and (front.type == "box" or front.type == "door" and self._opens(front)):
            moves["toggle"] = [TOGGLE]
        if front is None and env.carrying:
            moves["drop"] = [DROP]
        routes = find_routes(cells)
        for name, cell, thing in seen:
            if cell not in routes:
                continue
            moves[f"go to {name}"] = routes[cell] or [DONE]
            if thing.can_pickup() and not env.carrying:
                moves[f"pick up {name}"] = [*routes[cell], PICKUP]
            if thing.type == "door" and thing.is_open:
                moves[f"go through {name}"] = [*routes[cell], FORWARD, FORWARD]
            elif thing.type == "door" and self._opens(thing):
                moves[f"toggle and go through {name}"] = [*routes[cell], TOGGLE, FORWARD, FORWARD]
        return moves

    def _opens(self, door: Any) -> bool:
        """Whether the agent can open or close the door: it is unlocked, or the agent carries its key."""
        carried = self._env.carrying
        return not door.is_locked or (carried is not None and (carried.type, carried.color) == ("key", door.color))

    def _do(self, moves: list[int]) -> None:
        """Executes minigrid's actions until the mission ends or the way forward is blocked."""
        for move in moves:
            before = tuple(self._env.agent_pos)
            _, reward, self._done, _, _ = self._env.step(move)
            self._success = self._done and reward > 0
            self._progress = 1.0 if self._success else max(self._progress, self._milestones())
            if self._done or (move == FORWARD and tuple(self._env.agent_pos) == before):
                break

    # ---- progress ----------------------------------------------------------------------------------------------------

    def _milestones(self) -> float:
        """The mean over the mission's instructions in the current state."""
        front, shares = self._env.grid.get(*self._env.front_pos), []
        for instruction, done, its_turn in instructions(self._env.instrs, False, True):
            faced = its_turn and type(instruction).__name__ != "GoToInstr"
            faced = faced and any(thing is front for thing in instruction.desc.obj_set)
            shares.append(1.0 if done else 0.5 * faced)
        return sum(shares) / len(shares)


def instructions(instruction: Any, done: bool, its_turn: bool) -> Iterator[tuple[Any, bool, bool]]:
    """(simple instruction, whether it is done, whether its turn has come) of each in a mission."""
    kind = type(instruction).__name__
    if kind not in COMPOUND:
        yield instruction, done, its_turn
        return
    a_done, b_done = (done or status == "success" for status in (instruction.a_done, instruction.b_done))
    yield from instructions(instruction.instr_a, a_done, its_turn and (kind != "AfterInstr" or b_done))
    yield from instructions(instruction.instr_b, b_done, its_turn and (kind != "BeforeInstr" or a_done))


def walkable(thing: Any) -> bool:
    return thing is None or thing.can_overlap()


def door_state(thing: Any) -> str:
    if thing.type != "door":
        return ""
    return "open " if thing.is_open else "locked " if thing.is_locked else "closed "


def relative_position(cell: tuple[int, int]) -> str:
    """A cell's position relative to the agent: 2 steps ahead and 1 to the left."""
    ahead, right = HERE[1] - cell[1], cell[0] - HERE[0]
    parts = [f"{ahead} step{'' if ahead == 1 else 's'} ahead"] if ahead else []
    parts += [f"{abs(right)} to the {'right' if right > 0 else 'left'}"] if right else []
    return " and ".join(parts)


def find_routes(cells: dict[tuple[int, int], Any]) -> dict[tuple[int, int], list[int]]:
    """{cell: minigrid's actions of a shortest route to facing it}, through visible cells."""
    routes, seen, queue = {}, {(HERE, AHEAD)}, deque([(HERE, AHEAD, [])])
    while queue:
        here, (dx, dy), moves = queue.popleft()
        front = (here[0] + dx, here[1] + dy)
        routes.setdefault(front, moves)
        after = [(here, (dy, -dx), [*moves, LEFT]), (here, (-dy, dx), [*moves, RIGHT])]
        if front in cells and walkable(cells[front]):
            after.append((front, (dx, dy), [*moves, FORWARD]))
        for state in after:
            if state[:2] not in seen:
                seen.add(state[:2])
                queue.append(state)
    return routes

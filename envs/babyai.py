"""BabyAI: missions in a grid of rooms, told in text and played with macro-actions, after AgentBoard's. Needs minigrid.

The agent is told what it sees of the 7 x 7 cells before it, objects of a colour and kind numbered from near to far. It
may turn, move, toggle and drop, or name a thing: `go to red ball 1` walks through the cells in sight until it is
before the ball. `check available actions` is always accepted. A task is `<split>/<level>-<seed>`.
Left out: the turn limit (the runner's; AgentBoard's is 30) and the levels' own limit; AgentBoard's wordings and its
hand-written subgoals, so that progress is not comparable with its tables; its level OpenDoorsOrderN4Debug, which in
minigrid 3.2.0 fails as soon as the first of two doors is opened: OpenDoorsOrderN4 stands in for it.

Play one: python -m envs.play --env babyai --tasks --split babyai_test
Source: BabyAI (arXiv 1810.08272) as minigrid has it; AgentBoard (arXiv 2401.13178) for levels, seeds and macro-actions.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from envs.base import Observation, Result, check_split, check_task

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
HERE, AHEAD = (3, 6), (0, -1)  # the agent's cell and direction in its view, whose rows go from far to near
BOT_SEARCHES = 1000  # of minigrid's bot for a mission
COMPOUND = ("BeforeInstr", "AfterInstr", "AndInstr")


class Seen(NamedTuple):
    """A thing in sight: `name` with its number, its cell in the view, and minigrid's object."""

    name: str
    cell: tuple[int, int]
    thing: Any


def ids_of(split: str) -> list[str]:
    levels, seeds = SPLITS[split]
    return sorted(f"{split}/{level}-{seed}" for level in levels for seed in seeds)


class BabyAI:
    """BabyAI's levels as a `World`.

    Reward is 1.0 for a mission accomplished, however long that took. Progress is, at best, the mean over the mission's
    instructions: 1 for one that is done, 0.5 before a thing that is to be picked up or opened, 0 else and as long as
    its turn has not come. Raises ImportError without minigrid.
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
        """Sorted ids: babyai_test has AgentBoard's 28 levels with 4 seeds each, babyai_easy four small ones."""
        check_split(split, SPLITS)
        return ids_of(split)

    def reset(self, task_id: str) -> Observation:
        """Start a task. ValueError for an unknown id."""
        check_task(task_id, "babyai", "<level>-<seed>", SPLITS, ids_of)
        level, _, seed = task_id.partition("/")[2].rpartition("-")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which layouts it rejects
            self._env = self._make(f"BabyAI-{level}-v{1 if level == 'GoToObjS6' else 0}").unwrapped
            self._env.reset(seed=int(seed))
        self._env.max_steps = 10**9
        self._env.gen_obs = dict  # its own observation, at each of its steps, is not looked at
        self._success = self._done = False
        self._progress = self._milestones()
        self._look()
        task = self._env.mission
        text = f"You are in a building with rooms, doors and things. Your task is to {task}.\n{self._text}"
        return Observation(text=text, task=task)

    def step(self, action: str) -> Result:
        """Do one action. Case and surplus blanks of it do not matter."""
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
        """What can be done here, sorted: things can be named that are in sight and can be walked to."""
        self._need_task()
        return sorted([*self._moves, CHECK])

    def commands(self) -> list[str]:
        """Templates of all commands."""
        self._need_task()
        return [*SIMPLE, *MACROS, CHECK]

    def solution(self, most: int = 500) -> list[str]:
        """Commands that follow minigrid's own bot from here, with as many of its moves at once as a command can make;
        for scripted players and tests. Raises ValueError where the bot fails."""
        from minigrid.utils.baby_ai_bot import BabyAIBot, DisappearedBoxError

        class Bot(BabyAIBot):
            def _shortest_path(self, *args, **kwargs):
                assert self.bfs_counter < BOT_SEARCHES  # it may search for ever
                return super()._shortest_path(*args, **kwargs)

        self._need_task()
        leader: BabyAI = pickle.loads(pickle.dumps(self))
        del leader._env.gen_obs
        path = {leader._mark(): 0}  # when it was in which state last
        with contextlib.suppress(AssertionError, DisappearedBoxError):  # what it does not know a way out of
            bot = Bot(leader._env)
            for time in range(1, most):
                move = int(bot.replan())
                leader._do([move])
                path[leader._mark()] = time
                if leader._done or move == DONE:
                    break
        if not leader._success:
            raise ValueError(f"minigrid's bot does not accomplish {self._env.mission!r}")
        commands, player = [], self
        while not player._success:
            tries = [(command, pickle.loads(pickle.dumps(player))) for command in player._moves]
            for command, one in tries:
                one.step(command)
            command, after = max(tries, key=lambda each: path.get(each[1]._mark(), -1))
            if path.get(after._mark(), -1) <= path[player._mark()]:
                raise ValueError(f"no command follows minigrid's bot after {commands}")
            commands, player = [*commands, command], after
        return commands

    def _mark(self) -> tuple:
        """All that tells this state of a task from others."""
        env = self._env
        carried = env.carrying and (env.carrying.type, env.carrying.color)
        done = [done for _, done, _ in instructions(env.instrs, self._done, True)]
        return tuple(map(int, env.agent_pos)), env.agent_dir, carried, env.grid.encode().tobytes(), *done

    def _need_task(self) -> None:
        if self._env is None:
            raise RuntimeError("no task yet: call reset(task_id)")

    # ---- what is seen ------------------------------------------------------------------------------------------------

    def _view(self) -> tuple[dict[tuple[int, int], Any], list[Seen]]:
        """{cell in sight: minigrid's object or None}, and the things among them, near ones first."""
        grid, mask = self._env.gen_obs_grid()
        cells = {(x, y): grid.get(x, y) for x in range(7) for y in range(7) if mask[x, y]}
        cells[HERE] = None  # there minigrid shows what is carried
        near = sorted(cells, key=lambda cell: (abs(cell[0] - HERE[0]) + HERE[1] - cell[1], cell))
        counts, seen = Counter(), []
        for cell in near:
            thing = cells[cell]
            if thing is not None and thing.type != "wall":
                kind = f"{thing.color} {thing.type}"
                counts[kind] += 1
                seen.append(Seen(f"{kind} {counts[kind]}", cell, thing))
        return cells, seen

    def _look(self) -> None:
        """Takes in what is seen and what can be done now."""
        cells, seen = self._view()
        self._text, self._moves = self._describe(cells, seen), self._find_moves(cells, seen)

    def _describe(self, cells: dict[tuple[int, int], Any], seen: list[Seen]) -> str:
        parts = [f"{door_state(one.thing)}{one.name}, {place(one.cell)}" for one in seen]
        things = f"You see: {'; '.join(parts)}." if parts else "You see nothing but walls and floor."
        free, cell = 0, (HERE[0], HERE[1] - 1)
        while cell in cells and walkable(cells[cell]):
            free, cell = free + 1, (cell[0], cell[1] - 1)
        end = "" if cells.get(cell) is None else f", then there is a {cells[cell].type}"
        ahead = f"Ahead {free} step{'' if free == 1 else 's'} {'is' if free == 1 else 'are'} free{end}."
        carried = self._env.carrying
        holds = f"You carry a {carried.color} {carried.type}." if carried else "You carry nothing."
        return f"{things} {ahead} {holds}"

    # ---- what can be done --------------------------------------------------------------------------------------------

    def _find_moves(self, cells: dict[tuple[int, int], Any], seen: list[Seen]) -> dict[str, list[int]]:
        """{command: minigrid's actions} of all that can be done here."""
        env, moves = self._env, {"turn left": [LEFT], "turn right": [RIGHT]}
        before = env.grid.get(*env.front_pos)
        if walkable(before):
            moves["move forward"] = [FORWARD]
        if before is not None and (before.type == "box" or before.type == "door" and self._opens(before)):
            moves["toggle"] = [TOGGLE]
        if before is None and env.carrying:
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
        """Whether the door can be opened or closed: it is not locked, or its key is carried."""
        carried = self._env.carrying
        return not door.is_locked or (carried is not None and (carried.type, carried.color) == ("key", door.color))

    def _do(self, moves: list[int]) -> None:
        """Does minigrid's actions until the mission ends or the way forward is blocked."""
        for move in moves:
            before = tuple(self._env.agent_pos)
            _, reward, self._done, _, _ = self._env.step(move)
            self._success = self._done and reward > 0
            self._progress = 1.0 if self._success else max(self._progress, self._milestones())
            if self._done or (move == FORWARD and tuple(self._env.agent_pos) == before):
                break

    # ---- progress ----------------------------------------------------------------------------------------------------

    def _milestones(self) -> float:
        front, shares = self._env.grid.get(*self._env.front_pos), []
        for instruction, done, its_turn in instructions(self._env.instrs, False, True):
            before = its_turn and type(instruction).__name__ != "GoToInstr"
            before = before and any(thing is front for thing in instruction.desc.obj_set)
            shares.append(1.0 if done else 0.5 * before)
        return sum(shares) / len(shares)


def instructions(instruction: Any, done: bool, its_turn: bool) -> Iterator[tuple[Any, bool, bool]]:
    """Each simple instruction of a mission, whether it is done, and whether its turn has come."""
    kind = type(instruction).__name__
    if kind not in COMPOUND:
        yield instruction, done, its_turn
        return
    a_done, b_done = (done or one == "success" for one in (instruction.a_done, instruction.b_done))
    yield from instructions(instruction.instr_a, a_done, its_turn and (kind != "AfterInstr" or b_done))
    yield from instructions(instruction.instr_b, b_done, its_turn and (kind != "BeforeInstr" or a_done))


def walkable(thing: Any) -> bool:
    return thing is None or thing.can_overlap()


def door_state(thing: Any) -> str:
    if thing.type != "door":
        return ""
    return "open " if thing.is_open else "locked " if thing.is_locked else "closed "


def place(cell: tuple[int, int]) -> str:
    """Where a cell of the view is: 2 steps ahead and 1 to the left."""
    ahead, right = HERE[1] - cell[1], cell[0] - HERE[0]
    parts = [f"{ahead} step{'' if ahead == 1 else 's'} ahead"] if ahead else []
    parts += [f"{abs(right)} to the {'right' if right > 0 else 'left'}"] if right else []
    return " and ".join(parts)


def find_routes(cells: dict[tuple[int, int], Any]) -> dict[tuple[int, int], list[int]]:
    """{cell: the fewest of minigrid's actions after which the agent is before it}, through cells in sight."""
    routes, seen, queue = {}, {(HERE, AHEAD)}, deque([(HERE, AHEAD, [])])
    while queue:
        here, (dx, dy), moves = queue.popleft()
        front = (here[0] + dx, here[1] + dy)
        routes.setdefault(front, moves)
        after = [(here, (dy, -dx), [*moves, LEFT]), (here, (-dy, dx), [*moves, RIGHT])]
        if front in cells and walkable(cells[front]):
            after.append((front, (dx, dy), [*moves, FORWARD]))
        for one in after:
            if one[:2] not in seen:
                seen.add(one[:2])
                queue.append(one)
    return routes

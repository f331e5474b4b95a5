"""The verifier of synthetic worlds and trajectories (AgentRefine, Algorithm 1).

A teacher (a language model or our procedural one) writes a script and then plays it as both DM and Player. Its output
is not trusted. JSON objects, with the paper's keys:

    script    {"Environment": {...}, "Goal": "...", "Completion Conditions": [...], "Available Actions": {
                  "cd {path}": {"verification code": "^cd (.*)$", "parameters": {"path": ["home", "docs"]}}, ...}}
    DM        {"turn": 0, "role": "DM", "Thought": "...", "Observation": "...",
               "parameter_error": false, "place_error": false, "logic_error": false}
    Player    {"turn": 1, "role": "Player", "Thought": "...", "Action": "cd docs"}

`verify` reports the first fault: in the script, then in the turns in order, then in the trajectory as a whole. The
verdict says which rule, at which turn, and in `why` what was got and expected ("Available Actions.ls: missing
`parameters`").

| rule | fault | turn |
|---|---|---|
| json | the script, the turns or the line of the file is not JSON | null |
| keys | the script or an action lacks a key or has a value of the wrong type; a placeholder has no parameters | null |
| keys | a turn lacks a key, has an extra one or a value of the wrong type (flags: bool, numbers: int) | that turn |
| regex_invalid | a verification code does not compile, or takes too much time or memory (codes.py) | null |
| regex_self | a code does not match its own action's name, or no group captures a placeholder of that name | null |
| order | turns must start with DM, alternate strictly and end with DM | the one out of order |
| unflagged | an action matches no code with valid parameters, and the DM's reply sets no flag | the Player's |
| refinements | fewer than two flagged Player turns are followed by another Player turn | the last |
| incomplete | the last observation does not say "Task completed" | the last |

A code must match the whole action, as Python's `re` sees it. The text captured for a placeholder, stripped of
surrounding spaces, must be one of the listed values; case matters. Flagged actions are not checked. The "turn" numbers
are ignored (models lose count); indices in the list are used instead. Extra keys are allowed in the script and its
actions, not in turns. The flags of the first DM turn are ignored.

Left out: whether the DM is right. Only running a world shows what it allows beyond its codes (refine.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

from agentrefine.codes import Code, CodeError, fitting
from artifacts.json_io import parse_json
from artifacts.trajectory import Trajectory, Turn

COMPLETED = "Task completed"
REFINEMENTS = 2  # minimum number of mistakes followed by another attempt, as in the paper
DEEPEST = 100  # levels of nesting in a script
LONGEST = 300  # characters of a verdict's `why`

T = TypeVar("T")


class Verdict(NamedTuple):
    """`rule`, `turn` (index in the list; None for the script) and `why` of the first fault; all None if `ok`."""

    ok: bool
    rule: str | None
    turn: int | None
    why: str | None


class Fault(Exception):
    """Internal: (rule, turn, why)."""


class Action(msgspec.Struct):
    code: str = msgspec.field(name="verification code")
    parameters: dict[str, Any]


class Script(msgspec.Struct):
    environment: dict[str, Any] = msgspec.field(name="Environment")
    goal: str = msgspec.field(name="Goal")
    conditions: list[Any] = msgspec.field(name="Completion Conditions")
    actions: Annotated[dict[str, Any], msgspec.Meta(min_length=1)] = msgspec.field(name="Available Actions")


Values = list[str | Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | float]  # of a parameter


class DMTurn(msgspec.Struct, tag_field="role", tag="DM", forbid_unknown_fields=True):
    turn: int
    thought: str = msgspec.field(name="Thought")
    observation: str = msgspec.field(name="Observation")
    parameter_error: bool
    place_error: bool
    logic_error: bool

    @property
    def errors(self) -> list[str]:
        """Kinds of mistake flagged in the preceding Player turn."""
        return [kind for kind in ("parameter", "place", "logic") if getattr(self, f"{kind}_error")]


class PlayerTurn(msgspec.Struct, tag_field="role", tag="Player", forbid_unknown_fields=True):
    turn: int
    thought: str = msgspec.field(name="Thought")
    action: str = msgspec.field(name="Action")


# ---- the rules -------------------------------------------------------------------------------------------------------


def verify(script: Any, turns: Any) -> Verdict:
    """The verdict on a parsed script and its parsed turns. Never raises, whatever the JSON values."""
    try:
        codes = read_script(script)
        read, broken = read_turns(turns)
        check_actions(codes, read)
        if broken:
            raise broken
        check_whole(read)
    except Fault as fault:
        rule, turn, why = fault.args
        return Verdict(ok=False, rule=rule, turn=turn, why=shortened(why))
    return Verdict(ok=True, rule=None, turn=None, why=None)


def verified_prefix(verdict: Verdict, turns: list[Any]) -> int:
    """Number of leading turns without a fault, ending with a DM turn, from which another request may continue.

    0 if the script is at fault or the task was completed with too few refinements: neither can be repaired.
    """
    rule, turn = verdict.rule, verdict.turn
    if verdict.ok or rule == "incomplete" or (rule == "refinements" and COMPLETED not in turns[-1]["Observation"]):
        return len(turns)
    if rule == "refinements" or not turn:
        return 0
    return turn if turn % 2 else turn - 1  # DM turns have even indices


def verify_line(line: str | bytes) -> Verdict:
    """The verdict on one line {"script": ..., "turns": ...}; either value may be a string of JSON."""
    try:
        row = parse_json(line, where="the line")
        if not (isinstance(row, dict) and {"script", "turns"} <= row.keys()):
            why = "the line: expected an object with the keys `script` and `turns`"
            return Verdict(ok=False, rule="keys", turn=None, why=why)
        values = {key: row[key] for key in ("script", "turns")}
        parts = [parse_json(v, where=f"`{key}`") if isinstance(v, str) else v for key, v in values.items()]
    except ValueError as error:
        return Verdict(ok=False, rule="json", turn=None, why=shortened(str(error)))
    return verify(*parts)


def main_over(path: str | Path) -> None:
    """Prints one JSON verdict per line of a JSONL file; an empty line is not JSON."""
    with open(path, "rb") as file:
        for line in file:
            print(json.dumps(verify_line(line)._asdict()))


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def read(value: Any, type: type[T], where: str, turn: int | None = None) -> T:
    """The value as `type`. Raises Fault, with what is wrong at `where`, for any other value."""
    try:
        return msgspec.convert(value, type)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        words, _, path = str(error).partition(" - at `$")
        words = words.replace("Object missing required field", "missing").replace("Object contains", "has an")
        raise Fault("keys", turn, f"{where}{path.rstrip('`')}: {words[:1].lower()}{words[1:]}") from None


def read_script(script: Any) -> list[Code]:
    """The codes of a script's actions."""
    actions, codes = read(script, Script, "the script").actions, []
    if nested(script):
        raise Fault("keys", None, f"the script: nested deeper than {DEEPEST} levels")
    for name, value in actions.items():
        where = f"Available Actions.{name}"
        action, values = read(value, Action, where), {}
        for key, listed in action.parameters.items():
            values[key] = [str(each).strip() for each in read(listed, Values, f"{where}.parameters.{key}")]
        placeholders = re.findall(r"\{([^{}]+)\}", name)
        if missing := [placeholder for placeholder in placeholders if placeholder not in values]:
            raise Fault("keys", None, f"{where}.parameters: missing `{missing[0]}`, a placeholder of the action")
        codes.append(
            Code(name, action.code, {f"{{{placeholder}}}": values[placeholder] for placeholder in placeholders})
        )
    return codes


def nested(value: Any) -> bool:
    """Whether lists and objects lie in one another deeper than DEEPEST levels; whoever writes JSON would give up."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            each
            for outer in level
            if isinstance(outer, dict | list)
            for each in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def read_turns(turns: Any) -> tuple[list[DMTurn | PlayerTurn], Fault | None]:
    """The turns as structs, as far as their keys and their order are right, and the fault at which they end."""
    if not isinstance(turns, list):
        return [], Fault("keys", None, f"the turns: expected a list, got {type(turns).__name__}")
    found: list[DMTurn | PlayerTurn] = []
    for index, value in enumerate(turns):
        try:
            turn = read(value, DMTurn | PlayerTurn, f"turn {index}", index)
        except Fault as fault:
            return found, fault
        if isinstance(turn, DMTurn) != (index % 2 == 0):
            wrong = "DM" if index % 2 else "Player"
            return found, Fault("order", index, f"turn {index} is a {wrong}'s; DM first, then Player and DM in turn")
        found.append(turn)
    if len(found) % 2 == 0:
        last = max(len(found) - 1, 0)
        return found, Fault("order", last, f"{len(found)} turns; expected a DM's turn as the last")
    return found, None


def check_actions(codes: list[Code], turns: list[DMTurn | PlayerTurn]) -> None:
    """Checks the codes, and that each action that the DM lets pass matches one of them."""
    passed = [
        (index, player.action)
        for index, (player, dm) in enumerate(zip(turns, turns[1:], strict=False))
        if isinstance(player, PlayerTurn) and not dm.errors
    ]
    try:
        fit = fitting(codes, [action for _, action in passed])
    except CodeError as error:
        rule, why = error.args
        raise Fault(rule, None, f"Available Actions.{why}") from None
    for number, (index, action) in enumerate(passed):
        if number not in fit:
            raise Fault("unflagged", index, f"turn {index + 1} sets no flag, though no code matches {action!r}")


def check_whole(turns: list[DMTurn | PlayerTurn]) -> None:
    last = len(turns) - 1
    flagged = sum(bool(turn.errors) for turn in turns[2:-1:2])  # replies followed by another Player turn
    if flagged < REFINEMENTS:
        why = f"{flagged} of at least {REFINEMENTS} mistakes are followed by another attempt"
        raise Fault("refinements", last, why)
    if COMPLETED not in turns[-1].observation:
        raise Fault("incomplete", last, f"the last observation does not say {COMPLETED!r}")


# ---- conversion to a trajectory --------------------------------------------------------------------------------------


def to_trajectory(script: Any, turns: Any, *, split: str, task_id: str, seed: int) -> Trajectory:
    """A script and turns that `verify` accepts, as a trajectory. Raises ValueError for those of another form.

    The first observation has the content of the paper's first message: environment, goal, actions, the DM's opening.
    """
    world = msgspec.convert(script, Script)
    first, *rest = msgspec.convert(turns, list[DMTurn | PlayerTurn])
    opening = [
        f"Environment: {json.dumps(world.environment, ensure_ascii=False)}",
        f"Your task is to: {world.goal}",
        f"You can: {', '.join(world.actions)}.",
        first.observation,
    ]
    played = [
        Turn(
            thought=player.thought,
            action=player.action,
            observation=dm.observation,
            thought_by="teacher",
            action_by="teacher",
            valid=not dm.errors,
            errors=dm.errors,
        )
        for player, dm in zip(rest[::2], rest[1::2], strict=True)
    ]
    return Trajectory(
        env="refine",
        split=split,
        task_id=task_id,
        task=world.goal,
        trial=0,
        round=0,
        seed=seed,
        source="refine",
        first_observation="\n\n".join(opening),
        turns=played,
        reward=1.0,
        progress=1.0,
        success=True,
        end="success",
    )

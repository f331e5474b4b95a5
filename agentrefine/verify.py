"""The verifier of synthetic worlds and trajectories (AgentRefine, Algorithm 1).

A teacher, a language model or our procedural one, writes a script and then plays it as both DM and Player. Nothing it
writes is believed. JSON objects, with the paper's keys:

    script    {"Environment": {...}, "Goal": "...", "Completion Conditions": [...], "Available Actions": {
                  "cd {path}": {"verification code": "^cd (.*)$", "parameters": {"path": ["home", "docs"]}}, ...}}
    DM        {"turn": 0, "role": "DM", "Thought": "...", "Observation": "...",
               "parameter_error": false, "place_error": false, "logic_error": false}
    Player    {"turn": 1, "role": "Player", "Thought": "...", "Action": "cd docs"}

`verify` names the first fault: of the script, then of the turns in their order, then of the whole.

| rule | what is wrong | turn |
|---|---|---|
| json | script, turns or the line of a file is no JSON | null |
| keys | the script or an action lacks a key or has a value of another type; a placeholder has no parameters | null |
| keys | a turn has a key too few or too many, or a value of another type: flags are booleans, numbers integers | it |
| regex_invalid | a verification code does not compile, is too large or takes more than a second | null |
| regex_self | a code does not match its own action's name, or no group of it holds a placeholder of that name | null |
| order | not DM first, then strictly alternating, DM last | the one out of place |
| unflagged | an action fits no code with valid parameters, and the DM's answer flags nothing | the Player's |
| refinements | fewer than two flagged Player turns that are followed by another Player turn | the last |
| incomplete | the last observation does not say "Task completed" | the last |

A code must match the whole action. It is run on its own name first, which tells the group of each placeholder: the one
that holds "{path}" there holds the path in an action. What it holds, but for spaces around it, must be one of the
listed values; case counts. A flagged action is not run. The "turn" numbers are compared with nothing (models lose
count): positions in the list are. More keys than these are allowed in the script and its actions, not in turns. The
first DM turn's flags flag nobody.

Left out: whether the DM is right. What a world allows beyond its codes only its execution tells (refine.py).
"""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import regex

from artifacts.trajectory import Trajectory, Turn

COMPLETED = "Task completed"
REFINEMENTS = 2  # the paper's least number of mistakes that are followed by another try
LARGEST = 100_000  # copies that a code's counted repeats make of what they repeat; 40 MB in the regex package
SECONDS = 1.0  # of a code on one action, after which it is called catastrophic


class Verdict(NamedTuple):
    """`rule` and `turn` (an index in the list; None for the script) of the first fault; both None where `ok`."""

    ok: bool
    rule: str | None
    turn: int | None


class Fault(Exception):
    """Internal: (rule, turn)."""


class Action(msgspec.Struct):
    code: str = msgspec.field(name="verification code")
    parameters: dict[str, list[str | Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | float]]


class Script(msgspec.Struct):
    environment: dict[str, Any] = msgspec.field(name="Environment")
    goal: str = msgspec.field(name="Goal")
    conditions: list[Any] = msgspec.field(name="Completion Conditions")
    actions: Annotated[dict[str, Action], msgspec.Meta(min_length=1)] = msgspec.field(name="Available Actions")


class DM(msgspec.Struct, tag_field="role", tag="DM", forbid_unknown_fields=True):
    turn: int
    thought: str = msgspec.field(name="Thought")
    observation: str = msgspec.field(name="Observation")
    parameter_error: bool
    place_error: bool
    logic_error: bool

    @property
    def errors(self) -> list[str]:
        """The kinds of mistake that this turn finds in the Player's turn before it."""
        return [kind for kind in ("parameter", "place", "logic") if getattr(self, f"{kind}_error")]


class Player(msgspec.Struct, tag_field="role", tag="Player", forbid_unknown_fields=True):
    turn: int
    thought: str = msgspec.field(name="Thought")
    action: str = msgspec.field(name="Action")


class Code(NamedTuple):
    """A compiled verification code and, for each of its groups that holds a parameter, the values allowed there."""

    pattern: regex.Pattern
    groups: list[tuple[int, set[str]]]


# ---- the rules -------------------------------------------------------------------------------------------------------


def verify(script: Any, turns: Any) -> Verdict:
    """The first fault of a parsed script and its parsed turns. No JSON value raises."""
    try:
        codes = read_script(script)
        read = read_turns(turns, codes)
        check_whole(read)
    except Fault as fault:
        return Verdict(False, *fault.args)
    return Verdict(True, None, None)


def verified_prefix(script: Any, turns: Any) -> int:
    """How many leading turns are beyond reproach, the last of them a DM's: what another call may continue from.

    0 where the script is at fault, and where the task is completed with too few refinements: nothing mends that.
    """
    ok, rule, turn = verify(script, turns)
    if ok or rule == "incomplete" or (rule == "refinements" and COMPLETED not in turns[-1]["Observation"]):
        return len(turns)
    if rule == "refinements" or not turn:
        return 0
    return turn if turn % 2 else turn - 1  # DM turns have even positions


def verify_line(line: str | bytes) -> Verdict:
    """The verdict on one line {"script": ..., "turns": ...}, either of which may be a string of JSON."""
    try:
        row = msgspec.json.decode(line)
        if not (isinstance(row, dict) and {"script", "turns"} <= row.keys()):
            return Verdict(False, "keys", None)
        script, turns = (msgspec.json.decode(v) if isinstance(v, str) else v for v in (row["script"], row["turns"]))
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return Verdict(False, "json", None)
    return verify(script, turns)


def main_over(path: str | Path) -> None:
    """Prints a verdict for every line of a JSONL file, as one JSON object a line; an empty line is no JSON."""
    with open(path, "rb") as file:
        for line in file:
            print(json.dumps(verify_line(line)._asdict()))


def read_script(script: Any) -> list[Code]:
    try:
        actions = msgspec.convert(script, Script).actions
    except (msgspec.ValidationError, RecursionError):
        raise Fault("keys", None) from None
    return [read_code(name, action) for name, action in actions.items()]


def read_code(name: str, action: Action) -> Code:
    """Compiles an action's code and finds its parameters' groups by running it on the action's own name."""
    placeholders = re.findall(r"\{([^{}]+)\}", name)
    if not set(placeholders) <= action.parameters.keys():
        raise Fault("keys", None)
    match = full_match(compile_code(action.code), name)
    if match is None:
        raise Fault("regex_self", None)
    held = [(group or "").strip() for group in match.groups()]
    if not {f"{{{p}}}" for p in placeholders} <= set(held):
        raise Fault("regex_self", None)
    allowed = {f"{{{p}}}": {str(value).strip() for value in action.parameters[p]} for p in placeholders}
    return Code(match.re, [(number, allowed[text]) for number, text in enumerate(held, 1) if text in allowed])


def compile_code(code: str) -> regex.Pattern:
    """Python's own `re` decides what is a regex; the `regex` package, which can be stopped, runs it.

    That package copies what a counted repeat repeats, so nested ones could fill the memory: their product is bounded.
    """
    repeats = [count.lstrip("0")[:9] or "1" for count in re.findall(r"\{(?:\d*,)?(\d+)\}", code)]
    if math.prod(map(int, repeats)) > LARGEST:
        raise Fault("regex_invalid", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(code)
            return regex.compile(code)
    except (re.error, regex.error, OverflowError, RecursionError):
        raise Fault("regex_invalid", None) from None


def full_match(pattern: regex.Pattern, text: str) -> regex.Match | None:
    try:
        return pattern.fullmatch(text, timeout=SECONDS)
    except TimeoutError:
        raise Fault("regex_invalid", None) from None


def fits(action: str, codes: list[Code]) -> bool:
    """Whether some code matches the action with valid parameters."""
    for pattern, groups in codes:
        match = full_match(pattern, action)
        if match and all((match[number] or "").strip() in allowed for number, allowed in groups):
            return True
    return False


def read_turns(turns: Any, codes: list[Code]) -> list[DM | Player]:
    """The turns as structs, each checked as it is reached: keys, order, and whether its mistake was flagged."""
    if not isinstance(turns, list):
        raise Fault("keys", None)
    read: list[DM | Player] = []
    for index, value in enumerate(turns):
        try:
            turn = msgspec.convert(value, DM | Player)
        except (msgspec.ValidationError, RecursionError):
            raise Fault("keys", index) from None
        if isinstance(turn, DM) != (index % 2 == 0):
            raise Fault("order", index)
        if isinstance(turn, DM) and index and not turn.errors and not fits(read[-1].action, codes):
            raise Fault("unflagged", index - 1)
        read.append(turn)
    if len(read) % 2 == 0:
        raise Fault("order", max(len(read) - 1, 0))
    return read


def check_whole(read: list[DM | Player]) -> None:
    flagged = sum(bool(turn.errors) for turn in read[2:-1:2])  # answers that a further Player turn follows
    if flagged < REFINEMENTS:
        raise Fault("refinements", len(read) - 1)
    if COMPLETED not in read[-1].observation:
        raise Fault("incomplete", len(read) - 1)


# ---- into the record -------------------------------------------------------------------------------------------------


def to_trajectory(script: Any, turns: Any, *, split: str, task_id: str, seed: int) -> Trajectory:
    """The record of a script and turns that `verify` accepts. Raises ValueError, naming the fault, for others.

    The first observation holds what the paper's first message does: environment, goal, actions, the DM's first words.
    """
    verdict = verify(script, turns)
    if not verdict.ok:
        raise ValueError(f"{task_id}: not a verified trajectory: rule {verdict.rule}, turn {verdict.turn}")
    world = msgspec.convert(script, Script)
    first, *rest = msgspec.convert(turns, list[DM | Player])
    opening = [
        f"Environment: {json.dumps(world.environment, ensure_ascii=False)}",
        f"Your task is to: {world.goal}",
        f"You can: {', '.join(world.actions)}.",
        first.observation,
    ]
    played = [
        Turn(player.thought, player.action, dm.observation, "teacher", "teacher", not dm.errors, dm.errors)
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

"""The verifier of synthetic worlds and trajectories (AgentRefine, Algorithm 1).

A teacher (a language model or our procedural one) writes a script and then plays it as both DM and Player. Its output
is not trusted. JSON objects, with the paper's keys:

    script    {"Environment": {...}, "Goal": "...", "Completion Conditions": [...], "Available Actions": {
                  "cd {path}": {"verification code": "^cd (.*)$", "parameters": {"path": ["home", "docs"]}}, ...}}
    DM        {"turn": 0, "role": "DM", "Thought": "...", "Observation": "...",
               "parameter_error": false, "place_error": false, "logic_error": false}
    Player    {"turn": 1, "role": "Player", "Thought": "...", "Action": "cd docs"}

`verify` reports the first fault: in the script, then in the turns in order, then in the trajectory as a whole.

| rule | fault | turn |
|---|---|---|
| json | the script, the turns or the line of the file is not JSON | null |
| keys | the script or an action lacks a key or has a value of the wrong type; a placeholder has no parameters | null |
| keys | a turn lacks a key, has an extra one or a value of the wrong type (flags: bool, numbers: int) | that turn |
| regex_invalid | a verification code does not compile, is too large or takes more than a second | null |
| regex_self | a code does not match its own action's name, or no group captures a placeholder of that name | null |
| order | turns must start with DM, alternate strictly and end with DM | the one out of order |
| unflagged | an action matches no code with valid parameters, and the DM's reply sets no flag | the Player's |
| refinements | fewer than two flagged Player turns are followed by another Player turn | the last |
| incomplete | the last observation does not say "Task completed" | the last |

A code must match the whole action. It is first run on its own action's name to find the group of each placeholder: the
group that captures "{path}" in the name captures the path in an action. The captured text, stripped of surrounding
spaces, must be one of the listed values; case matters. Flagged actions are not checked. The "turn" numbers are ignored
(models lose count); indices in the list are used instead. Extra keys are allowed in the script and its actions, not in
turns. The flags of the first DM turn are ignored.

Left out: whether the DM is right. Only running a world shows what it allows beyond its codes (refine.py).
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
REFINEMENTS = 2  # minimum number of mistakes followed by another attempt, as in the paper
LARGEST = 100_000  # copies that nested counted repeats may expand to; 40 MB in the regex package
SECONDS = 1.0  # time limit of a code on one action; beyond it, backtracking counts as catastrophic


class Verdict(NamedTuple):
    """`rule` and `turn` (index in the list; None for the script) of the first fault; both None if `ok`."""

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


class Code(NamedTuple):
    """A compiled verification code, and (group, allowed values) for each group that captures a parameter."""

    pattern: regex.Pattern
    groups: list[tuple[int, set[str]]]


# ---- the rules -------------------------------------------------------------------------------------------------------


def verify(script: Any, turns: Any) -> Verdict:
    """The verdict on a parsed script and its parsed turns. Never raises, whatever the JSON values."""
    try:
        check_whole(read_turns(turns, read_script(script)))
    except Fault as fault:
        rule, turn = fault.args
        return Verdict(ok=False, rule=rule, turn=turn)
    return Verdict(ok=True, rule=None, turn=None)


def verified_prefix(script: Any, turns: Any) -> int:
    """Number of leading turns without a fault, ending with a DM turn, from which another request may continue.

    0 if the script is at fault or the task was completed with too few refinements: neither can be repaired.
    """
    ok, rule, turn = verify(script, turns)
    if ok or rule == "incomplete" or (rule == "refinements" and COMPLETED not in turns[-1]["Observation"]):
        return len(turns)
    if rule == "refinements" or not turn:
        return 0
    return turn if turn % 2 else turn - 1  # DM turns have even indices


def verify_line(line: str | bytes) -> Verdict:
    """The verdict on one line {"script": ..., "turns": ...}; either value may be a string of JSON."""
    try:
        row = msgspec.json.decode(line)
        if not (isinstance(row, dict) and {"script", "turns"} <= row.keys()):
            return Verdict(ok=False, rule="keys", turn=None)
        script, turns = (msgspec.json.decode(v) if isinstance(v, str) else v for v in (row["script"], row["turns"]))
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return Verdict(ok=False, rule="json", turn=None)
    return verify(script, turns)


def main_over(path: str | Path) -> None:
    """Prints one JSON verdict per line of a JSONL file; an empty line is not JSON."""
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
    """Compiles an action's code and runs it on the action's own name to find which group captures which parameter."""
    placeholders = re.findall(r"\{([^{}]+)\}", name)
    if not set(placeholders) <= action.parameters.keys():
        raise Fault("keys", None)
    match = full_match(compile_code(action.code), name)
    if match is None:
        raise Fault("regex_self", None)
    captured = [(text or "").strip() for text in match.groups()]
    if not {f"{{{p}}}" for p in placeholders} <= set(captured):
        raise Fault("regex_self", None)
    allowed = {f"{{{p}}}": {str(value).strip() for value in action.parameters[p]} for p in placeholders}
    return Code(match.re, [(group, allowed[text]) for group, text in enumerate(captured, 1) if text in allowed])


def compile_code(code: str) -> regex.Pattern:
    """Python's own `re` decides whether it is a regex; the `regex` package, which supports timeouts, runs it.

    That package expands counted repeats, so nested ones could exhaust memory: the product of the counts is limited.
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
    """Whether any code matches the action with valid parameters."""
    for pattern, groups in codes:
        match = full_match(pattern, action)
        if match and all((match[group] or "").strip() in allowed for group, allowed in groups):
            return True
    return False


def read_turns(turns: Any, codes: list[Code]) -> list[DMTurn | PlayerTurn]:
    """The turns as structs, checked one by one: keys, order, and whether a mistake was flagged."""
    if not isinstance(turns, list):
        raise Fault("keys", None)
    read: list[DMTurn | PlayerTurn] = []
    for index, value in enumerate(turns):
        try:
            turn = msgspec.convert(value, DMTurn | PlayerTurn)
        except (msgspec.ValidationError, RecursionError):
            raise Fault("keys", index) from None
        if isinstance(turn, DMTurn) != (index % 2 == 0):
            raise Fault("order", index)
        if isinstance(turn, DMTurn) and index and not turn.errors and not fits(read[-1].action, codes):
            raise Fault("unflagged", index - 1)
        read.append(turn)
    if len(read) % 2 == 0:
        raise Fault("order", max(len(read) - 1, 0))
    return read


def check_whole(read: list[DMTurn | PlayerTurn]) -> None:
    flagged = sum(bool(turn.errors) for turn in read[2:-1:2])  # replies followed by another Player turn
    if flagged < REFINEMENTS:
        raise Fault("refinements", len(read) - 1)
    if COMPLETED not in read[-1].observation:
        raise Fault("incomplete", len(read) - 1)


# ---- conversion to a trajectory --------------------------------------------------------------------------------------


def to_trajectory(script: Any, turns: Any, *, split: str, task_id: str, seed: int) -> Trajectory:
    """A script and turns that `verify` accepts, as a trajectory. Raises ValueError naming the fault otherwise.

    The first observation has the content of the paper's first message: environment, goal, actions, the DM's opening.
    """
    verdict = verify(script, turns)
    if not verdict.ok:
        raise ValueError(f"{task_id}: not a verified trajectory: rule {verdict.rule}, turn {verdict.turn}")
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

"""The one rendering of a trajectory as text, and back. As text it has A3T's surface form (the paper's appendix).

A thought is an action of its own that the harness answers with "OK.", a command is wrapped in act[...]:

    Observation: Your task is to: put a mug in desk. You are in the middle of a room. ...
    Action: think[I need a mug. I check shelf 1.]
    Observation: OK.
    Action: act[go to shelf 1]
    Observation: You arrive at shelf 1. On the shelf 1, you see a mug 2.

ActRe sees the same trajectory with the order inside a turn changed to (observation, action, reason):

    Action: act[go to shelf 1]
    Reason for the action: [I need a mug. I check shelf 1.]
    Observation: You arrive at shelf 1. On the shelf 1, you see a mug 2.

Left out: prompts and chat templates (agent/), ids and weights (packing.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from artifacts.trajectory import Trajectory, Turn

ACTION = "Action:"
REASON = "Reason for the action:"
OK = f"Observation: OK.\n{ACTION}"


class Segment(NamedTuple):
    """A piece of the rendering: who wrote it and in which turn (-1: the opening)."""

    text: str
    agent: bool
    turn: int


def flat(text: str) -> str:
    """One line: runs of newlines become a space, so that a text cannot imitate the harness. Nothing else changes."""
    return re.sub(r"\s*\n\s*", " ", text.strip("\n ")).replace("\r", " ")


def opening_text(first_observation: str, task: str) -> str:
    """The first observation with the paragraph that states the task moved to the front, as A3T's prompts have it."""
    paragraphs = [p for p in first_observation.split("\n\n") if p.strip()]
    stating = [p for p in paragraphs if task and task in p]
    ordered = stating + [p for p in paragraphs if p not in stating]
    return f"Observation: {flat(' '.join(ordered))}\n{ACTION}"


def observation_text(observation: str) -> str:
    return f"Observation: {flat(observation)}\n{ACTION}"


def last_observation_text(observation: str) -> str:
    return f"Observation: {flat(observation)}\n"


def think_line(thought: str) -> str:
    return f" think[{flat(thought)}]\n"


def act_line(action: str) -> str:
    return f" act[{flat(action)}]\n"


def reason_line(reason: str) -> str:
    return f" [{flat(reason)}]\n"


def parse_reply(line: str) -> tuple[Literal["think", "act"], str]:
    """What the agent's line says: ("think", thought) or ("act", command). A line in neither form is a command as it
    stands, which the world will not know: a malformed reply is an invalid action, never a crash."""
    line = line.strip()
    for kind in ("think", "act"):
        if line.startswith(f"{kind}[") and line.endswith("]"):
            return kind, line[len(kind) + 1 : -1].strip()
    return "act", line


def parse_reason(line: str) -> str:
    """The text inside ActRe's brackets; a line without brackets is taken whole."""
    line = line.strip()
    return line[1:-1].strip() if line.startswith("[") and line.endswith("]") else line


def react_segments(trajectory: Trajectory) -> list[Segment]:
    """The ReAct rendering: (observation, thoughts, action) in order; concatenated texts are the whole trajectory."""
    segments = [Segment(opening_text(trajectory.first_observation, trajectory.task), False, -1)]
    for number, turn in enumerate(trajectory.turns):
        for thought in filter(None, turn.thought.split("\n")):
            segments += [Segment(think_line(thought), True, number), Segment(OK, False, number)]
        segments.append(Segment(act_line(turn.action), True, number))
        last = number == len(trajectory.turns) - 1
        segments.append(Segment((last_observation_text if last else observation_text)(turn.observation), False, number))
    return segments


def actre_turn_text(turn: Turn) -> str:
    """One turn as ActRe's session sees it, up to the observation: the action, then the reason where there is one."""
    reason = f"{REASON}{reason_line(turn.thought)}" if turn.thought else ""
    return act_line(turn.action) + reason


def actre_segments(trajectory: Trajectory) -> list[Segment]:
    """The ActRe rendering, synchronised with the ReAct one: (observation, action, reason). Agent = the reasons."""
    segments = [Segment(opening_text(trajectory.first_observation, trajectory.task), False, -1)]
    for number, turn in enumerate(trajectory.turns):
        segments.append(Segment(act_line(turn.action) + (REASON if turn.thought else ""), False, number))
        if turn.thought:
            segments.append(Segment(reason_line(turn.thought), True, number))
        last = number == len(trajectory.turns) - 1
        segments.append(Segment((last_observation_text if last else observation_text)(turn.observation), False, number))
    return segments


def text_of(segments: Iterable[Segment]) -> str:
    return "".join(segment.text for segment in segments)

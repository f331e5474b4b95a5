"""Renders trajectories as text in A3T's surface form (the paper's appendix), and parses replies in that form.

A thought is a separate action that the harness answers with "OK."; a command is wrapped in act[...]:

    Observation: Your task is to: put a mug in desk. You are in the middle of a room. ...
    Action: think[I need a mug. I check shelf 1.]
    Observation: OK.
    Action: act[go to shelf 1]
    Observation: You arrive at shelf 1. On the shelf 1, you see a mug 2.

ActRe sees the same trajectory with each turn reordered to (observation, action, reason):

    Action: act[go to shelf 1]
    Reason for the action: [I need a mug. I check shelf 1.]
    Observation: You arrive at shelf 1. On the shelf 1, you see a mug 2.

Left out: prompts and chat templates (agent/), ids and weights (packing.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from artifacts.trajectory import Trajectory, Turn

Form = Literal["react", "actre"]
FORM = 1  # version of this form: raise it whenever a record's text changes
ACTION = "Action:"
REASON = "Reason for the action:"
OK = f"Observation: OK.\n{ACTION}"


class Segment(NamedTuple):
    """A piece of the rendering, whether the agent wrote it, and its turn (-1: the opening)."""

    text: str
    agent: bool
    turn: int


def flat(text: str) -> str:
    """Joins lines: runs of newlines become a space, so that text cannot imitate the harness. Nothing else changes."""
    # The lookbehind starts no search within blanks, which would take quadratic time.
    return re.sub(r"(?<!\s)\s*\n\s*", " ", text.strip("\n ")).replace("\r", " ")


def opening_text(first_observation: str, task: str) -> str:
    """The first observation, with the paragraph that states the task moved to the front as in A3T's prompts."""
    paragraphs = [p for p in first_observation.split("\n\n") if p.strip()]
    ordered = sorted(paragraphs, key=lambda p: not (task and task in p))
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
    """Parses the agent's line into ("think", thought) or ("act", command). Any other line is taken as a command, which
    the world rejects: a malformed reply is an invalid action, never a crash."""
    line = line.strip()
    for kind in ("think", "act"):
        if line.startswith(f"{kind}[") and line.endswith("]"):
            return kind, line[len(kind) + 1 : -1].strip()
    return "act", line


def parse_reason(line: str) -> str:
    """The text inside ActRe's brackets, or the whole line without brackets."""
    line = line.strip()
    return line[1:-1].strip() if line.startswith("[") and line.endswith("]") else line


def react_segments(trajectory: Trajectory) -> list[Segment]:
    """The ReAct rendering in order (observation, thoughts, action); its texts concatenate to the whole trajectory."""
    segments = [_opening(trajectory)]
    for index, turn in enumerate(trajectory.turns):
        for thought in filter(None, turn.thought.split("\n")):
            segments.append(Segment(text=think_line(thought), agent=True, turn=index))
            segments.append(Segment(text=OK, agent=False, turn=index))
        segments.append(Segment(text=act_line(turn.action), agent=True, turn=index))
        segments.append(_observation(trajectory, index))
    return segments


def actre_turn_text(turn: Turn) -> str:
    """One turn in ActRe's session, up to the observation: the action, then the reason if there is one."""
    reason = f"{REASON}{reason_line(turn.thought)}" if turn.thought else ""
    return act_line(turn.action) + reason


def actre_segments(trajectory: Trajectory) -> list[Segment]:
    """The ActRe rendering of the same turns: (observation, action, reason). Only reasons have agent=True."""
    segments = [_opening(trajectory)]
    for index, turn in enumerate(trajectory.turns):
        action = act_line(turn.action) + (REASON if turn.thought else "")
        segments.append(Segment(text=action, agent=False, turn=index))
        if turn.thought:
            segments.append(Segment(text=reason_line(turn.thought), agent=True, turn=index))
        segments.append(_observation(trajectory, index))
    return segments


SEGMENTS: dict[Form, Callable[[Trajectory], list[Segment]]] = {"react": react_segments, "actre": actre_segments}


def _opening(trajectory: Trajectory) -> Segment:
    return Segment(text=opening_text(trajectory.first_observation, trajectory.task), agent=False, turn=-1)


def _observation(trajectory: Trajectory, index: int) -> Segment:
    render = last_observation_text if index == len(trajectory.turns) - 1 else observation_text
    return Segment(text=render(trajectory.turns[index].observation), agent=False, turn=index)


def text_of(segments: Iterable[Segment]) -> str:
    return "".join(segment.text for segment in segments)

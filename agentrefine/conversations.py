"""Trajectories as conversations: the chat format in which agent data sets are released, out and in.

    {"id": "...", "conversations": [{"from": "human", "loss": false, "value": "<the world, the goal, the actions>"},
                                    {"from": "gpt", "loss": true, "value": "Thought: ...\\nAction: ..."}, ...],
     "a3t": {...}}

    python -m agentrefine.conversations --export runs/a3t/refine --out refine.jsonl
    python -m agentrefine.conversations --import refine-32k.jsonl --out runs/refine-32k   # then train_pg.py --inputs

Export writes successes only; turns with `errors` get "loss": false. A conversation ends with gpt, as chat trainers
require. `a3t`, which they ignore, holds what a chat has no place for: the record without the texts of the messages.
With it our own export comes back whole, token ids excepted, and with it texts that were edited in the messages.

Import reads JSONL or one JSON array of what others have released (AgentRefine, AgentGym's AgentTraj, AgentInstruct,
ETO, ShareGPT, OpenAI): `conversations` or `messages`, each of `from` or `role` and `value` or `content`; the name in
`id` or `item_id`, else the number of the row. Other keys are ignored, `reward` among them: the sets were filtered, so
every conversation counts as a success.
- A system turn, a first human message and, if gpt only agrees to it ("OK."), the second one form the opening.
- The task is what the opening says after "Your task is to", "Goal:" or "Instruction:", else empty.
- An answer is split at its last "Action:"; without one it is an action as a whole. "Observation:" is removed if all
  observations begin with it.
- A gpt message with "loss": false or "weight": 0 is a mistake of unknown kind and recorded with all three; without
  either it is trained on.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import codecs
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import tyro
from msgspec.structs import replace
from tqdm import tqdm

from artifacts.atomic import atomic_write
from artifacts.cli import run_main
from artifacts.json_io import parse_json
from artifacts.stage import Stage, StageError, require_done, sha256
from artifacts.trajectory import SCHEMA, Trajectory, Turn, read_trajectories, write_file

ANSWER_FORM = "Answer with one thought and one action each time, in this form:\nThought: ...\nAction: ..."
UNKNOWN = ["parameter", "place", "logic"]  # errors of a turn whose kind of mistake is unknown
ROLES = {"system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("human", "user", "observation", "tool", "function", "environment"), "human")
ROLES |= dict.fromkeys(("gpt", "assistant", "model", "agent", "function_call"), "gpt")
ACTION = re.compile(r"(?im:^[ \t]*action[ \t]*:)|\b(?:Action|ACTION):")
TASK = re.compile(r"(?i)\b(?:your task is to:?|goal:|instruction:)\s*(?:\[SEP\]\s*)?(\S[^\n]*)")
AGREED = re.compile(r"(?i)\s*ok(ay)?\b")


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path
    """File to write (--export), or stage directory to write (--import)."""
    export: Path | None = None
    """Directory of a finished stage (refine.py) to write as conversations."""
    import_: Annotated[Path | None, tyro.conf.arg(name="import")] = None
    """File of conversations to write as a finished stage."""

    def check(self) -> None:
        if (self.export is None) == (self.import_ is None):
            raise ValueError("give either --export DIRECTORY or --import FILE")


class Part(msgspec.Struct):
    text: str


class Message(msgspec.Struct):
    """A message with the keys of ShareGPT or of OpenAI."""

    sharegpt_role: str | None = msgspec.field(name="from", default=None)
    role: str | None = None
    value: str | None = None
    content: str | list[Part] | None = None
    loss: bool | None = None
    weight: float | None = None


class Row(msgspec.Struct):
    conversations: list[Message] | None = None
    messages: list[Message] | None = None
    system: str | None = None
    id: str | Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    item_id: str | Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    a3t: Trajectory | None = None


class Said(NamedTuple):
    """The text of a message, and whether it is trained on (None: not said)."""

    text: str
    loss: bool | None


# ---- export ----------------------------------------------------------------------------------------------------------


def to_conversation(trajectory: Trajectory) -> dict[str, Any]:
    """One trajectory in the released format; `id` is the task id, followed by #trial from the second trial on."""
    observations = [
        f"{trajectory.first_observation}\n\n{ANSWER_FORM}",
        *(turn.observation for turn in trajectory.turns),
    ]
    messages = []
    for text, turn in zip(observations, trajectory.turns, strict=False):  # the last observation has no reply
        reply = f"Thought: {turn.thought}\nAction: {turn.action}"
        messages += [
            {"from": "human", "loss": False, "value": text},
            {"from": "gpt", "loss": not turn.errors, "value": reply},
        ]
    turns = [replace(turn, thought="", observation="") for turn in trajectory.turns]
    turns[-1].observation = trajectory.turns[-1].observation
    name = f"{trajectory.task_id}#{trajectory.trial}" if trajectory.trial else trajectory.task_id
    rest = replace(trajectory, first_observation="", turns=turns, ids=[], sampled=[])
    return {"id": name, "conversations": messages, "a3t": rest}


def export(directory: Path, out: Path) -> None:
    """Writes the successes of a finished stage to a new file."""
    require_done(directory, "the stage that writes it")
    if os.path.lexists(out):
        raise StageError(f"{out} already exists; remove it or choose another --out")
    rows = list(read_trajectories(directory / "trajectories.jsonl"))
    kept = [to_conversation(row) for row in rows if row.success and row.turns]
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as temporary:
        temporary.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in tqdm(kept, "conversations")))
    skipped = len(rows) - len(kept)
    print(f"{out}: {len(kept)} conversations; skipped {skipped} of {len(rows)} trajectories that did not succeed")


# ---- import: texts ---------------------------------------------------------------------------------------------------


def parse_answer(value: str) -> tuple[str, str]:
    """(thought, action) of "Thought: ... Action: ...", on one line or several."""
    found = list(ACTION.finditer(value))
    if not found:
        return "", value.strip()
    thought = re.sub(r"(?i)^thought[ \t]*:", "", value[: found[-1].start()].strip())
    return thought.strip(), value[found[-1].end() :].strip()


def find_task(openings: list[str]) -> str:
    """The task that the messages of an opening state, of the last one first."""
    for text in reversed(openings):
        if found := TASK.search(text):
            return found[1].partition("[SEP]")[0].strip()
    return ""


def is_agreement(reply: Said, later: list[Said]) -> bool:
    """Whether gpt's first message only agrees to the instructions (AgentGym's and ETO's "OK."), so is no action."""
    if reply.loss or ACTION.search(reply.text):
        return False
    masked = reply.loss is False and any(ACTION.search(each.text) for each in later)
    return masked or bool(AGREED.match(reply.text))


def without_label(observations: list[str]) -> list[str]:
    """The observations without "Observation:" if each of them begins with it."""
    if not all(text.startswith("Observation:") for text in observations):
        return observations
    return [text.removeprefix("Observation:").lstrip() for text in observations]


# ---- import: rows ----------------------------------------------------------------------------------------------------


def read_messages(row: Row, where: str) -> tuple[list[str], list[Said]]:
    """The system texts before a conversation, and its messages, human's first, then gpt's and human's in turn. Raises
    ValueError, with `where` and the number of the message, for any other order, role or content."""
    messages = row.messages if row.conversations is None else row.conversations
    if messages is None:
        raise ValueError(f"{where}: no `conversations` and no `messages`; expected a list of messages in one of them")
    systems, found = [row.system] if row.system else [], []
    for index, message in enumerate(messages):
        named = message.role if message.sharegpt_role is None else message.sharegpt_role
        text = message.content if message.value is None else message.value
        expected = "gpt" if len(found) % 2 else "human"
        role = ROLES.get(named)
        if role not in ("system", expected) or (role == "system" and found):
            raise ValueError(
                f"{where}: message {index} is from {named!r:.40}, expected {expected}: a system turn "
                "if any, then human and gpt in turn"
            )
        if text is None:
            raise ValueError(f"{where}: message {index} has no `value` and no `content`; tool calls are not read")
        if isinstance(text, list):
            text = "\n".join(part.text for part in text)
        if role == "system":
            systems.append(text)
        else:
            found.append(Said(text, False if message.weight == 0 else message.loss))
    return systems, found


def to_trajectory(row: Row, *, split: str, name: str, where: str) -> Trajectory:
    """A row as a trajectory: `name`, unless it has one, is its task id. Raises ValueError for one that is none."""
    openings, messages = read_messages(row, where)
    if row.a3t:
        return restored(row.a3t, openings, messages, where)
    openings += [message.text for message in messages[:1]]
    if len(messages) > 2 and is_agreement(messages[1], messages[3::2]):
        openings.append(messages[2].text)
        messages = messages[2:]
    if len(messages) < 2:
        raise ValueError(f"{where}: {len(messages)} messages, expected at least one from human and one from gpt")
    observations = without_label([message.text for message in messages[2::2]])
    turns = []
    for index, reply in enumerate(messages[1::2]):
        thought, action = parse_answer(reply.text)
        mistake = reply.loss is False
        turns.append(
            Turn(
                thought=thought,
                action=action,
                observation=observations[index] if index < len(observations) else "",
                thought_by="teacher",
                action_by="teacher",
                valid=not mistake,
                errors=UNKNOWN if mistake else [],
            )
        )
    given = row.item_id if row.id is None else row.id
    return Trajectory(
        env="conversations",
        split=split,
        task_id=name if given in (None, "") else str(given),
        task=find_task(openings),
        trial=0,
        round=0,
        seed=0,
        source="refine",
        first_observation="\n\n".join(openings),
        turns=turns,
        reward=1.0,
        progress=1.0,
        success=True,
        end="success",
    )


def restored(rest: Trajectory, openings: list[str], messages: list[Said], where: str) -> Trajectory:
    """The trajectory of our own export: `rest`, its `a3t`, with the texts of its messages."""
    if rest.schema != SCHEMA:
        raise ValueError(f"{where}: `a3t` is of schema {rest.schema}, but this code reads schema {SCHEMA}")
    if len(messages) != 2 * len(rest.turns) or not messages:
        raise ValueError(
            f"{where}: {len(messages)} messages, but `a3t` is of {len(rest.turns)} turns; remove `a3t` from the row to "
            "read the messages alone"
        )
    observations = [message.text for message in messages[2::2]] + [rest.turns[-1].observation]
    for turn, reply, observation in zip(rest.turns, messages[1::2], observations, strict=True):
        end = f"\nAction: {turn.action}"
        if reply.text.startswith("Thought: ") and reply.text.endswith(end):
            turn.thought = reply.text[len("Thought: ") : -len(end)]
        else:
            turn.thought, turn.action = parse_answer(reply.text)
        turn.observation = observation
        if reply.loss is not None:
            turn.errors = [] if reply.loss else turn.errors or UNKNOWN
    first = "\n\n".join([*openings, messages[0].text])
    return replace(rest, first_observation=first.removesuffix(f"\n\n{ANSWER_FORM}"))


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yields (where, row) from a JSONL file or one JSON array; `where` is file:line, or file:[index] in an array.
    Raises ValueError naming it, with what was found and what was expected."""
    with open(path, "rb") as file:
        head = file.read(64)
        start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        file.seek(start)
        if head[start:].lstrip()[:1] == b"[":
            array = enumerate(parse_json(file.read(), list[msgspec.Raw], f"{path}, which starts as a JSON array,"))
            rows = ((f"{path}:[{index}]", bytes(row)) for index, row in array)
        else:
            rows = ((f"{path}:{line_number}", line) for line_number, line in enumerate(file, 1))
        for where, row in rows:
            yield where, parse_json(row, Row, where)


def import_file(path: Path, args: Args) -> None:
    """Writes the conversations of a file as a finished stage, or nothing if any of them is invalid."""
    rows: dict[tuple[str, int], Trajectory] = {}
    for number, (where, row) in enumerate(tqdm(read_rows(path), "conversations"), 1):
        trajectory = to_trajectory(row, split=path.stem, name=f"{path.stem}/{number}", where=where)
        while trajectory.key in rows:
            trajectory.trial += 1
        rows[trajectory.key] = trajectory
    if not rows:
        raise ValueError(f"{path} is empty; expected one conversation per line")
    with Stage(args.out, args, {"input": sha256(path)}) as stage:
        if stage.finished:
            return
        write_file(args.out / "trajectories.jsonl", [rows[key] for key in sorted(rows)])
        counts = {
            "trajectories": len(rows),
            "turns": sum(len(row.turns) for row in rows.values()),
            "mistakes": sum(bool(turn.errors) for row in rows.values() for turn in row.turns),
            "without_task": sum(not row.task for row in rows.values()),
        }
        stage.finish(counts)
    print(f"{args.out}: {', '.join(f'{value} {name}' for name, value in counts.items())}")


def main(args: Args) -> None:
    if args.export:
        export(args.export, args.out)
    else:
        import_file(args.import_, args)


if __name__ == "__main__":
    run_main(main, Args, __doc__)

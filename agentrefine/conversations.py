"""Trajectories as conversations: the format in which AgentRefine's data and AgentGym's AgentTraj were released.

    {"id": "...", "conversations": [{"from": "human", "loss": false, "value": "<the world, the goal, the actions>"},
                                    {"from": "gpt", "loss": true, "value": "Thought: ...\\nAction: ..."}, ...]}

    python -m agentrefine.conversations --export runs/a3t/refine --out refine.jsonl
    python -m agentrefine.conversations --import refine-32k.jsonl --out runs/refine-32k   # then train_pg.py --inputs

Export writes successes only; turns with `errors` get "loss": false. A conversation ends with gpt, as chat trainers
require, so the last observation is dropped, as are the kinds of mistakes, rewards and seeds.

Import reads JSONL or one JSON array; `item_id` is accepted for `id`. If the first gpt message is not trained on and has
no "Action:" (AgentGym's "OK."), the human messages before and after it form the opening. The format records neither
reward nor success, and both data sets were filtered, so every conversation counts as a success. A gpt message with
"loss": false is a mistake of unknown kind and recorded with all three; null on a gpt message means true. The task is
the text after "Your task is to:" or "Goal:", else empty. A gpt message without "Action:" is an action as a whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import tyro
from tqdm import tqdm

from artifacts.atomic import atomic_write
from artifacts.cli import parse
from artifacts.stage import Stage, StageError, require_done, run_main, sha256
from artifacts.trajectory import Trajectory, Turn, read_trajectories, write_file

ANSWER_FORM = "Answer with one thought and one action each time, in this form:\nThought: ...\nAction: ..."
UNKNOWN = ["parameter", "place", "logic"]  # errors of a turn whose kind of mistake is unknown


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path
    """File to write (--export), or stage directory to write (--import)."""
    export: Path | None = None
    """Directory of a finished stage (refine.py) to write as conversations."""
    import_: Annotated[Path | None, tyro.conf.arg(name="import")] = None
    """File of conversations to write as a finished stage."""


class Message(msgspec.Struct):
    role: Literal["human", "gpt"] = msgspec.field(name="from")
    loss: bool | None
    value: str


class Conversation(msgspec.Struct):
    conversations: list[Message]
    id: str | int | None = None
    item_id: str | int | None = None


# ---- export ----------------------------------------------------------------------------------------------------------


def to_conversation(trajectory: Trajectory) -> dict:
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
    name = f"{trajectory.task_id}#{trajectory.trial}" if trajectory.trial else trajectory.task_id
    return {"id": name, "conversations": messages}


def export(directory: Path, out: Path) -> None:
    """Writes the successes of a finished stage to a new file."""
    require_done(directory, "the stage that writes it")
    if out.exists():
        raise StageError(f"{out} already exists; remove it or choose another --out")
    rows = list(read_trajectories(directory / "trajectories.jsonl"))
    kept = [to_conversation(row) for row in rows if row.success and row.turns]
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as temporary:
        temporary.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in tqdm(kept, "conversations")))
    skipped = len(rows) - len(kept)
    print(f"{out}: {len(kept)} conversations; skipped {skipped} of {len(rows)} trajectories that did not succeed")


# ---- import ----------------------------------------------------------------------------------------------------------


def parse_answer(value: str) -> tuple[str, str]:
    """(thought, action) of "Thought: ... Action: ...", on one line or several."""
    thought, found, action = value.rpartition("Action:")
    if not found:
        return "", value.strip()
    return thought.strip().removeprefix("Thought:").strip(), action.strip()


def find_task(opening: str) -> str:
    found = re.search(r"^.*?\b(?:your task is to|goal):[ \t]*(\S[^\n]*)", opening, re.IGNORECASE | re.MULTILINE)
    return found[1].strip() if found else ""


def to_trajectory(conversation: Conversation, *, split: str, trial: int, where: str) -> Trajectory:
    """A conversation as a trajectory. Raises ValueError naming `where` if human and gpt do not alternate."""
    messages = conversation.conversations
    for index, message in enumerate(messages):
        expected = ("human", "gpt")[index % 2]
        if message.role != expected:
            raise ValueError(
                f"{where}: message {index} is from {message.role}, expected {expected}: human first, then alternating"
            )
    opening = [message.value for message in messages[:1]]
    if len(messages) > 2 and not messages[1].loss and "Action:" not in messages[1].value:
        opening.append(messages[2].value)
        messages = messages[2:]
    if len(messages) < 2:
        raise ValueError(f"{where}: {len(messages)} messages, expected at least one from human and one from gpt")
    turns = []
    for index in range(1, len(messages), 2):
        thought, action = parse_answer(messages[index].value)
        mistake = messages[index].loss is False
        turns.append(
            Turn(
                thought=thought,
                action=action,
                observation=messages[index + 1].value if index + 1 < len(messages) else "",
                thought_by="teacher",
                action_by="teacher",
                valid=not mistake,
                errors=UNKNOWN if mistake else [],
            )
        )
    first_observation = "\n\n".join(opening).removesuffix(f"\n\n{ANSWER_FORM}")
    return Trajectory(
        env="conversations",
        split=split,
        task_id=conversation_id(conversation),
        task=find_task(first_observation),
        trial=trial,
        round=0,
        seed=0,
        source="refine",
        first_observation=first_observation,
        turns=turns,
        reward=1.0,
        progress=1.0,
        success=True,
        end="success",
    )


def conversation_id(conversation: Conversation) -> str:
    return str(conversation.item_id if conversation.id is None else conversation.id)


def read_conversations(path: Path) -> Iterator[tuple[str, Conversation]]:
    """Yields (where, conversation) from a JSONL file or one JSON array; `where` is file:line, or file:[index] in an
    array. Raises ValueError naming it, with what was found and what was expected."""
    with open(path, "rb") as file:
        if file.read(64).lstrip()[:1] == b"[":
            file.seek(0)
            try:
                rows = enumerate(msgspec.json.decode(file.read(), type=list[msgspec.Raw]))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: starts as a JSON array but is not one: {error}") from error
            rows = ((f"{path}:[{index}]", bytes(row)) for index, row in rows)
        else:
            file.seek(0)
            rows = ((f"{path}:{line_number}", line) for line_number, line in enumerate(file, 1))
        for where, row in rows:
            try:
                conversation = msgspec.json.decode(row, type=Conversation)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ValueError(
                    f"{where}: got {row[:60]!r}, which is no conversation: {error}; expected "
                    '{"id", "conversations": [{"from", "value", "loss"}, ...]}'
                ) from error
            if conversation.id is None and conversation.item_id is None:
                raise ValueError(f"{where}: no id; expected a key id or item_id")
            yield where, conversation


def import_file(path: Path, args: Args) -> None:
    """Writes the conversations of a file as a finished stage, or nothing if any of them is invalid."""
    trials: Counter[str] = Counter()
    rows = []
    for where, conversation in tqdm(read_conversations(path), "conversations"):
        name = conversation_id(conversation)
        rows.append(to_trajectory(conversation, split=path.stem, trial=trials[name], where=where))
        trials[name] += 1
    if not rows:
        raise ValueError(f"{path} is empty; expected one conversation per line")
    stage = Stage(args.out, args, {"input": sha256(path)})
    if stage.finished:
        return
    write_file(args.out / "trajectories.jsonl", sorted(rows, key=lambda row: row.key))
    counts = {
        "trajectories": len(rows),
        "turns": sum(len(row.turns) for row in rows),
        "mistakes": sum(bool(turn.errors) for row in rows for turn in row.turns),
        "without_task": sum(not row.task for row in rows),
    }
    stage.finish(counts)
    print(f"{args.out}: {', '.join(f'{value} {name}' for name, value in counts.items())}")


def main(args: Args) -> None:
    if (args.export is None) == (args.import_ is None):
        raise StageError("give either --export DIRECTORY or --import FILE")
    if args.export:
        export(args.export, args.out)
    else:
        import_file(args.import_, args)


if __name__ == "__main__":
    run_main(main, parse(Args, __doc__))

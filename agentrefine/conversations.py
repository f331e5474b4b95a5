"""Trajectories as conversations: the released format of AgentRefine's data, which AgentGym's AgentTraj has too.

    {"id": "...", "conversations": [{"from": "human", "loss": false, "value": "<the world, the goal, the actions>"},
                                    {"from": "gpt", "loss": true, "value": "Thought: ...\\nAction: ..."}, ...]}

    python -m agentrefine.conversations --export runs/a3t/refine --out refine.jsonl
    python -m agentrefine.conversations --import refine-32k.jsonl --out runs/refine-32k   # then train_pg.py --inputs

Export takes successes only; turns with `errors` get "loss": false. A conversation ends with gpt, as chat trainers want
it, so what the world said last is not in it; nor are the kind of a mistake, rewards, seeds.

Import reads lines, or one JSON array; `item_id` stands for `id` as well. Where the first answer is not trained on and
has no "Action:" (AgentGym's "OK."), what stands before and after it is the opening. The format says neither reward nor
success, and both sets were filtered: every conversation counts as a success. A gpt turn of "loss": false is a mistake
whose kind is not known, and all three kinds are recorded; null on a gpt turn means true. The task is what follows "Your
task is to:" or "Goal:", if that is there. An answer without "Action:" is an action as a whole.
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
UNKNOWN = ["parameter", "place", "logic"]  # errors of a turn that is known to be a mistake, not of which kind


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path
    """File to write (--export), or directory of the stage to write (--import)."""
    export: Path | None = None
    """Directory of a finished stage (refine.py), to be written as conversations."""
    import_: Annotated[Path | None, tyro.conf.arg(name="import")] = None
    """File of conversations, to be written as a finished stage."""


class Message(msgspec.Struct):
    role: Literal["human", "gpt"] = msgspec.field(name="from")
    loss: bool | None
    value: str


class Conversation(msgspec.Struct):
    conversations: list[Message]
    id: str | int | None = None
    item_id: str | int | None = None


# ---- out -------------------------------------------------------------------------------------------------------------


def to_conversation(trajectory: Trajectory) -> dict:
    """The released format of one trajectory; `id` is the task's, with the trial behind it from the second on."""
    told = [f"{trajectory.first_observation}\n\n{ANSWER_FORM}", *(turn.observation for turn in trajectory.turns)]
    messages = []
    for text, turn in zip(told, trajectory.turns, strict=False):  # the last observation has no answer
        answer = f"Thought: {turn.thought}\nAction: {turn.action}"
        messages += [
            {"from": "human", "loss": False, "value": text},
            {"from": "gpt", "loss": not turn.errors, "value": answer},
        ]
    name = f"{trajectory.task_id}#{trajectory.trial}" if trajectory.trial else trajectory.task_id
    return {"id": name, "conversations": messages}


def export(directory: Path, out: Path) -> None:
    """Writes the successes of a finished stage to a file that is not there yet."""
    require_done(directory, "the stage that writes it")
    if out.exists():
        raise StageError(f"{out} is there already; remove it or give another --out")
    rows = list(read_trajectories(directory / "trajectories.jsonl"))
    kept = [to_conversation(row) for row in rows if row.success and row.turns]
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as temporary:
        temporary.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in tqdm(kept, "conversations")))
    print(f"{out}: {len(kept)} conversations; {len(rows) - len(kept)} of {len(rows)} trajectories were no successes")


# ---- in --------------------------------------------------------------------------------------------------------------


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
    """The record of a conversation. Raises ValueError, naming `where`, if human and gpt do not speak in turn."""
    messages = conversation.conversations
    for number, message in enumerate(messages):
        expected = ("human", "gpt")[number % 2]
        if message.role != expected:
            raise ValueError(
                f"{where}: message {number} is from {message.role}, expected {expected}: human first, then in turn"
            )
    opening = [message.value for message in messages[:1]]
    if len(messages) > 2 and not messages[1].loss and "Action:" not in messages[1].value:
        opening.append(messages[2].value)
        messages = messages[2:]
    if len(messages) < 2:
        raise ValueError(f"{where}: {len(messages)} messages, expected at least one of human and one answer of gpt")
    turns = []
    for number in range(1, len(messages), 2):
        thought, action = parse_answer(messages[number].value)
        observation = messages[number + 1].value if number + 1 < len(messages) else ""
        mistake = messages[number].loss is False
        turns.append(Turn(thought, action, observation, "teacher", "teacher", not mistake, UNKNOWN if mistake else []))
    first_observation = "\n\n".join(opening).removesuffix(f"\n\n{ANSWER_FORM}")
    return Trajectory(
        env="conversations",
        split=split,
        task_id=name_of(conversation),
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


def name_of(conversation: Conversation) -> str:
    return str(conversation.item_id if conversation.id is None else conversation.id)


def read_conversations(path: Path) -> Iterator[tuple[str, Conversation]]:
    """Yields (where, conversation) of a JSONL file or of one JSON array; ValueError says where, what was got and what
    was expected. `where` is file:line, or file:[index] in an array."""
    with open(path, "rb") as file:
        if file.read(64).lstrip()[:1] == b"[":
            file.seek(0)
            try:
                rows = enumerate(msgspec.json.decode(file.read(), type=list[msgspec.Raw]))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: starts as a JSON array, but is none: {error}") from error
            rows = ((f"{path}:[{index}]", bytes(row)) for index, row in rows)
        else:
            file.seek(0)
            rows = ((f"{path}:{number}", line) for number, line in enumerate(file, 1))
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
    """Writes the conversations of a file as a finished stage; nothing is written if one of them is bad."""
    trials: Counter[str] = Counter()
    rows = []
    for where, conversation in tqdm(read_conversations(path), "conversations"):
        name = name_of(conversation)
        rows.append(to_trajectory(conversation, split=path.stem, trial=trials[name], where=where))
        trials[name] += 1
    if not rows:
        raise ValueError(f"{path} is empty; expected one conversation a line")
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

"""The trajectories of runs, as the report's page shows them: every attempt with what was trained on it.

One entry per trajectory of a finished stage: its record without ids, the run and stage that it belongs to, and for each
round that trained on it the text in pieces of one weight, as packed.npz has it.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from artifacts.packing import load_packed
from artifacts.preview import segment_of, weighted_text
from artifacts.scores import type_of
from artifacts.stage import current_round, read_run, round_directory
from artifacts.trajectory import read_trajectories, trajectory_files
from lora.tokenizer import load_tokenizer

Pieces = list[tuple[str, float]]


class Entry(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A trajectory of the page. `trained`: [{"rounds": [1, 2], "pieces": [[text, weight], ...]}, ...]."""

    run: int
    stage: str
    type: str
    env: str
    task_id: str
    task: str
    trial: int
    source: str
    end: str
    success: bool
    reward: float
    progress: float
    opening: str
    turns: list[Any]
    trained: list[dict[str, Any]] = []


def trained_pieces(run: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """{(file, line): what the rounds trained on}, files as packed.jsonl names them. Empty if the base's tokenizer, by
    which ids become text, is no longer there."""
    model = Path(read_run(run).get("model", ""))
    if not (model / "tokenizer.json").exists() and not (model / "tokenizer.model").exists():
        return {}
    tokenizer, found = load_tokenizer(model), {}
    for round_index in range(current_round(run)):
        directory = round_directory(run, round_index) / "train_pg"
        if not (directory / "packed.npz").exists():
            continue
        packed, places = load_packed(directory)
        for place in places:
            ids, weights = segment_of(packed, place)
            known = found.setdefault((place.file, place.line), {})
            rounds, _, _ = known.setdefault((ids.tobytes(), weights.tobytes()), ([], ids, weights))
            rounds.append(round_index)
    return {
        key: [
            {"rounds": rounds, "pieces": weighted_text(ids, weights, tokenizer)}
            for rounds, ids, weights in known.values()
        ]
        for key, known in found.items()
    }


def entries(runs: Sequence[Path]) -> Iterator[Entry]:
    """All trajectories of the finished stages of runs, evaluations first."""
    for index, run in enumerate(runs):
        trained = trained_pieces(run)
        files = [path for path in trajectory_files(run) if (path.parent / "done.json").exists()]
        for path in sorted(files, key=lambda path: not path.parent.name.startswith("evaluate")):
            for line, t in enumerate(read_trajectories(path), 1):
                yield Entry(
                    run=index,
                    stage=str(path.parent.relative_to(run)),
                    type=type_of(t),
                    env=t.env,
                    task_id=t.task_id,
                    task=t.task,
                    trial=t.trial,
                    source=t.source,
                    end=t.end,
                    success=t.success,
                    reward=t.reward,
                    progress=t.progress,
                    opening=t.first_observation,
                    turns=[msgspec.structs.astuple(turn) for turn in t.turns],
                    trained=trained.get((str(path.relative_to(run)), line)) or trained.get((str(path), line), []),
                )


def packed_entries(found: Sequence[Entry]) -> str:
    """The entries as base64 of gzip of JSON: a tenth of the size, and no character that HTML takes for markup."""
    return base64.b64encode(gzip.compress(msgspec.json.encode(found), compresslevel=6, mtime=0)).decode()

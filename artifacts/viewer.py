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
import numpy as np
from tokenizers import Tokenizer

from artifacts.packing import load_packed
from artifacts.preview import segment_of, weighted_text
from artifacts.scores import type_of
from artifacts.stage import current_round, read_run, round_directory
from artifacts.trajectory import read_trajectories, trajectory_files
from lora.tokenizer import load_tokenizer


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


Segments = list[tuple[list[int], np.ndarray, np.ndarray]]  # (rounds that trained on it, ids [L], weights [L])


def trained_segments(run: Path) -> dict[tuple[Path, int], Segments]:
    """{(file, line): what the rounds trained on}."""
    found: dict[tuple[Path, int], dict[tuple[bytes, bytes], Any]] = {}
    for round_index in range(current_round(run)):
        directory = round_directory(run, round_index) / "train_pg"
        if not (directory / "packed.npz").exists():
            continue
        packed, places = load_packed(directory)
        files = {place.file: run / place.file for place in places}  # below the run, or as --inputs had it
        files = {name: (path if path.exists() else Path(name)).resolve() for name, path in files.items()}
        for place in places:
            ids, weights = segment_of(packed, place)
            known = found.setdefault((files[place.file], place.line), {})
            rounds, _, _ = known.setdefault((ids.tobytes(), weights.tobytes()), ([], ids, weights))
            rounds.append(round_index)
    return {key: list(known.values()) for key, known in found.items()}


def tokenizer_of(run: Path) -> Tokenizer | None:
    """The tokenizer of a run's base, by which ids become text; None if it is no longer there."""
    model = Path(read_run(run).get("model", ""))
    there = any((model / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    return load_tokenizer(model) if there else None


def entries(runs: Sequence[Path]) -> Iterator[Entry]:
    """All trajectories of the finished stages of runs, evaluations first."""
    files = [(k, path) for k, run in enumerate(runs) for path in trajectory_files(run)]
    files = [(k, path) for k, path in files if (path.parent / "done.json").exists()]
    trained = [trained_segments(run) for run in runs]
    tokenizers = [tokenizer_of(run) for run in runs]
    for k, path in sorted(files, key=lambda file: not file[1].parent.name.startswith("evaluate")):
        for line, t in enumerate(read_trajectories(path), 1):
            segments = trained[k].get((path.resolve(), line), []) if tokenizers[k] else []
            yield Entry(
                run=k,
                stage=str(path.parent.relative_to(runs[k])),
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
                trained=[
                    {"rounds": rounds, "pieces": weighted_text(ids, weights, tokenizers[k])}
                    for rounds, ids, weights in segments
                ],
            )


def packed_entries(found: Sequence[Entry]) -> str:
    """The entries as base64 of gzip of JSON: a tenth of the size, and no character that HTML takes for markup."""
    return base64.b64encode(gzip.compress(msgspec.json.encode(found), compresslevel=6, mtime=0)).decode()

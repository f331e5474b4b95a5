"""Writes a data card for a run's trajectories: <run>/README.md, with which the folder is a data set of Hugging Face.

    python -m artifacts.data_card --run runs/a3t
    python -c 'import datasets; print(datasets.load_dataset("runs/a3t", "rollout"))'

A configuration per kind of stage (rollout, actre, evaluate, ...), a split per round. The card names the type of every
field: `datasets` would guess them from the first ten megabytes, and fail at a list that is empty there and not later.
Then it says what the files hold and how they were made. An existing README.md is never replaced.
Left out: the licence, which whoever publishes must choose; shards, empty files and stages that are not finished.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from artifacts.atomic import atomic_write
from artifacts.cli import run_main
from artifacts.json_io import read_json
from artifacts.stage import read_run, sha256
from artifacts.stats import File, count, is_evaluation, listed
from artifacts.trajectory import Trajectory

TEXT = """
# Trajectories of {name}

Attempts of a language agent at tasks in text worlds, one JSON line each. An attempt is the world's first observation
and turns of thought, action and observation (the world's answer to the action). The code that made them explains every
field in `docs/artifacts.md`.

```python
import datasets

rows = datasets.load_dataset("{name}", "{default}")  # the folder with this card, or its name on a hub
```

Read a single file with the types of this card, since `datasets` guesses wrongly where the first rows have empty lists:

```python
types = datasets.load_dataset_builder("{name}", "{default}").info.features
rows = datasets.load_dataset("json", data_files="{name}/{file}", features=types)
```

Licence: not chosen yet. Whoever publishes this data writes it above, after looking at the licences of the base model
and of the worlds' data, whose text the observations hold.

## What is in it

`won` counts solved tasks. Attempts that ended in env_error, llm_error or timeout say nothing about the agent. The
evaluations play held-out tasks: **do not train on them**.

{contents}
{leaks}
## How it was made

{origins}
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    run: Path = Path("runs/a3t")
    """Directory of the run."""


def feature(kind: msgspec.inspect.Type) -> dict[str, Any]:
    """A type of the record in the form of a card's `features`."""
    if isinstance(kind, msgspec.inspect.ListType):
        item = feature(kind.item_type)
        return {"list": item.get("struct") or item["dtype"]}
    if isinstance(kind, msgspec.inspect.StructType):
        return {"struct": [{"name": field.name} | feature(field.type) for field in kind.fields]}
    if isinstance(kind, msgspec.inspect.IntType):
        return {"dtype": "int8" if kind.le == 1 else "int32" if kind.lt == 2**31 else "int64"}
    names = {msgspec.inspect.FloatType: "float64", msgspec.inspect.BoolType: "bool"}
    return {"dtype": names.get(type(kind), "string")}


def split_of(path: Path, run: Path) -> str:
    """round_0 for a file in round_0/rollout; train for one of a stage that is not of a round."""
    return "_".join(re.sub(r"\W", "_", part) for part in path.relative_to(run).parts[:-2]) or "train"


def front_matter(run: Path, files: list[File]) -> Iterator[str]:
    """The lines of YAML, in which values are JSON."""
    by_kind: dict[str, list[Path]] = defaultdict(list)
    for found in files:
        by_kind[found.path.resolve().parent.name].append(found.path)
    features = feature(msgspec.inspect.type_info(Trajectory))["struct"]
    yield "---\nlicense: other  # not chosen yet, see below\nconfigs:"
    for index, (kind, paths) in enumerate(by_kind.items()):
        yield f"- config_name: {json.dumps(kind)}\n  default: {json.dumps(index == 0)}\n  data_files:"
        for path in paths:
            yield f"  - {json.dumps({'split': split_of(path, run), 'path': str(path.relative_to(run))})}"
    yield "dataset_info:"
    for index, kind in enumerate(by_kind):
        yield f"- config_name: {json.dumps(kind)}\n  features: {'*features' if index else '&features'}"
        if not index:
            yield from (f"  - {json.dumps(entry)}" for entry in features)
    yield "---"


def contents(files: list[File]) -> Iterator[str]:
    yield "| folder | attempts | won | source | ends | sha256 of trajectories.jsonl |\n|---|---|---|---|---|---|"
    for found in files:
        whole, digest = found.whole, sha256(found.path)[:16]
        yield f"| {found.name} | {whole.n} | {whole.won} | {listed(whole.sources)} | {listed(whole.ends)} | {digest} |"


def origins(run: Path, files: list[File]) -> Iterator[str]:
    """What run.json and the stages' config.json say: base, world, panels, adapter, commit."""
    for name, value in read_run(run).items():
        text = Path(value).name if name == "model" else value if isinstance(value, str) else json.dumps(value)
        yield f"- {name}: `{text}`"
    yield "\n| folder | panel, tasks (sha256) | adapter | seed | commit |\n|---|---|---|---|---|"
    for found in files:
        config = read_json(found.path.with_name("config.json"), dict[str, Any])
        facts, args, git = (config.get(part, {}) for part in ("facts", "args", "git"))
        panels = facts.get("panels") or {facts.get("panel"): facts.get("panel_sha256")}
        named = ", ".join(f"{name} ({str(digest)[:16]})" for name, digest in panels.items() if name) or "-"
        commit = f"{str(git.get('commit') or '-')[:12]}{' and changes' if git.get('dirty') else ''}"
        adapter = str(facts.get("adapter") or "-")[:16]
        yield f"| {found.name} | {named} | {adapter} | {args.get('seed', '-')} | {commit} |"


def card(run: Path) -> str:
    """The text of the card. Raises ValueError if the run has no finished stage with trajectories."""
    found = [each for each in count(run) if each.whole.n and each.path.with_name("done.json").exists()]
    files = sorted(
        (each for each in found if "shards" not in each.path.relative_to(run).parts),
        key=lambda each: is_evaluation(each.path),
    )
    if not files:
        raise ValueError(f"{run} has no finished stage with trajectories; python rollout.py --run {run} makes some")
    leaks = [f"{number} of {each.name} play tasks of {where}" for each in files for where, number in each.leaks.items()]
    text = TEXT.format(
        name=run.resolve().name,
        default=files[0].path.resolve().parent.name,
        file=files[0].path.relative_to(run),
        contents="\n".join(contents(files)),
        leaks=f"\nTrained tasks that are evaluated too: {'; '.join(leaks)}.\n" if leaks else "",
        origins="\n".join(origins(run, files)),
    )
    return "\n".join(front_matter(run, files)) + "\n" + text


def main(args: Args) -> None:
    path = args.run / "README.md"
    if not args.run.is_dir():
        raise ValueError(f"no such run: {args.run}")
    if path.exists():
        raise ValueError(f"{path} is there already, perhaps edited; to have it written anew, rename or remove it")
    text = card(args.run)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"card -> {path}; the licence is yours to fill in")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

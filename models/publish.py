"""Publishes the adapter of a run: bfloat16, in PEFT's layout, with a model card that says where it comes from.

    python -m models.publish --run runs/smollm2 --round 3 --out models/adapters/alfworld
    python evaluate.py --run runs/smollm2 --adapter models/adapters/alfworld --panels valid_seen-140
    python -m models.publish --run runs/smollm2 --round 3 --out models/adapters/alfworld \\
        --scores runs/smollm2/adapter/evaluate/scores.json             # the card now has its scores

Left out: the base (merge them with lora.convert --adapter), uploading.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes

from artifacts.atomic import atomic_write
from artifacts.cli import Range, run_main
from artifacts.json_io import read_json, write_json
from artifacts.scores import Score
from artifacts.stage import compared, require_done, round_directory
from lora.checkpoint import open_tensors, save_tensors


@dataclass(frozen=True, kw_only=True)
class Args:
    run: Path = Path("runs/a3t")
    """Directory of the run."""
    round: Annotated[int, Range(0, 10_000)] = 3
    """Round whose adapter is published."""
    out: Path
    """Folder of the adapter; its name is the adapter's."""
    scores: tuple[Path, ...] = ()
    """scores.json files of evaluations of the published adapter, for the card."""
    machine: str = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    """What the run was made on."""


def copy_weights(adapter: Path, out: Path, base: str) -> None:
    """Writes the adapter's weights, rounded to bfloat16, and its configuration with `base` as the base's name."""
    weights = adapter / "adapter_model.safetensors"
    with open_tensors(weights) as opened:
        tensors = {name: opened.get_tensor(name).astype(ml_dtypes.bfloat16) for name in opened.keys()}
        recorded = opened.metadata() or {}
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / weights.name) as temporary:
        save_tensors(tensors, temporary, recorded)
    config = read_json(adapter / "adapter_config.json", dict[str, Any])
    write_json(out / "adapter_config.json", config | {"base_model_name_or_path": base})


def flags(config: dict[str, Any]) -> str:
    """The flags of train_pg.py that decide its result."""
    shown = compared({"args": config["args"]})
    words = [(name.removeprefix("args.").replace("_", "-"), value) for name, value in sorted(shown.items())]
    return " ".join(
        f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in words
        if value is not None and not isinstance(value, bool)
    )


def seconds(run: Path, last: int) -> float:
    """What the stages took that lead to the adapter of the last round: all of its and earlier rounds, and ActRe's."""
    stages = [
        round_directory(run, index) / stage / "done.json"
        for index in range(last + 1)
        for stage in ("rollout", "actre", "train_pg")
    ]
    done = [*(run / "actre").rglob("done.json"), *filter(Path.exists, stages)]
    return sum(read_json(path, dict[str, Any])["seconds"] for path in done)


def score_rows(paths: tuple[Path, ...]) -> list[str]:
    """A row of the card for each panel."""
    rows = []
    for path in paths:
        args = read_json(path.with_name("config.json"), dict[str, Any])["args"]
        for panel, score in read_json(path, dict[str, Score]).items():
            low, high = (100 * x for x in score.wilson95)
            how = f"{args['max_turns']} turns, {args['context']:,} tokens"
            rows.append(f"| {panel} | {score.n} | {100 * score.rate:.1f} % [{low:.1f}, {high:.1f}] | {how} |")
    return rows


def card(args: Args) -> str:
    """The model card, in Markdown."""
    folder = round_directory(args.run, args.round) / "train_pg"
    config, done = read_json(folder / "config.json", dict[str, Any]), read_json(folder / "done.json", dict[str, Any])
    base = Path(config["args"]["model"]).name
    trained = f"{done['sequences']} trajectories ({done['sequences_failed']} failures), {done['tokens']:,} tokens"
    facts = {
        "base": f"{base}, sha256 of its weights {config['facts']['base']}",
        "trained on": f"{trained}, {done['steps']} steps",
        "command": f"`python train_pg.py {flags(config)}`, round {args.round}",
        "commit": config["git"]["commit"] + (" and uncommitted changes" if config["git"]["dirty"] else ""),
        "seed": config["args"]["seed"],
        "time": f"{seconds(args.run, args.round) / 3600:.1f} hours for all stages up to it, on {args.machine}",
    }
    lines = [
        *("---", "library_name: peft", f"base_model: {base}", "---", "", f"# {args.out.name}", ""),
        "A LoRA adapter, in bfloat16.",
        *("", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())),
    ]
    if rows := score_rows(args.scores):
        lines += ["", "| panel | n | success, 95 % interval | limits |", "|---|---|---|---|", *rows]
    lines += ["", "```bash", f"python evaluate.py --model models/{base} --adapter {args.out}", "```"]
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    directory = round_directory(args.run, args.round) / "train_pg"
    require_done(directory, f"python train_pg.py --run {args.run} --round {args.round}")
    base = Path(read_json(directory / "config.json", dict[str, Any])["args"]["model"]).name
    copy_weights(directory / "adapter", args.out, base)
    with atomic_write(args.out / "README.md") as temporary:
        temporary.write_text(card(args))
    print(f"{args.out}: {sum(path.stat().st_size for path in args.out.iterdir()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    run_main(main, Args, __doc__)

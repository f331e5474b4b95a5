"""What do both papers bring a pretrained language model? SmolLM2-135M-Instruct, from its first words on.

    python -m bench.pretrained                              # resumes; all of it takes days on a CPU
    python -m bench.pretrained --experiments base bootstrap

Each arm is a run of its own, made by the project's own commands. An arm that shares stages with another copies them.
The model wins nothing by itself, so demonstrations stand in for the paper's prompted gpt-3.5: round 0 of every loop.
Choices are made on valid-60; valid_seen-140 is played by arms that are fixed. Play to train on has 20 turns, an
evaluation 50. After each command what can be kept of its stages (config.json, done.json, scores.json, metrics.jsonl,
the trajectories compressed) is copied to --results, so that a figure can be traced; prints a table of what is there.
On another machine, or to look at the attempts, --restore lays what was kept back into --runs:

    python -m bench.pretrained --restore --experiments
    python -m artifacts.report --run runs/pretrained/a3t
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import dataclasses
import gzip
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from artifacts.cli import Range, run_main
from artifacts.json_io import read_json

ROOT = Path(__file__).parent.parent
BOOTSTRAP = ("actre/demonstrations", "actre/round_0/train_pg", "round_0/rollout", "round_0/actre", "round_0/train_pg")
KEPT = ("config.json", "done.json", "scores.json", "metrics.jsonl")
TRAJECTORIES = "trajectories.jsonl"


@dataclass(frozen=True, kw_only=True)
class Settings:
    runs: Path = Path("runs/pretrained")
    """Folder for the runs, one per arm."""
    results: Path = Path("bench/results")
    """Folder for what is kept of them."""
    model: Path = Path("models/smollm2")
    """The pretrained base."""
    count: Annotated[int, Range(1, 10**6)] = 300
    """Demonstrations of round 0."""
    limit: Annotated[int, Range(1, 600)] = 120
    """Training tasks of a round, spread evenly over train-600."""
    rounds: Annotated[int, Range(1, 100)] = 4
    """Rounds of the loop, the demonstrations' included."""
    context: Annotated[int, Range(16, 10**7)] = 3072
    """Maximum tokens of an attempt of an evaluation."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of every command."""
    restore: bool = False
    """Begin with what was kept: finished play, compositions and evaluations are taken as they are."""

    @property
    def evaluation(self) -> tuple[str, ...]:
        """The flags of every evaluation."""
        return "--max-turns", "50", "--context", str(self.context), "--slots", "32"

    @property
    def environment(self) -> dict[str, object]:
        """The variables of every ./run.sh. What was kept was played by adapters that may be gone."""
        return {"MODEL": self.model, "SEED": self.seed} | ({"TRUST": 1} if self.restore else {})


def run(*words: object, **env: object) -> None:
    """Runs a command of the project; raises CalledProcessError if it fails."""
    command = [str(word) for word in words]
    command = command if command[0].startswith("./") else [sys.executable, *command]
    print("$", *(f"{key}={value}" for key, value in env.items()), *command, flush=True)
    subprocess.run(command, check=True, env=os.environ | {key: str(value) for key, value in env.items()})


def keep(settings: Settings, arm: str) -> None:
    """Copies what is kept of an arm's stages, with paths relative to the project; of one that is not finished, the
    attempts that are."""
    for config in sorted((settings.runs / arm).rglob("config.json")):
        stage = config.parent
        if not any((stage / name).exists() for name in ("done.json", TRAJECTORIES)):
            continue  # training under way
        folder = settings.results / arm / stage.relative_to(settings.runs / arm)
        folder.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (stage / name).exists():
                (folder / name).write_text((stage / name).read_text().replace(f"{ROOT}/", ""))
        if (stage / TRAJECTORIES).exists():
            packed = gzip.compress((stage / TRAJECTORIES).read_bytes(), mtime=0)  # the same bytes every time
            (folder / f"{TRAJECTORIES}.gz").write_bytes(packed)
    for identity in sorted((settings.runs / arm).rglob("run.json")):
        copy = settings.results / identity.relative_to(settings.runs)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(identity, copy)


def is_past(stage: Path) -> bool:
    """Whether all that a kept train_pg was trained for is kept too: its evaluation, and the next round's data."""
    index = int(stage.parent.name.removeprefix("round_"))
    after = stage.parent.with_name(f"round_{index + 1}")
    played = any(stage.parent.glob("evaluate*/done.json"))
    return played and all((after / name / "done.json").exists() for name in ("rollout", "actre"))


def restore(settings: Settings) -> None:
    """Lays what was kept into the runs, where a stage is missing: it resumes there. Adapters are not kept: one that
    something is still to be played by is trained again."""
    for config in sorted(settings.results.rglob("config.json")):
        kept = config.parent
        folder = settings.runs / kept.relative_to(settings.results)
        whole = is_past(kept) if kept.name == "train_pg" else (kept / f"{TRAJECTORIES}.gz").exists()
        if folder.exists() or not whole:
            continue
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(kept, part)
        if (packed := part / f"{TRAJECTORIES}.gz").exists():
            (part / TRAJECTORIES).write_bytes(gzip.decompress(packed.read_bytes()))
            packed.unlink()
        part.rename(folder)
    for identity in sorted(settings.results.rglob("run.json")):
        run = settings.runs / identity.parent.relative_to(settings.results)
        if run.exists() and not (run / "run.json").exists():
            shutil.copy(identity, run)


def share(settings: Settings, arm: str, other: str, *stages: str) -> None:
    """Copies finished stages of another arm, such as round_0 or round_1/rollout, unless they are there. What the other
    arm lacks, this one makes: also an adapter that was removed, and then all that was played by it."""
    for stage in stages:
        source, target = settings.runs / other / stage, settings.runs / arm / stage
        if stage.endswith("train_pg") and (source / "done.json").exists() and not (source / "adapter").exists():
            break
        if (source / "done.json").exists() and not target.exists():
            part = target.with_name(f"{target.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(source, part)
            part.rename(target)
            shutil.copy(settings.runs / other / "run.json", settings.runs / arm / "run.json")


def evaluate(settings: Settings, arm: str, *words: object, panel: str = "valid_seen-140") -> None:
    """Evaluates on a panel, valid-60 beside the other."""
    name = ("--name", "valid-60") if panel == "valid-60" else ()
    where = "--run", settings.runs / arm, "--model", settings.model, "--seed", settings.seed
    run("evaluate.py", *where, "--panels", panel, *settings.evaluation, *name, *words)
    keep(settings, arm)


def train(settings: Settings, arm: str, *words: object) -> None:
    """Trains round 0 of an arm with these flags, otherwise as ./run.sh smollm2 does."""
    where = "--run", settings.runs / arm, "--model", settings.model, "--seed", settings.seed, "--round", 0
    run("train_pg.py", *where, "--row-length", 2176, "--learning-rate", 1.5e-3, "--epochs", 1, *words)
    keep(settings, arm)


def loop(settings: Settings, arm: str, *words: object, rounds: int, panel: str = "valid_seen-140") -> None:
    """Plays the rounds of an arm with these flags, each evaluated on a panel."""
    how = ("--rollout.limit", settings.limit, "--evaluate.panels", panel, *settings.evaluation)
    how += ("--name", "valid-60") if panel == "valid-60" else ()
    where = {"RUN": settings.runs / arm, "COUNT": settings.count, **settings.environment}
    for count in range(1, rounds + 1):
        run("./run.sh", "smollm2", *how, *words, **where, ROUNDS=count)
        keep(settings, arm)


# ---- A3T -------------------------------------------------------------------------------------------------------------


def base(settings: Settings) -> None:
    """The model by itself, and after the paper's one-shot prompt."""
    evaluate(settings, "base", "--base")
    evaluate(settings, "base", "--base", "--prompt", "prompts/alfworld_react.txt", "--name", "one-shot")


def bootstrap(settings: Settings) -> None:
    """Round 0 alone, on all demonstrations and on a third."""
    for count in (settings.count, settings.count // 3):
        loop(dataclasses.replace(settings, count=count), f"bootstrap-{count}", rounds=1, panel="valid-60")


def actre(settings: Settings) -> None:
    """What ActRe writes: the frozen model alone, after the one-shot prompt, and tuned in the bootstrap."""
    adapter = settings.runs / f"bootstrap-{settings.count}" / "actre/round_0/train_pg/adapter"
    how = {"frozen": (), "prompted": ("--prompt", "prompts/alfworld_actre.txt"), "tuned": ("--adapter", adapter)}
    for name, words in how.items():
        out = settings.results / "actre" / f"reasons-{name}.json"
        run("-m", "bench.reasons", "--model", settings.model, "--out", out, *words)


def a3t(settings: Settings) -> None:
    """The loop of the paper: sampled actions, explained by ActRe."""
    share(settings, "a3t", f"bootstrap-{settings.count}", *BOOTSTRAP)
    loop(settings, "a3t", rounds=settings.rounds)


def resampling(settings: Settings) -> None:
    """The loop without sampled actions and ActRe: failed tasks again, at the same temperature."""
    share(settings, "resampling", "a3t", *BOOTSTRAP, "round_0/evaluate", "round_1/rollout")
    again = ("--actre.probability", 0, "--max-invalid", 0, "--reason", "empty")
    loop(settings, "resampling", *again, rounds=settings.rounds)


def success_only(settings: Settings) -> None:
    """Round 1 of the paper's loop without its failures (R_f = 0)."""
    stages = (settings.runs / "a3t" / name for name in ("round_0/rollout", "round_1/rollout", "round_1/actre"))
    train(settings, "success-only", "--inputs", *stages, "--failure-reward", 0)
    evaluate(settings, "success-only", "--round", 0)


def forced(settings: Settings) -> None:
    """Round 1 with sampled actions only where three were refused in a row."""
    share(settings, "forced", "a3t", *BOOTSTRAP, "round_0/evaluate", "round_1/rollout")
    loop(settings, "forced", "--actre.probability", 0, rounds=2)


def demonstrations(settings: Settings) -> None:
    """Round 1 of the paper's loop with as many further demonstrations as it has won compositions in their place."""
    won = read_json(settings.runs / "a3t/round_1/actre/done.json")["success"]
    more, a3t = settings.runs / "more-demonstrations", settings.runs / "a3t"
    run("-m", "models.demonstrations", "--out", more, "--count", won, "--seed", settings.seed + 2)
    train(settings, "demonstrations", "--inputs", a3t / "round_0/rollout", a3t / "round_1/rollout", more)
    evaluate(settings, "demonstrations", "--round", 0)


def displaced(settings: Settings) -> None:
    """Round 0 on demonstrations with refused actions and recoveries, masked as AgentRefine masks mistakes."""
    shown = settings.runs / "displaced-demonstrations"
    how = ("--count", settings.count, "--seed", settings.seed, "--displaced", 0.15)
    run("-m", "models.demonstrations", "--out", shown, *how)
    train(settings, "displaced", "--inputs", shown)
    evaluate(settings, "displaced", "--round", 0)


# ---- AgentRefine -----------------------------------------------------------------------------------------------------


def refinement(settings: Settings) -> None:
    """AgentRefine's experiment (bench/refinement.py), with 600 trajectories an arm and 40 tasks a panel."""
    arms = ("demo", "refine", "both", "drop-errors", "no-mask")
    how = ("--count", 600, "--limit", 40, "--rank", 16, "--learning-rate", 1.5e-3, "--row-length", 2048)
    where = ("--runs", settings.runs / "refinement", "--model", settings.model, "--seeds", settings.seed)
    for count in range(1, len(arms) + 1):
        run("-m", "bench.refinement", *where, *how, "--context", 2048, "--arms", *arms[:count])
        keep(settings, "refinement")


# ---- WebShop ---------------------------------------------------------------------------------------------------------


def webshop(settings: Settings) -> None:
    """The loop on WebShop: 60 tasks a round, the first 100 of the test panel."""
    where = {"RUN": settings.runs / "webshop", **settings.environment}
    for rounds in (1, 2):
        run("./run.sh", "smollm2-webshop", "--rollout.limit", 60, "--evaluate.limit", 100, **where, ROUNDS=rounds)
        keep(settings, "webshop")


EXPERIMENTS: dict[str, Callable[[Settings], None]] = {
    "base": base,
    "bootstrap": bootstrap,
    "actre": actre,
    "a3t": a3t,
    "resampling": resampling,
    "success-only": success_only,
    "forced": forced,
    "demonstrations": demonstrations,
    "displaced": displaced,
    "refinement": refinement,
    "webshop": webshop,
}


# ---- what came out ---------------------------------------------------------------------------------------------------


def table(settings: Settings) -> str:
    """A row for each evaluation that was kept."""
    rows = ["| arm | played | panel | success | n | 95 % interval | actions refused | ends |", "|---" * 8 + "|"]
    for path in sorted(settings.results.glob("*/*/*/scores.json")):
        arm, subject, stage = path.parent.relative_to(settings.results).parts
        for panel, score in read_json(path).items():
            low, high = (100 * x for x in score["wilson95"])
            ends = ", ".join(f"{end} {count}" for end, count in Counter(score["ends"]).most_common())
            rows.append(
                f"| {arm} | {subject}/{stage} | {panel} | {100 * score['rate']:.1f} | {score['n']} | "
                f"{low:.0f}-{high:.0f} | {100 * score['invalid_action_rate']:.0f} | {ends} |"
            )
    return "\n".join(rows)


@dataclass(frozen=True, kw_only=True)
class Args(Settings):
    experiments: tuple[Literal[tuple(EXPERIMENTS)], ...] = tuple(EXPERIMENTS)
    """What to run, in this order; without a name nothing, only the table is printed."""


def main(args: Args) -> None:
    if args.restore:
        restore(args)
    try:
        for name in args.experiments:
            EXPERIMENTS[name](args)
    finally:  # of an interrupted stage too
        for run in args.runs.glob("*/run.json"):
            keep(args, run.parent.name)
    print(table(args))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

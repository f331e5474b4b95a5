"""A rehearsal of the paper's run at 7B without its weights: seconds and peak memory of every stage of `./run.sh paper`.

Writes a random bfloat16 checkpoint of Mistral-7B's shape (14.5 GB, sharded) with Mistral's own tokenizer and chat
template, then runs rounds of `./run.sh paper` on it with two tasks, two turns and short replies: convert, rollout,
actre, train_pg, evaluate. Every trajectory counts as a success, so that every round trains. Shows that the stages work
on the real shape and what memory they take; says nothing about skill, or about speed on an accelerator. Needs
mistral-common (requirements/test.txt) for the tokenizer, and about 20 GB of disk.

    JAX_PLATFORMS=cpu python -m bench.rehearsal
    JAX_PLATFORMS=cpu python -m bench.rehearsal --layers 4          # a quick try
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import mistral_common
import ml_dtypes
import numpy as np
from tqdm import tqdm

from artifacts.cli import Range, run_main
from artifacts.json_io import read_json, write_json
from bench.shapes import MISTRAL_7B, parameters
from lora.checkpoint import tensor_shapes, write_checkpoint
from lora.config import Config

ROOT = Path(__file__).parent.parent
TOKENIZER = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
# The form of Mistral-7B-Instruct-v0.2.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
FLAGS = (
    "--play.max-turns 2 --play.max-new-tokens 4 --play.slots 4 --play.context 640 --play.rollout-weights nf4 "
    "--rollout.limit 2 --evaluate.limit 2 --actre.budget 1 --actre.force 1 --actre.probability 1 "
    "--train.threshold 0 --train.epochs 1 --train.batch-rows 2 --train.row-length 768"
)
SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True, kw_only=True)
class Args:
    folder: Path = Path("runs/rehearsal")
    """Folder for the checkpoint and the run; a finished checkpoint in it is used again, and the run resumes."""
    layers: Annotated[int, Range(1, 32)] = 32
    """Decoder layers; Mistral-7B has 32."""
    rounds: Annotated[int, Range(1, 4)] = 2
    """Rounds. Compositions, which hold two samplers, begin in the second."""


def write_model(folder: Path, config: Config) -> None:
    """Writes the checkpoint, unless it is there."""
    if (folder / "config.json").exists():
        return
    random = np.random.default_rng(0)
    pool = (0.02 * random.standard_normal(2**24 + 1, np.float32)).astype(ml_dtypes.bfloat16)  # of an odd length

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.ones(shape, pool.dtype) if name.endswith("norm.weight") else np.resize(pool, shape)

    shapes = tqdm(tensor_shapes(config).items(), desc="random weights", unit="tensor")
    (folder / "tokenizer.model").parent.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    special = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    write_json(folder / "tokenizer_config.json", special)
    file = dataclasses.replace(config, bos_token_id=1, eos_token_ids=(2,)).to_json() | {"dtype": "bfloat16"}
    write_checkpoint(folder, ((name, tensor(name, shape)) for name, shape in shapes), file)


def running_python(parent: int) -> tuple[str, int] | None:
    """The script that a child process of `parent` runs, and its peak resident bytes so far."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status = (process / "status").read_text()
            words = (process / "cmdline").read_text().split("\0")
        except OSError:  # it has ended
            continue
        if re.search(rf"^PPid:\t{parent}$", status, re.M) and "python" in words[0]:
            name = words[2] if words[1] == "-m" else words[1]
            if peak := re.search(r"^VmHWM:\s+(\d+) kB", status, re.M):
                return name, int(peak[1]) * 1024
    return None


def run_stages(command: list[str], environment: dict[str, str]) -> list[dict]:
    """Runs `./run.sh`; returns for each stage, in order, its script, seconds and peak resident bytes."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    stages: list[dict] = []
    while process.poll() is None:
        if found := running_python(process.pid):
            name, peak = found
            if not stages or stages[-1]["stage"] != name:
                stages.append({"stage": name, "started": time.time(), "peak": 0})
            stages[-1] |= {"seconds": round(time.time() - stages[-1]["started"]), "peak": max(stages[-1]["peak"], peak)}
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if process.returncode:
        raise SystemExit(f"run.sh ended with {process.returncode}; the stage that failed has said why")
    return stages


def main(args: Args) -> None:
    config = dataclasses.replace(MISTRAL_7B, num_hidden_layers=args.layers)
    model, run = args.folder / f"mistral-{args.layers}-layers", args.folder / f"run-{args.layers}-layers"
    start = time.time()
    write_model(model, config)
    written = round(time.time() - start)
    environment = os.environ | {"MODEL": str(model.resolve()), "RUN": str(run.resolve()), "ROUNDS": str(args.rounds)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # run.sh calls python
    stages = run_stages(["./run.sh", "paper", *FLAGS.split()], environment)
    last = run / f"round_{args.rounds - 1}" / "actre" / "done.json"
    print(f"{parameters(config) / 1e9:.2f} B parameters, {args.layers} layers; checkpoint written in {written} s")
    for stage in stages:
        print(f"{stage['stage']:14} {stage['seconds']:6} s {stage['peak'] / 2**30:6.2f} GiB peak")
    print(json.dumps({"parameters": parameters(config), "stages": stages, "actre": read_json(last, dict)["asked"]}))


if __name__ == "__main__":
    run_main(main, Args, __doc__)

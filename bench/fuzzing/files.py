"""Cases of bench/fuzz.py: damaged folders of models, and replies of a server."""

from __future__ import annotations

import http.server
import json
import shutil
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

import train_pg
from agent.attempt import AttemptSettings, Job
from agent.loop import PlayLoop
from agent.server import Server, ServerPolicy
from artifacts.packing import Example
from artifacts.trajectory import FAULTS, Trajectory, Writer, read_trajectories
from bench.fuzzing.demands import LIMIT, accepted, require
from bench.fuzzing.mutations import (
    DEEP,
    JUNK,
    answer,
    choose,
    readable,
    said,
    spoil_bytes,
    spoil_json,
    unreadable,
)
from envs.synthetic.world import Synthetic
from lora import convert
from lora.adapter import read_adapter, save_adapter
from lora.checkpoint import Checkpoint, base_facts, is_linear
from lora.config import Config
from lora.linear import LoRAConfig
from lora.load import load_model, save_model
from lora.model import CausalLM
from lora.tokenizer import encode_piece, load_tokenizer, newline_ids, prompt_ids
from models.tokenizer import byte_tokenizer

# ---- folders ---------------------------------------------------------------------------------------------------------


def write_models(folder: Path) -> None:
    """A random base over bytes with its tokenizer: dense, sharded, in NF4 and double-quantised NF4; and an adapter."""
    config = Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    save_model(CausalLM(config, rngs=nnx.Rngs(0)), folder / "dense")
    byte_tokenizer().save(str(folder / "dense/tokenizer.json"))
    (folder / "dense/tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "dense/generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    shutil.copytree(folder / "dense", folder / "sharded")
    tensors = sorted(load_file(folder / "dense/model.safetensors").items())
    (folder / "sharded/model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((tensors[:6], tensors[6:])):
        save_file(dict(part), folder / f"sharded/model-{number}.safetensors", metadata={"format": "pt"})
        weight_map |= {name: f"model-{number}.safetensors" for name, _ in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "sharded/model.safetensors.index.json").write_text(json.dumps(index))
    for weights in ("nf4", "nf4-dq"):
        convert.main(convert.Args(model=folder / "dense", out=folder / weights, weights=weights))
    model = load_model(folder / "dense", lora=LoRAConfig(rank=2))
    for base in ("dense", "sharded", "nf4", "nf4-dq"):
        save_adapter(folder / base / "adapter", model, folder / base)


def read_weights(folder: Path) -> Checkpoint:
    """Reads every tensor of a base, in the forms that it is loaded in."""
    checkpoint = Checkpoint(folder)
    for name in checkpoint.shapes:
        checkpoint.dense(name)
        if is_linear(name):
            checkpoint.nf4(name, None)
    return checkpoint


class Folders:
    """Bases with a tokenizer and an adapter, in which one file is damaged."""

    clock, limit, what = time.process_time, LIMIT, ""

    def __init__(self, folder: Path):
        self.folder = folder / "models"
        self.folder.mkdir()
        write_models(self.folder)
        for base in self.folder.iterdir():
            require(not self.refusals(base), f"{base.name} is refused before it is damaged")

    def __call__(self, rng: np.random.Generator) -> Counter[str]:
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as place:
            folder = shutil.copytree(choose(rng, sorted(self.folder.iterdir())), Path(place, "base"))
            files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != convert.RECORD)
            path = choose(rng, files)
            tensors = path.suffix == ".safetensors"
            how = choose(rng, ("header", "values", "values", "bytes") if tensors else ("json", "json", "json", "bytes"))
            how = choose(rng, (how, how, how, "replaced"))
            self.what = f"{how} of {path.relative_to(folder)}"
            fatal = getattr(self, how)(path, rng)
            refusals = self.refusals(folder)
            require(bool(refusals) or not fatal, f"{fatal}, and nothing is refused")
        return Counter(folders=1, refused_folders=bool(refusals))

    def refusals(self, folder: Path) -> int:
        """How many parts of a folder are refused."""
        tokenizer = accepted(str(folder), load_tokenizer, folder)
        checkpoint = accepted(str(folder), Checkpoint, folder)
        results = [tokenizer, checkpoint, accepted(str(folder), read_weights, folder)]
        results += [accepted(str(folder), Config.read, folder), accepted(str(folder), base_facts, folder)]
        if tokenizer is not None:
            results.append(accepted(str(folder), prompt_ids, tokenizer, folder, "look\n"))
            results.append(accepted(str(folder), newline_ids, tokenizer, folder))
            results.append(accepted("", lambda: tokenizer.decode(encode_piece(tokenizer, "act[take mug 1]\n", False))))
        if checkpoint is not None:
            results.append(accepted(str(folder), read_adapter, checkpoint, folder / "adapter"))
        return sum(result is None for result in results)

    # Each damages a file, and returns what is wrong if it must be refused, else "".

    def replaced(self, path: Path, rng: np.random.Generator) -> str:
        """Removed, emptied, a folder in its place, or something else."""
        how = choose(rng, ("removed", "emptied", "a folder", "deep", "junk"))
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how != "removed":
            path.write_text({"emptied": "", "deep": DEEP}.get(how, choose(rng, JUNK)), errors="replace")
        optional = path.name in ("generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")
        return "" if optional or how == "junk" else how

    def bytes(self, path: Path, rng: np.random.Generator) -> str:
        data = path.read_bytes()
        path.write_bytes(spoil_bytes(data, rng))
        return "it is shorter" if path.suffix == ".safetensors" and path.stat().st_size < len(data) else ""

    def json(self, path: Path, rng: np.random.Generator) -> str:
        path.write_text(spoil_json(path.read_text(), rng), errors="replace")
        return ""

    def header(self, path: Path, rng: np.random.Generator) -> str:
        """Another header of a safetensors file."""
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = spoil_json(data[8 : 8 + size].decode(), rng).encode(errors="replace")
        claimed = choose(rng, (len(header), len(header), len(header), 2**63, 0, size))
        path.write_bytes(claimed.to_bytes(8, "little") + header + data[8 + size :])
        return ""

    def values(self, path: Path, rng: np.random.Generator) -> str:
        """Other tensors in a safetensors file."""
        tensors = load_file(path)
        name = choose(rng, sorted(tensors))
        how = choose(rng, ("not finite", "missing", "unexpected", "another shape", "another type"))
        array = tensors.pop(name)
        if how == "not finite" and np.issubdtype(array.dtype, np.floating):
            array.reshape(-1)[rng.integers(array.size)] = choose(rng, (np.nan, np.inf, -np.inf))
        tensors |= {
            "not finite": {name: array},
            "missing": {},
            "unexpected": {name: array, f"{name}.more": array},
            "another shape": {name: array.reshape(-1)[:-1]},
            "another type": {name: array.astype(np.int64)},
        }[how]
        save_file(tensors, path, metadata={"format": "pt"})
        return how if how != "not finite" or np.issubdtype(array.dtype, np.floating) else ""


# ---- replies ---------------------------------------------------------------------------------------------------------

LINE, ACTION = "act[look around]", "look around"


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends the answers of its server in turn, the last one again and again."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answers = self.server.answers
        self.wfile.write(answers.pop(0) if len(answers) > 1 else answers[0])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Replies:
    """Attempts at synthetic games, played by a server."""

    clock, limit, what = time.monotonic, LIMIT, ""

    def __init__(self, folder: Path):
        self.folder = folder
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.good, self.readable, self.unreadable = answer(said(LINE)), readable(LINE), unreadable(LINE)

    def __call__(self, rng: np.random.Generator) -> Counter[str]:
        kind, before = choose(rng, ("readable", "unreadable", "changed")), int(rng.integers(0, 5))
        if kind == "changed":
            body = choose(rng, self.readable).partition(b"\r\n\r\n")[2]
            spoiled = spoil_bytes(body, rng)
            if body.startswith(b"{") and rng.random() < 0.7:
                spoiled = spoil_json(body.decode(), rng).encode(errors="replace")
            sent = answer(spoiled)
        else:
            sent = choose(rng, getattr(self, kind))
        recovers = bool(rng.random() < 0.5)
        self.what = f"{kind}, {before} good before: {sent[:1000]!r}"
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            cache = Path(place, "replies.sqlite")
            rows = accepted("", self.play, [self.good] * before + [sent] + [self.good] * recovers, cache)
            good = self.play([self.good], cache)
            require(not any(row.end in FAULTS for row in good), "a fault is still there with a good server")
            if rows is not None:
                self.check(rows, kind, 5 if recovers else before, Path(place))
        return Counter(replies=1, refused_replies=rows is None, faulty_rows=sum(r.end in FAULTS for r in rows or ()))

    def play(self, answers: list[bytes], cache: Path) -> list[Trajectory]:
        """Three attempts of two turns. Raises Broken if one is lost."""
        self.server.answers = answers
        url = f"http://127.0.0.1:{self.server.server_port}/v1"
        policy = ServerPolicy(Server(url=url, model="m", concurrency=1, retries=0), cache)
        jobs = [Job(f"syn_easy/{number:05d}", 0) for number in range(3)]
        settings = AttemptSettings(
            env="synthetic", stage="fuzz", round=1, seed=0, max_turns=2, patience=0, temperature=0.0
        )
        rows = list(PlayLoop(jobs, settings, Synthetic, policy))
        require(sorted(row.key for row in rows) == [tuple(job) for job in jobs], "an attempt was lost")
        return rows

    def check(self, rows: list[Trajectory], kind: str, good: int, folder: Path) -> None:
        """Demands of the rows; at most `good` turns can have had a good answer if the bad one says nothing."""
        turns = [turn for row in rows for turn in row.turns]
        if kind == "readable":
            require(
                len(turns) == 6 and {turn.action for turn in turns} == {ACTION}, "a reply was not played as it says"
            )
        elif kind == "unreadable":
            require(len(turns) <= good, "what says nothing was played")
        path = folder / "trajectories.jsonl"
        with Writer(path) as writer:
            for row in rows:
                writer.write(row)
        read = list(read_trajectories(path))
        require(read == rows, "a row was lost")
        examples = [Example(trajectory=row, weight=0.0, file="F", line=line) for line, row in enumerate(read, 1)]
        for args in (train_pg.Args(), train_pg.Args(fractional=True, threshold=0.0)):
            selected = train_pg.select(examples, args)
            require(not any(e.trajectory.end in FAULTS for e in selected), "a fault was selected to train on")

"""The flags of every stage that plays, and what is built from them: worlds, policies, attempt settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent.attempt import AttemptSettings, Compose
from agent.policy import Policy
from agent.server import Server, ServerPolicy
from artifacts.stage import sha256
from envs.base import World
from envs.make import make_world


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The local model."""

    model: Path = Path("models/tiny-alfworld")
    """Base model: a Hugging Face folder."""
    weights: Literal["nf4", "fp32"] = "nf4"
    """Values of the base: rounded to NF4, as in training, or unchanged."""
    rollout_weights: Literal["fp32", "bf16", "nf4"] | None = None
    """Base weights during sampling: fp32 with the adapter merged, bf16 with it separate, or NF4 (default: fp32 on a
    CPU, bf16 on an accelerator)."""
    slots: int = 64
    """Attempts played concurrently (a server: --server.concurrency)."""
    context: int = 1024
    """Maximum tokens of an attempt; one that needs more ends as context_full."""
    max_new_tokens: int = 64
    """Token limit of one reply."""


@dataclass(frozen=True, kw_only=True)
class PlayArgs(ModelArgs):
    """Worlds, attempts and sampling; the same in every stage that plays."""

    env: str = "alfworld"
    """World: alfworld, webshop, synthetic, pddl, babyai, scienceworld, jericho."""
    data: str | None = None
    """Folder with the world's data (default: $ALFWORLD_DATA, $WEBSHOP_DATA or $JERICHO_GAMES if set; else generated
    data, where the world has a generator)."""
    engine: Literal["ours", "textworld"] = "ours"
    """(ALFWorld) Game engine; textworld is the slow reference."""
    mode: Literal["text", "text_rich"] = "text"
    """(WebShop) Page format: parts joined by [SEP], or one part per line with buttons marked."""
    tell_commands: bool = False
    """Append the list of commands to the first observation, for agents that do not know the world."""
    prompt: Path | None = None
    """File with a few-shot example that precedes every session of the agent (prompts/; paper: in round 0). Training
    does not see it."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy (not stated in the paper; ReAct's own harness is greedy)."""
    top_p: float = 1.0
    """Nucleus sampling: keep the likeliest tokens with this total probability; 1 keeps all."""
    max_turns: int = 20
    """Turn limit of an attempt; an action and the thoughts before it are one turn (not stated in the paper)."""
    patience: int = 3
    """End an attempt as stuck when an action gets the same answer this many further times in a row; 0: never (not in
    the paper)."""
    deadline: float | None = None
    """Seconds after which an attempt ends as timeout, which never counts as the agent's failure (default: no limit)."""
    turn_deadline: float = 60.0
    """Seconds for one step of a third-party world. After that its process is killed, and the attempt is retried once in
    a new one before it ends as env_error."""
    processes: int | None = None
    """Subprocesses for third-party worlds (default: two per core)."""
    seed: int = 0
    """Seeds every draw, together with stage, round, task, trial and turn."""
    server: Server = Server()
    """An OpenAI-compatible server as the agent, in place of the local model."""


def make_settings(args: PlayArgs, stage: str, round_index: int, compose: Compose | None = None) -> AttemptSettings:
    """The settings shared by all attempts of a stage."""
    return AttemptSettings(
        env=args.env,
        stage=stage,
        round=round_index,
        seed=args.seed,
        max_turns=args.max_turns,
        patience=args.patience,
        temperature=args.temperature,
        deadline=args.deadline,
        turn_deadline=args.turn_deadline,
        processes=args.processes,
        compose=compose,
    )


def world_maker(args: PlayArgs, perturb: str = "none") -> Callable[[], World]:
    """Returns a picklable function that makes a world, in this process or a subprocess."""
    return functools.partial(
        make_world,
        args.env,
        data=args.data,
        engine=args.engine,
        mode=args.mode,
        perturb=perturb,
        tell_commands=args.tell_commands,
    )


def make_policy(args: PlayArgs, server: Server, replies: Path, adapter: Path | None, prompt: Path | None) -> Policy:
    """The server's policy, with replies cached in the file `replies`, if `server` has a URL; else the local base, with
    or without an adapter. Raises ValueError for a --top-p outside (0, 1]."""
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p is {args.top_p}; expected more than 0 and at most 1")
    example = prompt.read_text().rstrip("\n") + "\n\n" if prompt else ""
    if server.url:
        return ServerPolicy(server, replies, prompt=example, top_p=args.top_p)
    from agent.local import LocalPolicy  # on demand: a server needs no engine

    return LocalPolicy(
        args.model,
        adapter,
        prompt=example,
        top_p=args.top_p,
        weights=args.weights,
        rollout_weights=args.rollout_weights,
        slots=args.slots,
        context=args.context,
        max_new_tokens=args.max_new_tokens,
    )


def prompt_facts(*prompts: Path | None) -> dict[str, str]:
    """The sha256 of prompts, for a stage's config.json."""
    return {f"prompt {path.name}": sha256(path) for path in prompts if path}

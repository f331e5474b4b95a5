"""The flags of every stage that plays, and what they describe: worlds, policies, settings of attempts."""

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
class PlayArgs:
    """What every stage that plays can be told."""

    run: Path = Path("runs/a3t")
    """The run's directory."""
    env: str = "alfworld"
    """World: alfworld, webshop, synthetic, pddl, babyai, scienceworld, jericho."""
    data: str | None = None
    """The world's data (default: $ALFWORLD_DATA, $WEBSHOP_DATA or $JERICHO_GAMES; what is generated where it is not
    set)."""
    engine: Literal["ours", "textworld"] = "ours"
    """Engine of ALFWorld; textworld is the slow reference."""
    mode: Literal["text", "text_rich"] = "text"
    """How WebShop's pages are written: parts joined by [SEP], or a line each with buttons marked."""
    tell_commands: bool = False
    """List the world's commands at the end of the opening, for agents that do not know the world (envs/wording.py)."""
    model: Path = Path("models/tiny-alfworld")
    """Base model, of the agent and of ActRe, a Hugging Face folder."""
    weights: Literal["nf4", "fp32"] = "nf4"
    """The base's values: rounded to NF4, as they are trained on, or as the folder has them."""
    rollout_weights: Literal["fp32", "bf16", "nf4"] | None = None
    """How the base lies while it samples: dense in float32 with the adapter added to it, dense in bfloat16 with the
    adapter beside it, or in NF4 (default: fp32 on a CPU, bf16 on an accelerator)."""
    max_new_tokens: int = 64
    """Most tokens of a line of the local model."""
    server: Server = Server()
    """Where the agent asks instead of the local model."""
    prompt: Path | None = None
    """File with an example that stands before every session of the agent (prompts/; paper: in round 0). Adapters are
    trained on the sessions alone."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy (not stated in the paper; ReAct's own harness is greedy)."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that have this share together; 1: from all."""
    max_turns: int = 20
    """Turns after which an attempt ends; a thought and its action are one turn (not stated in the paper)."""
    patience: int = 3
    """An attempt ends as stuck when the same action has had the same answer so many times again; 0: never (not in the
    paper)."""
    deadline: float | None = None
    """Seconds after which an attempt ends as timeout, which is never a failure of the agent (default: none)."""
    turn_deadline: float = 60.0
    """Seconds that a world which is not ours may take for one answer; then its process is killed and the attempt played
    once more in a new one, before it ends as env_error."""
    processes: int | None = None
    """Worlds that are not ours, each in a process of its own, at once (default: two a core)."""
    slots: int = 64
    """Attempts played at once."""
    context: int = 1024
    """Tokens that a session can hold; an attempt that needs more ends as context_full."""
    seed: int = 0
    """Seeds every draw, together with round, task, trial and turn."""


def make_settings(args: PlayArgs, stage: str, round_index: int, compose: Compose | None = None) -> AttemptSettings:
    """What all attempts of a stage share."""
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
    """Makes the worlds of a stage, in this process or another: picklable."""
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
    """The server's policy if one is named, caching replies in the file `replies`; else the base, with or without an
    adapter. Raises ValueError for a --top-p outside of (0, 1]."""
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p is {args.top_p}; expected more than 0 and at most 1")
    example = prompt.read_text().rstrip("\n") + "\n\n" if prompt else ""
    if server.url:
        return ServerPolicy(server, replies, prompt=example, top_p=args.top_p)
    from agent.local import LocalPolicy  # on demand: who asks a server needs no engine

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
    """sha256 of prompts, for a stage's config.json."""
    return {f"prompt {path.name}": sha256(path) for path in prompts if path}

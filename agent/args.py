"""The flags of every stage that plays, and what is built from them: worlds, policies, attempt settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from agent.attempt import AttemptSettings
from agent.policy import Policy
from agent.server import Server, ServerPolicy
from agent.vllm import TokensPolicy
from artifacts.cli import Range
from artifacts.render import FORM
from artifacts.shards import parse_shard
from artifacts.stage import adapter_sha, base_of, sha256
from artifacts.trackers import TrackArgs
from envs.base import World
from envs.make import DEFAULTS, UNSEEN, make_world, own_world, require_base_for, require_world, world_name
from envs.own import explained
from lora.checkpoint import base_facts

A = TypeVar("A", bound="PlayArgs")


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The local model; with --server.api tokens, the base that the server plays."""

    model: Path | None = None
    """Base model: a Hugging Face folder (default: the run's base; in a new run the world's, models/tiny-alfworld,
    models/tiny-webshop or, for worlds never trained on, models/tiny-neutral)."""
    weights: Literal["nf4", "fp32"] = "nf4"
    """Values of the base: rounded to NF4, as in training, or unchanged."""
    rollout_weights: Literal["fp32", "bf16", "nf4"] | None = None
    """Base weights during sampling: fp32 with the adapter merged, bf16 with it separate, or NF4 (default: fp32 on a
    CPU, bf16 on an accelerator; NF4 if these leave no memory for 16 slots)."""
    slots: Annotated[int, Range(1, 10**6)] | None = None
    """Attempts played concurrently (default: 64, or as many as fit the device's memory; a server:
    --server.concurrency)."""
    context: Annotated[int, Range(16, 10**7)] | None = None
    """Maximum tokens of an attempt; one that needs more ends as context_full (default: the world's, 1024 for ALFWorld,
    3072 for WebShop, 1536 for worlds never trained on)."""
    max_new_tokens: Annotated[int, Range(1, 10**6)] = 64
    """Token limit of one reply."""
    drafts: Annotated[int, Range(0, 64)] | None = None
    """Tokens of a reply that are guessed, from what was played before, and verified in one step; replies stay the same.
    0: none (default: 3; on a CPU 1, or 0 for a model small enough for its caches)."""


@dataclass(frozen=True, kw_only=True)
class PlayArgs(ModelArgs, TrackArgs):
    """Worlds, attempts and sampling; the same in every stage that plays."""

    env: str = "alfworld"
    """World: alfworld, webshop, synthetic, pddl, babyai, scienceworld, jericho, or one of your own, FILE.py:CLASS
    (docs/your-own-world.md)."""
    data: str | None = None
    """Folder with the world's data (default: $ALFWORLD_DATA, $WEBSHOP_DATA or $JERICHO_GAMES if set; else generated
    data, where the world has a generator). One of your own is made by CLASS(data=...)."""
    engine: Literal["ours", "textworld"] = "ours"
    """(ALFWorld) Game engine; textworld is the slow reference."""
    mode: Literal["text", "text_rich"] = "text"
    """(WebShop) Page format: parts joined by [SEP], or one part per line with buttons marked."""
    tell_commands: bool = False
    """Append the list of commands to the first observation, for agents that do not know the world."""
    prompt: Path | None = None
    """File with a few-shot example that precedes every session of the agent (prompts/; paper: in round 0). Training
    does not see it."""
    temperature: Annotated[float, Range(0, 10)] = 0.0
    """Sampling temperature; 0 is greedy (not stated in the paper; ReAct's own harness is greedy)."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Nucleus sampling: keep the likeliest tokens with this total probability; 1 keeps all."""
    max_turns: Annotated[int, Range(1, 10_000)] = 20
    """Turn limit of an attempt; an action and the thoughts before it are one turn (not stated in the paper)."""
    patience: Annotated[int, Range(0, 10_000)] = 3
    """End an attempt as stuck when an action gets the same answer this many further times in a row; 0: never (not in
    the paper)."""
    deadline: Annotated[float, Range(0, 10**7, above=True)] | None = None
    """Seconds after which an attempt ends as timeout, which never counts as the agent's failure (default: no limit)."""
    turn_deadline: Annotated[float, Range(0, 10**7, above=True)] = 60.0
    """Seconds for one step of a third-party world. After that its process is killed, and the attempt is retried once in
    a new one before it ends as env_error."""
    processes: Annotated[int, Range(1, 10_000)] | None = None
    """Subprocesses for third-party worlds (default: two per core)."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seeds every draw, together with stage, round, task, trial and turn."""
    shard: str | None = None
    """Play this share of the tasks, such as 2/4 for the second of four; other machines that see the folder play the
    others. The one that finishes last joins them into the stage."""
    server: Server = Server()
    """An OpenAI-compatible server as the agent, in place of the local model."""

    def check(self) -> None:
        super().check()
        require_world(self.env)
        if self.shard:
            parse_shard(self.shard)


def require_file(flag: str, path: Path | None) -> None:
    """Raises ValueError unless the path is a file of text, or None."""
    try:
        if path is not None:
            path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"{flag} {path} cannot be read as text ({error}); expected a file such as those in prompts/"
        ) from error


def resolve(args: A) -> A:
    """The arguments with the base and context of the run, or of the world for a new run. Raises StageError if the run's
    base is no longer where it was, ValueError for a base made for another world or an unreadable prompt."""
    require_file("--prompt", args.prompt)
    model = base_of(args.run, args.model, args.env)
    if not args.server.takes_text:
        require_base_for(args.env, model)
    return dataclasses.replace(args, model=model, context=args.context or DEFAULTS.get(args.env, UNSEEN).context)


def explain_faults(main: Callable[[A], None]) -> Callable[[A], None]:
    """A stage's main, in which what a world of the user's raises outside of attempts is one sentence (envs/own.py)."""

    @functools.wraps(main)
    def explained_main(args: A) -> None:
        with explained(own_world(args.env)):
            main(args)

    return explained_main


def make_settings(args: PlayArgs, stage: str, round_index: int, **how: Any) -> AttemptSettings:
    """The settings shared by all attempts of a stage. `how`: `compose` or `player` (AttemptSettings)."""
    return AttemptSettings(
        env=world_name(args.env),
        stage=stage,
        round=round_index,
        seed=args.seed,
        max_turns=args.max_turns,
        patience=args.patience,
        temperature=args.temperature,
        deadline=args.deadline,
        turn_deadline=args.turn_deadline,
        processes=args.processes,
        **how,
    )


def world_maker(args: PlayArgs, perturb: str = "none") -> Callable[[], World]:
    """Returns a picklable function that makes a world, in this process or a subprocess."""
    own = own_world(args.env)
    return functools.partial(
        make_world,
        args.env,
        data=args.data,
        engine=args.engine,
        mode=args.mode,
        file=own.sha256 if own else None,
        perturb=perturb,
        tell_commands=args.tell_commands,
    )


class Player(NamedTuple):
    """Who plays: the base, local or on a server, with an adapter or without; or a server's own model."""

    server: Server
    adapter: Path | None
    prompt: Path | None


def fit_memory(args: A, *players: Player) -> A:
    """The arguments with rollout weights and slots for all `players` that are local. Prints what they take of the
    device's memory. Raises ValueError, with what would fit, for settings that do not."""
    local = [(player.adapter, read_prompt(player.prompt)) for player in players if not player.server.url]
    if not local:
        return args
    from agent.local import choose_memory  # on demand: a server needs no engine

    how = choose_memory(
        args.model,
        local,
        weights=args.weights,
        rollout=args.rollout_weights,
        slots=args.slots,
        context=args.context,
        max_new_tokens=args.max_new_tokens,
    )
    return dataclasses.replace(args, rollout_weights=how.rollout, slots=how.slots)


def sampler(args: PlayArgs) -> dict[str, Any] | None:
    """What fit_memory chose for the local model, for done.json."""
    return None if args.server.url else {"rollout_weights": args.rollout_weights, "slots": args.slots}


def read_prompt(prompt: Path | None) -> str:
    return prompt.read_text(encoding="utf-8").rstrip("\n") + "\n\n" if prompt else ""


def make_policy(args: PlayArgs, player: Player, replies: Path, beside: Policy | None = None) -> Policy:
    """The policy of a player: its server's, with replies cached in the file `replies`, or the local base, which without
    an adapter shares the arrays of a local policy `beside` it."""
    server, adapter, prompt = player
    example = read_prompt(prompt)
    if server.takes_text:
        return ServerPolicy(server, replies, prompt=example, top_p=args.top_p)
    if server.url:
        return TokensPolicy(
            server,
            replies,
            model_dir=args.model,
            adapter=adapter,
            weights=args.run / "server.json",
            context=args.context,
            max_new_tokens=args.max_new_tokens,
            prompt=example,
            top_p=args.top_p,
        )
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
        drafts=args.drafts,
        beside=beside if isinstance(beside, LocalPolicy) else None,
    )


# ---- what a stage depends on -----------------------------------------------------------------------------------------


def agent_facts(args: PlayArgs, adapter: Path | None, **prompts: Path | None) -> dict[str, Any]:
    """Facts (Stage) on who plays: the base, unless a server of text plays, the adapter and the prompts, by sha256."""
    base = {} if args.server.takes_text else base_facts(args.model)
    return {**base, "adapter": adapter_sha(adapter), **{name: path and sha256(path) for name, path in prompts.items()}}


def run_identity(args: PlayArgs) -> dict[str, Any]:
    """What a stage that plays knows of its run (Stage): the base, unless a server of text plays, and the form of
    prompts."""
    base = {} if args.server.takes_text else {"model": str(args.model), **base_facts(args.model)}
    return {**base, "prompts": FORM}


def world_identity(args: PlayArgs, world: World, panel: str, tasks: Sequence[str]) -> dict[str, Any]:
    """What a stage that plays training tasks knows of its run (Stage): the world, and the content of the tasks."""
    content = {f"{panel} ({len(tasks)} tasks)": world.fingerprint(tasks)}
    return run_identity(args) | {"env": world_name(args.env), "world": world.facts, "content": content}

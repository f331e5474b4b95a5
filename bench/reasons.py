"""Can a model be ActRe? The reasons that it writes for sampled actions, in the sessions of displaced demonstrations.

    python -m bench.reasons
    python -m bench.reasons --model models/smollm2 --prompt prompts/alfworld_actre.txt

Every random action in the demonstrations (models/corpus/alfworld.py) is asked for, after the turns before it as they
were played, their reasons included. Prints examples and, over all reasons, the shares that are one line in brackets,
name the object that the action is about (its first `NAME NUMBER`), say what the action does (a word for its verb), and
repeat an earlier reason of their game for another action.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from tqdm import tqdm

from agent.args import read_prompt, require_file
from agent.local import LocalPolicy
from agent.policy import Ask
from artifacts.cli import Range, run_main
from artifacts.json_io import write_json
from artifacts.render import REASON, act_line, actre_turn_text, observation_text, opening_text, parse_reason
from artifacts.trajectory import Trajectory
from models.corpus import alfworld
from models.corpus.args import CorpusArgs

# Words of which one tells what a command does.
SAYS = {
    "go": "go check bring arrive look need",
    "take": "take pick get",
    "move": "put move place",
    "open": "open",
    "close": "close",
    "clean": "clean wash",
    "heat": "heat warm",
    "cool": "cool",
    "use": "use turn light look",
    "slice": "slice cut",
    "examine": "examine look see check",
    "look": "look see",
    "inventory": "inventory carry have hold",
}


@dataclass(frozen=True, kw_only=True)
class Args:
    model: Path = Path("models/tiny-alfworld")
    """Base model."""
    adapter: Path | None = None
    """Adapter of ActRe (default: none, the frozen base)."""
    prompt: Path | None = None
    """File with a few-shot example that precedes every session (prompts/)."""
    count: Annotated[int, Range(1, 10**6)] = 25
    """Number of demonstrations."""
    displaced: Annotated[float, Range(0, 1, above=True)] = 0.25
    """Probability of a random action per turn."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 1
    """Seeds the demonstrations."""
    context: Annotated[int, Range(16, 10**7)] = 1664
    """Maximum tokens of a session."""
    out: Path | None = None
    """File for the shares, as JSON."""
    examples: Annotated[int, Range(0, 10**6)] = 8
    """Reasons to print."""


class Reason(NamedTuple):
    """A reply of ActRe, with the action that it is for and the game."""

    game: int
    action: str
    line: str


def explain(policy: LocalPolicy, trajectories: list[Trajectory]) -> list[Reason]:
    """Asks for a reason of every sampled action, one game at a time; a session that is full ends there."""
    reasons = []
    for game, played in enumerate(tqdm(trajectories, unit="game")):
        session = policy.open(opening_text(played.first_observation, played.task))
        for turn in played.turns:
            if turn.action_by == "sampled":
                policy.extend(session, act_line(turn.action) + REASON)
                policy.submit(Ask(session=session, temperature=0.0, seed=0))
                replies = []
                while not replies:
                    replies = policy.poll()
                if (line := replies[0][1]) is None:
                    break
                reasons.append(Reason(game, turn.action, line))
            else:
                policy.extend(session, actre_turn_text(turn))
            policy.extend(session, observation_text(turn.observation))
        policy.close(session)
    return reasons


def shares(reasons: Iterable[Reason]) -> dict[str, float]:
    """The share of reasons with each property; see above."""
    found: dict[str, list[bool]] = {"one line": [], "object": [], "verb": [], "repeated": []}
    earlier: dict[tuple[int, str], set[str]] = {}
    for reason in reasons:
        text, line = parse_reason(reason.line), reason.line.strip()
        things, words = re.findall(r"[a-z]+ \d+", reason.action), set(re.findall(r"[a-z]+", text.lower()))
        found["one line"].append(line.startswith("[") and line.endswith("]"))
        found["object"].append(not things or things[0] in text)
        found["verb"].append(not words.isdisjoint(SAYS.get(reason.action.split()[0], reason.action.split()[0]).split()))
        actions = earlier.setdefault((reason.game, text), set())
        found["repeated"].append(bool(actions - {reason.action}))
        actions.add(reason.action)
    return {name: sum(values) / max(1, len(values)) for name, values in found.items()}


def main(args: Args) -> None:
    require_file("--prompt", args.prompt)
    corpus = CorpusArgs(displaced=(args.displaced,), careless=(0.0,), seed=args.seed)
    trajectories = list(itertools.islice(alfworld.demonstrations(corpus), args.count))
    prompt = read_prompt(args.prompt)
    policy = LocalPolicy(args.model, args.adapter, slots=1, context=args.context, prompt=prompt)
    reasons = explain(policy, trajectories)
    for reason in reasons[: args.examples]:
        print(f"{reason.action:40} {reason.line.strip()}")
    found = shares(reasons)
    print(f"{len(reasons)} reasons: " + ", ".join(f"{name} {share:.0%}" for name, share in found.items()))
    if args.out is not None:
        write_json(args.out, {"reasons": len(reasons), **found})


if __name__ == "__main__":
    run_main(main, Args, __doc__)

"""Every number that a stage takes has a range, and a value outside it is refused by the flag's name."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import actre
import evaluate
import refine
import rollout
import train_pg
from artifacts.cli import check_values, parse

ROOT = Path(__file__).parent.parent
STAGES = {"rollout": rollout, "actre": actre, "refine": refine, "train_pg": train_pg, "evaluate": evaluate}
WRONG = (-1, 0, float("nan"), 10**9)
# Flags for which some of these values make sense; for all others, none does.
SENSIBLE = {
    "seed": (0, 10**9),
    "limit": (10**9,),
    "round": (0,),
    "preview": (0,),
    "patience": (0,),
    "max_invalid": (0,),
    "drafts": (0,),
    "temperature": (0,),
    "probability": (0,),
    "dropout": (0,),
    "weight_decay": (0,),
    "world_weight": (0,),
    "failure_reward": (-1, 0),
    "checkpoint_minutes": (0,),
    "retries": (0,),
    "floor": (-1, 0),
    "threshold": (0,),
}


def numbers(hint) -> set[type]:
    """The types of number in a hint: {int}, {float} or none."""
    found = {hint} & {int, float}
    for inner in typing.get_args(hint):
        found |= numbers(inner)
    return found


def numeric_flags(cls: type, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], typing.Any]]:
    """(path of field names, hint) of every flag that takes a number."""
    found = []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            found += numeric_flags(hint, (*prefix, name))
        elif numbers(hint):
            found.append(((*prefix, name), hint))
    return found


def with_value(args, path: tuple[str, ...], value):
    """A copy of `args` with one field, perhaps of a nested dataclass, replaced."""
    first, *rest = path
    return dataclasses.replace(args, **{first: with_value(getattr(args, first), rest, value) if rest else value})


def as_given(default, hint, value):
    """The value as a flag of this kind would hold it: alone, or once in a tuple."""
    if typing.get_origin(hint) is not tuple:
        return value
    return tuple(value for _ in default)


CASES = [
    pytest.param(stage, path, hint, value, id=f"{stage} --{'.'.join(path).replace('_', '-')} {value}")
    for stage, module in STAGES.items()
    for path, hint in numeric_flags(module.Args)
    for value in WRONG
    if not (value != value and numbers(hint) == {int})  # a flag of integers cannot hold nan
]


@pytest.mark.parametrize(("stage", "path", "hint", "value"), CASES)
def test_a_number_is_accepted_where_it_makes_sense_and_else_refused_by_the_flag(stage, path, hint, value):
    args = STAGES[stage].Args()
    default = args
    for name in path:
        default = getattr(default, name)
    given = with_value(args, path, as_given(default, hint, value))
    if value in SENSIBLE.get(path[-1], ()):
        check_values(given)
    else:
        with pytest.raises(ValueError, match=f"^--{'.'.join(path).replace('_', '-')} is .*; expected "):
            check_values(given)


def test_defaults_pass_their_own_checks():
    for module in STAGES.values():
        check_values(module.Args())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperature", "nan"], "--temperature is nan; expected a finite number"),
        (["--limit", "0"], "--limit is 0; expected at least 1"),
        (["--env", "alfwrld"], "did you mean alfworld"),
    ],
)
def test_parsing_refuses_a_wrong_value(words, said):
    with pytest.raises(ValueError, match=said):
        parse(rollout.Args, "", words)


def test_a_wrong_value_is_one_sentence_and_leaves_no_folder(tmp_path):
    run = tmp_path / "run"
    words = [sys.executable, "rollout.py", "--run", str(run), "--top-p", "2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "rollout.py: --top-p is 2.0; expected more than 0 and at most 1\n")
    assert not run.exists()

"""What the tiny base is trained on: whose games, whose skill."""

import itertools
import os

import numpy as np
import pytest

from envs.alfworld import TASK_TYPES, AlfWorld, task_type
from envs.panel import excluded_ids
from models.pretrain import Args, batches, demonstrations, sources, train_tokenizer
from trajectory import react_segments, text_of


@pytest.fixture
def generated_only(monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)


@pytest.mark.skipif("ALFWORLD_DATA" not in os.environ, reason="needs the real games: set ALFWORLD_DATA")
def test_no_panel_task_is_demonstrated():
    real, generated = sources(Args(generated=20))
    excluded = excluded_ids()
    train = AlfWorld().tasks("train")
    assert set(real.task_ids) == set(train) - excluded and 0 < len(real.task_ids) < len(train)
    assert generated.task_ids and not excluded & set(generated.task_ids)


def won_by_type(careless: float) -> dict[str, set[bool]]:
    """Which outcomes each task type's demonstrations have where that share of the players is careless."""
    args = Args(generated=60, careless=(careless,), displaced=(0.0,))
    outcomes = {kind: set() for kind in TASK_TYPES}
    for t in itertools.islice(demonstrations(args), 150):
        outcomes[task_type(t.task_id)].add(t.success)
        if not t.success:
            assert t.end == "finished" and [turn.action for turn in t.turns[-2:]] == ["look", "look"]
    return outcomes


def test_careful_players_win_and_careless_ones_fail_but_at_the_simplest_task(generated_only):
    assert all(won == {True} for won in won_by_type(0.0).values())
    careless = won_by_type(1.0)
    assert careless.pop("pick_and_place_simple") == {True}
    assert all(False in won for won in careless.values()), careless


def test_the_same_seed_makes_the_same_batches(generated_only):
    args = Args(generated=30)
    tokenizer = train_tokenizer([text_of(react_segments(t)) for t in itertools.islice(demonstrations(args), 20)], 400)
    first, again = (list(itertools.islice(batches(args, tokenizer), 2)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))
        ids_BL, segments_BL, weights_BL = one
        weights = set(weights_BL[segments_BL == 1].tolist())
        assert ids_BL.any() and weights == {1.0, float(np.float32(args.world_weight))}
        assert not weights_BL[segments_BL == 0].any()

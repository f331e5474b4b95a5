"""Pairing and filtering, the objective against ten lines of numpy, and what a weight of zero or minus one does."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from artifacts.packing import Example, tokens_of
from artifacts.render import react_segments, text_of
from artifacts.stage import StageError
from artifacts.trajectory import Turn, to_line
from lora.linear import LoRAConfig, LoRAParam
from lora.load import load_model
from lora.logprobs import token_logprobs
from lora.sharding import make_mesh
from lora.tokenizer import encode_piece
from lora.train_step import Batch, initial_state, make_update, training_mesh
from tests.support.helpers import byte_tokenizer, trajectory, write_tiny_model
from train_pg import (
    Args,
    batch_order,
    check_step,
    collect,
    main,
    objective,
    pack_examples,
    refined,
    select_round,
)

WON = {"reward": 1.0, "success": True, "end": "success"}
LOST = {"reward": 0.0, "success": False, "end": "max_turns"}


def row(task, source, trial=0, **outcome):
    return Example(trajectory(task_id=f"gen_train/{task}/1", source=source, trial=trial, **outcome), 0.0, "f", 1)


def chosen(rows, **args):
    args = {"failure_reward": -1.0} | args  # the paper's
    return [
        (e.trajectory.task_id.split("/")[1], e.trajectory.source, e.trajectory.trial, e.weight)
        for e in select_round(rows, Args(**args))
    ]


def test_a_failure_is_kept_only_beside_a_success_of_its_task():
    rows = [
        row("solved", "react", **LOST),
        row("solved", "actre", 0, **LOST),
        row("solved", "actre", 1, **WON),
        row("solved", "actre", 2, **WON),
        row("lost", "react", **LOST),
        row("lost", "actre", 0, **LOST),
        row("easy", "react", **WON),
    ]
    assert chosen(rows) == [
        ("easy", "react", 0, 1.0),
        ("solved", "actre", 1, 1.0),
        ("solved", "actre", 2, 1.0),
        ("solved", "react", 0, -1.0),
    ]


def test_faults_are_neither_failures_nor_successes():
    fault = {"reward": 0.0, "success": False, "end": "env_error"}
    assert chosen([row("a", "react", **fault), row("a", "actre", 0, **WON)]) == [("a", "actre", 0, 1.0)]
    assert chosen([row("a", "react", **(fault | {"reward": 1.0}))]) == []


@pytest.mark.parametrize(
    "args, weights",
    [
        ({"failure_reward": 0.0}, [1.0, 1.0]),
        ({"failure_reward": 0.1}, [1.0, 1.0, 0.1]),
        ({"positives": 1}, [1.0, -1.0]),
        ({"fractional": True}, [1.0, 1.0, 0.4]),
        ({"threshold": 0.4}, [1.0, 1.0, 1.0]),
    ],
)
def test_switches(args, weights):
    rows = [row("a", "react", **(LOST | {"reward": 0.4})), row("a", "actre", 0, **WON), row("a", "actre", 1, **WON)]
    assert [w for *_, w in chosen(rows, **args)] == weights


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    lora = LoRAConfig(rank=4, alpha=12.0, targets=("q", "v", "down"))
    model = load_model(write_tiny_model(tmp_path_factory.mktemp("tiny")), weights="nf4", lora=lora, seed=3)
    graph, adapter, frozen = nnx.split(model, LoRAParam, ...)
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(adapter)))
    leaves = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, jax.tree.leaves(adapter), strict=True)]
    return graph, jax.tree.unflatten(jax.tree.structure(adapter), leaves), frozen


def batch():
    rng = np.random.default_rng(0)
    ids_BL = rng.integers(1, 255, (2, 24)).astype(np.int32)
    segments_BL = np.array([[1] * 10 + [2] * 9 + [0] * 5, [1] * 20 + [0] * 4], np.int32)
    weights_BL = np.where(segments_BL == 2, -1.0, 1.0).astype(np.float32) * (segments_BL > 0)
    return ids_BL, segments_BL, weights_BL


@pytest.fixture
def gradient(model):
    """gradient(weights_BL): the objective's gradient of the adapter, as one vector."""
    graph, adapter, frozen = model
    ids_BL, segments_BL, _ = batch()

    @jax.jit
    def of_adapter(adapter, weights_BL):
        def value(adapter):
            return objective(nnx.merge(graph, adapter, frozen), Batch(ids_BL, segments_BL, weights_BL), 3.0)[0]

        return jnp.concatenate([g.ravel() for g in jax.tree.leaves(jax.grad(value)(adapter))])

    return lambda weights_BL: of_adapter(adapter, weights_BL)


def test_the_objective_is_ten_lines_of_numpy(model):
    graph, adapter, frozen = model
    ids_BL, segments_BL, weights_BL = batch()
    merged = nnx.merge(graph, adapter, frozen)
    total = 0.0
    for row_number, (ids, segments) in enumerate(zip(ids_BL, segments_BL, strict=True)):
        for segment in range(1, segments.max() + 1):
            where = segments == segment
            alone = ids[where][None]  # each trajectory by itself, so that packing is checked too
            logits = np.asarray(merged.logits(merged(alone, np.ones_like(alone))))[0].astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            picked = logprobs[np.arange(len(alone[0]) - 1), alone[0][1:]]
            total += (weights_BL[row_number][where][1:] * picked).sum()
    value, (positive, negative) = objective(merged, Batch(*batch()), 3.0)
    assert float(value) == pytest.approx(total / 3.0, rel=1e-4)
    assert float(positive - negative) == pytest.approx(total, rel=1e-4) and negative < 0 and positive < 0


def test_weight_zero_gives_no_gradient_and_minus_one_the_negative(gradient):
    _, _, weights_BL = batch()
    whole = gradient(weights_BL)
    assert float(jnp.abs(whole).max()) > 1e-3
    assert float(jnp.abs(gradient(0 * weights_BL)).max()) == 0.0
    assert jnp.array_equal(gradient(-weights_BL), -whole)
    only_second = gradient(weights_BL * (batch()[1] == 2))
    others = gradient(weights_BL * (batch()[1] == 1))
    assert jnp.allclose(only_second + others, whole, atol=1e-5)


def test_devices_that_share_the_rows_take_the_same_step(model):
    graph, adapter, frozen = model
    adapter = jax.tree.map(np.asarray, adapter)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    def step(devices):
        mesh = make_mesh((devices, 1, 1))
        places = jax.device_put((adapter, frozen), NamedSharding(mesh, PartitionSpec()))
        update = make_update(objective, graph, optimizer, mesh, *places)
        rows = Batch(*(x.reshape(2 // devices, devices, -1) for x in batch()))
        return update(places[0], initial_state(optimizer, places[0], mesh), places[1], 1e-3, rows, 3.0, None)

    one, two = (jax.tree.leaves(step(devices)) for devices in (1, 2))
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(jax.tree.leaves(adapter), two, strict=False))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_a_step_that_is_not_finite_or_runs_away_is_named(tmp_path):
    line = {"step": 7, "loss": 1.0, "gradient_norm": 2.0, "logprob_negative": -3.0}
    check_step(Args(), line, tmp_path)
    with pytest.raises(StageError, match="step 7: loss nan.*Lower --learning-rate"):
        check_step(Args(), line | {"loss": float("nan")}, tmp_path)
    with pytest.raises(StageError, match="step 7: .*inf"):
        check_step(Args(), line | {"gradient_norm": float("inf")}, tmp_path)
    with pytest.raises(StageError, match="step 7: the mean log-probability of the failures' tokens is -20.5, under"):
        check_step(Args(), line | {"logprob_negative": -20.5}, tmp_path)


def test_rows_that_cannot_be_divided_are_refused():
    assert dict(training_mesh((-1, 1, 1), 3, 1).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert dict(training_mesh((-1, 1, 1), 4, 2).shape) == {"data": 2, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="--batch-rows 3 is not a multiple of .* give a multiple of 2"):
        training_mesh((-1, 1, 1), 3, 2)


def test_padding_rows_change_nothing(model):
    graph, adapter, frozen = model
    ids_BL, segments_BL, _ = batch()
    merged = nnx.merge(graph, adapter, frozen)
    pad = np.zeros((1, 24), np.int32)
    padded = token_logprobs(merged, np.concatenate([ids_BL, pad]), np.concatenate([segments_BL, pad]))
    assert jnp.allclose(padded[:2], token_logprobs(merged, ids_BL, segments_BL), atol=1e-6)
    assert float(jnp.abs(padded[2]).max()) == 0.0


MISTAKES = {
    "source": "refine",
    "env": "synthetic",
    **WON,
    "turns": [
        Turn("I look.", "look", "A box.", "teacher", "teacher", True),
        Turn("I open it.", "open box 9", "There is no box 9.", "teacher", "teacher", False, ["parameter"]),
        Turn("It is box 1.", "open box 1", "It is locked.", "teacher", "teacher", False, ["logic"]),
        Turn("It is locked. I look for a key.", "take key", "Taken.", "teacher", "teacher", True),
        Turn("I open it now.", "open box 1", "Task completed.", "teacher", "teacher", True),
    ],
}


def agent_text_by_weight(how: str) -> dict[float, str]:
    """What the text of the packed trajectory is, by the weight that its tokens have."""
    tokenizer = byte_tokenizer()
    example = Example(trajectory(**MISTAKES), 1.0, "f", 1)
    packed = pack_examples([example], Args(refinement=how), functools.partial(encode_piece, tokenizer))
    there = packed.segments_NL == 1
    ids, weights = packed.ids_NL[there], packed.weights_NL[there]
    assert tokenizer.decode(ids.tolist()) == text_of(react_segments(refined(example.trajectory, how)[0]))
    return {weight: tokenizer.decode(ids[weights == weight].tolist()) for weight in set(weights.tolist())}


def lines(*numbers: int) -> str:
    turns = [MISTAKES["turns"][number] for number in numbers]
    return "".join(f" think[{turn.thought}]\n act[{turn.action}]\n" for turn in turns)


@pytest.mark.parametrize(
    ("how", "learnt"),
    [
        ("mask-errors", (0, 3, 4)),
        ("mask-refined", (0, 4)),
        ("drop-errors", (0, 3, 4)),
        ("no-mask", (0, 1, 2, 3, 4)),
    ],
)
def test_mistakes_are_masked_and_the_controls_do_what_they_say(how, learnt):
    by_weight = agent_text_by_weight(how)
    assert set(by_weight) == {0.0, 1.0} and by_weight[1.0] == lines(*learnt)
    assert ("There is no box 9." in by_weight[0.0]) == (how != "drop-errors")


@pytest.mark.parametrize("how", ["mask-errors", "no-mask"])
def test_the_gradient_of_a_mistake_is_exactly_zero(how, tmp_path):
    encode = functools.partial(encode_piece, byte_tokenizer())
    example = Example(trajectory(**MISTAKES), 1.0, "f", 1)
    packed = pack_examples([example], Args(refinement=how, row_length=640), encode)
    turns = np.array(tokens_of(example.trajectory, encode).turn)
    only = np.where(np.isin(np.resize(turns, 640), (1, 2)) & (packed.segments_NL > 0), packed.weights_NL, 0)
    model = load_model(write_tiny_model(tmp_path), weights="nf4", lora=LoRAConfig(rank=4, alpha=8.0))
    graph, adapter, frozen = nnx.split(model, LoRAParam, ...)
    adapter = jax.tree.map(lambda x: x + 0.01, adapter)  # not only A and not only B

    def loss(adapter):
        batch = Batch(jnp.asarray(packed.ids_NL), jnp.asarray(packed.segments_NL), jnp.asarray(only))
        return objective(nnx.merge(graph, adapter, frozen), batch, 1.0)[0]

    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(jax.grad(loss)(adapter)))
    assert largest == 0.0 if how == "mask-errors" else largest > 0.0


def test_inputs_replace_the_runs_own_trajectories_and_mix(tmp_path):
    rows = {
        "refine": [trajectory(**MISTAKES), trajectory(**MISTAKES | LOST, trial=1)],
        "demo": [trajectory(source="demo", **WON), trajectory(source="demo", **LOST, trial=1)],
        "rollout": [trajectory(source="react", round=1, **LOST)],
        "actre": [trajectory(source="actre", round=1, **WON)],
    }
    for name, trajectories in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "trajectories.jsonl").write_bytes(b"".join(map(to_line, trajectories)))
    args = Args(run=tmp_path / "run", inputs=tuple(tmp_path / name for name in rows), failure_reward=-1.0)
    with pytest.raises(StageError, match="refine"):
        collect(args, 0)
    for name in rows:
        (tmp_path / name / "done.json").write_text("{}")
    examples, hashes = collect(args, 0)
    assert [(e.trajectory.source, e.weight) for e in examples] == [
        ("refine", 1.0),
        ("demo", 1.0),
        ("actre", 1.0),
        ("react", -1.0),
    ]
    assert len(hashes) == 4


def test_where_nobody_has_won_round_0_keeps_the_base_and_later_ones_stop(tmp_path, capsys):
    args = Args(run=tmp_path / "run", model=write_tiny_model(tmp_path / "base"), rank=2, row_length=128)
    for number in range(2):
        for stage in ("rollout", "actre"):
            directory = args.run / f"round_{number}" / stage
            directory.mkdir(parents=True)
            (directory / "trajectories.jsonl").write_bytes(to_line(trajectory(round=number, **LOST)))
            (directory / "done.json").write_text("{}")
    main(args)
    assert "0 steps (nothing was won yet: the policy is still the base)" in capsys.readouterr().out
    adapter = load_file(args.run / "round_0" / "train_pg" / "adapter" / "adapter_model.safetensors")
    assert not any(weight.any() for name, weight in adapter.items() if "lora_B" in name) and len(adapter) > 1
    with pytest.raises(StageError, match="none of 4 trajectories was won"):
        collect(args, 1)
    with pytest.raises(StageError, match="nothing to train on"):
        collect(Args(inputs=(args.run / "round_0" / "rollout",)), 0)


def test_all_weights_zero_is_an_error():
    examples = [Example(trajectory(), 0.0, "f", 1)]
    with pytest.raises(ValueError, match="nothing to train on"):
        pack_examples(examples, Args(), functools.partial(encode_piece, byte_tokenizer()))


@pytest.mark.parametrize("wrong", [{"epochs": ()}, {"epochs": (2, 0)}, {"batch_rows": 0}, {"device_rows": 0}])
def test_nothing_to_pass_over_is_an_error(wrong, tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        main(Args(run=tmp_path, **wrong))


def test_every_row_is_seen_once_an_epoch_in_another_order_each_time():
    args = Args(batch_rows=4, seed=1)
    first, second = (np.concatenate(batch_order(args, 2, epoch, 10)) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == [-1, -1, *range(10)]
    assert first.tolist() != second.tolist()
    assert first.tolist() == np.concatenate(batch_order(args, 2, 0, 10)).tolist()

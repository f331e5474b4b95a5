"""Pairing and filtering, the objective against ten lines of numpy, and what a weight of zero or minus one does."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from artifacts.cli import parse
from artifacts.metrics import MetricsLog, check_step
from artifacts.packing import Example, pack
from artifacts.preview import painted
from artifacts.render import react_segments, text_of
from artifacts.stage import Stage, StageError
from artifacts.tokens import tokens_of
from artifacts.trajectory import Turn, to_line
from lora import attention
from lora.footprint import Device
from lora.linear import LoRAConfig, LoRAParam
from lora.load import load_model
from lora.logprobs import token_logprobs
from lora.sharding import make_mesh
from lora.train_step import Batch, initial_state, make_update, training_mesh
from models.tokenizer import byte_tokenizer
from tests.support.helpers import byte_codec, tensorboard_scalars, trajectory, write_tiny_model
from train_pg import (
    Args,
    batch_order,
    collect,
    learning_rate,
    main,
    objective,
    pack_examples,
    refined,
    select,
    select_round,
    train,
)

WON = {"reward": 1.0, "success": True, "end": "success"}
LOST = {"reward": 0.0, "success": False, "end": "max_turns"}
CODEC = byte_codec()


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


def step(model, devices, **forward):
    """An optimizer step that `devices` share, and its arguments."""
    graph, adapter, frozen = model
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    mesh = make_mesh((devices, 1, 1))
    places = jax.device_put((jax.tree.map(np.asarray, adapter), frozen), NamedSharding(mesh, PartitionSpec()))
    update = make_update(functools.partial(objective, **forward), graph, optimizer, mesh, *places)
    rows = Batch(*(x.reshape(2 // devices, devices, -1) for x in batch()))
    return update, (places[0], initial_state(optimizer, places[0], mesh), places[1], 1e-3, rows, 3.0, None)


def test_devices_that_share_the_rows_take_the_same_step(model):
    steps = (step(model, devices) for devices in (1, 2))
    one, two = (jax.tree.leaves(update(*arguments)) for update, arguments in steps)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(jax.tree.leaves(model[1]), two, strict=False))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_a_step_with_cudnn_and_where_cudnn_has_no_plan(model, monkeypatch, capsys):
    """The kernel is replaced: it compiles, and then XLA has no plan for it, which a user's own choice does not hide.

    Steps are traced only: tests/test_attention.py compares values.
    """
    kernel, plans, masked = jax.nn.dot_product_attention, True, []

    def replaced(*arrays, implementation, **how):
        if implementation == "cudnn" and not plans:
            raise jax.errors.JaxRuntimeError("INTERNAL: No execution plans support the graph.\nSource: somewhere")
        masked.append("mask" in how)
        return kernel(*arrays, implementation="xla", **how)

    def trace(**forward):
        masked.clear()
        update, arguments = step(model, 2, bounds=attention.SegmentBounds(segments=2, positions=24), **forward)
        jax.eval_shape(update, *arguments)
        return masked, capsys.readouterr().out.splitlines()

    monkeypatch.setattr(jax.nn, "dot_product_attention", replaced)
    monkeypatch.setattr(attention, "best_implementation", lambda platform, dtype: "cudnn")
    attention.cudnn_compiles.cache_clear()
    kinds, said = trace()
    assert kinds and not any(kinds) and not said
    plans = False
    attention.cudnn_compiles.cache_clear()
    kinds, [said] = trace()
    assert kinds and all(kinds)
    assert "(INTERNAL: No execution plans support the graph.): computing as --attention xla" in said
    with pytest.raises(jax.errors.JaxRuntimeError, match="No execution plans"):
        trace(implementation="cudnn")
    attention.cudnn_compiles.cache_clear()


def test_attention_is_told_how_many_segments_a_row_has_and_how_long_they_are(monkeypatch, tmp_path):
    def stop(model, objective, *_, **__):
        raise LookupError(*objective.keywords["bounds"])

    monkeypatch.setattr("train_pg.Trainer", stop)
    packed = pack([([7] * length, [1.0] * length) for length in (120, 65, 30, 20, 10)], 128)
    with pytest.raises(LookupError) as told:
        train(Args(), 0, packed, None, None, tmp_path)
    assert told.value.args == (4, 128)  # rows of 120 tokens and of 65, 30, 20 and 10


def test_a_step_that_is_not_finite_or_runs_away_is_named():
    line = {"step": 7, "loss": 1.0, "gradient_norm": 2.0, "logprob_negative": -3.0}
    check_step(line, -20.0, "Do this.")
    for change, said in (
        ({"loss": float("nan")}, "step 7: loss nan, gradient norm 2.0. Do this."),
        ({"gradient_norm": float("inf")}, "step 7: loss 1.0, gradient norm inf. Do this."),
        (
            {"logprob_negative": -20.5},
            r"step 7: the mean .* with negative weight \(failures\) is -20.5, under --floor -20",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            check_step(line | change, -20.0, "Do this.")


def test_rows_that_cannot_be_divided_are_refused():
    assert dict(training_mesh((-1, 1, 1), 3, 1).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert dict(training_mesh((-1, 1, 1), 4, 2).shape) == {"data": 2, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="--batch-rows 3 is not a multiple of .* give a multiple of 2"):
        training_mesh((-1, 1, 1), 3, 2)
    for shape in ((0, 0, 0), (0, 1, 1), (-1, 0, 1), (1, 1, -2), (-1, -1, 1)):
        with pytest.raises(ValueError, match=f"--mesh {' '.join(map(str, shape))}: expected .* each at least 1"):
            training_mesh(shape, 2, 1)


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


def agent_text_by_weight(how: str, **changes) -> dict[float, str]:
    """What the text of the packed trajectory is, by the weight that its tokens have."""
    tokenizer = byte_tokenizer()
    example = Example(trajectory(**MISTAKES | changes), 1.0, "f", 1)
    packed = pack_examples([example], Args(refinement=how), CODEC)
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


def test_mistakes_marked_in_a_demonstration_are_masked_too_and_its_world_keeps_its_weight():
    by_weight = agent_text_by_weight("mask-errors", source="demo")
    assert by_weight[1.0] == lines(0, 3, 4) and "There is no box 9." in by_weight[0.0]
    assert "Taken." in by_weight[float(np.float32(Args().world_weight))]


@pytest.mark.parametrize("how", ["mask-errors", "no-mask"])
def test_the_gradient_of_a_mistake_is_exactly_zero(how, tmp_path):
    example = Example(trajectory(**MISTAKES), 1.0, "f", 1)
    packed = pack_examples([example], Args(refinement=how, row_length=640), CODEC)
    turns = np.array(tokens_of(example.trajectory, CODEC).turn)
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
    with pytest.raises(ValueError, match=f"--inputs {tmp_path} has no trajectories.jsonl; did you mean {tmp_path}/"):
        collect(dataclasses.replace(args, inputs=(tmp_path,)), 0)
    with pytest.raises(ValueError, match="nowhere has no trajectories.jsonl; expected a stage"):
        collect(dataclasses.replace(args, inputs=(tmp_path / "nowhere",)), 0)


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
        pack_examples(examples, Args(), CODEC)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--epochs 2 0", "--epochs is 0; expected at least 1"),
        ("--epochs", "--epochs needs at least one value"),
        ("--targets", "--targets needs at least one value"),
        ("--mesh 0 1 1", "--mesh 0 1 1: expected"),
        ("--learning-rate 1e9", "--learning-rate is 1000000000.0; expected more than 0 and at most 1"),
        ("--clip 0", "--clip is 0.0; expected more than 0"),
        ("--weights fp32 --dtype bfloat16", "--weights fp32 has its own activations, but --dtype is bfloat16"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_the_flag(words, said):
    with pytest.raises(ValueError, match=said):
        parse(Args, "", words.split())


def test_attention_that_this_device_does_not_have_is_refused_before_anything_is_written(tmp_path):
    for implementation, needs in (("cudnn", "a GPU and 16-bit"), ("splash", "a TPU")):
        with pytest.raises(ValueError, match=f"--attention {implementation} needs {needs}.* gives blocks here"):
            main(Args(run=tmp_path / "run", attention=implementation))
    assert not (tmp_path / "run").exists()


def test_every_row_is_seen_once_an_epoch_in_another_order_each_time():
    args = Args(batch_rows=4, seed=1)
    first, second = (np.concatenate(batch_order(args, 2, epoch, 10)) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == [-1, -1, *range(10)]
    assert first.tolist() != second.tolist()
    assert first.tolist() == np.concatenate(batch_order(args, 2, 0, 10)).tolist()


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure_reward", [-0.5, 0.1])
def test_a_failure_is_one_whatever_its_weight(failure_reward):
    """In round 0, too, where failures are left out."""
    rows = [row("a", "react", trial, round=number, **end) for number in (0, 1) for trial, end in ((0, LOST), (1, WON))]
    selected = select(rows, Args(failure_reward=failure_reward))
    assert [(e.trajectory.round, e.weight) for e in selected] == [(0, 1.0), (1, 1.0), (1, failure_reward)]


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base, with a cache for the compiled programs of the runs below."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0), strict=True):
        jax.config.update(name, value)
    yield write_tiny_model(tmp_path_factory.mktemp("bases") / "base")
    for name, value in before.items():
        jax.config.update(name, value)


def write_stage(directory, rows):
    directory.mkdir(parents=True)
    (directory / "trajectories.jsonl").write_bytes(b"".join(map(to_line, rows)))
    (directory / "done.json").write_text("{}")


def small(tmp_path, base, **changes) -> Args:
    """Three demonstrations in three rows: two steps an epoch, four in all."""
    given = tmp_path / "given"
    if not given.exists():
        write_stage(given, [trajectory(source="demo", trial=trial, **WON) for trial in range(3)])
    how = {"inputs": (given,), "rank": 2, "row_length": 512, "epochs": (2,), "dropout": 0.1, "round": 0}
    return Args(run=tmp_path / "run", model=base, **how | changes)


def adapter_bytes(run) -> bytes:
    return (run / "round_0/train_pg/adapter/adapter_model.safetensors").read_bytes()


def steps_of(run) -> list[int]:
    return [json.loads(line)["step"] for line in metrics_of(run).splitlines()]


def metrics_of(run) -> str:
    return (run / "round_0/train_pg/metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, base):
    args = small(tmp_path_factory.mktemp("unbroken"), base)
    main(args)
    assert steps_of(args.run) == [1, 2, 3, 4]
    return args.run


class Killed(BaseException):
    """What stands for a kill: nothing catches it."""


def killed(args: Args, monkeypatch, at: int) -> None:
    """Runs the stage until it would write the line of step `at`."""
    write = MetricsLog.write

    def write_or_die(self, line):
        if line["step"] == at:
            raise Killed
        write(self, line)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsLog, "write", write_or_die)
        main(args)


@pytest.mark.parametrize(("minutes", "kills"), [(0.0, [2]), (0.0, [2, 4]), (0.0, [3, 3]), (10.0, [2, 4])])
def test_a_run_that_is_killed_within_an_epoch_ends_with_the_same_bytes(
    unbroken, base, tmp_path, monkeypatch, minutes, kills
):
    args = small(tmp_path, base, checkpoint_minutes=minutes)
    for at in kills:
        killed(args, monkeypatch, at)
    main(args)
    assert adapter_bytes(args.run) == adapter_bytes(unbroken) and steps_of(args.run) == [1, 2, 3, 4]


def test_a_training_with_a_tracker_leaves_the_same_files(unbroken, base, tmp_path, monkeypatch):
    for package in ("tensorboardX", "tensorboard"):
        pytest.importorskip(package, reason=f"{package} is not installed (requirements/tracking.txt)")
    args = small(tmp_path, base, checkpoint_minutes=0.0, track="tensorboard")
    killed(args, monkeypatch, 3)
    main(args)
    assert adapter_bytes(args.run) == adapter_bytes(unbroken) and steps_of(args.run) == [1, 2, 3, 4]
    ours, theirs = ([json.loads(line)["loss"] for line in metrics_of(run).splitlines()] for run in (args.run, unbroken))
    assert ours == theirs
    files = [{path.name for path in (run / "round_0/train_pg").iterdir()} for run in (args.run, unbroken)]
    assert files[0] == files[1]
    shown = tensorboard_scalars(args.run, "round_0")["loss"]
    assert [step for step, _ in shown] == [1, 2, 3, 4] and [value for _, value in shown] == pytest.approx(ours)
    main(dataclasses.replace(args, track=None))  # another tracker, or none, makes no other training


def test_a_run_goes_on_at_the_step_of_the_last_checkpoint(base, tmp_path, monkeypatch):
    args = small(tmp_path, base, checkpoint_minutes=0.0)
    killed(args, monkeypatch, 4)
    written = []
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", lambda self, line: written.append(line["step"]))
        main(args)
    assert written == [4]


def test_a_kill_while_the_metrics_are_rewritten_loses_no_line(unbroken, base, tmp_path, monkeypatch):
    args = small(tmp_path, base, checkpoint_minutes=0.0)
    killed(args, monkeypatch, 3)
    replace = os.replace

    def replace_or_die(source, target):
        if str(target).endswith("metrics.jsonl"):
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("artifacts.atomic.os.replace", replace_or_die)
        main(args)
    assert steps_of(args.run) == [1, 2]
    main(args)
    assert steps_of(args.run) == [1, 2, 3, 4] and adapter_bytes(args.run) == adapter_bytes(unbroken)


def test_metrics_of_a_resumed_run_have_each_step_once_and_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in (2, 1, 3, 2, 5, 4)) + '{"step": 6, "lo')
    MetricsLog(tmp_path, 4, 9).__exit__()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    path.write_text('{"step": 1}\n{"step"\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not valid JSON"):
        MetricsLog(tmp_path, 4, 9)


@pytest.mark.parametrize(("damaged", "begins"), [([2], 2), ([1, 2], 1)])
def test_a_damaged_checkpoint_is_left_aside_for_the_one_before(
    unbroken, base, tmp_path, monkeypatch, capsys, damaged, begins
):
    args = small(tmp_path, base, checkpoint_minutes=0.0)
    killed(args, monkeypatch, 3)
    for step in damaged:
        for file in (args.run / f"round_0/train_pg/checkpoints/{step}").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:20])
    (args.run / "round_0/train_pg/checkpoints/7").mkdir()  # half-made by somebody else
    written, write = [], MetricsLog.write
    monkeypatch.setattr(MetricsLog, "write", lambda self, line: (written.append(line["step"]), write(self, line)))
    main(args)
    printed = capsys.readouterr().out
    assert all(
        f"checkpoints/{step} cannot be read, so training goes on from an earlier step" in printed for step in damaged
    )
    assert written == list(range(begins, 5)) and steps_of(args.run) == [1, 2, 3, 4]
    assert adapter_bytes(args.run) == adapter_bytes(unbroken)


def test_a_full_disk_is_one_error_and_the_run_goes_on_when_there_is_room(unbroken, base, tmp_path, monkeypatch):
    args = small(tmp_path, base, checkpoint_minutes=0.0)
    killed(args, monkeypatch, 2)
    with monkeypatch.context() as patch:
        patch.setattr("lora.trainer.shutil.disk_usage", lambda _: SimpleNamespace(free=1))
        with pytest.raises(
            OSError, match="no space left for the checkpoint of step 2: it takes [0-9,]+ bytes, 1 are free"
        ):
            main(args)
    main(args)
    assert adapter_bytes(args.run) == adapter_bytes(unbroken) and steps_of(args.run) == [1, 2, 3, 4]


def test_a_file_in_the_place_of_the_checkpoints_is_named(base, tmp_path):
    args = small(tmp_path, base)
    (args.run / "round_0/train_pg").mkdir(parents=True)
    (args.run / "round_0/train_pg/checkpoints").write_text("")
    with pytest.raises(FileExistsError, match="checkpoints"):
        main(args)


def test_a_step_that_cannot_fit_is_refused_unless_it_is_done(unbroken, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train_pg.training_device", lambda: Device(platform="cpu", limit=2**28))
    args = small(tmp_path, base, batch_rows=10_000, row_length=2**20)
    with pytest.raises(ValueError, match=r"1 row of 1,048,576 at a time.* of 0\.2 GiB\. .*expected fewer --batch-rows"):
        main(args)
    assert not (args.run / "round_0/train_pg").exists()
    main(small(unbroken.parent, base))
    assert "finished already" in capsys.readouterr().out


def test_the_rate_warms_up_to_the_peak_and_falls_to_a_tenth():
    peak, close = 1e-3, functools.partial(pytest.approx, rel=1e-5)
    for steps, warmup in ((1, 1), (2, 1), (100, 3)):
        rates = [float(learning_rate(Args(learning_rate=peak), steps)(step)) for step in range(1, steps + 1)]
        assert rates[:warmup] == close([peak * step / warmup for step in range(1, warmup + 1)])
        after = [(step - warmup) / max(1, steps - warmup) for step in range(warmup + 1, steps + 1)]
        assert rates[warmup:] == close([peak * (0.1 + 0.9 * (1 + np.cos(np.pi * share)) / 2) for share in after])


def test_a_single_step_trains(base, tmp_path):
    args = small(tmp_path, base, epochs=(1,), batch_rows=4)
    main(args)
    weights = load_file(args.run / "round_0/train_pg/adapter/adapter_model.safetensors")
    changes = [np.abs(weight).max() for name, weight in weights.items() if "lora_B" in name]
    assert steps_of(args.run) == [1] and min(changes) == pytest.approx(args.learning_rate, rel=0.01)


def test_a_second_process_is_refused_and_the_metrics_are_of_one(base, tmp_path):
    args = small(tmp_path, base)
    with (
        Stage(args.run / "round_0/train_pg", args, {}),
        pytest.raises(StageError, match="another process is at work in"),
    ):
        main(args)


def test_a_record_whose_ids_were_changed_is_named_and_nothing_is_written(base, tmp_path):
    args = small(tmp_path, base)
    tokens = tokens_of(trajectory(), CODEC)
    played = {"ids": tokens.ids, "sampled": tokens.agent}
    rows = [trajectory(trial=trial, round=0, **played | WON) for trial in range(3)]
    start = tokens.agent.index(1) + 8
    for strange in (tokens.ids[start] + 1, 256):
        rows[1].ids = [*tokens.ids[:start], strange, *tokens.ids[start + 1 :]]
        (args.inputs[0] / "trajectories.jsonl").write_bytes(b"".join(map(to_line, rows)))
        with pytest.raises(ValueError, match=r"given/trajectories\.jsonl:2: .* were they changed"):
            main(args)
    assert not args.run.exists()


def paired(tmp_path, base, **changes) -> Args:
    """Round 1 of a run: a failure and a composition that won, after a round 0 in which nothing was won."""
    run = tmp_path / "run"
    for number in range(2):
        write_stage(run / f"round_{number}/rollout", [trajectory(round=number, **LOST)])
        write_stage(run / f"round_{number}/actre", [trajectory(round=1, source="actre", **WON)] if number else [])
    (run / "round_0/train_pg").mkdir()
    (run / "round_0/train_pg/done.json").write_text("{}")
    return Args(run=run, model=base, round=1, rank=2, row_length=512, epochs=(1,), **changes)


@pytest.mark.parametrize(("failure_reward", "trained"), [(0.1, 2), (-0.1, 2), (0.0, 1)])
def test_failures_are_counted_as_failures_whatever_their_weight(base, tmp_path, capsys, failure_reward, trained):
    args = paired(tmp_path, base, failure_reward=failure_reward)
    main(args)
    done = json.loads((args.run / "round_1/train_pg/done.json").read_text())
    assert (done["sequences"], done["sequences_failed"]) == (trained, trained - 1)
    assert f"{trained} trajectories ({trained - 1} failed)" in capsys.readouterr().out


# ---- preview ---------------------------------------------------------------------------------------------------------


def test_preview_shows_what_was_trained_on_whatever_the_flags(base, tmp_path, capsys, monkeypatch):
    args = paired(tmp_path, base, failure_reward=0.1, preview=5)
    main(args)
    would_be = capsys.readouterr().out
    assert "would be trained on" in would_be and not (args.run / "round_1/train_pg").exists()
    main(dataclasses.replace(args, preview=0))
    before = {path: path.read_bytes() for path in args.run.rglob("*") if path.is_file()}
    for changes in (
        {},
        {"failure_reward": -1.0, "world_weight": 1.0, "inputs": (tmp_path / "nowhere",)},
        {"round": None},
    ):
        capsys.readouterr()
        main(dataclasses.replace(args, **changes))
        header, *lines = capsys.readouterr().out.splitlines()
        assert header == f"what round 1 was trained on, from {args.run}/round_1/train_pg"
        assert lines == would_be.splitlines()[1:]
    assert {path: path.read_bytes() for path in args.run.rglob("*") if path.is_file()} == before
    assert "\033" not in would_be
    places = [line for line in lines if line.startswith("---")]
    assert [line.split(": ", 1)[1] for line in places] == [
        "round_1/actre/trajectories.jsonl:1 weight +1, 396 tokens",
        "round_1/rollout/trajectories.jsonl:1 weight +0.1, 396 tokens",
    ]
    for weight, text in (
        ("+1", " think[I need a mug. I check the shelf 1.]"),
        ("+0.05", "Observation: You pick up the mug 1 from the shelf 1."),
        ("+0.1", " act[take mug 1 from shelf 1]"),
        ("+0.005", "Observation: OK."),
    ):
        assert f"{weight:>8} | {text}" in lines


def test_the_colour_of_a_token_has_the_size_of_its_weight(base, tmp_path, capsys, monkeypatch):
    args = paired(tmp_path, base, failure_reward=-0.5, world_weight=0.0, preview=5)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(args)
    coloured = capsys.readouterr().out
    assert "\033[38;2;0;190;0m think[I need a mug." in coloured  # green at +1
    assert "\033[38;2;210;72;72m think[I need a mug." in coloured  # less red at -0.5 than at -1
    assert "\033[0mObservation: OK." in coloured  # plain at 0
    assert painted("x", -1.0) == "\033[38;2;235;40;40mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    main(args)
    assert "\033" not in capsys.readouterr().out


def test_a_damaged_file_of_packed_rows_is_named(base, tmp_path):
    args = paired(tmp_path, base)
    main(args)
    directory = args.run / "round_1/train_pg"
    for name, said in (("packed.npz", "is not a whole file of packed rows"), ("packed.jsonl", ":1 is not valid JSON")):
        path = directory / name
        whole = path.read_bytes()
        path.write_bytes(whole[:50])
        with pytest.raises(ValueError, match=f"{path}{said if said[0] == ':' else ' ' + said}"):
            main(dataclasses.replace(args, preview=1))
        path.write_bytes(whole)

"""Plans of memory: their arrays are the real ones, and what they choose, refuse and advise follows from them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import agent.local
import rollout
import train_pg
from agent.args import Player, fit_memory
from agent.local import LocalPolicy
from agent.server import Server
from artifacts.stage import Stage
from bench.shapes import LLAMA_31_8B, LLAMA_32_1B, MISTRAL_7B, QWEN3_4B, QWEN25_7B, described
from lora import memory
from lora.decoder import make_decoder
from lora.engine import Engine
from lora.footprint import Device, Playing, Training, adapter_bytes, base_bytes, nf4_bits, plan_playing, plan_training
from lora.linear import LoRAConfig, LoRAParam
from lora.load import load_model
from lora.memory import DEVICES, GIB, choose_playing, choose_training, cpu_devices
from lora.model import CausalLM
from lora.sharding import make_mesh
from tests.support.helpers import TINY, write_tiny_model

CPU = Device(platform="cpu", limit=16 * GIB, cores=2)
LORA = LoRAConfig(rank=16, targets=("q", "v"))
PAPER = Playing(context=1920, prefixes=(512,), adapters=(adapter_bytes(MISTRAL_7B, LORA),))
BOTH = dataclasses.replace(PAPER, prefixes=(512, 512), adapters=(*PAPER.adapters, 0))  # ActRe beside the agent
STEP = Training(dtype="bfloat16", lora=LORA, row_length=2048, batch_rows=16)


def stored(tree) -> int:
    """Bytes of arrays as they are stored: two codes of 4 bits in a byte."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size // 2 if x.dtype == jnp.uint4 else x.size * x.dtype.itemsize for x in leaves)


# ---- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("config", [MISTRAL_7B, QWEN25_7B, QWEN3_4B, LLAMA_32_1B], ids=lambda config: config.model_type)
def test_the_bytes_of_a_base_and_an_adapter_are_those_of_its_arrays(config, double):
    config = dataclasses.replace(config, num_hidden_layers=2)
    model = described(config, LORA, make_mesh((1, 1, 1)), double=double)
    _, adapter, base = nnx.split(model, LoRAParam, ...)
    assert stored(adapter) == adapter_bytes(config, LORA)
    assert stored(base) == base_bytes(config, nf4_bits(double))
    dense = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
    assert stored(nnx.state(dense)) == base_bytes(config, 32, 4)


@pytest.mark.parametrize("form", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, vocab_size=200_000)], ids=["small", "large"])
def test_the_weights_and_the_cache_of_a_plan_are_those_of_the_engine(config, form):
    """On a CPU, where a large model has wider groups."""
    graph, adapter, rest = nnx.split(described(config, LORA, make_mesh((1, 1, 1)), dtype=jnp.float32), LoRAParam, ...)
    for slots in (1, 5, 33, 64):
        how = Playing(rollout=form, slots=slots, context=300, prefixes=(3,))

        def arrays(adapter, rest, how=how):
            decoder = make_decoder(nnx.merge(graph, adapter, rest), form)
            engine = Engine(decoder, slots=how.slots, context=how.context, stop_ids=[5], prefix=[5, 6, 7])
            weights, groups = decoder.weights, engine._groups
            cache = [group._cache for group in groups], groups[0].weights.prefix
            made = (weights.embed, weights.norm, weights.head, weights.layers), cache
            return jax.tree.map(jnp.asarray, made)

        weights, cache = jax.eval_shape(arrays, adapter, rest)
        plan = plan_playing(config, how, CPU)
        assert stored(weights) == plan.base + (0 if form == "fp32" else adapter_bytes(config, LORA))
        assert stored(cache) == plan.cache


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("form", ["bf16", "nf4"])
def test_more_slots_and_a_longer_context_never_take_less(platform, form):
    def peaks(context: int) -> list[int]:
        each = (Playing(rollout=form, slots=slots, context=context) for slots in (1, 2, 7, 8, 16, 17, 33, 64, 100))
        return [plan_playing(MISTRAL_7B, how, Device(platform=platform, limit=GIB, cores=2)).running for how in each]

    short, long = peaks(128), peaks(1920)
    assert short == sorted(short) and long == sorted(long)
    assert all(a < b for a, b in zip(short, long, strict=True))


# GiB of arguments, temporaries and results, by the compilers for TPUs and GPUs.
DECODED = [
    ("tpu", MISTRAL_7B, "nf4", 64, 1024, 12.71),
    ("tpu", MISTRAL_7B, "bf16", 64, 1024, 22.07),
    ("tpu", LLAMA_31_8B, "nf4", 48, 1024, 13.27),
    ("tpu", QWEN25_7B, "nf4", 48, 1024, 9.79),
    ("gpu", MISTRAL_7B, "bf16", 64, 1920, 28.58 + 0.06),
    ("gpu", MISTRAL_7B, "nf4", 64, 1920, 19.23 + 0.22),
]
TRAINED = [
    ("gpu", "full", 1, 2048, 4.22 + 1.09),
    ("gpu", "none", 1, 2048, 4.22 + 14.96),
    ("gpu", "none", 4, 2048, 4.22 + 59.2),
    ("gpu", "full", 8, 2048, 4.22 + 7.01),
    ("tpu", "full", 1, 2048, 5.50),
    ("tpu", "none", 1, 1024, 11.78),
]


@pytest.mark.parametrize("platform, config, form, slots, context, compiled", DECODED)
def test_a_plan_of_playing_is_near_what_the_compilers_assign(platform, config, form, slots, context, compiled):
    how = Playing(rollout=form, slots=slots, context=context, prefixes=(512,), adapters=(adapter_bytes(config, LORA),))
    plan = plan_playing(config, how, Device(platform=platform, limit=GIB))
    assert plan.running / GIB == pytest.approx(compiled, rel=0.15)


@pytest.mark.parametrize("platform, remat, rows, length, compiled", TRAINED)
def test_a_plan_of_training_is_near_what_the_compilers_assign(platform, remat, rows, length, compiled):
    how = dataclasses.replace(STEP, remat=remat, device_rows=rows, batch_rows=rows, row_length=length)
    plan = plan_training(MISTRAL_7B, how, Device(platform=platform, limit=GIB))
    assert plan.running / GIB == pytest.approx(compiled, rel=0.15)


# ---- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, one, both, training",
    [
        ("RTX 3090", ("bf16", 24), ("nf4", 24), ("none", 1)),
        ("A100-80", ("bf16", 64), ("bf16", 64), ("none", 4)),
        ("H200", ("bf16", 64), ("bf16", 64), ("none", 4)),
        ("TPU v5e", ("nf4", 32), ("nf4", 16), ("full", 4)),
    ],
)
def test_what_mistral_7b_gets_on_a_device(device, one, both, training):
    for how, expected in ((PAPER, one), (BOTH, both)):
        chosen, plan = choose_playing(MISTRAL_7B, how, DEVICES[device])
        assert (chosen.rollout, chosen.slots) == expected and plan.peak < DEVICES[device].limit
    chosen, plan = choose_training(MISTRAL_7B, STEP, DEVICES[device])
    assert (chosen.remat, chosen.device_rows) == training and plan.peak < DEVICES[device].limit


def test_explicit_settings_are_obeyed_or_refused_with_what_fits():
    device = DEVICES["RTX 3090"]

    def choose(device=device, **settings):
        return choose_playing(MISTRAL_7B, dataclasses.replace(PAPER, **settings), device)[0]

    assert (choose(slots=40).rollout, choose(slots=40).slots) == ("nf4", 40)
    with pytest.raises(ValueError, match=r"memory: base 4\.1 .*100 slots x 1,920 = 23.* of 21\.7 GiB\. ") as said:
        choose(slots=100)
    assert "expected --slots 24 --rollout-weights bf16 or --slots 56 --rollout-weights nf4" in str(said.value)
    with pytest.raises(ValueError, match=r"64 slots.*; 30.*expected --slots 24 or --slots 56 --rollout-weights nf4"):
        choose(slots=64, rollout="bf16")
    with pytest.raises(ValueError, match=r"expected --slots 1 --context \d+"):
        choose(context=30_000, device=device._replace(limit=17 * GIB // 2))
    with pytest.raises(ValueError, match="4 rows of 2,048 at a time, remat none.*expected --device-rows 4 --remat f"):
        choose_training(MISTRAL_7B, dataclasses.replace(STEP, device_rows=4, remat="none"), device)


def test_a_base_that_is_not_quantised_is_not_played_in_nf4():
    dense = dataclasses.replace(PAPER, weights="fp32")
    assert choose_playing(MISTRAL_7B, dense, DEVICES["A100-80"])[0].rollout == "bf16"
    with pytest.raises(ValueError, match="expected a smaller base, --weights nf4"):
        choose_playing(MISTRAL_7B, dense, DEVICES["TPU v5e"])


def test_a_cpu_plays_in_float32_with_64_slots_and_keeps_all_activations_unless_that_does_not_fit():
    assert choose_playing(TINY, Playing(), CPU)[0] == Playing(rollout="fp32", slots=64)
    assert choose_playing(MISTRAL_7B, Playing(), CPU._replace(limit=64 * GIB))[0].rollout == "fp32"
    assert choose_playing(MISTRAL_7B, Playing(), CPU._replace(limit=24 * GIB))[0].rollout == "nf4"
    assert choose_training(MISTRAL_7B, Training(), CPU._replace(limit=64 * GIB))[0].remat == "none"
    assert choose_training(MISTRAL_7B, Training(), CPU._replace(limit=20 * GIB))[0].remat == "full"


def test_several_devices_share_the_slots_and_each_holds_the_base():
    one, plan = choose_playing(MISTRAL_7B, PAPER, DEVICES["RTX 3090"])
    four, each = choose_playing(MISTRAL_7B, dataclasses.replace(PAPER, devices=4), DEVICES["RTX 3090"])
    assert four.slots == 4 * one.slots and plan == each


def test_a_cpu_is_split_as_far_as_its_memory_goes(monkeypatch):
    counts = []
    for limit in (1, 60, 10_000):
        monkeypatch.setattr(memory, "this_cpu", lambda limit=limit: CPU._replace(limit=limit * GIB))
        counts.append(cpu_devices(MISTRAL_7B, Training(batch_rows=8, remat="full")))
    assert counts == [1, 4, 8]


# ---- in the stages ---------------------------------------------------------------------------------------------------


def test_a_stage_prints_its_plan_and_plays_with_what_it_chose(tmp_path, monkeypatch, capsys):
    args = rollout.Args(model=write_tiny_model(tmp_path / "base"), context=256)
    monkeypatch.setattr(agent.local, "this_device", lambda: Device(platform="cpu", limit=GIB, cores=2))
    (tmp_path / "prompt").write_text("look\n")
    chosen = fit_memory(args, Player(args.server, None, tmp_path / "prompt"), Player(args.server, None, None))
    assert (chosen.slots, chosen.rollout_weights) == (64, "fp32")
    assert "memory: base 0.0 GiB (fp32), cache 2 x 64 slots x 256 = 0.0 GiB, working" in capsys.readouterr().out
    remote = Server(url="http://localhost:1")
    assert fit_memory(args, Player(remote, None, None)) is args and not capsys.readouterr().out
    with pytest.raises(ValueError, match=r"1000000 slots x 256 .* of 1.0 GiB\. That does not fit; expected --slots 64"):
        fit_memory(dataclasses.replace(args, slots=10**6), Player(args.server, None, None))


@pytest.mark.parametrize(
    "before, now",
    [
        (rollout.Args(slots=64), rollout.Args(rollout_weights="nf4")),
        (rollout.Args(), rollout.Args(slots=8, rollout_weights="bf16")),
        (train_pg.Args(remat="none", device_rows=1), train_pg.Args()),
        (train_pg.Args(), train_pg.Args(remat="full", device_rows=2)),
    ],
)
def test_what_follows_from_the_memory_never_refuses_a_resume(tmp_path, before, now):
    with Stage(tmp_path, before, {}):
        (tmp_path / "trajectories.jsonl").write_text("row\n")
    with Stage(tmp_path, now, {}) as stage:
        assert not stage.finished


def test_a_base_that_is_played_in_16_bits_is_loaded_in_16_bits(tmp_path, monkeypatch):
    """And not as float32 first; its numbers stay those of a copy made from float32."""
    base, loaded = write_tiny_model(tmp_path / "base"), []
    monkeypatch.setattr(
        agent.local, "load_model", lambda folder, **how: loaded.append(how["weights"]) or load_model(folder, **how)
    )
    narrow = LocalPolicy(base, weights="fp32", rollout_weights="bf16", slots=1, context=64).decoders[0].weights
    wide = make_decoder(load_model(base, weights="fp32"), "bf16").weights
    assert loaded == ["bf16"]
    for ours, expected in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert ours.dtype == expected.dtype and (ours == expected).all()


def test_the_command_prints_the_flags_of_each_stage(tmp_path, capsys):
    write_tiny_model(tmp_path / "base")
    memory.main(memory.Args(model=tmp_path / "base", device="H200", devices=2, context=256, prefix=64))
    said = capsys.readouterr().out
    assert "rollout.py, evaluate.py --slots 128 --rollout-weights bf16\n  memory: base" in said
    assert "2 x 128 slots x 256" in said and "train_pg.py --dtype bfloat16 --remat none --device-rows 4\n" in said

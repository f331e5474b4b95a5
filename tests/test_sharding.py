"""A training step on one device and on meshes of eight; in one process and in two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from lora.config import Config, Llama3Rope
from lora.load import save_model
from lora.model import CausalLM
from lora.sharding import check_divisible, fused_order, join_processes, make_mesh, start_devices
from tests.support.helpers import TINY

ROOT = Path(__file__).parent.parent
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def write_model(folder: Path, **changes) -> Path:
    """A random model, with biases and norms of heads away from their initial values."""
    model = CausalLM(Config(**{**vars(TINY), **WIDE, **changes}), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    drawn = [*model.layers.qkv.bias.values()]
    drawn += [getattr(model.layers, name) for name in model.config.norms if name in ("q_norm", "k_norm")]
    for variable in drawn:
        variable[...] = variable[...] + rng.normal(0, 0.3, variable.shape).astype(np.float32)
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"))


def start(folder, weights, devices, *meshes, **environment) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.support.sharded_losses", str(folder), weights, str(devices), *meshes]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def result(process: subprocess.Popen) -> np.ndarray:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return np.array(json.loads(out.splitlines()[-1]))


@pytest.fixture(scope="module")
def one_device(folder):
    [losses] = result(start(folder, "nf4", 1, "1,1,1"))
    assert losses[0] - losses[-1] > 0.5  # it learns, so that a wrong gradient shows
    return losses


def test_meshes_give_the_losses_of_one_device(folder, one_device):
    for losses in result(start(folder, "nf4", 8, "1,8,1", "1,2,4", "2,2,2")):
        assert np.abs(losses - one_device).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("weights, mesh", [("nf4-dq", "2,2,2"), ("fp32", "1,4,2")])
def test_other_forms_of_the_base_too(folder, weights, mesh):
    [sharded] = result(start(folder, weights, 8, mesh))
    [alone] = result(start(folder, weights, 1, "1,1,1"))
    assert np.abs(sharded - alone).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_other_families_are_sharded_too(family, tmp_path):
    scaling = Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    write_model(tmp_path, model_type=family, rope_scaling=scaling if family == "llama" else None)
    [sharded] = result(start(tmp_path, "nf4", 8, "1,2,4"))
    [alone] = result(start(tmp_path, "nf4", 1, "1,1,1"))
    assert np.abs(sharded - alone).max() < 1e-5


def test_two_processes_give_the_losses_of_one_device(folder, one_device):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [
        start(folder, "nf4", 2, "1,2,2", COORDINATOR=address, PROCESSES="2", PROCESS=str(number)) for number in (0, 1)
    ]
    for [losses] in map(result, both):
        assert np.abs(losses - one_device).max() < 1e-5


def test_fused_rows_are_dealt_to_devices_part_by_part():
    assert fused_order([4, 2], 2).tolist() == [0, 1, 4, 2, 3, 5]
    assert fused_order([3, 2], 1).tolist() == [0, 1, 2, 3, 4]


def test_what_cannot_be_divided_is_named(folder):
    with pytest.raises(ValueError, match=r"q of shape \(6, 5\) cannot be sharded over tensor=2 x fsdp=2: 6 is not"):
        check_divisible("q", (6, 5), P(("tensor", "fsdp")), {"data": 1, "fsdp": 2, "tensor": 2})
    with pytest.raises(ValueError, match="needs 64 devices, found 2"):
        make_mesh((1, 64, 1))
    for shape in ((0, 0, 0), (-1, 0, 1), (1, 1), (-1, -1, 1), (1, 1, -3)):
        with pytest.raises(
            ValueError, match="--mesh .*: expected the devices along data, fsdp, tensor, each at least 1"
        ):
            make_mesh(shape)
    assert dict(make_mesh((-1, 1, 1)).shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    process = start(folder, "nf4-dq", 8, "1,1,4")
    assert process.wait(120) == 1
    assert "its blocks of 256 absmax would be cut. Use weights='nf4'" in process.stderr.read()


def test_a_coordinator_needs_its_numbers(monkeypatch):
    monkeypatch.setenv("COORDINATOR", "localhost:1")
    monkeypatch.setenv("PROCESSES", "2")
    with pytest.raises(ValueError, match="needs PROCESS too"):
        join_processes()


def test_a_cpu_is_split_into_as_many_devices_as_a_step_has_rows_but_not_into_thousands(monkeypatch):
    """Nor into more than hold a copy of the base each."""
    devices = {}
    monkeypatch.setattr(jax.config, "update", devices.__setitem__)
    for rows, fitting, count in ((1, 99, 1), (2, 99, 2), (10_000, 10_000, 64), (16, 4, 4), (16, 0, 1)):
        start_devices(rows, fitting)
        assert devices == {"jax_num_cpu_devices": count}

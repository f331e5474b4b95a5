"""Model shapes shared by several benchmarks, as abstract arrays or filled with random numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora import nf4
from lora.adapter import adapter_shapes
from lora.config import Config
from lora.linear import FUSED, NF4, LoRAConfig
from lora.model import CausalLM
from lora.sharding import check_divisible, partition_spec

MISTRAL_7B = Config(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    rope_theta=1e6,
)
# 98 M parameters: the same family at a size that a laptop can train.
MISTRAL_100M = Config(
    vocab_size=32000,
    hidden_size=640,
    intermediate_size=1792,
    num_hidden_layers=13,
    num_attention_heads=10,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    rope_theta=1e6,
)


def described(config: Config, lora: LoRAConfig, mesh: Mesh, *, double: bool = False, dtype=jnp.bfloat16) -> CausalLM:
    """A model in NF4 with an adapter, whose arrays are ShapeDtypeStructs sharded on the mesh like real ones."""

    def array(shape, dtype, spec, name):
        check_divisible(name, shape, spec, mesh.shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    model = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
    for holder in (model, model.layers):
        for name in ("embed", "norm", "head", "attention_norm", "mlp_norm"):
            if (old := getattr(holder, name, None)) is not None:
                setattr(holder, name, nnx.Param(array(old.shape, dtype, P(), name)))
    N, shapes = config.num_hidden_layers, adapter_shapes(config, lora)
    for name, parts in FUSED.items():
        linear = getattr(model.layers, name)
        G = linear.inputs // nf4.BLOCK
        M = sum(-(-rows * G // nf4.NESTED_BLOCK) for rows in linear.rows)
        fields = {"codes": ((N, sum(linear.rows), G, nf4.BLOCK), jnp.uint4)}
        if double:
            fields |= {
                "absmax_codes": ((N, M, nf4.NESTED_BLOCK), jnp.uint8),
                "nested": ((N, M), jnp.float32),
                "offset": ((N, M), jnp.float32),
            }
        else:
            fields["absmax"] = ((N, sum(linear.rows), G), jnp.float32)
        arrays = {field: array(*how, partition_spec(name, field), f"{name}.{field}") for field, how in fields.items()}
        linear.quantize(NF4(**{"absmax": None} | arrays))
        for part in (part for part in parts if part in lora.targets):
            a, b = (array(shapes[part, side], jnp.float32, partition_spec(name, side), part) for side in "ab")
            linear.add_adapter(part, a, b, lora)
    return model


def random_like(tree, seed: int = 0):
    """Random arrays in place of abstract ones: small normal floats, uniform codes; created with their sharding."""
    leaves, structure = jax.tree.flatten(tree)

    def fill(leaf, index):
        key = jax.random.fold_in(jax.random.key(seed), index)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.random.bits(key, leaf.shape, jnp.uint8).astype(leaf.dtype)
        return (0.02 * jnp.abs(jax.random.normal(key, leaf.shape, jnp.float32))).astype(leaf.dtype)

    filled = (jax.jit(fill, out_shardings=leaf.sharding, static_argnums=0)(leaf, i) for i, leaf in enumerate(leaves))
    return jax.tree.unflatten(structure, list(filled))


def parameters(config: Config) -> int:
    """Number of parameters of a model of that shape."""
    shapes = jax.eval_shape(lambda: nnx.state(CausalLM(config, rngs=nnx.Rngs(0))))
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))

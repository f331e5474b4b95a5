"""Model shapes shared by several benchmarks, as abstract arrays or filled with random numbers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora import nf4
from lora.adapter import adapter_shapes
from lora.config import Config, Llama3Rope
from lora.decoder import DecoderWeights, Graph, RolloutWeights, decoding_layers
from lora.decoding import SamplingParams, Tile, empty_cache
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
LLAMA_31_8B = dataclasses.replace(
    MISTRAL_7B,
    model_type="llama",
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_theta=5e5,
    rope_scaling=Llama3Rope(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192),
)
QWEN25_7B = Config(
    model_type="qwen2",
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=32768,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
)
QWEN3_8B = Config(
    model_type="qwen3",
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
)
QWEN25_15B = dataclasses.replace(
    QWEN25_7B,
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
QWEN3_4B = dataclasses.replace(QWEN3_8B, hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True)
LLAMA_32_1B = dataclasses.replace(
    LLAMA_31_8B,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    head_dim=64,
    rope_scaling=LLAMA_31_8B.rope_scaling._replace(factor=32),
    tie_word_embeddings=True,
)
SMOLLM2_135M = Config(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rope_theta=1e5,
    tie_word_embeddings=True,
)
SHAPES = {
    "smollm2-135m": SMOLLM2_135M,
    "llama-3.2-1b": LLAMA_32_1B,
    "qwen2.5-1.5b": QWEN25_15B,
    "qwen3-4b": QWEN3_4B,
    "mistral-7b": MISTRAL_7B,
    "qwen2.5-7b": QWEN25_7B,
    "llama-3.1-8b": LLAMA_31_8B,
    "qwen3-8b": QWEN3_8B,
}
# 98 M parameters: Mistral at a size that a laptop can train.
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
    for holder, names in ((model, ("embed", "norm", "head")), (model.layers, config.norms)):
        for name in names:
            if (old := getattr(holder, name)) is not None:
                setattr(holder, name, nnx.Param(array(old.shape, dtype, P(), name)))
    N, shapes = config.num_hidden_layers, adapter_shapes(config, lora)
    for name, parts in FUSED.items():
        linear = getattr(model.layers, name)
        for part, old in linear.bias.items():
            linear.bias[part] = nnx.Param(array(old.shape, dtype, partition_spec(name, "bias"), f"{part}.bias"))
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


def decode_arguments(
    model: CausalLM,
    *,
    weights: RolloutWeights,
    slots: int,
    prefix: int,
    sizes: tuple[int, ...],
    tile: Tile,
    text: int,
) -> tuple[Graph, tuple]:
    """What `lora.decoding.decode` takes, for a `described` model: its graph, and abstract arrays in the order of its
    arguments. `sizes` and `tile`: the blocks of the cache (lora.group.cache_sizes); `text`: ids that drafts are looked
    up in."""
    config, dtype, graphs = model.config, model.embed.dtype, []

    def make_layers(state) -> list:
        graph, layers = decoding_layers(nnx.merge(definition, state), weights)
        graphs.append(graph)
        return layers

    def array(*shape: int, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    definition, state = nnx.split(model.layers)
    layers = jax.eval_shape(make_layers, state)
    K, C, V, D = config.num_key_value_heads, config.head_dim, config.vocab_size, config.hidden_size
    decoder = DecoderWeights(
        embed=array(V, D),
        norm=array(D),
        head=array(D, V),
        stops_V=array(V, dtype=bool),
        layers=layers,
        prefix=[(array(K, C, prefix), array(K, prefix, C))] * config.num_hidden_layers,
    )
    past = jax.eval_shape(lambda: empty_cache(config, slots, sizes, tile, dtype))
    ints, floats = array(slots, dtype=jnp.int32), array(slots, dtype=jnp.float32)
    params = SamplingParams(
        limit=ints,
        drawn=ints,
        temperature=floats,
        top_p=floats,
        seed=array(slots, dtype=jnp.uint32),
    )
    return graphs[0], (decoder, past, ints, params, array(slots, text, dtype=jnp.int32), ints)


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

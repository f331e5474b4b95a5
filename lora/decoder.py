"""A model laid out for decoding: one set of arrays per layer, its base in the form that it is sampled from.

    decoder = make_decoder(model, "bf16")                   # a copy of the base; the adapter stays beside it
    bare = without_adapter(decoder)                         # the same arrays, for ActRe

Shapes: V vocabulary, K kv heads, C head dim, S positions of the prefix.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora.config import Config
from lora.linear import FUSED, LoRAParam, tile_for_cpu
from lora.model import CausalLM, Layer

# Base weights during sampling: float32 with the adapter merged; bfloat16 with it separate (merging in bfloat16 would
# round most of it away); or NF4 as in the model, decoded at every step.
RolloutWeights = Literal["fp32", "bf16", "nf4"]
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


class DecoderWeights(NamedTuple):
    """The model's weights for decoding: one set of arrays per layer, so that no step slices stacked weights."""

    embed: jax.Array
    norm: jax.Array
    head: jax.Array  # in the layout of `tiled_matmul`
    stops_V: jax.Array  # bool: whether an id ends a reply
    layers: list
    prefix: list  # per layer, keys [K, C, S] and values [K, S, C] of the shared prefix; S may be 0


class Graph:
    """A layer's nnx graph as a static jit argument, hashed only once: hashing it takes 0.3 ms per call."""

    def __init__(self, graph: nnx.GraphDef):
        self._graph, self._hash = graph, hash(graph)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return isinstance(other, Graph) and self._graph == other._graph

    def merge(self, weights: nnx.State):
        return nnx.merge(self._graph, weights)


@jax.jit
def take_layer(stacked, index):
    """The arrays of one layer."""
    return jax.tree.map(lambda x: x[index], stacked)


def decoding_layers(layers: Layer, weights: RolloutWeights) -> tuple[Graph, list]:
    """Converts the layers for decoding, one at a time, to their common graph and the arrays of each layer.

    The model is unchanged. Raises ValueError for NF4 rollout weights of a dense model.
    """
    if weights == "nf4" and not layers.qkv.quantized:
        raise ValueError("the rollout weights are nf4, but the model is dense: load it in NF4, or choose fp32 or bf16.")
    graph, stacked = nnx.split(layers)
    arrays = []
    for index in range(layers.config.num_hidden_layers):
        layer = nnx.merge(graph, take_layer(stacked, index))
        if weights != "nf4":
            dtype = DTYPES[weights]
            for name in FUSED:
                setattr(layer, name, getattr(layer, name).dense(dtype, merge=weights == "fp32"))
            for name in layers.config.norms:
                setattr(layer, name, nnx.Param(getattr(layer, name)[...].astype(dtype)))
        layer_graph, layer_arrays = nnx.split(layer)
        arrays.append(layer_arrays)
    return Graph(layer_graph), arrays


class Decoder(NamedTuple):
    """A model for decoding."""

    config: Config
    graph: Graph
    weights: DecoderWeights  # without ids that stop, and without a prefix
    merged: bool  # whether an adapter was added to the base
    device: jax.Device  # that the weights are on


def make_decoder(model: CausalLM, weights: RolloutWeights = "fp32") -> Decoder:
    """The model with its base in the form `weights`; dense forms are copies. Raises as `decoding_layers` does."""
    dtype, adapted = DTYPES.get(weights, model.embed.dtype), bool(jax.tree.leaves(nnx.state(model.layers, LoRAParam)))
    graph, layers = decoding_layers(model.layers, weights)
    embed, norm, head = (x.astype(dtype) for x in (model.embed[...], model.norm[...], model.unembed()))
    none_V = np.zeros(model.config.vocab_size, bool)
    arrays = DecoderWeights(embed=embed, norm=norm, head=tile_for_cpu(head), stops_V=none_V, layers=layers, prefix=[])
    merged = adapted and weights == "fp32"
    return Decoder(model.config, graph, arrays, merged=merged, device=jax.local_devices()[0])


def without_adapter(decoder: Decoder) -> Decoder | None:
    """The base alone, on the same arrays; None if an adapter was merged into them."""
    if decoder.merged:
        return None
    layers = []
    for arrays in decoder.weights.layers:
        layer = decoder.graph.merge(arrays)
        for name in FUSED:
            linear = getattr(layer, name)
            linear.a, linear.b = nnx.Dict(), nnx.Dict()
        graph, bare = nnx.split(layer)
        layers.append(bare)
    return decoder._replace(graph=Graph(graph), weights=decoder.weights._replace(layers=layers))


def copy_to(decoder: Decoder, device: jax.Device) -> Decoder:
    """The same decoder on another device."""
    return decoder._replace(weights=jax.device_put(decoder.weights, device), device=device)

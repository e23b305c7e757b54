"""Model FLOPs: what the mathematics of one training step needs, whatever the hardware does.

6 per active matmul weight and token (2 forward, 4 backward), and for causal attention
12 * keys * H * N per layer and token, where keys is the mean number of keys a query may see and N
the mean width of a key and a value (scores and values, 2 each forward and 4 backward). Attention to
blocks counts the keys that are attended and 2 N for every product of a query with a mean key, which
has no backward pass; where it is switched on or off at a step, as while it is on: the least.
Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B, with the causal half not counted.
Recomputation under remat is not useful work and is not counted.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from moejax.models.stack import Layer
from moejax.models.transformer import Transformer
from moejax.models.variables import parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Parameter counts and work. `active_params` is what one token uses (k of E experts)."""

    params: int
    active_params: int
    train_flops_per_token: float


def size(model: Transformer, sequence_length: int) -> Size:
    """Counts from abstract shapes; no memory is allocated."""
    shapes = parameters(jax.eval_shape(model.init, jax.random.key(0)))
    axes = parameters(model.logical_axes())
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
    params = active = matmul = 0.0
    for (path, leaf), axis_names in zip(leaves, names, strict=True):
        count = math.prod(leaf.shape)
        share = 1.0
        if "expert" in axis_names and model.moe is not None:
            share = getattr(model.moe.router, "k", model.moe.num_experts) / model.moe.num_experts
        params += count
        active += share * count
        is_lookup = "embedding" in jax.tree_util.keystr(path) and not model.tied_head
        # The axes of layers and experts stack matrices and vectors (norms, biases) alike.
        rank = leaf.ndim - ("layers" in axis_names) - ("expert" in axis_names)
        if rank >= 2 and not is_lookup:
            matmul += share * count
    flops = 6 * matmul + _attention_flops(model, sequence_length)
    return Size(params=int(params), active_params=round(active), train_flops_per_token=flops)


def _attention_flops(model: Transformer, sequence_length: int) -> float:
    return sum(
        len(segment.indices(member)) * _layer_flops(layer, model.d_model, sequence_length)
        for segment in model.segments
        for member, layer in enumerate(segment.layers)
    )


def _layer_flops(layer: Layer, d_model: int, sequence_length: int) -> float:
    attention = layer.block.attention
    heads = getattr(attention, "num_heads", 0)
    one = getattr(attention, "head_dim", None) or d_model // max(heads, 1)
    key, value = getattr(attention, "head_widths", (one, one))
    width = heads * (key + value) / 2
    if layer.window is None and hasattr(attention, "mean_keys"):
        keys, scores = attention.mean_keys(sequence_length), attention.mean_scores(sequence_length)
        return 12 * keys * width + 2 * scores * key
    reach = min(layer.window or sequence_length, sequence_length)
    average = reach - reach * (reach - 1) / (2 * sequence_length)  # mean number of visible keys
    return 12 * average * width

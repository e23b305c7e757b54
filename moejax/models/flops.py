"""Model FLOPs: what the mathematics of one training step needs, whatever the hardware does.

Of an active matmul weight and token, 2 each: the forward pass; the gradient of the input; and the
weight's own gradient, where it trains. So 6 where all train, and 4 for a frozen weight. In layers
below the first in which anything trains no input needs a gradient, and 2 are left. What adapters
add is counted alike, by the matrices in the collection `lora`; the products that merge or mix them
are not.

Of causal attention 12 * keys * H * N per layer and token, where keys is the mean number of keys a
query may see and N the mean width of a key and a value (scores and values, 2 each forward and 4
backward; below the first layer that trains, the 4 forward alone). Attention to
blocks counts the keys that are attended and 2 N for every product of a query with a mean key, which
has no backward pass; where it is switched on or off at a step, as while it is on: the least.
Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B, with the causal half not counted.
Recomputation under remat is not useful work and is not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

import jax

from moejax.layers.adapter_leaf import ADAPTERS
from moejax.models.stack import Layer, stacked_layers
from moejax.models.transformer import Transformer
from moejax.models.variables import parameters
from moejax.types import named_leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Parameter counts and work. `active_params` is what one token uses (k of E experts).

    `forward_flops_per_token` is of one forward pass, and a part of `train_flops_per_token`.
    """

    params: int
    active_params: int
    train_flops_per_token: float
    forward_flops_per_token: float


def size(model: Transformer, sequence_length: int, *, frozen: Collection[str] = ()) -> Size:
    """Counts from abstract shapes; no memory is allocated.

    `frozen` holds the paths of what does not train, within the tree of `variables.parameters`: the
    keys of `named_leaves(freeze.split(shapes, trainable)[1])`. A leaf of which some experts train
    has a whole gradient, and is not frozen.
    """
    shapes = named_leaves(parameters(jax.eval_shape(model.init, jax.random.key(0))))
    if unknown := sorted(set(frozen) - shapes.keys()):
        raise ValueError(f"frozen names {unknown[0]}, which is no parameter of the model")
    axes = parameters(model.logical_axes())
    names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
    places = {path: _places(path, model) for path in shapes}
    trained = [place for path in shapes if path not in frozen for place in places[path]]
    first = min(trained, default=math.inf)
    params = active = forward = backward = 0.0
    for (path, leaf), axis_names in zip(shapes.items(), names, strict=True):
        count = math.prod(leaf.shape)
        share = 1.0
        if "expert" in axis_names and model.moe is not None:
            share = getattr(model.moe.router, "k", model.moe.num_experts) / model.moe.num_experts
        params += count
        active += share * count
        is_head = path.startswith("head/") or path == "embed/embedding" and model.tied_head
        is_lookup = path == "embed/embedding" and not model.tied_head
        # The axes of layers and experts stack matrices and vectors (norms, biases) alike.
        rank = leaf.ndim - ("layers" in axis_names) - ("expert" in axis_names)
        if rank >= 2 and not is_lookup:
            inputs = [model.num_layers] if is_head else places[path]
            share_above = sum(place >= first for place in inputs) / len(inputs)
            forward += 2 * share * count
            backward += 2 * share * count * ((path not in frozen) + share_above)
    for segment in model.segments:
        for member, layer in enumerate(segment.layers):
            ahead, back = _layer_flops(layer, model.d_model, sequence_length)
            forward += ahead * len(segment.indices(member))
            backward += back * sum(index >= first for index in segment.indices(member))
    return Size(
        params=int(params),
        active_params=round(active),
        train_flops_per_token=forward + backward,
        forward_flops_per_token=forward,
    )


def _places(path: str, model: Transformer) -> Sequence[int]:
    """The layers that a parameter belongs to; -1 is before all, and num_layers behind them."""
    name = path.removeprefix(f"{ADAPTERS}/").split("/")[0]
    outside = {"embed": -1, "final_norm": model.num_layers, "head": model.num_layers + 1}
    return [outside[name]] if name in outside else stacked_layers(model.segments)[name]


def _layer_flops(layer: Layer, d_model: int, sequence_length: int) -> tuple[float, float]:
    """Of attention alone: (forward, backward)."""
    attention = layer.block.attention
    heads = getattr(attention, "num_heads", 0)
    one = getattr(attention, "head_dim", None) or d_model // max(heads, 1)
    key, value = getattr(attention, "head_widths", (one, one))
    width = heads * (key + value) / 2
    if layer.window is None and hasattr(attention, "mean_keys"):
        keys, scores = attention.mean_keys(sequence_length), attention.mean_scores(sequence_length)
        return 4 * keys * width + 2 * scores * key, 8 * keys * width
    reach = min(layer.window or sequence_length, sequence_length)
    average = reach - reach * (reach - 1) / (2 * sequence_length)  # mean number of visible keys
    return 4 * average * width, 8 * average * width

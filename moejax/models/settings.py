"""Which settings of a model cannot be, and which calls it does not take."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from moejax.errors import UserError
from moejax.models import stack
from moejax.models.moe import MoE

_DTYPES = ("float32", "bfloat16", "float64")


def check_settings(model: Any) -> None:
    """Raises UserError for the first setting of a `Transformer` that cannot be."""
    if model.remat not in stack.REMAT_POLICIES:
        known = ", ".join(stack.REMAT_POLICIES)
        raise UserError(f"model.remat={model.remat!r} is not one of {known}")
    for name in ("num_layers", "d_model", "unroll", "moe_every"):
        if getattr(model, name) < 1:
            raise UserError(f"model.{name}={getattr(model, name)} must be at least 1")
    for name in ("dtype", "param_dtype"):
        if getattr(model, name) not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise UserError(f"model.{name}={getattr(model, name)!r} is not one of {known}")
    if not model.windows or any(w is not None and w < 1 for w in model.windows):
        raise UserError(
            f"model.windows={model.windows} must name a window of at least 1 position, or None "
            "for full attention, for one layer or more"
        )
    if any(not 0 < boundary < model.num_layers for boundary in model.boundaries):
        raise UserError(
            f"model.boundaries={model.boundaries} must lie between 1 and "
            f"model.num_layers - 1 = {model.num_layers - 1}"
        )
    if model.logit_soft_cap is not None and not 0 < model.logit_soft_cap < math.inf:
        raise UserError(
            f"model.logit_soft_cap={model.logit_soft_cap} must be positive and finite, or None for "
            "no cap"
        )
    if not 0 <= model.last_k_full <= model.num_layers:
        raise UserError(
            f"model.last_k_full={model.last_k_full} names no layers: it must lie between 0 and "
            f"model.num_layers={model.num_layers}"
        )
    if model.last_k_full and not hasattr(model.block.attention, "full"):
        raise UserError(
            f"model.last_k_full={model.last_k_full} needs an attention that can also attend every "
            f"key in the same parameters, as MoBA can, and {type(model.block.attention).__name__} "
            "has no method full(): leave it out"
        )
    _check_pattern(model)


def check_trained_routers(model: Any, trained: Collection[str]) -> None:
    """Raises UserError where a router trains that the loss cannot reach.

    `trained` are the paths of the parameters that train.
    """
    adapter, moe = model.adapter, model.moe
    routers = {}
    if any("/ffn/router/" in path for path in trained) and moe.num_experts > 1:
        routers["model's"] = moe.router
    for part in ("linear", "mlp"):
        mixed = getattr(adapter, part, None)
        if any("/routing/" in path for path in trained) and mixed is not None:
            routers[f"adapter.{part}'s"] = getattr(mixed, "router", None)
    for name, router in routers.items():
        if why := getattr(router, "constant_weights", ""):
            raise UserError(f"the {name} router trains, but the loss does not reach it: {why}")


def _check_pattern(model: Any) -> None:
    """Which layers are dense: that there are such layers, what they need, and who is left."""
    if not 0 <= model.first_k_dense <= model.num_layers:
        raise UserError(
            f"model.first_k_dense={model.first_k_dense} must lie between 0 and "
            f"model.num_layers={model.num_layers}"
        )
    dense = [model.is_dense(i) for i in range(model.num_layers)]
    if any(dense) and model.dense_ffn is None:
        raise UserError(
            f"model.first_k_dense={model.first_k_dense} and model.moe_every={model.moe_every} "
            "make dense layers, but model.dense_ffn is None: give it a DenseGLU"
        )
    if all(dense) and isinstance(model.block.ffn, MoE):
        raise UserError(
            f"model.first_k_dense={model.first_k_dense} and model.moe_every={model.moe_every} "
            f"leave none of model.num_layers={model.num_layers} layers to the MoE of "
            "model.block.ffn: lower them, or give the block a DenseGLU"
        )


def check_length(model: Any, length: int) -> None:
    """Raises UserError for a sequence longer than a `Transformer` accepts."""
    if model.max_length is not None and length > model.max_length:
        raise UserError(
            f"a sequence of {length} tokens is longer than model.max_length={model.max_length}"
        )


def check_segments(model: Any, per_layer: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError where something is given for layers that a `Transformer` does not have."""
    if not any(per_layer.values()):
        return
    segments = sorted({name for name, _ in model.moe_layers.values()})
    for field, values in per_layer.items():
        if unknown := sorted(values.keys() - set(segments)):
            raise UserError(
                f"{field} is given for {unknown[0]!r}, and the stacks of layers with routers are "
                f"{', '.join(segments) or 'none'}: see model.moe_layers, which says what lies where"
            )

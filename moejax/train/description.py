"""What a run's first record says about it."""

from __future__ import annotations

from typing import Any

import jax

from moejax.models.flops import size
from moejax.models.transformer import Transformer
from moejax.train.manifest import versions
from moejax.train.peak import peak_flops


def describe(model: Transformer, tokens_per_step: int, sequence_length: int) -> dict[str, Any]:
    """What a run's first record says about its size and its machine."""
    counted = size(model, sequence_length)
    return {
        "num_params": counted.params,
        "num_active_params": counted.active_params,
        "train_flops_per_token": counted.train_flops_per_token,
        "moe_layers": list(model.moe_layers),
        "num_experts": model.moe.num_experts if model.moe else 0,
        "k": getattr(model.moe.router, "k", None) if model.moe else None,
        "tokens_per_step": tokens_per_step,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "peak_flops": peak_flops(),
    }

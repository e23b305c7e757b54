"""The same sum of adapters on rows sorted by adapter: work for the chosen ones alone."""

from __future__ import annotations

import logging

from jaxtyping import Array, Float, Int

from moejax.kernels import compat, dispatch
from moejax.kernels.expert_mlp.slots import rows_of_tokens, sort_slots, tokens_of_rows
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.types import at_least_f32

# Adapters for each chosen one from which on sorting is faster, forward and backward, where it was
# measured (docs/benchmarks.md). Elsewhere all adapters are computed.
_BREAK_EVEN = {"cpu": 12}


def pays(num_adapters: int, k: int) -> bool:
    """Whether sorting by adapter is faster than computing all; logs the choice once."""
    platform = compat.target_platform()
    needed = _BREAK_EVEN.get(platform)
    sort = needed is not None and num_adapters >= needed * k
    why = (
        f"nothing else was measured on {platform}"
        if needed is None
        else f"sorting pays from {needed} adapters for each chosen one on {platform}, measured in "
        "docs/benchmarks.md"
    )
    how = "on rows sorted by adapter" if sort else "over all adapters at once"
    dispatch.announce(logging.INFO, f"{k} of {num_adapters} adapters: computed {how}; {why}")
    return sort


def ragged_delta(
    x: Float[Array, "T K"],
    a: Float[Array, "E K r"],
    b: Float[Array, "E r N"],
    chosen: Int[Array, "T k"],
    weights: Float[Array, "T k"],
) -> Float[Array, "T N"]:
    """sum_j w_j x A_chosen_j B_chosen_j; an id outside `[0, E)` is an empty slot."""
    slots = sort_slots(chosen, a.shape[0])
    inner = grouped_matmul(rows_of_tokens(x, slots), a, slots.group_sizes)
    score = slots.to_rows(weights.astype(at_least_f32(x.dtype)))
    gated = (inner * score[:, None]).astype(x.dtype)  # in rank space, where rows are short
    return tokens_of_rows(grouped_matmul(gated, b, slots.group_sizes), slots, x.dtype)

"""Statistics of routing: load, MaxVio, entropy, effective experts, dead experts, percentiles.

Everything here is numpy on the host, and the only definition of each: what a run writes down and
what the report draws are the same. `load` is `[..., E]`: each expert's share of the choices of
one layer (a row sums to 1), or plain counts; every statistic is invariant to that scale. The
*even share* is the mean over experts, 1/E where a row sums to 1.

A layer without tokens has no statistics: its shares are 0, for nothing was given to anyone, and
everything else is NaN. None of its experts counts as dead, and its number of dead ones is NaN,
not 0 and not E.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moejax.analysis.entropy import entropy

PerLayer = NDArray | np.floating  # `[...]`: numpy's scalar where `load` is one row `[E]`


def load_share(load: ArrayLike) -> NDArray:
    """Each expert's share of the choices, `load_i / sum(load)`. `[..., E] -> [..., E]`."""
    load = np.asarray(load, np.float64)
    total = load.sum(-1, keepdims=True)
    return np.divide(load, total, out=np.zeros_like(load), where=total != 0)


def relative_load(load: ArrayLike) -> NDArray:
    """Load divided by the even share: `load_i / mean(load)`. `[..., E] -> [..., E]`; 1 is even."""
    load = np.asarray(load, np.float64)
    mean = load.mean(-1, keepdims=True)
    return np.divide(load, mean, out=np.full_like(load, np.nan), where=mean > 0)


def max_vio(load: ArrayLike) -> PerLayer:
    """Largest violation of balance: `(max_i load_i - mean(load)) / mean(load)`.

    `[..., E] -> [...]`. 0 is perfect balance; the most a top-k router can reach is `E/k - 1`.
    Source: "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    arXiv 2408.15664, section 4.1.
    """
    return relative_load(load).max(-1) - 1.0


def normalized_entropy(entropy: ArrayLike, num_experts: int) -> PerLayer:
    """An entropy in nats divided by its maximum `ln E`: 0 is certain, 1 is uniform.

    With a single expert there is nothing to choose and the result is 1.
    """
    entropy = np.asarray(entropy, np.float64)
    if num_experts < 2:
        return np.ones_like(entropy)
    return entropy / np.log(num_experts)


def router_entropy(total: ArrayLike, num_tokens: ArrayLike, num_experts: int) -> PerLayer:
    """Mean normalised entropy of the router's distribution over the tokens it saw.

    `total` `[...]` is the sum over tokens of `-sum_i p_i ln p_i` in nats, `num_tokens` `[...]`
    how many there were.
    """
    total = np.asarray(total, np.float64)
    count = np.asarray(num_tokens, np.float64)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return np.where(np.isnan(mean), np.nan, normalized_entropy(mean, num_experts))


def load_entropy(load: ArrayLike) -> PerLayer:
    """Normalised entropy of the load, `-sum_i p_i ln p_i / ln E` with `p = load / sum(load)`.

    `[..., E] -> [...]`, 1 when every expert has the same load, 0 when one expert has it all.
    """
    load = np.asarray(load, np.float64)
    return normalized_entropy(_entropy_nats(load), load.shape[-1])


def effective_experts(load: ArrayLike) -> PerLayer:
    """The number of equally loaded experts with the same load entropy: `exp(-sum p ln p)`.

    `[..., E] -> [...]`, from 1 to E. A top-k router cannot go below k: its choices for one token
    are k different experts.
    """
    return np.exp(_entropy_nats(load))


def load_spread(load: ArrayLike, k: int) -> PerLayer:
    """Where the effective number of experts lies between its least, k (0), and its most, E (1).

    `[..., E] -> [...]`. The scale makes layers with different E and k comparable; when k is E
    there is nothing to spread and the result is 1.
    """
    num_experts = np.shape(load)[-1]
    effective = effective_experts(load)
    if num_experts <= k:
        return np.where(np.isnan(effective), np.nan, 1.0)
    return np.clip((effective - k) / (num_experts - k), 0.0, 1.0)


def dead_experts(load: ArrayLike, threshold: float = 0.0) -> NDArray[np.bool_]:
    """Which experts get no more than `threshold` of the even share. `[..., E] -> [..., E]`.

    The default, 0, marks those without a single token. NaN load is not dead.
    """
    return relative_load(load) <= threshold


def num_dead_experts(load: ArrayLike, threshold: float = 0.0) -> NDArray:
    """How many experts are dead, see `dead_experts`. `[..., E] -> [...]`, float for the NaN."""
    known = np.isfinite(relative_load(load)).all(-1)
    return np.where(known, dead_experts(load, threshold).sum(-1), np.nan)


def load_percentiles(load: ArrayLike, percentiles: Sequence[float]) -> NDArray:
    """Percentiles (0 to 100) over experts of the relative load. `[..., E] -> [..., Q]`."""
    return np.moveaxis(np.percentile(relative_load(load), percentiles, axis=-1), 0, -1)


def _entropy_nats(load: ArrayLike) -> PerLayer:
    return entropy(relative_load(load) / np.shape(load)[-1])

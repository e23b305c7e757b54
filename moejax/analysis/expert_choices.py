"""How many tokens choose an expert: counts, the load, and the share of tokens that activate it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def count_choices(experts: ArrayLike, num_experts: int) -> NDArray[np.int64]:
    """Tokens that choose each expert. `[..., T, K] -> [..., E]`.

    Ids outside `[0, num_experts)` are empty slots and count nowhere. A token's choices are
    different experts. Divided by their sum the counts are the load (`routing.load_share`).
    """
    experts = np.asarray(experts)
    *lead, num_tokens, k = experts.shape
    rows = experts.reshape(math.prod(lead), num_tokens * k).astype(np.int64)
    used = (rows >= 0) & (rows < num_experts)
    offset = np.arange(len(rows))[:, None] * num_experts
    counts = np.bincount((rows + offset)[used], minlength=len(rows) * num_experts)
    return counts.reshape(*lead, num_experts)


def activation_share(counts: ArrayLike, num_tokens: int) -> NDArray:
    """f_k, the share of tokens that activate expert k: `counts / num_tokens`, `[..., E]`.

    From `count_choices`; over the experts it sums to k where no slot is empty. Source:
    "Multilingual Routing in Mixture-of-Experts", arXiv 2510.04694, which compares counts and not
    combine weights. NaN without tokens.
    """
    counts = np.asarray(counts, np.float64)
    return counts / num_tokens if num_tokens else np.full_like(counts, np.nan)

"""Which experts are chosen together by the same token.

Counts first, `N_ij` tokens that choose both i and j; every statistic comes from them, so that
counts of several batches can be added.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moejax.analysis.divergence import distribution
from moejax.analysis.entropy import entropy


def count_together(experts: ArrayLike, num_experts: int) -> NDArray[np.int64]:
    """`N_ij`, tokens that choose both i and j; `N_ii` choose i. `[T, K] -> [E, E]`, symmetric.

    Ids outside `[0, num_experts)` are empty slots. A token's choices are different experts.
    """
    experts = np.asarray(experts, np.int64)
    size = num_experts + 1  # the last row and column collect the empty slots
    ids = np.where((experts < 0) | (experts > num_experts), num_experts, experts)
    pairs = (ids[:, :, None] * size + ids[:, None, :]).reshape(-1)
    counts = np.bincount(pairs, minlength=size * size).reshape(size, size)
    return counts[:num_experts, :num_experts]


def together_share(together: ArrayLike, num_tokens: int) -> NDArray:
    """`N_ij / T`: the share of tokens that choose both. `[..., E, E] -> [..., E, E]`, in [0, 1]."""
    return np.asarray(together, np.float64) / num_tokens


def given_choice(together: ArrayLike) -> NDArray:
    """`N_ij / N_i`: of the tokens that choose i (row), the share that also choose j (column).

    `[..., E, E] -> [..., E, E]`; the diagonal is 1; a row whose expert nobody chooses is NaN.
    Source: "OLMoE: Open Mixture-of-Experts Language Models", arXiv 2409.02060, section 5.2.
    """
    counts = np.asarray(together, np.float64)
    own = np.diagonal(counts, axis1=-2, axis2=-1)[..., :, None]
    return np.divide(counts, own, out=np.full_like(counts, np.nan), where=own > 0)


def relative_coactivation(together: ArrayLike) -> NDArray:
    """`N_ij / mean over j != i of N_ij`: how often j comes with i, over the mean of the others.

    `[..., E, E] -> [..., E, E]`, NaN on the diagonal and in rows without a pair. The mean of
    every other row is 1, whatever k and the load: 1 is "no more than any other expert".
    """
    counts = np.asarray(together, np.float64)
    num_experts = counts.shape[-1]
    other = ~np.eye(num_experts, dtype=bool)
    mean = np.where(other, counts, 0).sum(-1, keepdims=True) / max(num_experts - 1, 1)
    return np.divide(counts, mean, out=np.full_like(counts, np.nan), where=other & (mean > 0))


def choice_information(together: ArrayLike) -> NDArray | np.floating:
    """What one choice of a token says about another: mutual information in nats.

    `[..., E, E] -> [...]`. Of all ordered pairs of different choices of one token, i is the one
    and j the other: `sum_ij p_ij ln(p_ij / (p_i p_j))`. The least that even, independent choices
    reach is `ln(E / (E - 1))`, because the two differ; NaN where no token makes two choices.
    """
    counts = np.asarray(together, np.float64)
    num_experts = counts.shape[-1]
    pairs = np.where(np.eye(num_experts, dtype=bool), 0, counts)
    p = distribution(pairs.reshape(*counts.shape[:-2], -1))
    one = p.reshape(counts.shape).sum(-1)
    return 2 * entropy(one) - entropy(p)


def strongest_pairs(together: ArrayLike, most: int) -> list[tuple[int, int, float]]:
    """The pairs (i, j, overlap), i < j, with the largest overlap first. `[E, E]`.

    Overlap is Jaccard's: tokens that choose both over tokens that choose either,
    `N_ij / (N_i + N_j - N_ij)`; 1 where i and j serve the same tokens. Of equals, the first.
    Pairs that never meet are left out.
    """
    counts = np.asarray(together, np.float64)
    own = np.diagonal(counts)
    first, second = np.triu_indices(len(counts), 1)
    both = counts[first, second]
    either = own[first] + own[second] - both
    overlap = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
    best = np.argsort(-overlap, kind="stable")[:most]
    return [(int(first[n]), int(second[n]), float(overlap[n])) for n in best if overlap[n] > 0]

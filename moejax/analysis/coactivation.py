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


def pair_lift(together: ArrayLike, *, min_expected: float = 0.0) -> NDArray:
    """How often i and j come together over how often they would by chance: `p_ij / (p_i p_j)`.

    `[..., E, E] -> [..., E, E]`, symmetric; `p_ij` and `p_i` as in `choice_information`, so a busy
    expert is no one's partner for being busy. 1 is chance; even and independent choices have
    `E / (E - 1)`, because the two differ. NaN on the diagonal, for experts without a pair, and
    where chance would give fewer than `min_expected` tokens, which is too few to say.
    """
    pairs, one = _pair_shares(together)
    chance = one[..., :, None] * one[..., None, :]
    apart = ~np.eye(pairs.shape[-1], dtype=bool)
    total = np.where(apart, together, 0).sum((-2, -1), keepdims=True)
    known = apart & (chance > 0) & (chance * total >= min_expected)
    return np.divide(pairs, chance, out=np.full_like(pairs, np.nan), where=known)


def choice_information(together: ArrayLike) -> NDArray | np.floating:
    """What one choice of a token says about another: mutual information in nats.

    `[..., E, E] -> [...]`. Of all ordered pairs of different choices of one token, i is the one
    and j the other: `sum_ij p_ij ln(p_ij / (p_i p_j))`. The least that even, independent choices
    reach is `ln(E / (E - 1))`, because the two differ; NaN where no token makes two choices.
    """
    pairs, one = _pair_shares(together)
    return 2 * entropy(one) - entropy(pairs.reshape(*one.shape[:-1], -1))


def _pair_shares(together: ArrayLike) -> tuple[NDArray, NDArray]:
    """(p_ij `[..., E, E]`, p_i `[..., E]`) over ordered pairs of different choices; NaN if none."""
    counts = np.asarray(together, np.float64)
    other = np.where(np.eye(counts.shape[-1], dtype=bool), 0, counts)
    pairs = distribution(other.reshape(*counts.shape[:-2], -1)).reshape(counts.shape)
    return pairs, pairs.sum(-1)


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

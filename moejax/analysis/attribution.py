"""Which experts a text belongs to: the mean router probability of each, ranked over all layers.

"SEUF: Is Unlearning One Expert Enough for Mixture-of-Experts LLMs?", arXiv 2411.18797: the score
of an expert is the mean over sequences of the mean over tokens of its router probability, and
layers are ranked together. Shared experts have no router probability, so they take no part. The
paper asks for at least about 100,000 tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def attribution(sequence_probs: ArrayLike) -> NDArray:
    """Scores `[L, E]` from every sequence's mean router probabilities `[N, L, E]`.

    A long sequence counts as much as a short one. The scores of a layer sum to 1 where each
    token's probabilities do. Raises ValueError without sequences.
    """
    probs = np.asarray(sequence_probs, np.float64)
    if not len(probs):
        raise ValueError("attribution needs at least one sequence")
    return probs.mean(axis=0)


def rank_experts(scores: ArrayLike, most: int) -> list[tuple[int, int, float]]:
    """The `most` highest of `[L, E]` as (row of the layer, expert, score), best first.

    Over all layers together; of equals the earlier layer, then the smaller expert.
    """
    scores = np.asarray(scores, np.float64)
    best = np.argsort(-scores, axis=None, kind="stable")[:most]
    rows, experts = np.unravel_index(best, scores.shape)
    return [(int(r), int(e), float(scores[r, e])) for r, e in zip(rows, experts, strict=True)]

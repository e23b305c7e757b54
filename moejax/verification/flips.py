"""How many choices of a run the oracle would not have made, and how nearly it would have.

In a dtype of few digits two layouts round the router's scores differently, and an expert on the
edge is chosen in the one and not in the other. Rounding flips few choices, and by little.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Choices = Mapping[str, np.ndarray]  # by segment, [L, T, K]; an id of E is an empty slot


def share(replayed: Choices, own: Choices, num_experts: int) -> float:
    """The share of the oracle's own choices that are others when replayed, in any order.

    Empty slots of both are no choices.
    """
    flipped = sum(np.abs(_gained(replayed[name], own[name], num_experts)).sum() for name in own)
    return float(flipped / 2 / max(sum((c < num_experts).sum() for c in own.values()), 1))


def margin(replayed: Choices, own: Choices, probs: Mapping[str, np.ndarray]) -> float:
    """The largest distance, in router probability, by which a replayed choice was not the best.

    Of every token whose choices differ: the most probable expert that the oracle chose by itself
    and the replay does not, less the least probable one of the replay that it did not choose; an
    empty slot has probability 0.

    Args:
      replayed, own: the choices that the oracle is given, and those of its run without any.
      probs: `[L, T, E]` by segment, of the run that replays: there the layers before have made the
        same choices, so that what is left between the two is rounding.
    """
    return max((_margin(replayed[name], own[name], probs[name]) for name in own), default=0.0)


def _margin(replayed: np.ndarray, own: np.ndarray, probs: np.ndarray) -> float:
    gained = _gained(replayed, own, probs.shape[-1])
    probs = np.pad(probs, ((0, 0), (0, 0), (0, 1)))  # the empty slot
    lost_best = np.where(gained < 0, probs, -np.inf).max(axis=-1)
    gained_worst = np.where(gained > 0, probs, np.inf).min(axis=-1)
    return float((lost_best - gained_worst).max(initial=0))


def _gained(replayed: np.ndarray, own: np.ndarray, num_experts: int) -> np.ndarray:
    """`[L, T, E + 1]`: how many more choices of each expert, and of none, are replayed."""
    counts = lambda chosen: (chosen[..., None] == np.arange(num_experts + 1)).sum(axis=-2)
    return counts(replayed) - counts(own)

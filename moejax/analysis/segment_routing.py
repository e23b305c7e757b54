"""How well a model would do if each expert were on or off for whole segments of tokens (SRP).

"Not All Models Suit Expert Offloading", arXiv 2505.16056: segment routing best performance. For
one expert and every window of m consecutive tokens let f be the number of its tokens that choose
the expert. An estimator keeps the expert for a window or not; its F1 is 2 TP / (predicted +
actual), with TP the sum of f over kept windows, predicted m times their number, and actual the sum
of f over all. The best estimator keeps the windows with f >= alpha for one alpha, so histograms of
f say everything. For several experts (a layer, a model) the histograms are added first: one alpha
for all.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentRouting:
    """`srp` in [0, 1]; `kept` experts per token by the best estimator, in units of k."""

    srp: float
    kept: float


def window_histogram(experts: ArrayLike, *, num_experts: int, window: int) -> NDArray[np.int64]:
    """How many windows of one sequence have f = 0, 1, ..., m tokens that choose an expert.

    Args:
      experts: `[S, K]` choices of one sequence; ids outside `[0, num_experts)` are empty slots.
      num_experts: E.
      window: m, tokens of a window; windows begin at every token and do not cross sequences.

    Returns:
      `[E, m + 1]`; zeros where the sequence is shorter than a window. Add them over sequences.
    """
    experts = np.asarray(experts)
    if len(experts) < window:
        return np.zeros((num_experts, window + 1), np.int64)
    chosen = (experts >= 0) & (experts < num_experts)
    before = np.zeros((len(experts) + 1, num_experts), np.int64)  # choices before token s
    before[np.nonzero(chosen)[0] + 1, experts[chosen]] = 1
    before = before.cumsum(axis=0)
    within = before[window:] - before[:-window]  # [windows, E]
    cells = within + np.arange(num_experts) * (window + 1)  # one bincount for all experts
    counts = np.bincount(cells.reshape(-1), minlength=num_experts * (window + 1))
    return counts.reshape(num_experts, window + 1)


def segment_routing(histograms: ArrayLike) -> SegmentRouting:
    """The best estimator of a group of experts, from their `window_histogram`s `[..., m + 1]`.

    Both values are NaN where no expert was ever chosen.
    """
    counts = np.asarray(histograms, np.float64)
    counts = counts.reshape(-1, counts.shape[-1]).sum(axis=0)
    hits = counts * np.arange(len(counts))
    actual = hits.sum()
    if actual == 0:
        return SegmentRouting(srp=float("nan"), kept=float("nan"))
    true = hits[::-1].cumsum()[::-1]  # by alpha = 0, 1, ..., m
    predicted = counts[::-1].cumsum()[::-1] * (len(counts) - 1)
    f1 = 2 * true / (predicted + actual)
    best = int(f1.argmax())
    return SegmentRouting(srp=float(f1[best]), kept=float(predicted[best] / actual))

"""How differently two texts, or two parts of one, are routed: the Jensen-Shannon divergence."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moejax.analysis.entropy import entropy
from moejax.analysis.routing import relative_load


def jensen_shannon(a: ArrayLike, b: ArrayLike) -> NDArray | np.floating:
    """`H((p + q) / 2) - (H(p) + H(q)) / 2` in nats, of `p = a / sum(a)` and `q = b / sum(b)`.

    `[..., E], [..., E] -> [...]`; `a` and `b` are counts, loads or mean router probabilities. 0
    where both are the same, ln 2 where no expert serves both; symmetric. NaN where a side sums
    to nothing. Source: Lin, "Divergence measures based on the Shannon entropy", IEEE Transactions
    on Information Theory 37(1), 1991, equation 4.1 with equal weights.

    Of finite samples it is above 0 even where the distributions are the same: compare it with the
    divergence between two halves of one text.
    """
    p, q = distribution(a), distribution(b)
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0.0)


def distribution(values: ArrayLike) -> NDArray:
    """Rows divided by their sum, `[..., E]`; NaN where a row sums to nothing."""
    values = np.asarray(values, np.float64)
    return relative_load(values) / values.shape[-1]

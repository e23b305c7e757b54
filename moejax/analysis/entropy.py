"""Shannon entropy in nats, the one definition for loads, routers and divergences."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def entropy(p: ArrayLike) -> NDArray | np.floating:
    """`-sum_i p_i ln p_i` over the last axis, with `0 ln 0 = 0`. `[..., E] -> [...]`, nats.

    The rows of `p` are distributions; a row that holds NaN gives NaN. From 0 (one expert has it
    all) to `ln E` (uniform).
    """
    p = np.asarray(p, np.float64)
    return -np.where(p == 0, 0.0, p * np.log(np.where(p > 0, p, 1.0))).sum(-1)

"""How differently a sentence and its translation are routed, and which experts serve a domain.

"Multilingual Routing in Mixture-of-Experts", arXiv 2510.04694, equations 1, 2 and 6 to 8. A layer
with even routers has little room to differ, so the divergence is divided by that room.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moejax.analysis.divergence import distribution, jensen_shannon
from moejax.analysis.entropy import entropy


def divergence(q_a: ArrayLike, q_b: ArrayLike) -> NDArray | np.floating:
    """`D = JSD(q_a, q_b) / (ln E - (H(q_a) + H(q_b)) / 2)`, natural logarithms; in [0, 1].

    `[..., E], [..., E] -> [...]`. `q` is the mean over the tokens of one sentence of a layer's
    whole router distribution. Two uniform distributions leave no room and do not differ: 0. One
    half of the experts against the other is 1; two different experts are `ln 2 / ln E`.
    """
    p, q = distribution(q_a), distribution(q_b)
    difference = np.asarray(jensen_shannon(p, q))
    room = np.log(p.shape[-1]) - (entropy(p) + entropy(q)) / 2
    # Rounding leaves crumbs of both where p and q are uniform: their quotient would be anything.
    crumbs = 8 * np.finfo(np.float64).eps * np.log(p.shape[-1])
    out = np.divide(difference, room, out=np.zeros_like(difference), where=room > crumbs)
    return np.where(np.isnan(room), np.nan, np.minimum(out, 1.0))


def mean_divergence(q_a: ArrayLike, q_b: ArrayLike) -> NDArray:
    """Div of every layer: the mean of `divergence` over sentence pairs. `[N, L, E] x 2 -> [L]`.

    Pair n is sentence n of both sides. Raises ValueError where the sides have different shapes or
    there is no pair.
    """
    q_a, q_b = np.asarray(q_a), np.asarray(q_b)
    if q_a.shape != q_b.shape or not len(q_a):
        raise ValueError(f"sentence pairs need equal shapes, not {q_a.shape} and {q_b.shape}")
    return np.asarray(divergence(q_a, q_b)).mean(axis=0)


def specialised_experts(
    share: ArrayLike, reference: ArrayLike, tau: float = 0.3
) -> NDArray[np.bool_]:
    """Experts of a domain: `f_k(domain) - f_k(reference) > tau`. `[..., E] x 2 -> [..., E]`.

    `share` and `reference` are `expert_choices.activation_share`s. At tau of 0.3 and more the
    paper's task experts and multilingual experts do not overlap.
    """
    return np.asarray(share, np.float64) - np.asarray(reference, np.float64) > tau

"""What an outcome must be whatever computed it, so that a mistake of every layout is found too.

One device alone may be wrong in the same way as many. Here the entries of an outcome that follow
from its other entries, or from the batch, are worked out again in numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.types import Batch
from moejax.verification.outcome import LEARNING_RATE, Outcome


def by_definition(
    found: Outcome, choices: Any, batch: Batch, weights: Mapping[str, float]
) -> Outcome:
    """`found` with its norm, loss, update, target count and statistics as they are defined.

    Args:
      found, choices: from `outcome`.
      batch: what it was computed from.
      weights: {term: factor in the loss}.
    """
    gradients = {
        name.partition(" ")[2]: np.asarray(value, np.float64)
        for name, value in found.items()
        if name.startswith("gradient ")
    }
    defined = {
        "term lm/1": np.sum(batch.loss_mask),
        "global_norm of all gradients": np.sqrt(
            sum(np.square(g).sum() for g in gradients.values())
        ),
    }
    term = found | defined
    mean = lambda name: term[f"term {name}/0"] / max(term[f"term {name}/1"], 1)
    defined["loss"] = sum(weight * mean(name) for name, weight in weights.items())
    for name, gradient in gradients.items():
        defined[f"updated {name}"] = found[f"initial {name}"] - LEARNING_RATE * gradient
    defined |= _counts(found, choices, batch)
    return {name: np.asarray(defined.get(name, value)) for name, value in found.items()}


def _counts(found: Outcome, choices: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """Tokens and choices of each layer, counted from the choices of tokens that are no padding.

    An objective may pass every row of the batch several times, each beside itself.
    """
    segments = np.asarray(batch.segment_ids)
    counts = {}
    for layers, chosen in choices.items():  # [L, T, K]
        mask = np.repeat(segments > 0, chosen.shape[1] // segments.size, axis=0).reshape(-1)
        load = f"statistics {layers}/load"
        experts = np.arange(found[load].shape[-1])
        counts[load] = (chosen[:, mask, :, None] == experts).sum(axis=(1, 2))
        counts[f"statistics {layers}/tokens"] = np.full(len(chosen), mask.sum())
    return counts

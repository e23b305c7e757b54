"""Finds arrays of experts x tokens x width in a compiled step: every expert on every token.

Some compilers expand a grouped product that way without a word (`kernels/grouped_matmul/xla.py`).
"""

from __future__ import annotations

import math
import re

from moejax.experiment import Experiment
from moejax.models.transformer import Transformer
from moejax.planning.hlo import Module

_NAMED = re.compile(r'op_name="([^"]*)"')


def expansions(
    module: Module, experiment: Experiment, model: Transformer, num_owners: int, num_devices: int
) -> list[str]:
    """The feed-forward's instructions that hold such an array, `name dims`; empty is good.

    Args:
      module: the compiled step.
      experiment, model: of which it is.
      num_owners: over how many devices experts are split.
      num_devices: over how many devices tokens are split.
    """
    if model.moe is None:
        return []
    tokens = experiment.batch_size * experiment.sequence_length
    tokens //= experiment.num_microbatches * num_devices
    experts = model.moe.num_experts
    slots = getattr(model.moe.transport, "num_slots", 0)
    counts = {experts, experts // num_owners, experts // num_owners + slots} - {0, 1}
    widths = model.d_model, getattr(model.moe.experts, "d_ff", model.d_model)
    # A weight may have as many rows as there are tokens; both gated matrices may be one.
    weights = {tuple(sorted((n, widths[0], f * widths[1]))) for n in counts for f in (1, 2)}
    found = []
    for lines in module.computations.values():
        for line in lines:
            name = _NAMED.search(line.attributes)
            if name is None or "/ffn/" not in name[1]:
                continue
            for array in line.arrays:
                dims = tuple(n for n in array.dims if n > 1)
                if tuple(sorted(dims)) in weights:
                    continue
                if _is_expanded(dims, counts, tokens, min(widths)):
                    found.append(f"{line.name} {list(array.dims)}")
    return found


def _is_expanded(dims: tuple[int, ...], counts: set[int], tokens: int, width: int) -> bool:
    """Whether some axis is experts, another tokens, and the rest at least a width."""
    for i, count in enumerate(dims):
        others = dims[:i] + dims[i + 1 :]
        rows = [n for n in others if n >= tokens and n % tokens == 0]
        if count in counts and rows and math.prod(others) >= tokens * width:
            return True
    return False

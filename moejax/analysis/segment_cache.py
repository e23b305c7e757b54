"""How often an expert is already there if a cache of experts may look a segment ahead (SCH).

"Not All Models Suit Expert Offloading", arXiv 2505.16056: segment cache best hit rate. One cache of
C experts per layer. A choice of a token is a hit if its expert was in the cache before the token.
Then the token's experts are loaded one after another; where there is no room, the cached expert
goes that is wanted least often in the look-ahead (the token's experts that are still to be
loaded, and the next m - 1 tokens), of equals the one used longest ago. First loads are free while
fewer than C experts have been seen.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import ArrayLike


def segment_cache_hit_rate(
    experts: ArrayLike, *, num_experts: int, capacity: int, window: int
) -> float:
    """Hits over choices of one layer and one sequence, in [0, 1].

    Args:
      experts: `[S, K]` choices in order; ids outside `[0, num_experts)` are empty slots.
      num_experts: E.
      capacity: C, experts that the cache holds; at least 1.
      window: m, tokens of the look-ahead, the current one among them; at least 1.

    Raises ValueError where capacity or window is below 1, or nothing was chosen.
    """
    if capacity < 1 or window < 1:
        raise ValueError(f"capacity={capacity} and window={window} must be at least 1")
    tokens = [[e for e in row if 0 <= e < num_experts] for row in np.asarray(experts).tolist()]
    num_choices = sum(map(len, tokens))
    if not num_choices:
        raise ValueError("no expert was chosen")
    wanted = [0] * num_experts  # in the look-ahead; a list, which is quicker than an array here
    for expert in itertools.chain.from_iterable(tokens[: window - 1]):
        wanted[expert] += 1
    used: dict[int, int] = {}  # cached expert: when it was last used
    seen: set[int] = set()
    hits = clock = 0
    for step, token in enumerate(tokens):
        if step + window - 1 < len(tokens):
            for expert in tokens[step + window - 1]:
                wanted[expert] += 1
        cached = set(used)
        for expert in token:
            is_free = expert not in seen and len(seen) < capacity
            hits += expert in cached or is_free
            seen.add(expert)
            wanted[expert] -= 1
            if expert not in used and len(used) == capacity:
                del used[min(used, key=lambda e: (wanted[e], used[e]))]
            clock += 1
            used[expert] = clock
    return hits / num_choices

"""Block attention on queries packed by block: work that grows with the choices, not with M.

In plain JAX; what packing is stands in `packed_passes.py`.
"""

from __future__ import annotations

import functools
from typing import Any

from moejax.kernels.block_attention import packed_passes, routed_tiles


def obstacle(dtype: Any, block_size: int) -> str | None:
    """None: serves every dtype and block size on every platform."""


plan = packed_passes.plan
forward = functools.partial(packed_passes.forward, routed_tiles.forward)
backward = functools.partial(packed_passes.backward, routed_tiles.backward)

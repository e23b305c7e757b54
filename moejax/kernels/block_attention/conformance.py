"""What every implementation must get right in block attention: the value and all gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.kernels.block_attention import moba_attention

# Of the largest entry of the array in question.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2e-2, "float64": 1e-12}
_NAMES = ("out", "dq", "dk", "dv")


class Case(NamedTuple):
    """One call: `queries` of the keys from `offset` on, or all from there."""

    name: str
    keys: int
    block_size: int
    top_k: int
    segments: tuple[tuple[int, ...], ...] = ()  # lengths by row; what they leave is padding
    num_heads: int = 2
    kv_heads: int = 2
    width: int = 16
    value_width: int = 16
    heads: str = "query"
    offset: int = 0
    queries: int | None = None
    sink: bool = False  # every query prefers the first block of its segment

    def options(self) -> dict[str, Any]:
        """What `moba_attention` takes beside arrays; the segments of every row."""
        options = {"block_size": self.block_size, "top_k": self.top_k, "heads": self.heads}
        if self.segments:
            rows = [np.repeat(np.arange(len(s)) + 1, s) for s in self.segments]
            padded = [np.pad(row, (0, self.keys - len(row))) for row in rows]
            options["segment_ids"] = np.asarray(padded, np.int32)
        return options | {"q_offset": self.offset}


CASES = (
    Case("whole blocks", 96, 16, 3),
    Case("ragged tail, narrow values", 100, 16, 3, value_width=8),
    Case("own block alone", 100, 16, 1),
    Case("two blocks", 96, 8, 2, num_heads=1, kv_heads=1),
    Case("fewer keys than a block", 24, 32, 3),
    Case("one token to a block", 24, 1, 4),
    Case("every block", 100, 16, 7),
    Case("more blocks than there are", 100, 16, 40, segments=((100,),)),
    Case("grouped queries", 100, 16, 3, num_heads=6),
    Case("chosen by the group", 100, 16, 3, num_heads=6, heads="group", width=24),
    Case("segments", 120, 8, 3, segments=((120,), (40, 1, 33, 8, 30), (1, 7, 9, 16, 17, 25))),
    Case("segments by the group", 96, 8, 3, ((50, 46), (96,)), num_heads=4, heads="group"),
    Case("nothing but padding", 64, 8, 3, segments=((), (60,))),
    Case("segments shorter than a block", 96, 32, 3, segments=((20, 30, 31, 5),)),
    Case("everyone chooses one block", 160, 8, 2, sink=True),
    Case("long enough for tall tiles", 640, 16, 4, num_heads=1, kv_heads=1, width=8, value_width=8),
    Case("queries cut inside a block", 96, 16, 3, offset=40, queries=40),
    Case("queries cut at a block", 96, 16, 3, offset=32, queries=64),
    Case("one query", 96, 16, 3, ((30, 50),), offset=70, queries=1),
    Case("queries of segments", 96, 8, 3, ((30, 50), (90,)), offset=24, queries=60),
    Case("a block taller than a tile", 700, 300, 2, num_heads=1, kv_heads=1, width=8),
    Case("a block of two tiles", 1100, 512, 2, num_heads=1, kv_heads=1, width=8),
    Case("such a block in segments", 700, 300, 2, ((90, 610),), num_heads=1, kv_heads=1, width=8),
)


def failures(implementation: str | None, case: Case, *, dtype: str = "float32") -> list[str]:
    """What `moba_attention` gets wrong with that implementation; empty if nothing.

    Padding holds NaN, in the cotangent too.
    """
    arrays = _arrays(case, dtype)
    real = case.options().get("segment_ids")
    if real is not None:
        at_query = slice(case.offset, case.offset + arrays[0].shape[1])
        masks = real[:, at_query], real, real, real[:, at_query]
        poison = lambda x, real: jnp.where(real[:, :, None, None] != 0, x, jnp.nan)
        arrays = tuple(poison(x, m) for x, m in zip(arrays, masks, strict=True))
    with jax.default_matmul_precision("highest"):
        got = jax.jit(functools.partial(_run, implementation, case))(*arrays)
    found = []
    for name, a, b in zip(_NAMES, got, _wanted(case, dtype), strict=True):
        a = np.asarray(a, np.float64)
        error = np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)
        if not error <= TOLERANCE[dtype]:
            found.append(f"moba_attention ({case.name}): {name} is off by {error:.2g}")
    return found


@functools.lru_cache(maxsize=64)
def _wanted(case: Case, dtype: str) -> list[np.ndarray]:
    q, k, v, d_out = _arrays(case, dtype)
    if dtype == "bfloat16":  # the keys' dtype decides how their mean is rounded
        q, v, d_out = (x.astype(jnp.float32) for x in (q, v, d_out))
    real = case.options().get("segment_ids")
    if real is not None:
        at_query = real[:, case.offset : case.offset + q.shape[1]]
        d_out = jnp.where(at_query[:, :, None, None] != 0, d_out, 0)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(functools.partial(_run, "reference", case))(q, k, v, d_out)
    return [np.asarray(x, np.float64) for x in found]


def _run(implementation: str | None, case: Case, q, k, v, d_out):
    attend = functools.partial(moba_attention, **case.options(), implementation=implementation)
    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(d_out.astype(out.dtype))


def _arrays(case: Case, dtype: str) -> tuple[jax.Array, ...]:
    """(q, k, v, cotangent)."""
    rng = np.random.default_rng(0)
    num_rows, queries = len(case.segments) or 1, case.queries or case.keys - case.offset
    draw = lambda *shape: rng.standard_normal((num_rows, *shape))
    q = draw(queries, case.num_heads, case.width)
    k = draw(case.keys, case.kv_heads, case.width)
    v = draw(case.keys, case.kv_heads, case.value_width)
    d_out = draw(queries, case.num_heads, case.value_width)
    if case.sink:
        q[..., 0], k[:, : case.block_size, :, 0] = 3, 3
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v, d_out))

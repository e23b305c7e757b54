"""Does an implementation of full attention agree with its definition here, gradients included?

An error is relative to the largest entry of what it is an error of. Queries, keys, values and
cotangents of padding are NaN, and so are keys and values that no query looks at.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.kernels.full_attention import full_attention, obstacle
from moejax.kernels.full_attention.call import Call

# About 2.5 times what was found of `scan` on CPU. With 16 bits, weights and what is found for the
# gradient of logits are rounded.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 1.7e-2, "float16": 2.2e-3}
NAMES = ("result", "gradient of q", "gradient of k", "gradient of v", "gradient of sinks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call, by sizes and options.

    `segments` are the lengths of the first row's documents; what they leave is padding. The second
    row has the last of these first.
    """

    name: str
    queries: int = 256
    keys: int = 256
    heads: int = 4
    kv_heads: int = 2
    width: int = 64
    value_width: int = 64
    segments: tuple[int, ...] | None = None
    window: int | None = None
    sinks: bool = False
    soft_cap: float | None = None
    scale: float | None = None
    offset: int = 0
    traced: bool = False  # the offset is known only when the program runs


CASES = (
    Case(name="one segment"),
    Case(name="one segment, window", window=70),
    Case(name="one key head", kv_heads=1, width=128, value_width=128),
    Case(name="packed, padding", segments=(100, 1, 130), width=32, value_width=32),
    Case(name="window of two", window=2, segments=(100, 156)),
    Case(name="sinks", sinks=True, segments=(200, 50)),
    Case(name="soft cap", soft_cap=2.0, scale=0.5, segments=(255,)),
    Case(
        name="everything, wide keys",
        sinks=True,
        soft_cap=3.0,
        window=33,
        segments=(90, 70, 90),
        width=192,
        value_width=128,
    ),
    Case(name="last queries", queries=128, keys=384, offset=256, segments=(150, 200)),
    Case(name="middle queries, window", queries=128, keys=384, offset=128, window=40),
    Case(name="long row", queries=640, keys=640, segments=(300, 200, 100), sinks=True),
    Case(name="long row, window", queries=1024, keys=1024, window=300, heads=2, kv_heads=2),
    Case(name="no even length", queries=77, keys=77, segments=(40, 30), width=24, value_width=8),
    Case(name="no even length, long", queries=555, keys=601, offset=46, window=129, sinks=True),
    Case(
        name="traced offset",
        queries=64,
        keys=256,
        offset=130,
        traced=True,
        segments=(140, 100),
        window=90,
        sinks=True,
        soft_cap=5.0,
    ),
    Case(name="one query", queries=1, keys=200, offset=199),
)


def failures(implementation: str, cases: tuple[Case, ...], dtype: str) -> Iterator[str]:
    """What differs from the definition on the device at hand, in words; nothing if all agree.

    Raises UserError for a case that the implementation cannot serve (see `serves`).
    """
    for case in cases:
        given = _operands(case, dtype)
        with jax.default_matmul_precision("highest"):  # float32 is float32 on every device
            got = _compiled(implementation, case)(*given)
        # Its own rounding in float32 is no smaller than that of what it is to judge.
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            want = _compiled("reference", case)(*(np.asarray(x, np.float64) for x in given))
        for name, a, b in zip(NAMES, got, want, strict=False):
            if a.dtype != jnp.dtype(dtype):
                yield f"{case.name}: {name} is of {a.dtype} instead of {dtype}"
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
            if not error <= TOLERANCE[dtype]:  # also where it is NaN
                yield f"{case.name}: {name} is wrong by {error:.2g} of its largest entry"


def serves(implementation: str, case: Case, dtype: str) -> bool:
    """Whether the implementation can serve the case here."""
    q, k, v, *_ = _operands(case, dtype)
    options = _options(case)
    if case.traced:
        options["q_offset"] = jnp.int32(case.offset)
    sinks = options.pop("with_sinks") or None
    call = Call(sinks=sinks, scale=options.pop("scale") or 1.0, **options)
    return obstacle(implementation, q, k, v, call) is None


def _options(case: Case) -> dict:
    segments = None if case.segments is None else jnp.asarray(_segment_ids(case))
    return {
        "segment_ids": segments,
        "window": case.window,
        "soft_cap": case.soft_cap,
        "scale": case.scale,
        "q_offset": case.offset,
        "with_sinks": case.sinks,
    }


@functools.cache
def _compiled(implementation: str, case: Case):
    """(q, k, v, sinks, cotangent, offset) -> the result and all gradients."""
    options = _options(case)
    with_sinks = options.pop("with_sinks")

    @jax.jit
    def run(q, k, v, sinks, cotangent, offset):
        here = options | {"q_offset": offset} if case.traced else options

        def attend(q, k, v, *sinks):
            named = {"sinks": sinks[0]} if with_sinks else {}
            return full_attention(q, k, v, implementation=implementation, **named, **here)

        y, pull = jax.vjp(attend, q, k, v, *((sinks,) if with_sinks else ()))
        return y, *pull(cotangent)

    return lambda *arrays: run(*arrays, jnp.int32(case.offset))


def _segment_ids(case: Case) -> np.ndarray:
    rows = []
    for lengths in (case.segments, case.segments[-1:] + case.segments[:-1]):
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        rows.append(np.pad(ids, (0, case.keys - len(ids))))
    return np.stack(rows).astype(np.int32)


@functools.cache
def _operands(case: Case, dtype: str) -> tuple[Array, ...]:
    """(q, k, v, sinks, cotangent) of two rows, NaN where nobody looks."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape)
    q = draw(2, case.queries, case.heads, case.width)
    k = draw(2, case.keys, case.kv_heads, case.width)
    v = draw(2, case.keys, case.kv_heads, case.value_width)
    sinks, cotangent = draw(case.heads), draw(2, case.queries, case.heads, case.value_width)
    ids = np.ones((2, case.keys), int) if case.segments is None else _segment_ids(case)
    own = ids[:, case.offset : case.offset + case.queries] != 0
    position = np.arange(case.keys)
    seen = (ids != 0) & (position < case.offset + case.queries)
    if case.window is not None:
        seen &= position > case.offset - case.window
    poison = lambda x, used: np.where(used[..., None, None], x, np.nan)
    arrays = poison(q, own), poison(k, seen), poison(v, seen), sinks, poison(cotangent, own)
    return tuple(jnp.asarray(x, dtype) for x in arrays)

"""The definition of block attention is MoBA's: numpy, one query after another, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.block_attention import moba_attention

SEGMENTS = np.repeat([1, 2, 5, 0], [37, 3, 50, 6])[None]


def by_hand(q, k, v, segment_ids, *, block_size, top_k, q_offset=0, heads="query"):
    """One query and head at a time, from the paper's equations; `[S, H, dv]` of one row."""
    num_heads, share = q.shape[1], q.shape[1] // k.shape[1]
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for i in range(q.shape[0]):
        t = q_offset + i
        if segment_ids[t] == 0:
            continue
        tokens = np.flatnonzero(segment_ids == segment_ids[t])
        blocks = [tokens[j : j + block_size] for j in range(0, len(tokens), block_size)]
        own = next(n for n, block in enumerate(blocks) if t in block)
        for h in range(num_heads):
            key_head = h // share
            asking = range(key_head * share, (key_head + 1) * share) if heads == "group" else [h]
            score = [
                sum(q[i, a] @ k[block, key_head].mean(0) for a in asking) for block in blocks[:own]
            ]
            best = sorted(range(own), key=lambda n: (-score[n], n))[: top_k - 1]
            seen = [m for n in best for m in blocks[n]] + [m for m in blocks[own] if m <= t]
            logits = k[seen, key_head] @ q[i, h] / np.sqrt(q.shape[2])
            weight = np.exp(logits - logits.max())
            out[i, h] = weight / weight.sum() @ v[seen, key_head]
    return out


def draw(seed, queries, keys=None, heads=4, kv_heads=2):
    rng = np.random.default_rng(seed)
    keys = keys or queries
    shapes = (queries, heads, 8), (keys, kv_heads, 8), (keys, kv_heads, 12), (queries, heads, 12)
    return [rng.standard_normal(shape) for shape in shapes]


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 8, "top_k": 3},
        {"block_size": 16, "top_k": 2, "heads": "group"},
        {"block_size": 5, "top_k": 1},
        {"block_size": 8, "top_k": 20},
        {"block_size": 8, "top_k": 3, "q_offset": 21},
    ],
    ids=str,
)
def test_the_definition_equals_loops_over_queries(options):
    offset = options.get("q_offset", 0)
    q, k, v, direction = draw(0, 96 - offset, 96)
    want = by_hand(q, k, v, SEGMENTS[0], **options)
    with jax.enable_x64(True):
        attend = functools.partial(
            moba_attention, segment_ids=SEGMENTS, implementation="reference", **options
        )
        arrays = [jnp.asarray(x[None]) for x in (q, k, v)]
        got, vjp = jax.vjp(attend, *arrays)
        slope = [np.asarray(g[0]) for g in vjp(jnp.asarray(direction[None]))]
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-12)
    # The slope along a random direction, of the loops: choices do not change over so short a way.
    steps = [x * 1e-6 for x in draw(1, 96 - offset, 96)[:3]]
    ends = [
        by_hand(
            *(x + sign * s for x, s in zip((q, k, v), steps, strict=True)), SEGMENTS[0], **options
        )
        for sign in (1, -1)
    ]
    want_slope = ((ends[0] - ends[1]) * direction).sum() / 2
    got_slope = sum((g * s).sum() for g, s in zip(slope, steps, strict=True))
    np.testing.assert_allclose(got_slope, want_slope, rtol=1e-6)


def test_the_mean_key_is_rounded_to_the_dtype_of_the_keys():
    """The mean of block 1 is greater by less than a rounding to bfloat16: a tie, so block 0."""
    k = np.ones((1, 7, 1, 1), np.float32)
    k[0, 3, 0, 0] = 1.0078125  # 1 + 2^-7: a mean of 1.0039, which rounds to 1
    v = np.arange(7, dtype=np.float32).reshape(1, 7, 1, 1)
    q = np.full((1, 7, 1, 1), 1e-3, np.float32)
    options = {"block_size": 2, "top_k": 2, "implementation": "reference"}
    for dtype, want in (("bfloat16", (0 + 1 + 6) / 3), ("float32", (2 + 3 + 6) / 3)):
        out = moba_attention(*(jnp.asarray(x, dtype) for x in (q, k, v)), **options)
        np.testing.assert_allclose(out[0, 6, 0, 0].astype(np.float32), want, rtol=1e-2)


@pytest.mark.parametrize("implementation", ["scan", "packed", "reference"])
def test_a_packed_segment_is_what_it_is_alone(implementation):
    arrays = [jnp.asarray(x[None], jnp.float32) for x in draw(2, 96)[:3]]
    attend = functools.partial(moba_attention, block_size=8, top_k=3, implementation=implementation)
    packed = attend(*arrays, segment_ids=SEGMENTS)
    for start, stop in ((0, 37), (37, 40), (40, 90)):
        alone = attend(*(x[:, start:stop] for x in arrays))
        np.testing.assert_allclose(packed[:, start:stop], alone, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(packed[:, 90:], 0)


@pytest.mark.parametrize("implementation", ["scan", "packed", "reference"])
def test_nan_in_padding_reaches_nothing(implementation):
    """In queries, keys, values and the cotangent."""
    arrays = [jnp.asarray(x[None], jnp.float32) for x in draw(3, 96)]
    attend = functools.partial(
        moba_attention,
        block_size=8,
        top_k=3,
        segment_ids=SEGMENTS,
        implementation=implementation,
    )
    found = []
    for padding in (0.0, jnp.nan):
        *operands, direction = (
            jnp.where((SEGMENTS == 0)[..., None, None], padding, x) for x in arrays
        )
        out, vjp = jax.vjp(attend, *operands)
        found.append((out, *vjp(direction)))
    for clean, poisoned in zip(*found, strict=True):
        np.testing.assert_array_equal(clean, poisoned)
        assert np.isfinite(clean).all()

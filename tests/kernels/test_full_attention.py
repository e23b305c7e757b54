"""Full attention: the definition against a loop in numpy, the others against the definition."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.kernels import compat
from moejax.kernels.full_attention import IMPLEMENTATIONS, conformance, full_attention, scan
from moejax.verification.contracts.cases import quick_jit

QUICK = ("packed, padding", "everything, wide keys", "traced offset", "no even length, long")
CASES = {case.name: case for case in conformance.CASES}
SLOW = sorted(set(CASES) - set(QUICK))
BATCH, QUERIES, KEYS, HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 2, 5, 7, 4, 2, 3, 2
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 2, 2, 2, 0]])


def loop(q, k, v, *, segment_ids, window, sinks, soft_cap, scale, q_offset):
    """One query, one head, one key at a time."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, i, h in np.ndindex(*q.shape[:3]):
        position, total = q_offset + i, 0.0 if sinks is None else np.exp(sinks[h])
        if segment_ids is not None and segment_ids[b, position] == 0:
            continue
        for j in range(position + 1):
            if window is not None and j <= position - window:
                continue
            if segment_ids is not None and segment_ids[b, j] != segment_ids[b, position]:
                continue
            logit = scale * sum(q[b, i, h] * k[b, j, h // (HEADS // KV_HEADS)])
            if soft_cap is not None:
                logit = soft_cap * np.tanh(logit / soft_cap)
            total += np.exp(logit)
            out[b, i, h] += np.exp(logit) * v[b, j, h // (HEADS // KV_HEADS)]
        out[b, i, h] /= total
    return out


def drawn():
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((BATCH, QUERIES, HEADS, WIDTH)),
        rng.standard_normal((BATCH, KEYS, KV_HEADS, WIDTH)),
        rng.standard_normal((BATCH, KEYS, KV_HEADS, VALUE_WIDTH)),
        rng.standard_normal(HEADS),
    )


@pytest.mark.parametrize("implementation", ["reference", "scan"])
@pytest.mark.parametrize("window, soft_cap", [*itertools.product([None, 1, 3], [None, 0.7])])
def test_values_are_the_loops(implementation, window, soft_cap):
    q, k, v, sinks = drawn()
    for packed, with_sinks, offset in itertools.product([False, True], [False, True], [0, 2]):
        options = {
            "segment_ids": SEGMENTS if packed else None,
            "window": window,
            "sinks": sinks if with_sinks else None,
            "soft_cap": soft_cap,
            "scale": 0.8,
            "q_offset": offset,
        }
        with jax.enable_x64(True):
            given = options | {"sinks": None if not with_sinks else jnp.asarray(sinks)}
            attend = functools.partial(full_attention, implementation=implementation, **given)
            out = quick_jit(attend)(q, k, v)
        np.testing.assert_allclose(out, loop(q, k, v, **options), rtol=1e-12, atol=1e-13)


def test_gradients_of_the_definition_are_differences():
    """Of the loop, along a random direction for each operand."""
    operands, rng = drawn(), np.random.default_rng(1)
    options = {"segment_ids": SEGMENTS, "window": 3, "soft_cap": 0.7, "scale": 0.8, "q_offset": 2}
    with jax.enable_x64(True):
        attend = lambda q, k, v, s: full_attention(
            q, k, v, sinks=s, implementation="reference", **options
        )
        y, pull = jax.vjp(attend, *map(jnp.asarray, operands))
        cotangent = rng.standard_normal(y.shape)
        gradients = [np.asarray(x) for x in pull(jnp.asarray(cotangent))]
    for at, gradient in enumerate(gradients):
        direction = rng.standard_normal(operands[at].shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [x + step * direction if i == at else x for i, x in enumerate(operands)]
            ends.append((cotangent * loop(*moved[:3], sinks=moved[3], **options)).sum())
        expected = (ends[0] - ends[1]) / 2e-5
        assert abs(expected) > 1e-2
        np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=1e-7)


def passes(implementation, name, dtype):
    assert not list(conformance.failures(implementation, (CASES[name],), dtype))


@pytest.mark.parametrize("name", QUICK)
def test_scan_equals_the_definition(name):
    passes("scan", name, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_scan_equals_the_definition_everywhere(name, dtype):
    passes("scan", name, dtype)


@pytest.mark.parametrize("name", ["everything, wide keys", "long row"])
def test_scan_equals_the_definition_in_float64(name):
    with jax.enable_x64(True):
        passes("scan", name, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_definition_in_float32_is_as_near(name):
    passes("reference", name, "float32")


def served_by_splash():
    with compat.interpret_tpu():
        return [n for n, case in CASES.items() if conformance.serves("splash", case, "float32")]


def test_splash_equals_the_definition():
    with compat.interpret_tpu():
        passes("splash", "everything, wide keys", "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_splash_equals_the_definition_everywhere(dtype):
    names = served_by_splash()
    assert len(names) == len(CASES) - 4  # odd lengths, a traced offset, one query
    with compat.interpret_tpu():
        for name in names:
            passes("splash", name, dtype)


@pytest.mark.parametrize(
    "planted, name",
    [
        (lambda q, k, window: q[:, None] > k[None, :], "packed, padding"),
        (lambda q, k, window: q[:, None] >= k[None, :], "everything, wide keys"),
    ],
    ids=["the own key is not seen", "the window is ignored"],
)
def test_the_kit_notices_a_wrong_mask(monkeypatch, planted, name):
    conformance._compiled.cache_clear()
    monkeypatch.setattr(scan, "in_reach", planted)
    found = list(conformance.failures("scan", (CASES[name],), "float32"))
    conformance._compiled.cache_clear()
    assert any("result is wrong by" in text for text in found)
    assert any("gradient of k is wrong by" in text for text in found)


@pytest.mark.parametrize("implementation", ["scan", "reference"])
@pytest.mark.parametrize("sizes", [(40, 10), (600, 200)])
def test_chunks_of_queries_equal_the_whole(implementation, sizes):
    length, chunk = sizes
    rng = np.random.default_rng(2)
    draw = lambda heads: jnp.asarray(rng.standard_normal((1, length, heads, 4)), jnp.float32)
    q, k, v = draw(2), draw(1), draw(1)
    ids = jnp.asarray(np.sort(rng.integers(1, 4, (1, length)), axis=1))
    options = {"segment_ids": ids, "window": length // 3, "implementation": implementation}
    whole = full_attention(q, k, v, **options)
    run = jax.jit(lambda q, offset: full_attention(q, k, v, q_offset=offset, **options))
    parts = [run(q[:, i : i + chunk], i) for i in range(0, length, chunk)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [100, 600])
def test_huge_logits_neither_overflow_nor_lose_their_sum(length):
    """Equal keys: every query averages. Kept as one logarithm, the sum would vanish in rounding."""
    rng = np.random.default_rng(3)
    shape = (1, length, 1, 4)
    q, k = jnp.full(shape, 1e4, jnp.float32), jnp.full(shape, 1e4, jnp.float32)
    v, cotangent = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    y, pull = jax.vjp(functools.partial(full_attention, q, k, implementation="scan"), v)
    seen = np.arange(1, length + 1)[:, None, None]
    np.testing.assert_allclose(y, np.cumsum(v, axis=1) / seen, rtol=1e-5, atol=1e-5)
    expected = np.cumsum((cotangent / seen)[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(pull(cotangent)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0 must be positive"),
        ({"soft_cap": np.inf}, "soft_cap=inf must be positive and finite"),
        ({"implementation": "flash"}, "no implementation 'flash'; use one of"),
        ({"implementation": "splash"}, "'splash' cannot serve this call: it runs on TPU"),
        ({"implementation": "cudnn"}, "'cudnn' cannot serve this call: it runs on NVIDIA GPUs"),
    ],
)
def test_what_cannot_be_is_one_clear_sentence(changes, message):
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(UserError, match=message):
        full_attention(x, x, x, **changes)


def test_shapes_that_do_not_fit_are_refused():
    x, longer = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 6, 2, 8))
    with pytest.raises(ValueError, match="4 queries from position 3 on do not fit into 6 keys"):
        full_attention(x, longer, longer, q_offset=3)
    with pytest.raises(ValueError, match="3 heads of keys do not divide 2 heads of queries"):
        full_attention(x, jnp.ones((1, 4, 3, 8)), jnp.ones((1, 4, 3, 8)))


@pytest.mark.parametrize("implementation", ["scan", "reference"])
@pytest.mark.parametrize("number", [int, np.int64, np.array, jnp.int32], ids=str)
def test_a_known_offset_is_checked_whatever_its_type(implementation, number):
    q, k = jnp.ones((1, 8, 2, 4)), jnp.ones((1, 64, 2, 4))
    attend = functools.partial(full_attention, q, k, k, implementation=implementation)
    for outside in (60, -3):
        with pytest.raises(ValueError, match=f"8 queries from position {outside} on do not fit"):
            attend(q_offset=number(outside))
    np.testing.assert_array_equal(attend(q_offset=number(56)), attend(q_offset=56))


@pytest.mark.parametrize("implementation", ["scan", "reference"])
@pytest.mark.parametrize("ids", [None, np.repeat([[1, 0]], [10, 6], axis=1)], ids=["", "padding"])
def test_a_traced_offset_that_does_not_fit_gives_nan(implementation, ids):
    q, k = jnp.ones((1, 8, 2, 4)), jnp.ones((1, 16, 2, 4))
    options = {"segment_ids": ids, "implementation": implementation}
    run = jax.jit(lambda offset: full_attention(q, k, k, q_offset=offset, **options))
    for offset in (-1, 9, 100):
        assert np.isnan(run(offset)).all()
    for offset in (0, 8):
        np.testing.assert_allclose(run(offset)[0, : 10 - offset], 1, rtol=1e-6)
        assert np.isfinite(run(offset)).all()


@pytest.mark.parametrize("shape", [(2,), (1,), (), (4, 1)], ids=str)
def test_sinks_are_one_for_each_head_of_queries(shape, unchecked):
    q, k = jnp.ones((1, 8, 4, 8)), jnp.ones((1, 8, 2, 8))
    with pytest.raises(ValueError, match="sinks of shape .* one for each of 4 heads of queries"):
        full_attention(q, k, k, sinks=jnp.zeros(shape))


def test_every_implementation_says_that_it_was_not_run_on_hardware_or_is_plain_jax():
    """Until somebody runs them; then this test is to be changed with their docstrings."""
    for name in set(IMPLEMENTATIONS) - {"scan", "reference"}:
        text = importlib.import_module(f"moejax.kernels.full_attention.{name}").__doc__
        assert "not run on hardware" in text

"""Causal softmax attention against a loop in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention.full import FullAttention
from moejax.errors import UserError
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import LongRopeScaling, Rope
from moejax.verification.contracts.cases import make_context, quick_jit, random_variables

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 7, 4, 2, 3


def apply(attention, x, **context):
    context = make_context(np.ones(x.shape[:2], bool), **context)
    variables = random_variables(attention, x, context.replace(decode=False))
    run = lambda v, x, c: attention.apply(v, x, c, mutable=["cache"])[0]
    return variables["params"], np.asarray(quick_jit(run)(variables, x, context))


def test_layer_equals_its_parts():
    """Projections, norm over all heads, RoPE, one query and head at a time, output projection."""
    x = np.random.default_rng(1).standard_normal((BATCH, LENGTH, 8)).astype(np.float32)
    attention = FullAttention(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=4,
        rope=Rope(fraction=0.5),
        qk_norm=RMSNorm(num_axes=2),
        use_bias=True,
        use_output_bias=True,
    )
    params, y = apply(attention, x)
    p = {name: {k: np.asarray(v) for k, v in leaf.items()} for name, leaf in params.items()}
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))

    def project(name, heads):
        z = x @ p[name]["kernel"] + p[name]["bias"]
        if name != "value":
            z = z / np.sqrt(np.square(z).mean(-1, keepdims=True) + 1e-6)
            z = z * p[f"{name}_norm"]["scale"]
        z = z.reshape(BATCH, LENGTH, heads, 4)
        return z if name == "value" else np.asarray(Rope(fraction=0.5)(jnp.asarray(z), positions))

    q, k, v = project("query", HEADS), project("key", KV_HEADS), project("value", KV_HEADS)
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(BATCH, LENGTH, HEADS):
        weights = np.exp(k[b, : i + 1, h // 2] @ q[b, i, h] / 2)
        out[b, i, h] = weights / weights.sum() @ v[b, : i + 1, h // 2]
    expected = out.reshape(BATCH, LENGTH, -1) @ p["output"]["kernel"] + p["output"]["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_a_position_without_a_cache_slot_gives_nan():
    x = np.ones((1, 2, 8), np.float32)
    attention = FullAttention(num_heads=2, num_kv_heads=1)
    _, y = apply(attention, x, decode=True, cache_length=4, positions=jnp.array([[3, 4]]))
    assert np.isfinite(y[0, 0]).all()
    assert np.isnan(y[0, 1]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 must divide attention.num_heads=4"),
        ({"num_heads": 4, "num_kv_heads": 0}, "num_kv_heads=0 must divide"),
        ({"num_heads": 3, "num_kv_heads": 1}, "num_heads=3 does not divide model.d_model=8"),
        ({"num_heads": 2, "num_kv_heads": 2, "soft_cap": 0.0}, "soft_cap=0.0 must be positive"),
        ({"num_heads": 2, "num_kv_heads": 2, "implementation": "cudnn"}, "runs on NVIDIA GPUs"),
    ],
)
def test_bad_options_are_one_clear_sentence(options, message):
    with pytest.raises(UserError, match=message):
        apply(FullAttention(**options), np.ones((1, 2, 8), np.float32))


def test_a_cache_too_short_says_so():
    x = np.ones((1, 5, 8), np.float32)
    with pytest.raises(UserError, match="5 positions do not fit into a cache of 4 slots"):
        apply(FullAttention(num_heads=2, num_kv_heads=1), x, decode=True, cache_length=4)


def test_decoding_caps_the_logits_as_training_does():
    x = 3 * np.random.default_rng(3).standard_normal((1, LENGTH, 8)).astype(np.float32)
    plain = FullAttention(num_heads=2, num_kv_heads=1, head_dim=4, use_sinks=True)
    capped = plain.copy(soft_cap=0.5)
    params, whole = apply(capped, x)
    uncapped = apply(plain, x)[1]
    context = make_context(np.ones((1, LENGTH), bool), decode=True, cache_length=LENGTH)
    run = quick_jit(lambda v, x, c: capped.apply(v, x, c, mutable=["cache"])[0])
    np.testing.assert_allclose(run({"params": params}, x, context), whole, rtol=1e-4, atol=1e-5)
    assert np.abs(whole - uncapped).max() > 0.01


@pytest.mark.parametrize("original_context", [LENGTH - 1, LENGTH])
def test_decoding_rotates_by_the_factors_of_its_cache(original_context):
    """A position at a time, in a cache as long as the row: as the row at once, long or short."""
    scaling = LongRopeScaling(
        short_factors=(1.0, 2.0),
        long_factors=(4.0, 8.0),
        short_amplitude=1.0,
        long_amplitude=1.5,
        original_context=original_context,
    )
    attention = FullAttention(num_heads=2, num_kv_heads=1, head_dim=4, rope=Rope(scaling=scaling))
    x = np.random.default_rng(2).standard_normal((1, LENGTH, 8)).astype(np.float32)
    params, whole = apply(attention, x)
    variables = {"params": params}
    run = quick_jit(lambda v, x, c: attention.apply(v, x, c, mutable=["cache"]))
    for position in range(LENGTH):
        context = make_context(np.ones((1, 1), bool), decode=True, cache_length=LENGTH)
        context = context.replace(positions=jnp.full((1, 1), position))
        out, updated = run(variables, x[:, position : position + 1], context)
        variables = {"params": params, **updated}
        np.testing.assert_allclose(out[:, 0], whole[:, position], rtol=1e-4, atol=1e-5)

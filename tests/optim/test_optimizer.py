"""AdamW against its equations, the decay mask by name, clipping, and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.errors import UserError
from moejax.optim.guard import Guard, select
from moejax.optim.optimizer import AdamW, decay_mask, global_norm
from moejax.optim.schedule import WarmupCosine
from moejax.types import named_leaves

SCHEDULE = WarmupCosine(peak=1e-2, warmup_steps=3)


def make_params(dtype=jnp.float32):
    """Stacked layers: everything in `blocks` has a leading layer axis of 3."""
    shapes = {
        "embed": {"embedding": (11, 4)},
        "blocks": {
            "attention_norm": {"scale": (3, 4)},
            "attention": {
                "kernel": (3, 4, 4),
                "bias": (3, 4),
                "q_norm": {"scale": (3, 2)},
                "sinks": (3, 2),
            },
            "experts": {"w_up": (3, 2, 4, 5)},
        },
        "unembed": {"kernel": (4, 11)},
        "gain": (4,),
    }
    rng = np.random.default_rng(0)
    leaf = lambda s: jnp.asarray(rng.standard_normal(s), dtype)
    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def like(params, seed, size=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(size * rng.standard_normal(p.shape), p.dtype), params)


def test_decay_goes_by_name_and_is_not_fooled_by_stacked_layers():
    mask = named_leaves(decay_mask(make_params()))
    assert {path for path, decays in mask.items() if decays} == {
        "blocks/attention/kernel",
        "blocks/experts/w_up",
        "unembed/kernel",
    }


def test_given_patterns_replace_the_default_and_must_match():
    mask = named_leaves(decay_mask(make_params(), ("*/experts/*",)))
    assert not mask["blocks/experts/w_up"]
    assert not mask["gain"]  # fewer than two axes never decay
    assert mask["embed/embedding"]
    assert mask["blocks/attention_norm/scale"]
    without = named_leaves(decay_mask(make_params(), ()))
    assert [path for path, decays in without.items() if not decays] == ["gain"]
    with pytest.raises(UserError, match=r"no_decay: the pattern '\*/router/\*' matches none of"):
        AdamW(schedule=SCHEDULE, no_decay=("*/router/*",)).build(make_params(), 10)


def numpy_adamw(params, gradients, *, clip, decay, steps=10):
    """The equations of the paper in float64, one leaf at a time."""
    b1, b2, eps = 0.9, 0.95, 1e-8
    rate = SCHEDULE.build(steps)
    mask = named_leaves(decay_mask(params))
    p = {k: np.asarray(v, np.float64) for k, v in named_leaves(params).items()}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    for t, gradient in enumerate(gradients):
        g = {k: np.asarray(x, np.float64) for k, x in named_leaves(gradient).items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        scale = 1.0 if clip is None else min(1.0, clip / norm)
        for k in p:
            m[k] = b1 * m[k] + (1 - b1) * g[k] * scale
            v[k] = b2 * v[k] + (1 - b2) * (g[k] * scale) ** 2
            step = (m[k] / (1 - b1 ** (t + 1))) / (np.sqrt(v[k] / (1 - b2 ** (t + 1))) + eps)
            p[k] = p[k] - float(rate(t)) * (step + decay * mask[k] * p[k])
    return p


@pytest.mark.parametrize("clip", [None, 0.5])
def test_against_the_equations(clip):
    params = make_params()
    gradients = [like(params, seed, size=0.1 + seed) for seed in range(5)]
    optimizer = AdamW(schedule=SCHEDULE, weight_decay=0.3, clip_norm=clip).build(params, 10)
    want = numpy_adamw(params, gradients, clip=clip, decay=0.3)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params, grad_norm=global_norm(gradient))
        params = optax.apply_updates(params, updates)
    for path, value in named_leaves(params).items():
        np.testing.assert_allclose(value, want[path], rtol=2e-5, atol=1e-6, err_msg=path)


def test_moments_and_updates_of_bf16_parameters_are_float32():
    params = make_params(jnp.bfloat16)
    optimizer = AdamW(schedule=SCHEDULE).build(params, 10)
    state = jax.jit(optimizer.init)(params)
    gradient = like(params, 1)
    update = jax.jit(optimizer.update)
    updates, state = update(gradient, state, params, grad_norm=global_norm(gradient))
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(params))
    assert {x.dtype for x in moments} == {jnp.dtype("float32")}
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    new = optax.apply_updates(params, updates)
    assert {p.dtype for p in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}


def test_float64_stays_float64():
    with jax.enable_x64(True):
        params = make_params(jnp.float64)
        optimizer = AdamW(schedule=SCHEDULE).build(params, 10)
        update = jax.jit(optimizer.update)
        gradient = like(params, 1)
        norm = global_norm(gradient)
        updates, _ = update(gradient, optimizer.init(params), params, grad_norm=norm)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("float64")}
        assert global_norm(updates).dtype == jnp.float64


def test_builds_from_shapes_alone():
    params = make_params()
    optimizer = AdamW(schedule=SCHEDULE).build(jax.eval_shape(lambda: params), 10)
    jax.eval_shape(optimizer.init, params)


def test_global_norm_adds_in_float32():
    tree = {"a": jnp.full((1000,), 0.1, jnp.bfloat16), "b": jnp.full((2, 2), 3.0)}
    want = np.sqrt(1000 * float(jnp.bfloat16(0.1)) ** 2 + 36.0)
    assert global_norm(tree).dtype == jnp.float32
    np.testing.assert_allclose(global_norm(tree), want, rtol=1e-6)
    assert not np.isfinite(global_norm({"a": jnp.array([1.0, jnp.nan])}))


@pytest.mark.parametrize(
    "size, norm", [(1e20, np.inf), (np.inf, np.inf), (np.nan, np.nan)], ids=str
)
def test_a_norm_that_is_not_finite_gives_no_finite_update(size, norm):
    """1e20 is finite and its square is not: clipped by it, the gradient would be a silent 0."""
    params = make_params()
    optimizer = AdamW(schedule=WarmupCosine(peak=1e-2, warmup_steps=0)).build(params, 10)
    state = optimizer.init(params)
    gradient = jax.tree.map(lambda p: jnp.zeros_like(p).at[0].set(size), params)
    np.testing.assert_equal(float(global_norm(gradient)), norm)
    updates, new = jax.jit(optimizer.update)(
        gradient, state, params, grad_norm=global_norm(gradient)
    )
    assert all(np.isnan(update).all() for update in jax.tree.leaves(updates))
    guard = Guard()
    accept, _ = guard.decide(guard.init(), 3.0, global_norm(gradient), global_norm(updates))
    kept = select(accept, (optax.apply_updates(params, updates), new), (params, state))
    jax.tree.map(np.testing.assert_array_equal, kept, (params, state))


@pytest.mark.parametrize(
    "wrong",
    [
        {"b1": 1.0},
        {"b2": -0.1},
        {"eps": 0.0},
        {"weight_decay": -1.0},
        {"clip_norm": 0.0},
        *({name: np.nan} for name in ("b1", "b2", "eps", "weight_decay", "clip_norm")),
        *({name: np.inf} for name in ("eps", "weight_decay", "clip_norm")),
    ],
    ids=str,
)
def test_values_out_of_range(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        AdamW(schedule=SCHEDULE, **wrong).build(make_params(), 10)

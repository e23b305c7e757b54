"""Multi-head latent attention against its definition, written out, in float64."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention.mla import MultiHeadLatentAttention
from moejax.errors import UserError
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import Rope, YarnScaling
from moejax.verification.contracts.cases import make_context, quick_jit, random_variables, to_dtype

HEADS, RANK, NOPE, ROTATED, VALUE, WIDTH = 3, 6, 4, 2, 5, 8
YARN = YarnScaling(factor=8.0, original_context=16, mscale=1.0, mscale_all_dim=0.6)
PLAIN = MultiHeadLatentAttention(
    num_heads=HEADS,
    kv_lora_rank=RANK,
    nope_head_dim=NOPE,
    rope_head_dim=ROTATED,
    v_head_dim=VALUE,
)
FULL = PLAIN.copy(q_lora_rank=7, rope=Rope(theta=100.0, scaling=YARN), use_bias=True)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 0]])


def definition(attention, params, x, *, window=None):
    """The paper's equations, one head after another; keys and values are expanded."""

    def project(name, value):
        leaf = params[name]
        return value @ leaf["kernel"] + leaf.get("bias", 0)

    def norm(name, value):
        mean = jnp.mean(value**2, axis=-1, keepdims=True)
        return value / jnp.sqrt(mean + 1e-6) * params[name]["scale"]

    def rotated(value):  # [B, S, 2], one pair: one frequency, which YaRN keeps or divides
        rope = attention.rope
        frequency = float(rope.frequencies(ROTATED)[0])
        size = 1.0 if rope.scaling is None else m(YARN.mscale) / m(YARN.mscale_all_dim)
        angle = POSITIONS * frequency
        a, b = value[..., 0], value[..., 1]
        cos, sin = size * jnp.cos(angle), size * jnp.sin(angle)
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1)

    m = lambda s: 0.1 * s * math.log(YARN.factor) + 1
    scale = 1 / math.sqrt(NOPE + ROTATED)
    if attention.rope.scaling is not None:
        scale *= m(YARN.mscale_all_dim) ** 2
    if attention.q_lora_rank is None:
        q = project("query", x)
    else:
        q = project("query_up", norm("query_norm", project("query_down", x)))
    down = project("kv_down", x)
    kv = project("kv_up", norm("kv_norm", down[..., :RANK]))
    shared = rotated(down[..., RANK:])
    distance = np.arange(7)[:, None] - np.arange(7)
    seen = (distance >= 0) & (distance < (window or 7))
    seen = seen & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
    out = []
    for h in range(HEADS):
        of_q = q[..., h * (NOPE + ROTATED) :]
        of_kv = kv[..., h * (NOPE + VALUE) :]
        q_h = jnp.concatenate([of_q[..., :NOPE], rotated(of_q[..., NOPE : NOPE + ROTATED])], -1)
        k_h = jnp.concatenate([of_kv[..., :NOPE], shared], -1)
        v_h = of_kv[..., NOPE : NOPE + VALUE]
        logits = jnp.where(seen, scale * jnp.einsum("bin,bjn->bij", q_h, k_h), -jnp.inf)
        out.append(jnp.einsum("bij,bjn->bin", jax.nn.softmax(logits), v_h))
    return project("output", jnp.concatenate(out, -1))


def inputs(attention, **changes):
    """Random x `[2, 7, D]`, parameters and the packed context, in float64 where that is on."""
    context = make_context(SEGMENTS > 0, segment_ids=SEGMENTS, positions=jnp.asarray(POSITIONS))
    x = np.random.default_rng(0).standard_normal((*SEGMENTS.shape, WIDTH))
    variables = random_variables(attention, x, context)
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    return *to_dtype((variables["params"], x), dtype), context.replace(**changes)


@pytest.mark.parametrize(
    "attention, window", [(PLAIN, None), (FULL, None), (FULL, 2)], ids=["plain", "full", "window"]
)
def test_values_and_gradients_are_those_of_the_definition(attention, window):
    with jax.enable_x64(True):
        params, x, context = inputs(attention, window=window)
        weight = np.random.default_rng(1).standard_normal(x.shape) * (SEGMENTS > 0)[..., None]

        def loss(function, params, x):
            return jnp.sum(weight * function(params, x)), function(params, x)

        ours = lambda p, x: attention.apply({"params": p}, x, context)
        theirs = functools.partial(definition, attention, window=window)
        (_, y), gradients = quick_jit(
            jax.value_and_grad(functools.partial(loss, ours), argnums=(0, 1), has_aux=True)
        )(params, x)
        (_, expected), expected_gradients = jax.value_and_grad(
            functools.partial(loss, theirs), argnums=(0, 1), has_aux=True
        )(params, x)
    np.testing.assert_allclose(y[SEGMENTS > 0], expected[SEGMENTS > 0], rtol=1e-10, atol=1e-12)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert np.abs(b).max() > 1e-3, name
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11, err_msg=name)


def decode(attention, params, x, steps, *, slots=8, window=None):
    """The outputs of `steps` one after another, and the cache they leave."""
    variables, outputs = {"params": params}, []
    run = quick_jit(lambda v, x, c: attention.apply(v, x, c, mutable=["cache"]))
    for start, stop in steps:
        positions = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (len(x), stop - start))
        context = make_context(positions >= 0, positions=jnp.asarray(positions), window=window)
        context = context.replace(decode=True, cache_length=slots)
        y, cache = run(variables, x[:, start:stop], context)
        variables = {"params": params} | cache
        outputs.append(y)
    return np.concatenate(outputs, axis=1), variables["cache"]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("attention", [PLAIN, FULL], ids=["plain", "full"])
def test_decoding_equals_the_full_pass(attention, window):
    with jax.enable_x64(True):
        params, x, _ = inputs(attention)
        context = make_context(np.ones(x.shape[:2], bool), window=window)
        whole = attention.apply({"params": params}, x, context)
        steps = ((0, 4), (4, 5), (5, 6), (6, 7))
        y, cache = decode(attention, params, x, steps, window=window)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, whole, rtol=1e-11, atol=1e-12)
    assert {k: v.shape for k, v in cache.items()} == {"cached_latent": (2, 8, RANK + ROTATED)}


def test_decoding_never_expands_old_positions():
    """No intermediate of a step is as large as the keys or the values of all slots would be."""
    slots = 64
    params, x, _ = inputs(PLAIN)
    one = jnp.zeros((2, 1), jnp.int32)
    context = make_context(one == 0, positions=one).replace(decode=True, cache_length=slots)
    step = lambda p, x: PLAIN.apply({"params": p}, x, context, mutable=["cache"])
    jaxpr = jax.make_jaxpr(step)(params, x[:, :1]).jaxpr
    sizes = [out.aval.size for equation in _equations(jaxpr) for out in equation.outvars]
    assert max(sizes) == 2 * slots * (RANK + ROTATED) < 2 * slots * HEADS * NOPE
    whole = jax.make_jaxpr(lambda p, x: PLAIN.apply({"params": p}, x, make_context(one == 0)))
    expanded = whole(params, x[:, :1]).jaxpr  # the same search does find what is expanded
    assert any(
        out.aval.shape[-2:] == (HEADS, NOPE + ROTATED)
        for equation in _equations(expanded)
        for out in equation.outvars
    )


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


class _Opaque(nn.Module):
    """A projection that depends on the token, and so is no one matrix."""

    features: int = 0
    use_bias: bool = False
    axes: tuple = (None, None)

    @nn.compact
    def __call__(self, x, context):
        return Linear(features=self.features, name="base")(x, context) * jnp.sign(x[..., :1])


def test_a_projection_that_is_no_matrix_trains_and_is_refused_in_decoding():
    attention = PLAIN.copy(linear=_Opaque())
    params, x, context = inputs(attention)
    assert np.isfinite(attention.apply({"params": params}, x, context)).all()
    with pytest.raises(UserError, match=r"_Opaque defines no method matrix.*'kv_up'"):
        decode(attention, params, x, ((0, 1),))


def test_a_position_without_a_slot_gives_nan_and_too_short_a_cache_says_so():
    params, x, _ = inputs(PLAIN)
    y, _ = decode(PLAIN, params, x, ((0, 2), (2, 3)), slots=2)
    assert np.isfinite(y[:, :2]).all()
    assert np.isnan(y[:, 2]).all()
    with pytest.raises(UserError, match="3 positions do not fit into a cache of 2 slots"):
        decode(PLAIN, params, x, ((0, 3),), slots=2)


def test_every_matrix_is_split_over_both_kinds_of_axes():
    """All but the small ones into latents have an axis for each of fsdp and tensor."""
    boxed = jax.eval_shape(
        lambda: FULL.init(jax.random.key(0), jnp.ones((1, 1, WIDTH)), make_context([[True]]))
    )["params"]
    names = {name: leaf["kernel"].names for name, leaf in boxed.items() if "kernel" in leaf}
    assert names == {
        "query_down": ("embed", None),
        "query_up": ("embed", "heads"),
        "kv_down": ("embed", None),
        "kv_up": ("embed", "heads"),
        "output": ("heads", "embed"),
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q_lora_rank": 0}, "attention.q_lora_rank=0 must be at least 1"),
        ({"num_heads": 0}, "attention.num_heads=0 must be at least 1"),
        ({"rope": Rope(fraction=0.5)}, "attention.rope.fraction=0.5 must be 1"),
        ({"rope_head_dim": 3}, "rotates 3 of them"),
    ],
)
def test_bad_options_are_one_clear_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        inputs(PLAIN.copy(**changes))


def test_without_rope_order_shows_only_in_what_is_visible():
    """The last token sees all others, and without positions their order does not matter."""
    attention = PLAIN.copy(rope=None, latent_norm=RMSNorm(epsilon=1e-5))
    params, x, _ = inputs(attention)
    context = make_context(np.ones(x.shape[:2], bool))
    run = quick_jit(lambda x: attention.apply({"params": params}, x, context)[:, -1])
    turned = np.concatenate([x[:, 5::-1], x[:, 6:]], axis=1)
    np.testing.assert_allclose(run(turned), run(x), rtol=1e-5, atol=1e-6)

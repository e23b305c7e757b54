"""Attention to blocks: its parameters, its definition, decoding, switches and bad settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention.full import FullAttention
from moejax.attention.moba import MoBA
from moejax.errors import UserError
from moejax.kernels.block_attention import moba_attention
from moejax.layers.norm import RMSNorm
from moejax.layers.short_convolution import ShortConvolution
from moejax.types import named_leaves
from moejax.verification.contracts.cases import make_context, quick_jit, random_variables, to_dtype

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH, D_MODEL = 2, 23, 4, 2, 4, 16
PLAIN = MoBA(num_heads=HEADS, num_kv_heads=KV_HEADS, block_size=3, top_k=2)
CHOICES = {
    "each head": PLAIN,
    "by group": PLAIN.copy(selection="group", top_k=3),
    "own block": PLAIN.copy(top_k=1),
    "convolved": PLAIN.copy(key_conv=ShortConvolution(width=4), rope=None),
    "more blocks than there are": PLAIN.copy(top_k=9),
}


def inputs(attention, *, length=LENGTH, seed=0, **context):
    """Variables and x of `attention`, with its context of rows without padding."""
    x = np.random.default_rng(seed).standard_normal((BATCH, length, D_MODEL))
    context = make_context(np.ones((BATCH, length), bool), **context)
    variables = random_variables(attention, x.astype(np.float32), context, seed=seed)
    return variables, x.astype(np.float32), context


def apply(attention, variables, x, context):
    return np.asarray(quick_jit(lambda v, x, c: attention.apply(v, x, c))(variables, x, context))


@pytest.mark.parametrize("key_conv", [None, ShortConvolution()])
def test_its_parameters_are_those_of_full_attention(key_conv):
    same = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "qk_norm": RMSNorm(), "use_bias": True}
    same |= {"use_output_bias": True, "key_conv": key_conv}
    sparse, full = MoBA(**same, block_size=3, top_k=2), FullAttention(**same)
    variables, x, context = inputs(sparse)
    other = random_variables(full, x, context)
    shapes = lambda tree: {name: leaf.shape for name, leaf in named_leaves(tree).items()}
    assert shapes(variables) == shapes(other)
    assert sparse.full() == full
    whole = apply(full, variables, x, context)
    # The first two blocks are all there is for the first six queries; later ones see less.
    got = apply(sparse, variables, x, context)
    np.testing.assert_allclose(got[:, :6], whole[:, :6], rtol=1e-5, atol=1e-6)
    assert (np.abs(got[:, 9:] - whole[:, 9:]).max(axis=(0, 2)) > 1e-3).mean() > 0.9
    every = apply(sparse.copy(top_k=8), variables, x, context)
    np.testing.assert_allclose(every, whole, rtol=1e-5, atol=1e-6)


def test_the_layer_is_projections_and_the_kernel():
    attention = PLAIN.copy(rope=None)
    variables, x, context = inputs(attention)
    p = {name: np.asarray(leaf["kernel"]) for name, leaf in variables["params"].items()}
    heads = lambda name, n: jnp.asarray((x @ p[name]).reshape(BATCH, LENGTH, n, WIDTH))
    q, k, v = heads("query", HEADS), heads("key", KV_HEADS), heads("value", KV_HEADS)
    out = moba_attention(q, k, v, block_size=3, top_k=2, implementation="reference")
    expected = np.asarray(out).reshape(BATCH, LENGTH, -1) @ p["output"]
    np.testing.assert_allclose(
        apply(attention, variables, x, context), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", CHOICES)
def test_decoding_equals_the_whole_in_float64(name):
    """A ragged prefill, then a token at a time, past many blocks; the cache is longer still."""
    attention = CHOICES[name]
    lengths = np.array([LENGTH, LENGTH - 5])
    with jax.enable_x64(True):
        variables, x, _ = inputs(attention)
        variables, x = to_dtype(variables, jnp.float64), x.astype(np.float64)
        whole = apply(attention, variables, x, make_context(np.ones((BATCH, LENGTH), bool)))
        step = quick_jit(lambda v, x, c: attention.apply(v, x, c, mutable=["cache"]))
        cache, first = {}, 9
        at = np.minimum(lengths, [first, first - 4])  # how far each row is
        tokens = np.arange(first)
        context = make_context(tokens < at[:, None], decode=True, cache_length=LENGTH + 3)
        y, cache = step(variables, x[:, :first], context)
        for row in range(BATCH):
            np.testing.assert_allclose(y[row, : at[row]], whole[row, : at[row]], rtol=1e-10)
        while (at < lengths).any():
            there = at < lengths
            at_most = np.minimum(at, LENGTH - 1)
            context = make_context(
                there[:, None],
                positions=jnp.asarray(at_most[:, None], jnp.int32),
                decode=True,
                cache_length=LENGTH + 3,
            )
            y, cache = step(variables | cache, x[np.arange(BATCH), at_most][:, None], context)
            for row in np.flatnonzero(there):
                expected = whole[row, at[row]]
                np.testing.assert_allclose(y[row, 0], expected, rtol=1e-10, atol=1e-12)
            at = at + there
    assert y.dtype == jnp.float64


def test_decoding_sees_no_block_that_was_not_chosen():
    """With other keys and values in an old block that nobody chooses, nothing changes."""
    attention = PLAIN.copy(rope=None, top_k=2)
    variables, x, _ = inputs(attention)
    step = quick_jit(lambda v, x, c: attention.apply(v, x, c, mutable=["cache"]))
    context = make_context(np.ones((BATCH, LENGTH - 1), bool), decode=True, cache_length=LENGTH)
    _, cache = step(variables, x[:, :-1], context)
    last = make_context(
        np.ones((BATCH, 1), bool), positions=jnp.full((BATCH, 1), LENGTH - 1, jnp.int32)
    ).replace(decode=True, cache_length=LENGTH)
    y = step(variables | cache, x[:, -1:], last)[0]
    changed = []
    for block in range((LENGTH - 1) // 3):
        values = cache["cache"]["cached_value"].at[:, 3 * block : 3 * block + 3].add(1.0)
        other = {"cache": cache["cache"] | {"cached_value": values}}
        changed.append(np.abs(step(variables | other, x[:, -1:], last)[0] - y).max(axis=(1, 2)))
    seen = (np.stack(changed) > 1e-6).sum(axis=0)
    assert ((seen >= 1) & (seen <= HEADS)).all()  # of 7 old blocks, one for each head


@pytest.mark.parametrize("decode", [False, True])
def test_a_switch_computes_what_its_step_says(decode):
    """Blocks in the steps 3 and 4, every key in all others; gradients too."""
    attention = PLAIN.copy(from_step=3, until_step=5)
    variables, x, context = inputs(attention)
    if decode:
        context = context.replace(decode=True, cache_length=LENGTH)

    def both(attention):
        def loss(v, x, context):
            y, _ = attention.apply(v, x, context, mutable=["cache"])
            return jnp.sum(jnp.sin(y)), y

        return quick_jit(jax.grad(loss, has_aux=True))

    switched, blocks, full = both(attention), both(PLAIN), both(attention.full())
    for step, expected in ((0, full), (2, full), (3, blocks), (4, blocks), (5, full)):
        now = context.replace(step=jnp.int32(step))
        got, wanted = switched(variables, x, now), expected(variables, x, now)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted
        )
    assert not np.allclose(blocks(variables, x, now)[1], full(variables, x, now)[1], atol=1e-3)


def test_at_a_step_the_switch_is_decided():
    attention = PLAIN.copy(from_step=3, until_step=5)
    assert attention.at_step(4) == attention.at_step(3) == PLAIN
    assert attention.at_step(2) == attention.at_step(5) == PLAIN.full()
    assert PLAIN.at_step(7) == PLAIN


def test_a_window_is_attended_as_full_attention_does():
    variables, x, context = inputs(PLAIN, window=4)
    expected = apply(PLAIN.full(), variables, x, context)
    np.testing.assert_array_equal(apply(PLAIN, variables, x, context), expected)


@pytest.mark.parametrize("length", [5, 24])
@pytest.mark.parametrize("top_k", [1, 3, 30])
def test_mean_keys_is_what_the_mask_holds(length, top_k):
    """Counted in the definition: with values that are a key's own axis, weights above 0."""
    attention = PLAIN.copy(top_k=top_k)
    q = k = jnp.asarray(np.random.default_rng(0).standard_normal((1, length, 1, 4)), jnp.float32)
    v = jnp.eye(length)[None, :, None]
    weights = moba_attention(q, k, v, block_size=3, top_k=top_k, implementation="reference")
    assert attention.mean_keys(length) == pytest.approx((np.asarray(weights) > 0).sum() / length)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"top_k": 0}, "attention.top_k=0 must be at least 1"),
        ({"block_size": 0}, "attention.block_size=0 must be at least 1"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide attention.num_heads=4"),
        ({"until_step": 0}, "from_step=0 and until_step=0 name no step"),
        ({"from_step": 4, "until_step": 4}, "name no step"),
        ({"from_step": -1}, "from_step=-1"),
        ({"key_conv": ShortConvolution(width=1)}, "key_conv.width=1 must be at least 2"),
        ({"implementation": "fast"}, "fast"),
    ],
)
def test_bad_options_are_one_clear_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        inputs(PLAIN.copy(**changes))


def test_a_cache_too_short_says_so():
    variables, x, context = inputs(PLAIN)
    context = context.replace(decode=True, cache_length=4)
    with pytest.raises(UserError, match="23 positions do not fit into a cache of 4 slots"):
        PLAIN.apply(variables, jnp.asarray(x), context, mutable=["cache"])

"""LoRA against numpy: scaling, initialisation, dropout, the merged matrix."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.adapters.lora import LoRA, RsLoRA
from moejax.errors import UserError
from moejax.layers.row_keys import row_keys
from moejax.verification.contracts.cases import make_context, quick_jit, random_variables

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)
CONTEXT = make_context(np.ones((2, 5), bool))


def built(cls, **settings):
    module = cls(features=6, axes=("embed", "heads"), **settings)
    variables = random_variables(module, X, CONTEXT)
    return module, variables, jax.tree.map(np.asarray, variables["lora"])


@pytest.mark.parametrize("cls, scale", [(LoRA, 10 / 4), (RsLoRA, 10 / 2)])
def test_equals_numpy(cls, scale):
    module, variables, leaves = built(cls, rank=4, alpha=10.0)
    y = quick_jit(module.apply)(variables, X, CONTEXT)
    kernel = np.asarray(variables["params"]["kernel"])
    merged = kernel + scale * leaves["a"] @ leaves["b"]
    np.testing.assert_allclose(y, X @ merged, rtol=1e-4, atol=1e-5)
    matrix = module.bind(variables).matrix(jnp.float32)
    np.testing.assert_allclose(matrix, merged, rtol=1e-5, atol=1e-6)


def test_fresh_factors_are_those_of_peft():
    """A uniform within 1/sqrt(in), of variance 1/(3 in); B zero."""
    module = LoRA(features=64, rank=32, axes=(None, None))
    x = jnp.zeros((1, 1, 400))
    context = make_context(np.ones((1, 1), bool))
    init = lambda key: nn.meta.unbox(module.init(key, x, context))
    a, b = quick_jit(init)(jax.random.key(0))["lora"].values()
    assert np.abs(a).max() <= 0.05 + 1e-7
    assert np.abs(a).max() > 0.0499
    assert np.var(a) == pytest.approx(1 / 1200, rel=0.05)
    assert (a.shape, b.shape) == ((400, 32), (32, 64))
    assert not np.asarray(b).any()


def test_dropout_zeroes_the_share_it_says_in_the_low_rank_path_alone():
    module, variables, leaves = built(LoRA, rank=8, alpha=8.0, dropout=0.25)
    eye = {"a": jnp.eye(8), "b": jnp.eye(8)[:, :6]}
    zero = {"params": {"kernel": jnp.zeros((8, 6))}, "lora": eye}
    ones = jnp.ones((2, 4000, 8))
    context = make_context(np.ones((2, 4000), bool)).replace(key=row_keys(jax.random.key(0), 2))
    run = quick_jit(module.apply)
    y = np.asarray(run(zero, ones, context))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.005)
    assert (y[0] != y[1]).any()
    context = CONTEXT.replace(key=row_keys(jax.random.key(0), 2))
    without = variables | {"lora": jax.tree.map(jnp.zeros_like, variables["lora"])}
    base = X @ np.asarray(variables["params"]["kernel"])
    np.testing.assert_allclose(run(without, X, context), base, rtol=1e-5, atol=1e-5)
    plain = np.asarray(run(variables, X, CONTEXT))  # no key: no dropout
    expected = base + X @ leaves["a"] @ leaves["b"]
    np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"rank": 0}, r"adapter.linear.rank=0 must be at least 1"),
        ({"dropout": 1.0}, r"adapter.linear.dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_bad_settings_say_so(settings, text):
    with pytest.raises(UserError, match=text):
        LoRA(features=4, **settings).init(jax.random.key(0), X, CONTEXT)

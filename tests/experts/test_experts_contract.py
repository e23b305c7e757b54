"""What every expert form and every dense MLP promises; found by walking the package."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax.experts
from moejax.verification.contracts.cases import (
    float_dtypes,
    make_context,
    quick_jit,
    random_variables,
    to_dtype,
)
from moejax.verification.contracts.experts import CHECKS, D_MODEL, Case
from tests.contract import methods


def is_routed(module) -> bool:
    """Expert forms take `(num_experts, d_model)`, MLPs `(x, context)`."""
    return "num_experts" in inspect.signature(module.__call__).parameters


ALL = methods(moejax.experts)
ROUTED = [p for p in ALL if is_routed(p.values[0])]
MLPS = [p for p in ALL if not is_routed(p.values[0])]


@pytest.fixture(scope="module", params=ROUTED)
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_promise(case, check):
    check(case)


@pytest.mark.parametrize("mlp", MLPS)
def test_a_dense_mlp_works_token_by_token(mlp):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, D_MODEL)), jnp.float32)
    context = make_context(np.ones((2, 3), bool))
    variables = random_variables(mlp, x, context)
    run = quick_jit(lambda v, x: mlp.apply(v, x, context))
    y = np.asarray(run(variables, x))
    assert y.shape == x.shape
    other = x.at[1, 2].set(5.0)
    changed = np.abs(np.asarray(run(variables, other)) - y).max(axis=-1) > 0
    np.testing.assert_array_equal(changed, [[False] * 3, [False, False, True]])
    loss = lambda v: jnp.sum(jnp.sin(mlp.apply(v, x, context)))
    for leaf in jax.tree.leaves(quick_jit(jax.grad(loss))(variables)):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0
    with jax.enable_x64(True):
        wide = to_dtype((variables, x), jnp.float64)
        assert float_dtypes(lambda v, x: mlp.apply(v, x, context), *wide) == {"float64"}

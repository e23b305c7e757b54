"""What every expert form and every dense MLP promises; found by walking the package."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax.experts
from tests.contract import (
    float_dtypes,
    make_context,
    methods,
    quick_jit,
    random_variables,
    to_dtype,
)

NUM_EXPERTS, D_MODEL, NUM_ROWS, K = 4, 8, 6, 2
EMPTY = NUM_EXPERTS


def is_routed(module) -> bool:
    """Expert forms take `(num_experts, d_model)`, MLPs `(x, context)`."""
    return "num_experts" in inspect.signature(module.__call__).parameters


ALL = methods(moejax.experts)
ROUTED = [p for p in ALL if is_routed(p.values[0])]
MLPS = [p for p in ALL if not is_routed(p.values[0])]


class Case:
    """An expert form with variables and rows, compiled once."""

    def __init__(self, form):
        self.form = form
        rng = np.random.default_rng(0)
        self.variables = random_variables(form, NUM_EXPERTS, D_MODEL)
        self.rows = rng.standard_normal((NUM_ROWS, D_MODEL)).astype(np.float32)
        self.ids = np.stack([rng.permutation(NUM_EXPERTS)[:K] for _ in range(NUM_ROWS)])
        self.ids[2] = self.ids[4, 1] = EMPTY
        self.gate = rng.random((NUM_ROWS, K)).astype(np.float32)
        self.run = quick_jit(self.call)

    def call(self, variables, rows, ids, gate):
        weights, compute = self.form.apply(variables, NUM_EXPERTS, rows.shape[1])
        return compute(rows, jnp.asarray(ids), gate, weights)

    def result(self, **changes):
        args = {"variables": self.variables, "rows": self.rows, "ids": self.ids, "gate": self.gate}
        return np.asarray(self.run(**(args | changes)))


@pytest.fixture(scope="module", params=ROUTED)
def case(request):
    return Case(request.param)


def test_weights_lead_with_the_expert_axis(case):
    weights, _ = case.form.apply(case.variables, NUM_EXPERTS, D_MODEL)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(weights)} == {NUM_EXPERTS}


def test_a_row_is_the_weighted_sum_of_its_experts(case):
    alone = [
        case.result(
            ids=np.stack([np.full(NUM_ROWS, e), np.full(NUM_ROWS, EMPTY)], axis=1),
            gate=np.ones_like(case.gate),
        )
        for e in range(NUM_EXPERTS)
    ]
    expected = np.zeros_like(case.rows)
    for row in range(NUM_ROWS):
        for e, g in zip(case.ids[row], case.gate[row], strict=True):
            if e != EMPTY:
                expected[row] += g * alone[e][row]
    np.testing.assert_allclose(case.result(), expected, rtol=1e-5, atol=1e-6)
    assert (case.result()[2] == 0).all()
    assert np.abs(np.diff(np.stack(alone), axis=0)).min() > 0  # experts differ


def test_a_nan_in_a_row_or_gate_nobody_uses_reaches_nothing(case):
    rows, gate = case.rows.copy(), case.gate.copy()
    rows[2] = gate[2] = gate[4, 1] = np.nan
    np.testing.assert_array_equal(case.result(rows=rows, gate=gate), case.result())


def test_permuting_rows_permutes_the_result(case):
    order = np.random.default_rng(1).permutation(NUM_ROWS)
    permuted = case.result(rows=case.rows[order], ids=case.ids[order], gate=case.gate[order])
    np.testing.assert_allclose(permuted, case.result()[order], rtol=1e-5, atol=1e-6)


def test_gradients_are_finite_and_reach_every_weight(case):
    loss = lambda v, rows, gate: jnp.sum(jnp.sin(case.call(v, rows, case.ids, gate)))
    gradients = quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(case.variables, case.rows, case.gate)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


def test_bf16_rows_give_bf16_and_float64_stays_float64(case):
    half = to_dtype((case.variables, case.rows, case.gate), jnp.bfloat16)
    variables, rows, gate = half
    shape = jax.eval_shape(case.call, variables, rows, case.ids, gate.astype(jnp.float32))
    assert shape.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        variables, rows, gate = to_dtype((case.variables, case.rows, case.gate), jnp.float64)
        assert float_dtypes(case.call, variables, rows, case.ids, gate) == {"float64"}


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

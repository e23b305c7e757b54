"""What every expert form promises."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moejax.verification.contracts.cases import (
    float_dtypes,
    quick_jit,
    random_variables,
    require,
    require_finite,
    to_dtype,
)

NUM_EXPERTS, D_MODEL, NUM_ROWS, K = 4, 8, 6, 2
EMPTY = NUM_EXPERTS


class Case:
    """An expert form with variables and rows, compiled once."""

    def __init__(self, form: nn.Module):
        self.form = form
        rng = np.random.default_rng(0)
        self.variables = random_variables(form, NUM_EXPERTS, D_MODEL)
        self.rows = rng.standard_normal((NUM_ROWS, D_MODEL)).astype(np.float32)
        self.ids = np.stack([rng.permutation(NUM_EXPERTS)[:K] for _ in range(NUM_ROWS)])
        self.ids[2] = self.ids[4, 1] = EMPTY
        self.gate = rng.random((NUM_ROWS, K)).astype(np.float32)
        self.run = quick_jit(self.call)

    def call(self, variables: Any, rows: Any, ids: Any, gate: Any) -> Any:
        """The form's result for rows with these choices."""
        weights, _, compute = self.form.apply(variables, NUM_EXPERTS, rows.shape[1])
        return compute(rows, jnp.asarray(ids), gate, weights)

    def result(self, **changes: Any) -> np.ndarray:
        """`call` of the case's own operands, with some changed."""
        args = {"variables": self.variables, "rows": self.rows, "ids": self.ids, "gate": self.gate}
        return np.asarray(self.run(**(args | changes)))


def weights_lead_with_the_expert_axis(case: Case) -> None:
    """And name every axis, the first one `expert`."""
    weights, axes, _ = case.form.apply(case.variables, NUM_EXPERTS, D_MODEL)
    for leaf, names in zip(jax.tree.leaves(weights), _leaves_of_names(axes), strict=True):
        require(leaf.shape[0] == NUM_EXPERTS, f"a weight is {leaf.shape}: experts come first")
        require(len(names) == leaf.ndim, f"{names} does not name every axis of {leaf.shape}")
        require(names[0] == "expert", f"{names} does not begin with 'expert'")


def _leaves_of_names(axes: Any) -> list:
    return jax.tree.leaves(axes, is_leaf=lambda names: isinstance(names, tuple))


def a_row_is_the_weighted_sum_of_its_experts(case: Case) -> None:
    """Empty slots add nothing, and experts differ."""
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
    require((case.result()[2] == 0).all(), "a row without experts is not zero")
    require(np.abs(np.diff(np.stack(alone), axis=0)).min() > 0, "two experts give the same")


def a_nan_in_a_row_or_gate_nobody_uses_reaches_nothing(case: Case) -> None:
    """Unused rows and gates are selected away."""
    rows, gate = case.rows.copy(), case.gate.copy()
    rows[2] = gate[2] = gate[4, 1] = np.nan
    np.testing.assert_array_equal(case.result(rows=rows, gate=gate), case.result())


def permuting_rows_permutes_the_result(case: Case) -> None:
    """No row depends on where it stands."""
    order = np.random.default_rng(1).permutation(NUM_ROWS)
    permuted = case.result(rows=case.rows[order], ids=case.ids[order], gate=case.gate[order])
    np.testing.assert_allclose(permuted, case.result()[order], rtol=1e-5, atol=1e-6)


def gradients_are_finite_and_reach_every_weight(case: Case) -> None:
    """Rows and gates too."""
    loss = lambda v, rows, gate: jnp.sum(jnp.sin(case.call(v, rows, case.ids, gate)))
    gradients = quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(case.variables, case.rows, case.gate)
    require_finite(gradients, what="the gradient of ")


def bf16_rows_give_bf16_and_float64_stays_float64(case: Case) -> None:
    """The result has the rows' dtype, and no intermediate of a float64 run is narrower."""
    variables, rows, _ = to_dtype((case.variables, case.rows, case.gate), jnp.bfloat16)
    shape = jax.eval_shape(case.call, variables, rows, case.ids, case.gate)
    require(shape.dtype == jnp.bfloat16, f"bfloat16 rows give {shape.dtype}")
    with jax.enable_x64(True):
        variables, rows, gate = to_dtype((case.variables, case.rows, case.gate), jnp.float64)
        found = float_dtypes(case.call, variables, rows, case.ids, gate)
    require(found == {"float64"}, f"a float64 run computes in {', '.join(sorted(found))}")


CHECKS = (
    weights_lead_with_the_expert_axis,
    a_row_is_the_weighted_sum_of_its_experts,
    a_nan_in_a_row_or_gate_nobody_uses_reaches_nothing,
    permuting_rows_permutes_the_result,
    gradients_are_finite_and_reach_every_weight,
    bf16_rows_give_bf16_and_float64_stays_float64,
)

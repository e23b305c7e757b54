"""What every adapter of a projection promises."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moejax.layers.linear import Linear
from moejax.layers.reports import REPORTS, told
from moejax.layers.row_keys import row_keys
from moejax.types import named_leaves
from moejax.verification.contracts.cases import (
    float_dtypes,
    quick_jit,
    require,
    require_finite,
    to_dtype,
)
from moejax.verification.contracts.sequences import (
    MASK,
    SequenceCase,
    a_packed_segment_equals_the_segment_alone,
    a_token_changes_itself_and_later_tokens_of_its_segment_only,
    decoding_token_by_token_equals_the_whole,
    flipped,
    padding_changes_nothing,
)

D_IN, D_OUT = 16, 12
AXES = ("embed", "heads")


class Case(SequenceCase):
    """An adapter with variables, compiled once, the projection it adapts, and `[B, S, K]`."""

    def __init__(self, method: Linear):
        owned = {"features": D_OUT, "use_bias": True, "axes": AXES}
        self.base = Linear(**owned)
        super().__init__(method.clone(**owned), D_IN)


def its_params_are_the_projections_own(case: Case) -> None:
    """Names, shapes and initial values; everything else is in `lora`."""
    require(set(case.variables) == {"params", "lora"}, f"collections {set(case.variables)}")
    draw = lambda module: quick_jit(module.init)(jax.random.key(0), case.x, case.context)
    adapted, plain = draw(case.method)["params"], draw(case.base)["params"]
    require(
        named_leaves(adapted).keys() == named_leaves(plain).keys(),
        f"params {list(named_leaves(adapted))}",
    )
    jax.tree.map(np.testing.assert_array_equal, adapted, plain)


def fresh_it_gives_what_the_projection_gives(case: Case) -> None:
    """Bit for bit, with and without a key."""
    variables = quick_jit(case.method.init)(jax.random.key(0), case.x, case.context)
    plain = quick_jit(lambda v, x: case.base.apply(v, x, case.context))
    expected = np.asarray(plain({"params": variables["params"]}, case.x))
    for key in (None, row_keys(jax.random.key(1), len(MASK))):
        y = np.asarray(case.run(variables, case.x, case.context.replace(key=key)))
        require((y[MASK] == expected[MASK]).all(), "a fresh adapter changes the projection")


def rows_are_independent_with_and_without_keys(case: Case) -> None:
    """A sequence alone gives what it gives in the batch; what is drawn for it is its own."""
    for keys in (None, row_keys(jax.random.key(1), len(MASK))):
        whole = case.run(case.variables, case.x, case.context.replace(key=keys))
        context = flipped(case.context.replace(key=keys))
        y = np.asarray(case.run(case.variables, case.x[::-1], context))[::-1]
        np.testing.assert_allclose(y[MASK], np.asarray(whole)[MASK], rtol=1e-5, atol=1e-6)


def gradients_are_finite_and_reach_every_leaf(case: Case) -> None:
    """No leaf is without effect in training: on the result, or on what is reported."""
    context = case.context.replace(key=row_keys(jax.random.key(1), len(MASK)))

    def loss(variables: Any) -> Array:
        y, reports = case.method.apply(variables, jnp.asarray(case.x), context, mutable=[REPORTS])
        report = told(reports)
        others = jax.tree.leaves((report.terms, report.log_prob))
        return jnp.sum(jnp.sin(y)) + sum(map(jnp.sum, others))

    require_finite(quick_jit(jax.grad(loss))(case.variables), what="the gradient of ")


def bf16_gives_bf16_and_float64_stays_float64(case: Case) -> None:
    """No intermediate of a float64 run is narrower."""
    half = to_dtype((case.variables, case.x), jnp.bfloat16)
    dtype = jax.eval_shape(case.call, *half, case.context).dtype
    require(dtype == jnp.bfloat16, f"bfloat16 input gives {dtype}")
    with jax.enable_x64(True):
        wide = to_dtype((case.variables, case.x), jnp.float64)
        found = float_dtypes(case.call, *wide, case.context)
    require(found == {"float64"}, f"a float64 run computes in {', '.join(sorted(found))}")


CHECKS = (
    its_params_are_the_projections_own,
    fresh_it_gives_what_the_projection_gives,
    a_token_changes_itself_and_later_tokens_of_its_segment_only,
    padding_changes_nothing,
    a_packed_segment_equals_the_segment_alone,
    decoding_token_by_token_equals_the_whole,
    rows_are_independent_with_and_without_keys,
    gradients_are_finite_and_reach_every_leaf,
    bf16_gives_bf16_and_float64_stays_float64,
)

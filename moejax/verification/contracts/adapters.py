"""What every adapter of a projection promises."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moejax.layers.linear import Linear
from moejax.layers.row_keys import row_keys
from moejax.types import named_leaves
from moejax.verification.contracts.cases import (
    float_dtypes,
    make_context,
    quick_jit,
    random_variables,
    require,
    require_finite,
    to_dtype,
)

D_IN, D_OUT = 16, 12
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
MASK = SEGMENTS > 0
AXES = ("embed", "heads")


class Case:
    """An adapter with variables, compiled once, the projection it adapts, and `[B, S, K]`."""

    def __init__(self, method: Linear):
        owned = {"features": D_OUT, "use_bias": True, "axes": AXES}
        self.method, self.base = method.clone(**owned), Linear(**owned)
        self.context = make_context(MASK, segment_ids=SEGMENTS)
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((*MASK.shape, D_IN)).astype(np.float32)
        self.variables = random_variables(self.method, self.x, self.context)
        self.call = lambda variables, x, context: self.method.apply(variables, x, context)
        self.run = quick_jit(self.call)
        self.y = np.asarray(self.run(self.variables, self.x, self.context))


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


def a_token_changes_itself_and_later_tokens_of_its_segment_only(case: Case) -> None:
    """No adapter looks ahead or into another document."""
    for row, column in ((0, 1), (0, 4), (1, 2)):
        allowed = np.equal(SEGMENTS, SEGMENTS[row, column]) & (np.arange(7) >= column)
        allowed[1 - row] = False
        x = case.x.copy()
        x[row, column] += 1.0
        changed = (np.asarray(case.run(case.variables, x, case.context)) != case.y).any(axis=-1)
        require(changed[row, column], "a token does not see itself")
        require(
            not (changed & ~allowed & MASK).any(),
            f"the token {column} of row {row} reached {np.argwhere(changed & ~allowed).tolist()}",
        )


def padding_changes_nothing(case: Case) -> None:
    """What stands at padding reaches no real token."""
    x = np.where(MASK[..., None], case.x, 100.0).astype(np.float32)
    y = np.asarray(case.run(case.variables, x, case.context))
    np.testing.assert_array_equal(y[MASK], case.y[MASK])


def rows_are_independent_with_and_without_keys(case: Case) -> None:
    """A sequence alone gives what it gives in the batch; what is drawn for it is its own."""
    for keys in (None, row_keys(jax.random.key(1), len(MASK))):
        whole = case.run(case.variables, case.x, case.context.replace(key=keys))
        flipped = jax.tree.map(lambda a: a[::-1] if jnp.ndim(a) == 2 else a, case.context)
        flipped = flipped.replace(key=None if keys is None else keys[::-1])
        y = np.asarray(case.run(case.variables, case.x[::-1], flipped))[::-1]
        np.testing.assert_allclose(y[MASK], np.asarray(whole)[MASK], rtol=1e-5, atol=1e-6)


def gradients_are_finite_and_reach_every_leaf(case: Case) -> None:
    """No leaf is without effect, in training."""
    context = case.context.replace(key=row_keys(jax.random.key(1), len(MASK)))
    loss = lambda v: jnp.sum(jnp.sin(case.call(v, jnp.asarray(case.x), context)))
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
    rows_are_independent_with_and_without_keys,
    gradients_are_finite_and_reach_every_leaf,
    bf16_gives_bf16_and_float64_stays_float64,
)

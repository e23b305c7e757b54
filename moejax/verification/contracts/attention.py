"""What every attention method promises."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moejax.verification.contracts.cases import (
    float_dtypes,
    quick_jit,
    require,
    require_finite,
    to_dtype,
)
from moejax.verification.contracts.sequences import (
    SequenceCase,
    a_packed_segment_equals_the_segment_alone,
    a_token_changes_itself_and_later_tokens_of_its_segment_only,
    decoding_token_by_token_equals_the_whole,
    flipped,
    padding_changes_nothing,
)

D_MODEL = 16


class Case(SequenceCase):
    """An attention method with variables, compiled once, and its input `[B, S, D]`."""

    def __init__(self, method: nn.Module):
        super().__init__(method, D_MODEL)


def rows_of_the_batch_are_independent(case: Case) -> None:
    """Sequences do not see each other."""
    y = case.run(case.variables, case.x[::-1], flipped(case.context))
    np.testing.assert_allclose(np.asarray(y)[::-1], case.y, rtol=1e-5, atol=1e-6)


def gradients_are_finite_and_reach_every_parameter(case: Case) -> None:
    """No parameter is without effect."""
    loss = lambda v: jnp.sum(jnp.sin(case.call(v, jnp.asarray(case.x), case.context)))
    require_finite(quick_jit(jax.grad(loss))(case.variables), what="the gradient of ")


def bf16_gives_bf16_and_float64_stays_float64(case: Case) -> None:
    """Softmax in at least float32, and no intermediate of a float64 run is narrower."""
    half = to_dtype((case.variables, case.x), jnp.bfloat16)
    dtype = jax.eval_shape(case.call, *half, case.context).dtype
    require(dtype == jnp.bfloat16, f"bfloat16 input gives {dtype}")
    found = float_dtypes(case.call, *half, case.context)
    require("float32" in found, "a bfloat16 run computes its softmax in bfloat16")
    with jax.enable_x64(True):
        wide = to_dtype((case.variables, case.x), jnp.float64)
        found = float_dtypes(case.call, *wide, case.context)
    require(found == {"float64"}, f"a float64 run computes in {', '.join(sorted(found))}")


CHECKS = (
    a_token_changes_itself_and_later_tokens_of_its_segment_only,
    padding_changes_nothing,
    rows_of_the_batch_are_independent,
    a_packed_segment_equals_the_segment_alone,
    decoding_token_by_token_equals_the_whole,
    gradients_are_finite_and_reach_every_parameter,
    bf16_gives_bf16_and_float64_stays_float64,
)

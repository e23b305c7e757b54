"""Both projections of a gated feed-forward layer and their activation in one pass, on Hopper.

Two accumulators share each tile of rows. The pre-activations are written too, for the backward
pass, and no `[R, 2 F]` array is formed.

Not yet run on hardware: simulated with race detection, and compiled for an H100.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from moejax.kernels import activations
from moejax.kernels.activations import GluActivation
from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.grouped_matmul.hopper.persistent import Blocks, multiply


def glu(
    rows: Array,
    gate: Array,
    up: Array,
    biases: tuple[Array, Array] | None,
    groups: LocalGroups,
    *,
    act: GluActivation,
    blocks: Blocks | None = None,
) -> tuple[Array, Array, Array]:
    """(rows Wg + bg, rows Wu + bu, act of both), each `[R, F]` in the dtype of `rows`.

    `act` acts in float32 on the pre-activations as they are returned. Rows of nobody are zero.
    Copies nothing if D and F are multiples of 64 and R of 8; otherwise operands are padded.

    Args:
      rows: `[R, D]` in bfloat16 or float16.
      gate, up: the groups' matrices, `[G, D, F]`.
      biases: None, or `[G, F]` for gate and up.
      groups: of the rows.
      act: elementwise.
      blocks: how to cut the work; chosen by default.
    """

    act = _gelu if act is activations.gelu else act

    def finish(sums, biases):
        if biases:
            sums = tuple(total + bias for total, bias in zip(sums, biases, strict=True))
        rounded = tuple(total.astype(rows.dtype) for total in sums)
        return *rounded, act(*(x.astype(jnp.float32) for x in rounded))

    return multiply(
        rows,
        (gate.astype(rows.dtype), up.astype(rows.dtype)),
        biases or (),
        groups,
        transpose=False,
        finish=finish,
        num_results=3,
        dtype=rows.dtype,
        blocks=blocks,
    )


# Press et al., Numerical Recipes, section 6.2: erfc(z) = t exp(-z^2 + p(t)), t = 1 / (1 + z / 2),
# z >= 0. The relative error is below 1.2e-7 everywhere, so small results are right as well.
_ERFC = (
    -1.26551223,
    1.00002368,
    0.37409196,
    0.09678418,
    -0.18628806,
    0.27886807,
    -1.13520398,
    1.48851587,
    -0.82215223,
    0.17087277,
)


def _gelu(gate: Array, up: Array) -> Array:
    """`activations.gelu` out of what Mosaic GPU can compile: it has no erfc."""
    z = jnp.abs(gate) * jnp.float32(0.5**0.5)
    t = 1 / (1 + 0.5 * z)
    p = jnp.full_like(t, _ERFC[-1])
    for coefficient in _ERFC[-2::-1]:
        p = p * t + coefficient
    tail = t * jnp.exp(p - z * z)  # erfc(|gate| / sqrt(2))
    return 0.5 * gate * jnp.where(gate < 0, tail, 2 - tail) * up

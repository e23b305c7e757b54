"""A short convolution over time against a loop over positions."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.layers.short_convolution import ShortConvolution
from moejax.verification.contracts.cases import make_context, quick_jit

SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 2, 3, 3, 0, 0, 0]])


def inputs(width):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*SEGMENTS.shape, 2, 3)).astype(np.float32)
    kernel = rng.standard_normal((width, 6)).astype(np.float32)
    return (
        x,
        {"params": {"kernel": jnp.asarray(kernel)}},
        make_context(SEGMENTS > 0, segment_ids=SEGMENTS),
    )


@pytest.mark.parametrize("width", [2, 3, 5, 9])
def test_equals_a_loop(width):
    """Nothing from before a segment, and NaN in padding reaches no token."""
    x, variables, context = inputs(width)
    kernel = np.asarray(variables["params"]["kernel"]).reshape(width, 2, 3)
    poisoned = np.where((SEGMENTS > 0)[..., None, None], x, np.nan)
    run = quick_jit(lambda v, x: ShortConvolution(width=width).apply(v, x, context))
    y = np.asarray(run(variables, poisoned))
    for row, t in np.argwhere(SEGMENTS > 0):
        earlier = [s for s in range(t + 1) if SEGMENTS[row, s] == SEGMENTS[row, t]][-width:]
        total = sum(kernel[t - s] * x[row, s] for s in earlier)
        expected = x[row, t] + total / (1 + np.exp(-total))
        np.testing.assert_allclose(y[row, t], expected, rtol=1e-5, atol=1e-6)


def test_a_fresh_one_changes_no_bit():
    x, _, context = inputs(3)
    convolution = ShortConvolution()
    variables = convolution.init(jnp.zeros((2,), jnp.uint32), jnp.asarray(x), context)
    np.testing.assert_array_equal(convolution.apply(variables, jnp.asarray(x), context), x)


def test_too_narrow_says_so():
    x, variables, context = inputs(1)
    with pytest.raises(UserError, match="key_conv.width=1 must be at least 2"):
        ShortConvolution(width=1).apply(variables, jnp.asarray(x), context)

"""The dense MLP against numpy, with and without its sigmoid gate."""

import numpy as np
import pytest

from moejax.experts.dense import DenseGLU
from moejax.verification.contracts.cases import make_context, quick_jit, random_variables


@pytest.mark.parametrize("gated", [False, True])
def test_equals_numpy(gated):
    x = np.random.default_rng(0).standard_normal((1, 6, 4)).astype(np.float32)
    mlp = DenseGLU(d_ff=5, use_bias=True, gated=gated)
    context = make_context(np.ones((1, 6), bool))
    variables = random_variables(mlp, x, context)
    y = quick_jit(lambda v, x: mlp.apply(v, x, context))(variables, x)
    w = variables["params"]
    project = lambda name, v: v @ np.asarray(w[name]["kernel"]) + np.asarray(w[name]["bias"])
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    gate = project("gate", x)
    expected = project("down", gate * sigmoid(gate) * project("up", x))
    if gated:
        expected *= sigmoid(x @ np.asarray(w["shared_gate"]["kernel"]))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert ("shared_gate" in w) == gated

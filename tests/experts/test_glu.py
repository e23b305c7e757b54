"""Stacked GLU experts against numpy, and their initialisation."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from moejax.experts.glu import GLU
from moejax.verification.contracts.cases import quick_jit, random_variables


@pytest.mark.parametrize("use_bias", [False, True])
def test_equals_numpy(use_bias):
    rng = np.random.default_rng(0)
    form = GLU(d_ff=5, use_bias=use_bias)
    variables = random_variables(form, 3, 4)
    rows = rng.standard_normal((7, 4)).astype(np.float32)
    ids = np.stack([rng.permutation(3)[:2] for _ in range(7)])
    gate = rng.random((7, 2)).astype(np.float32)

    def run(variables, rows, ids, gate):
        weights, _, compute = form.apply(variables, 3, 4)
        return compute(rows, ids, gate, weights)

    y = quick_jit(run)(variables, rows, ids, gate)
    w = {k: np.asarray(v, np.float64) for k, v in variables["params"].items()}
    bias = lambda name, e: w[f"{name}_bias"][e] if use_bias else 0.0
    for row in range(7):
        expected = 0.0
        for e, g in zip(ids[row], gate[row], strict=True):
            a = rows[row] @ w["gate"][e] + bias("gate", e)
            b = rows[row] @ w["up"][e] + bias("up", e)
            hidden = a / (1 + np.exp(-a)) * b
            expected = expected + g * (hidden @ w["down"][e] + bias("down", e))
        np.testing.assert_allclose(y[row], expected, rtol=1e-5, atol=1e-5)


def test_every_expert_is_initialised_like_a_dense_layer():
    params = quick_jit(lambda key: GLU(d_ff=64).init(key, 8, 32))(jax.random.key(0))["params"]
    assert params["gate"].names == ("expert", "expert_embed", "expert_mlp")
    assert params["down"].names == ("expert", "expert_mlp", "expert_embed")
    values = nn.meta.unbox(params)
    assert np.std(values["gate"]) == pytest.approx(32**-0.5, rel=0.03)
    assert np.std(values["down"]) == pytest.approx(64**-0.5, rel=0.03)
    assert len({float(v) for v in np.asarray(values["gate"])[:, 0, 0]}) == 8

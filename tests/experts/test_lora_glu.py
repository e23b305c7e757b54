"""Routed experts with LoRA against the same experts with merged matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.experts.glu import GLU
from moejax.experts.lora_glu import LoRAGLU, RsLoRAGLU
from moejax.verification.contracts.cases import quick_jit, random_variables

E, D, F, T, K = 4, 8, 6, 10, 2
RNG = np.random.default_rng(0)
ROWS = jnp.asarray(RNG.standard_normal((T, D)), jnp.float32)
IDS = jnp.asarray(RNG.integers(0, E + 1, (T, K)), jnp.int32)  # E is an empty slot
GATE = jnp.asarray(RNG.random((T, K)), jnp.float32)


def run(form, variables):
    def call(variables, rows):
        weights, _, compute = form.apply(variables, E, D)
        return compute(rows, IDS, GATE, weights)

    return quick_jit(call)(variables, ROWS)


def merged_params(form, variables):
    params = dict(variables["params"])
    for name in ("gate", "up", "down"):
        if f"{name}_a" in variables["lora"]:
            a, b = (variables["lora"][f"{name}_{factor}"] for factor in "ab")
            params[name] = form.merged(params[name], a, b)
    return {"params": params}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"share_a": True},
        {"share_a": True, "share_b": True},
        {"use_bias": True, "activation": "swiglu_clamped"},
        {"targets": ("up",)},
    ],
)
def test_equals_experts_with_merged_matrices(settings):
    form = LoRAGLU(d_ff=F, rank=2, alpha=3.0, **settings)
    variables = random_variables(form, E, D)
    plain = GLU(
        d_ff=F,
        use_bias=settings.get("use_bias", False),
        activation=settings.get("activation", "silu"),
    )
    expected = run(plain, merged_params(form, variables))
    np.testing.assert_allclose(run(form, variables), expected, rtol=2e-5, atol=2e-6)
    assert np.abs(run(plain, {"params": variables["params"]}) - expected).max() > 0.1


def test_the_rank_stabilised_form_divides_by_the_root():
    form, other = RsLoRAGLU(d_ff=F, rank=4, alpha=3.0), LoRAGLU(d_ff=F, rank=4, alpha=6.0)
    variables = random_variables(form, E, D)
    np.testing.assert_array_equal(run(form, variables), run(other, variables))
    merged = run(GLU(d_ff=F), merged_params(form, variables))
    np.testing.assert_allclose(run(form, variables), merged, rtol=2e-5, atol=2e-6)


def test_shared_factors_are_stored_once():
    form = LoRAGLU(d_ff=F, rank=2, share_a=True)
    shapes = jax.tree.map(jnp.shape, random_variables(form, E, D)["lora"])
    assert shapes["gate_a"] == (1, D, 2)
    assert shapes["gate_b"] == (E, 2, F)
    assert shapes["down_a"] == (1, F, 2)


def test_fresh_experts_give_what_plain_ones_give():
    form, plain = LoRAGLU(d_ff=F, rank=2), GLU(d_ff=F)
    draw = lambda form: quick_jit(lambda key: form.init(key, E, D))
    variables = draw(form)(jax.random.key(0))
    base = draw(plain)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, variables["params"], base["params"])
    np.testing.assert_array_equal(run(form, variables), run(plain, base))


def test_a_rank_of_zero_is_an_error():
    with pytest.raises(UserError, match="adapter.experts.rank=0 must be at least 1"):
        LoRAGLU(d_ff=F, rank=0).init(jax.random.key(0), E, D)


def test_the_gradient_of_a_bias_counts_all_rows_in_bfloat16():
    """A sum in bfloat16 stops growing at 256."""
    form, num_rows = LoRAGLU(d_ff=F, rank=2, use_bias=True), 1024
    variables = random_variables(form, E, D)
    ids, gate = jnp.zeros((num_rows, 1), jnp.int32), jnp.ones((num_rows, 1))

    def total(params):
        weights, _, compute = form.apply(variables | {"params": params}, E, D)
        rows = jnp.zeros((num_rows, D), jnp.bfloat16)
        return compute(rows, ids, gate, weights).astype(jnp.float32).sum()

    gradient = quick_jit(jax.grad(total))(variables["params"])["down_bias"]
    np.testing.assert_array_equal(gradient, np.full((E, D), num_rows) * np.eye(E, 1))

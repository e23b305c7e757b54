"""What every transport promises; found by walking the package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax.transport
from moejax.types import Routing
from tests.contract import methods, quick_jit

NUM_TOKENS, NUM_EXPERTS, K, D_MODEL = 10, 4, 2, 3


@pytest.fixture(scope="module", params=methods(moejax.transport))
def transport(request):
    return request.param


def compute(rows, local_ids, gate, weights):
    """Expert e multiplies by its weight `[E, D]`; an id outside is an empty slot."""
    one_hot = local_ids[..., None] == jnp.arange(weights.shape[0])
    picked = jnp.where(one_hot, gate[..., None], 0).sum(axis=1)  # [R, E]
    return rows * (picked @ weights)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((NUM_TOKENS, D_MODEL)).astype(np.float32)
    weights = rng.standard_normal((NUM_EXPERTS, D_MODEL)).astype(np.float32)
    experts = np.stack([rng.permutation(NUM_EXPERTS)[:K] for _ in range(NUM_TOKENS)])
    experts[3] = experts[4, 0] = NUM_EXPERTS  # empty slots
    gate = np.where(experts < NUM_EXPERTS, rng.random((NUM_TOKENS, K)), 0).astype(np.float32)
    probs = jnp.full((NUM_TOKENS, NUM_EXPERTS), 1 / NUM_EXPERTS)
    experts = jnp.asarray(experts, jnp.int32)
    gate = jnp.asarray(gate)
    routing = Routing(experts=experts, weights=gate, probs=probs, logits=probs, extras={})
    return x, routing, weights


def expected(x, routing, weights):
    y = np.zeros_like(x)
    for t in range(NUM_TOKENS):
        for e, g in zip(np.asarray(routing.experts[t]), routing.weights[t], strict=True):
            if e < NUM_EXPERTS:
                y[t] += g * x[t] * weights[e]
    return y


def test_every_choice_is_computed_where_the_token_is(transport, inputs):
    y, counts = quick_jit(lambda *a: transport(*a, compute))(*inputs)
    np.testing.assert_allclose(y, expected(*inputs), rtol=1e-5, atol=1e-6)
    assert int(counts["dropped"]) == 0


def test_gradients_are_those_of_the_dense_formula(transport, inputs):
    x, routing, weights = inputs

    def loss(apply, x, gate, weights):
        same = Routing(**(vars(routing) | {"weights": gate}))
        return jnp.sum(jnp.sin(apply(x, same, weights)))

    through = lambda x, r, w: transport(x, r, w, compute)[0]
    direct = lambda x, r, w: compute(x, r.experts, r.weights, w)
    gradients = [
        quick_jit(jax.grad(lambda *a, f=f: loss(f, *a), argnums=(0, 1, 2)))(
            x, routing.weights, weights
        )
        for f in (through, direct)
    ]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

"""What every transport promises on one device; `moejax verify CONFIG` asks the rest on many."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.types import Routing
from moejax.verification.contracts.cases import quick_jit, require

NUM_TOKENS, NUM_EXPERTS, K, D_MODEL = 10, 4, 2, 3


class Case:
    """A transport, and a routing with empty slots for experts that scale their rows."""

    def __init__(self, transport: Any):
        self.transport = transport
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((NUM_TOKENS, D_MODEL)).astype(np.float32)
        self.weights = rng.standard_normal((NUM_EXPERTS, D_MODEL)).astype(np.float32)
        experts = np.stack([rng.permutation(NUM_EXPERTS)[:K] for _ in range(NUM_TOKENS)])
        experts[3] = experts[4, 0] = NUM_EXPERTS  # empty slots
        gate = np.where(experts < NUM_EXPERTS, rng.random((NUM_TOKENS, K)), 0)
        unused = jnp.full((NUM_TOKENS, NUM_EXPERTS), 1 / NUM_EXPERTS)
        self.routing = Routing(
            experts=jnp.asarray(experts, jnp.int32),
            weights=jnp.asarray(gate, jnp.float32),
            probs=unused,
            logits=unused,
            extras={},
        )


def compute(rows: Any, local_ids: Any, gate: Any, weights: Any) -> Any:
    """Expert e multiplies by its weight `[E, D]`; an id outside is an empty slot."""
    one_hot = local_ids[..., None] == jnp.arange(weights.shape[0])
    picked = jnp.where(one_hot, gate[..., None], 0).sum(axis=1)  # [R, E]
    return rows * (picked @ weights)


def every_choice_is_computed_where_the_token_is(case: Case) -> None:
    """Each token gets the weighted sum of its experts' results, and `dropped` is 0."""
    run = quick_jit(lambda *args: case.transport(*args, compute, axes=None))
    y, counts = run(case.x, case.routing, case.weights)
    expected = np.zeros_like(case.x)
    for t in range(NUM_TOKENS):
        choices = zip(np.asarray(case.routing.experts[t]), case.routing.weights[t], strict=True)
        for e, g in choices:
            if e < NUM_EXPERTS:
                expected[t] += g * case.x[t] * case.weights[e]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    require(int(counts["dropped"]) == 0, f"{counts['dropped']} choices were dropped")


def gradients_are_those_of_the_dense_formula(case: Case) -> None:
    """In tokens, routing weights and experts' weights."""

    def loss(apply, x, gate, weights):
        same = Routing(**(vars(case.routing) | {"weights": gate}))
        return jnp.sum(jnp.sin(apply(x, same, weights)))

    through = lambda x, r, w: case.transport(x, r, w, compute, axes=None)[0]
    direct = lambda x, r, w: compute(x, r.experts, r.weights, w)
    gradients = [
        quick_jit(jax.grad(lambda *a, f=f: loss(f, *a), argnums=(0, 1, 2)))(
            case.x, case.routing.weights, case.weights
        )
        for f in (through, direct)
    ]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


CHECKS = (every_choice_is_computed_where_the_token_is, gradients_are_those_of_the_dense_formula)

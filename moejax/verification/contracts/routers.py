"""What every router promises."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moejax.interventions.add import Add
from moejax.types import Routing
from moejax.verification.contracts.cases import (
    float_dtypes,
    make_context,
    quick_jit,
    random_variables,
    require,
    require_finite,
    to_dtype,
)

NUM_EXPERTS, D_MODEL = 8, 16
MASK = np.array([[True] * 6, [True] * 4 + [False] * 2])


class Case:
    """A router with parameters, compiled once, and its input `[T, D]`."""

    def __init__(self, router: nn.Module):
        self.router = router
        self.context = make_context(MASK, num_experts=NUM_EXPERTS)
        if hasattr(router, "initial_carry"):
            self.context = self.context.replace(router_carry=router.initial_carry(MASK.size))
        self.x = np.random.default_rng(0).standard_normal((MASK.size, D_MODEL)).astype(np.float32)
        self.variables = random_variables(router, self.x, self.context)
        self.call = lambda variables, x, context: router.apply(variables, x, context)[0]
        self.run = quick_jit(self.call)
        self.routing: Routing = self.run(self.variables, self.x, self.context)


def _valid(tree):
    """The rows of real tokens."""
    return jax.tree.map(lambda a: np.asarray(a)[MASK.reshape(-1)], tree)


def _per_token(routing: Routing):
    return (routing.experts, routing.weights, routing.probs, routing.logits)


def routing_is_well_formed(case: Case) -> None:
    """int32 choices, no expert twice, weights finite and zero in empty slots, probs sum to 1."""
    experts, weights, probs, logits = _valid(_per_token(case.routing))
    require(experts.dtype == np.int32, f"experts are {experts.dtype}, not int32")
    require(experts.shape == weights.shape, "experts and weights differ in shape")
    shape = (MASK.sum(), NUM_EXPERTS)
    require(probs.shape == logits.shape == shape, "probs and logits must be [T, E]")
    empty = (experts < 0) | (experts >= NUM_EXPERTS)
    require(
        np.isfinite(weights).all() and (weights >= 0).all(), "a weight is negative or not finite"
    )
    require((weights[empty] == 0).all(), "an empty slot has a weight")
    require((weights[~empty] > 0).any(), "no choice has a weight")
    for row, unused in zip(experts, empty, strict=True):
        require(len(set(row[~unused])) == (~unused).sum(), "a token chose an expert twice")
    require((probs >= 0).all(), "a probability is negative")
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)


def padding_changes_nothing(case: Case) -> None:
    """Neither numbers nor NaN at padding reach a real token or a statistic."""
    for junk in (7.0, np.nan):
        x = np.where(MASK.reshape(-1, 1), case.x, junk).astype(np.float32)
        other = case.run(case.variables, x, case.context)
        for a, b in zip(_valid(_per_token(case.routing)), _valid(_per_token(other)), strict=True):
            np.testing.assert_array_equal(a, b)
        summed = lambda r: {k: v for k, v in r.extras.items() if k != "log_prob"}
        jax.tree.map(np.testing.assert_array_equal, summed(case.routing), summed(other))


def permuting_tokens_permutes_the_routing(case: Case) -> None:
    """No token's decision depends on where it stands."""
    order = np.random.default_rng(1).permutation(MASK.size)
    context = make_context(MASK.reshape(-1)[order].reshape(MASK.shape), num_experts=NUM_EXPERTS)
    shuffled = lambda a: jnp.asarray(a).reshape(-1)[order].reshape(MASK.shape)
    context = context.replace(
        positions=shuffled(case.context.positions),
        token_ids=shuffled(case.context.token_ids),
        router_carry=jax.tree.map(lambda a: a[order], case.context.router_carry),
    )
    permuted = case.run(case.variables, case.x[order], context)
    for a, b in zip(_per_token(case.routing), _per_token(permuted), strict=True):
        np.testing.assert_allclose(np.asarray(a)[order], b, rtol=1e-5, atol=1e-6)


def bf16_input_is_routed_in_float32(case: Case) -> None:
    """Scores and weights of bfloat16 tokens are those of the same tokens in float32."""
    x = jnp.asarray(case.x, jnp.bfloat16)
    routing = case.run(case.variables, x, case.context)
    expected = case.run(case.variables, x.astype(jnp.float32), case.context)
    found = {str(v.dtype) for v in (routing.weights, routing.probs, routing.logits)}
    require(found == {"float32"}, f"the routing is in {', '.join(sorted(found))}")
    for a, b in zip(_per_token(routing), _per_token(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def float64_stays_float64(case: Case) -> None:
    """No intermediate of a float64 run is narrower."""
    with jax.enable_x64(True):
        variables, x = to_dtype((case.variables, case.x), jnp.float64)
        context = case.context.replace(router_carry=to_dtype(case.context.router_carry, "float64"))
        found = float_dtypes(case.call, variables, x, context)
    require(found == {"float64"}, f"a float64 run computes in {', '.join(sorted(found))}")


def gradients_are_finite_and_not_all_zero(case: Case) -> None:
    """The weights differentiate, in parameters and tokens."""
    probe = jnp.asarray(np.random.default_rng(2).standard_normal(case.routing.weights.shape))

    def loss(variables, x):
        routing = case.call(variables, x, case.context)
        return jnp.sum(jnp.where(MASK.reshape(-1, 1), routing.weights * probe, 0))

    gradients = quick_jit(jax.grad(loss, argnums=(0, 1)))(case.variables, case.x)
    require_finite(gradients, what="the gradient of ", not_zero=False)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(gradients))
    require(largest > 0, "every gradient is zero")


def initial_values_do_not_depend_on_x64(case: Case) -> None:
    """A float64 run starts from the same parameters."""
    draw = lambda: quick_jit(case.router.init)(jax.random.key(0), case.x, case.context)
    narrow = draw()
    with jax.enable_x64(True):
        wide = draw()
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)


def given_choices_are_replayed_with_their_own_weights(case: Case) -> None:
    """Another run's choices (`context.selection`) replace the router's; scores stay its own."""
    experts = case.routing.experts
    other = (experts + 1) % NUM_EXPERTS
    replayed = case.run(case.variables, case.x, case.context.replace(selection=other))
    np.testing.assert_array_equal(replayed.experts, other)
    require_finite(_valid(replayed.weights), what="the replayed weights")
    same = case.run(case.variables, case.x, case.context.replace(selection=experts))
    for a, b in zip(_valid(_per_token(same)), _valid(_per_token(case.routing)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def an_intervention_comes_before_anything_else(case: Case) -> None:
    """`context.intervention` that adds zero changes no bit; much for an expert selects it."""
    delta = np.zeros((MASK.size, NUM_EXPERTS), np.float32)
    run = lambda delta: case.run(
        case.variables,
        case.x,
        case.context.replace(intervention=Add(delta=jnp.asarray(delta).reshape(*MASK.shape, -1))),
    )
    same = run(delta)
    for a, b in zip(_valid(_per_token(same)), _valid(_per_token(case.routing)), strict=True):
        np.testing.assert_array_equal(a, b)
    wanted = np.arange(MASK.size) % NUM_EXPERTS
    delta[np.arange(MASK.size), wanted] = 30
    moved = run(delta)
    chosen = (np.asarray(moved.experts) == wanted[:, None]).any(axis=-1)
    require(_valid(chosen).all(), "a token does not choose the expert whose logit was raised")
    np.testing.assert_allclose(
        _valid(moved.logits), _valid(case.routing.logits + delta), rtol=1e-5, atol=1e-5
    )


CHECKS = (
    routing_is_well_formed,
    padding_changes_nothing,
    permuting_tokens_permutes_the_routing,
    bf16_input_is_routed_in_float32,
    float64_stays_float64,
    gradients_are_finite_and_not_all_zero,
    initial_values_do_not_depend_on_x64,
    given_choices_are_replayed_with_their_own_weights,
    an_intervention_comes_before_anything_else,
)

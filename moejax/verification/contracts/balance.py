"""What every balance rule promises."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.balance.rule import Rule
from moejax.models.moe import without_padding
from moejax.types import Routing, add_terms, mean
from moejax.verification.contracts.cases import (
    float_dtypes,
    make_context,
    quick_jit,
    require,
    require_finite,
)

NUM_EXPERTS, K = 8, 2
MASK = np.ones((4, 6), bool)
MASK[1, 4:] = MASK[2, 1:] = False


class Case:
    """A rule, and router logits `[B, S, E]` for it."""

    def __init__(self, rule: Rule):
        self.rule = rule
        rng = np.random.default_rng(0)
        self.logits = rng.standard_normal((*MASK.shape, NUM_EXPERTS)).astype(np.float32)

    def terms(self, logits: Any, mask: Any = MASK, **context: Any):
        """The rule's terms for a softmax top-k routing of the logits."""
        context = make_context(mask, **context)
        state = self.rule.state(NUM_EXPERTS)
        return quick_jit(lambda z: self.rule.terms(make_routing(z, mask), context, state))(logits)


def make_routing(logits: Any, mask: Any) -> Routing:
    """Softmax top-k of these logits `[B, S, E]`, as the MoE layer hands it to the rules."""
    mask = jnp.asarray(mask)
    logits = jnp.asarray(logits).reshape(-1, NUM_EXPERTS)
    probs = jax.nn.softmax(logits)
    weights, experts = jax.lax.top_k(probs, K)
    routing = Routing(experts=experts, weights=weights, probs=probs, logits=logits, extras={})
    return without_padding(routing, mask.reshape(-1))


def loads(routing: Routing) -> np.ndarray:
    """Choices per expert."""
    count = np.bincount(np.asarray(routing.experts).reshape(-1), minlength=NUM_EXPERTS + 1)
    return count[:NUM_EXPERTS]


def terms_are_named_sums_and_counts_with_a_weight(case: Case) -> None:
    """A rule with a name gives one finite (sum, count) over the real tokens, and has a weight."""
    terms = case.terms(case.logits)
    expected = {case.rule.name} if case.rule.name else set()
    require(set(terms) == expected, f"terms {set(terms)}, but the rule's name is {expected}")
    for total, count in terms.values():
        require(total.shape == count.shape == (), "a term's sum and count must be scalars")
        require(np.isfinite(total), "a term's sum is not finite")
        require(count == MASK.sum(), f"counts {count} tokens of {MASK.sum()}")
        require(case.rule.weight > 0, "a rule with a name needs a weight above 0")


def padding_changes_nothing(case: Case) -> None:
    """NaN logits at padding change no bit of any term."""
    junk = np.where(MASK[..., None], case.logits, np.float32(np.nan))
    jax.tree.map(np.testing.assert_array_equal, case.terms(case.logits), case.terms(junk))


def sums_add_up_over_microbatches_unless_declared_otherwise(case: Case) -> None:
    """Given the global loads, the terms of parts add up; `mesh_dependent` says if they do not."""
    routing = make_routing(case.logits, MASK)
    share = jnp.asarray(loads(routing) / loads(routing).sum(), jnp.float32)
    whole = case.terms(case.logits, loads=share)
    parts = [
        case.terms(case.logits[i : i + 2], MASK[i : i + 2], loads=share) for i in range(0, 4, 2)
    ]
    added = add_terms(*parts)
    close = jax.tree.leaves(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5), whole, added))
    require(
        all(close) != case.rule.mesh_dependent,
        f"terms of two halves {'add' if all(close) else 'do not add'} up to the whole's, and "
        f"mesh_dependent is {case.rule.mesh_dependent}",
    )


def gradients_are_finite(case: Case) -> None:
    """And zero at padding."""
    rule = case.rule

    def loss(z):
        terms = rule.terms(make_routing(z, MASK), make_context(MASK), rule.state(NUM_EXPERTS))
        return sum((mean(term) for term in terms.values()), jnp.zeros(()))

    gradient = np.asarray(quick_jit(jax.grad(loss))(case.logits))
    require_finite(gradient, what="the gradient", not_zero=False)
    require((gradient[~MASK] == 0).all(), "padding has a gradient")


def the_state_keeps_its_structure_and_survives_an_empty_step(case: Case) -> None:
    """Shapes and dtypes stay, and a step without tokens changes nothing."""
    rule, state = case.rule, case.rule.state(NUM_EXPERTS)
    stats = {"load": jnp.asarray(loads(make_routing(case.logits, MASK)), jnp.int32)}
    updated = jax.jit(rule.update)(state, stats)
    form = lambda tree: jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)
    require(form(updated) == form(state), f"{form(state)} became {form(updated)}")
    require_finite(updated, what="the state", not_zero=False)
    again = rule.update(updated, {"load": jnp.zeros(NUM_EXPERTS, jnp.int32)})
    jax.tree.map(np.testing.assert_array_equal, again, updated)


def selection_bias_is_none_or_one_number_per_expert(case: Case) -> None:
    """What is added to the router's scores has the shape [E]."""
    bias = case.rule.selection_bias(case.rule.state(NUM_EXPERTS))
    require(bias is None or bias.shape == (NUM_EXPERTS,), "the selection bias is not [E]")


def float64_stays_float64(case: Case) -> None:
    """No intermediate of a float64 run is narrower."""
    rule = case.rule
    with jax.enable_x64(True):
        state = jax.tree.map(lambda a: a.astype(jnp.float64), rule.state(NUM_EXPERTS))

        def run(z, state):
            routing = make_routing(z, MASK)
            stats = {"load": jnp.ones(NUM_EXPERTS, jnp.int32)}
            return rule.terms(routing, make_context(MASK), state), rule.update(state, stats)

        found = float_dtypes(run, jnp.asarray(case.logits, jnp.float64), state)
    require(found == {"float64"}, f"a float64 run computes in {', '.join(sorted(found))}")


CHECKS = (
    terms_are_named_sums_and_counts_with_a_weight,
    padding_changes_nothing,
    sums_add_up_over_microbatches_unless_declared_otherwise,
    gradients_are_finite,
    the_state_keeps_its_structure_and_survives_an_empty_step,
    selection_bias_is_none_or_one_number_per_expert,
    float64_stays_float64,
)

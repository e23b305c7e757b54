"""The MoE layer: what it adds up, and that padding reaches nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax.routers
from moejax.balance.load_balance import (
    LaggedLoadBalance,
    SequenceLoadBalance,
    ShardLoadBalance,
    TwoPassLoadBalance,
)
from moejax.balance.loss_free import LossFreeBias
from moejax.balance.unbalanced import Unbalanced
from moejax.balance.z_loss import RouterZLoss
from moejax.errors import UserError
from moejax.models.block import Block
from moejax.models.moe import without_padding
from moejax.routers.topk import TopK
from moejax.types import Routing
from moejax.verification.contracts.cases import make_context, quick_jit, random_variables
from tests.contract import methods
from tests.models.tiny_model import attention, moe

MASK = np.array([[True] * 5, [True] * 3 + [False] * 2])
SEGMENTS = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])
RULES = (
    SequenceLoadBalance(weight=1.0),
    ShardLoadBalance(weight=1.0),
    TwoPassLoadBalance(weight=1.0),
    LaggedLoadBalance(weight=1.0),
    RouterZLoss(weight=1.0),
    LossFreeBias(),
)


class Case:
    """A block around one router with every rule at once; `run` gives its outputs and gradients."""

    def __init__(self, router):
        self.context = make_context(MASK, segment_ids=SEGMENTS)
        if hasattr(router, "initial_carry"):
            self.context = self.context.replace(router_carry=router.initial_carry(MASK.size))
        self.x = np.random.default_rng(0).standard_normal((*MASK.shape, 16)).astype(np.float32)
        block = Block(attention=attention(), ffn=moe(router=router, balance=RULES))
        try:
            self.variables = random_variables(block, self.x, self.context)
        except UserError as error:
            if "no place for a selection bias" not in str(error):
                raise
            block = Block(attention=attention(), ffn=moe(router=router, balance=RULES[:-1]))
            self.variables = random_variables(block, self.x, self.context)

        def loss(params, state, x):
            y, terms, stats, _ = block.apply({"params": params, **state}, x, self.context)
            total = jnp.sum(jnp.where(MASK[..., None], jnp.sin(y), 0))
            return total + sum(s / c for s, c in terms.values()), (y, terms, stats)

        self._grad = quick_jit(jax.value_and_grad(loss, argnums=(0, 2), has_aux=True))

    def run(self, x):
        """((y, terms, stats), gradients of parameters and x)."""
        state = {k: v for k, v in self.variables.items() if k != "params"}
        (_, aux), gradients = self._grad(self.variables["params"], state, x)
        return aux, gradients


@pytest.fixture(scope="module", params=methods(moejax.routers))
def case(request):
    return Case(request.param)


def test_nan_in_padding_changes_no_output_term_statistic_or_gradient(case):
    (y, terms, stats), gradients = case.run(case.x)
    nan = np.where(MASK[..., None], case.x, np.nan).astype(np.float32)
    (y2, terms2, stats2), gradients2 = case.run(nan)
    np.testing.assert_array_equal(np.asarray(y)[MASK], np.asarray(y2)[MASK])
    jax.tree.map(np.testing.assert_array_equal, (terms, stats), (terms2, stats2))
    jax.tree.map(np.testing.assert_array_equal, gradients, gradients2)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_statistics_count_real_tokens(case):
    (_, _, stats), _ = case.run(case.x)
    assert stats["tokens"] == MASK.sum()
    assert stats["load"].sum() + stats["dropped"] <= 2 * MASK.sum()
    assert 0 <= stats["entropy"] / MASK.sum() <= np.log(4)
    assert stats["dropped"] == 0


def test_topk_uses_every_slot_and_entropy_is_in_nats():
    """A router of zeros is uniform, and ties go to the lower expert."""
    layer, context = moe(shared=None, balance=(Unbalanced(),)), make_context(MASK)
    x = jnp.ones((*MASK.shape, 16))
    variables = random_variables(layer, x, context)
    params = variables["params"] | {"router": {"kernel": jnp.zeros((16, 4))}}
    _, _, stats, _ = quick_jit(lambda p: layer.apply({"params": p}, x, context))(params)
    np.testing.assert_array_equal(stats["load"], [MASK.sum(), MASK.sum(), 0, 0])
    assert float(stats["entropy"]) == pytest.approx(MASK.sum() * np.log(4), rel=1e-6)


def test_padding_is_routed_nowhere():
    nan = jnp.full((3, 4), jnp.nan)
    routing = Routing(
        experts=jnp.ones((3, 2), jnp.int32),
        weights=nan[:, :2],
        probs=nan,
        logits=nan,
        extras={},
    )
    routing = without_padding(routing, jnp.array([True, False, False]))
    np.testing.assert_array_equal(routing.experts, [[1, 1], [4, 4], [4, 4]])
    for values in (routing.weights, routing.probs, routing.logits):
        assert np.isnan(values[0]).all()
        np.testing.assert_array_equal(values[1:], 0)


X = jnp.zeros((1, 2, 16))
CONTEXT = make_context(np.ones((1, 2), bool))


def build(layer):
    return jax.eval_shape(lambda: layer.init(jax.random.key(0), X, CONTEXT))


def test_balancing_must_be_stated_once():
    with pytest.raises(UserError, match="ffn.balance is empty"):
        build(moe(balance=()))
    with pytest.raises(UserError, match="has a rule twice among router_z, router_z"):
        build(moe(balance=(RouterZLoss(weight=1.0), RouterZLoss(weight=2.0))))
    assert "router_state" not in build(moe(balance=(Unbalanced(),)))


def test_extras_may_not_shadow_the_layers_statistics():
    class Loud(TopK):
        def __call__(self, x, context):
            routing, carry = super().__call__(x, context)
            return dataclasses.replace(routing, extras={"load": jnp.zeros(4)}), carry

    with pytest.raises(ValueError, match="names of the layer: load"):
        build(moe(router=Loud(k=2)))


def test_extras_reach_the_statistics_but_log_prob_does_not():
    class Chatty(TopK):
        def __call__(self, x, context):
            routing, carry = super().__call__(x, context)
            extras = {"margin": (jnp.ones(()), jnp.ones(())), "log_prob": routing.logits}
            return dataclasses.replace(routing, extras=extras), carry

    layer = moe(router=Chatty(k=2))
    stats = jax.eval_shape(lambda: layer.init_with_output(jax.random.key(0), X, CONTEXT)[0][2])
    assert "margin" in stats
    assert "log_prob" not in stats


def test_update_changes_each_rules_own_state_only():
    layer = moe(balance=(LossFreeBias(rate=1.0), LaggedLoadBalance(weight=1.0)))
    state = {
        "balance_0_correction_bias": jnp.zeros(4),
        "balance_1_previous_share": jnp.full(4, 0.25),
    }
    new = layer.update_router_state(state, {"load": jnp.array([4, 0, 0, 0])})
    np.testing.assert_array_equal(new["balance_0_correction_bias"], [-1, 1, 1, 1])
    np.testing.assert_array_equal(new["balance_1_previous_share"], [1, 0, 0, 0])
    frozen = layer.update_router_state(state, {"load": jnp.array([4, 0, 0, 0])}, frozen=True)
    np.testing.assert_array_equal(frozen["balance_0_correction_bias"], np.zeros(4))
    np.testing.assert_array_equal(frozen["balance_1_previous_share"], [1, 0, 0, 0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Misnamed(LossFreeBias):
    def state(self, num_experts):
        return {"push": jnp.zeros(num_experts)}

    def selection_bias(self, state):
        return state["push"]


def test_what_selects_has_its_name():
    with pytest.raises(UserError, match="Misnamed keeps what it adds to selection as push: name"):
        jax.eval_shape(moe(balance=(Misnamed(),)).init, jax.random.key(0), X, CONTEXT)

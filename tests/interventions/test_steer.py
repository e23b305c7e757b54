"""Steering: properties that the paper's definition implies, on random logits and in a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.interventions.stacked import stacked
from moejax.interventions.steer import Steer
from moejax.routers.topk import TopK
from moejax.verification.contracts.cases import make_context, quick_jit
from tests.models.tiny_model import moe, random_model_variables, tiny

E, T, K = 8, 200, 3
LOGITS = np.random.default_rng(0).normal(size=(T, E)).astype(np.float32) * 3
CONTEXT = make_context(np.ones((1, T), bool), num_experts=E)


def steered(*, soft=(), hard=(), logits=LOGITS):
    """`soft` and `hard` are (expert, value) pairs."""
    vectors = [np.zeros(E, np.float32), np.zeros(E, np.float32)]
    for vector, pairs in zip(vectors, (soft, hard), strict=True):
        for expert, value in pairs:
            vector[expert] = value
    return np.asarray(Steer(soft=vectors[0], hard=vectors[1])(jnp.asarray(logits), CONTEXT))


def chosen(logits):
    return np.sort(np.argsort(-logits, axis=-1, kind="stable")[:, :K], axis=-1)


def test_nothing_to_steer_changes_no_bit():
    np.testing.assert_array_equal(steered(), LOGITS)


def test_a_soft_step_is_so_many_standard_deviations():
    moved = steered(soft=[(2, 0.5), (5, -1.0)])
    spread = LOGITS.astype(np.float64).std(axis=-1)
    np.testing.assert_allclose(moved[:, 2] - LOGITS[:, 2], 0.5 * spread, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moved[:, 5] - LOGITS[:, 5], -spread, rtol=1e-4, atol=1e-5)
    others = np.delete(np.arange(E), [2, 5])
    np.testing.assert_array_equal(moved[:, others], LOGITS[:, others])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_hard_step_makes_the_choice_certain_and_changes_at_most_one_other(scale):
    logits = LOGITS * scale
    before, after = chosen(logits), chosen(steered(hard=[(6, 1)], logits=logits))
    assert (after == 6).any(axis=-1).all()
    kept = [len(set(a) & set(b)) for a, b in zip(before, after, strict=True)]
    assert min(kept) == K - 1 < max(kept)
    away = chosen(steered(hard=[(6, -1)], logits=logits))
    assert (before == 6).any()
    assert not (away == 6).any()


def test_experts_steered_alike_keep_their_order():
    moved = steered(hard=[(1, 1), (4, 1)])
    assert (chosen(moved)[:, None] == np.array([1, 4])[:, None]).any(-1).all()
    apart = np.abs(LOGITS[:, 1] - LOGITS[:, 4]) > 2
    np.testing.assert_array_equal(
        (moved[:, 1] > moved[:, 4])[apart], (LOGITS[:, 1] > LOGITS[:, 4])[apart]
    )


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_router_chooses_the_best_of_those_that_are_steered_alike(score, scale):
    """8 of 64: of half of them that are up, of half that are not down, and of all but 4 down."""
    order = np.stack([np.random.default_rng(t).permutation(64) for t in range(50)])
    logits = jnp.asarray(scale * (order - 32) / 16, jnp.float32)
    context = make_context(np.ones((1, 50), bool), num_experts=64)
    router = TopK(k=8, score=score)

    @quick_jit
    def route(hard):
        steer = Steer(soft=jnp.zeros(64), hard=hard)
        variables = {"params": {"kernel": logits}}
        return router.apply(variables, jnp.eye(50), context.replace(intervention=steer))[0].experts

    first = lambda num: (np.arange(64) < num).astype(np.float32)
    best = lambda own: np.argsort(-own, axis=-1)[:, :8]
    np.testing.assert_array_equal(route(first(32)), best(order[:, :32]))
    np.testing.assert_array_equal(route(-first(32)), best(order[:, 32:]) + 32)
    np.testing.assert_array_equal(route(-first(60))[:, 4:], best(order[:, :60])[:, :4])


def test_equal_logits_are_steered_too():
    moved = steered(hard=[(3, 1), (0, -1)], logits=np.full((T, E), 2.0, np.float32))
    assert (moved.argmax(-1) == 3).all()
    assert (moved.argmin(-1) == 0).all()


def test_only_the_named_layers_of_a_model_are_steered():
    model = tiny(ffn=moe())
    variables = random_model_variables(model)
    tokens = np.random.default_rng(1).integers(1, 16, (2, 6))
    layers = list(model.moe_layers)
    num_experts = model.moe.num_experts
    off = Steer(soft=jnp.zeros(num_experts), hard=jnp.zeros(num_experts))
    on = Steer(soft=jnp.zeros(num_experts), hard=jnp.zeros(num_experts).at[1].set(1))
    chosen = stacked(model, {layers[-1]: on}, elsewhere=off)

    @quick_jit
    def run(intervention):
        out = model.apply(variables, tokens, intervention=intervention, record=True)
        by_layer = {
            layer: jax.tree.map(lambda a, row=row: a[row], out.stats[name]["trace"])
            for layer, (name, row) in model.moe_layers.items()
        }
        return out.logits, by_layer

    base, steered = run(stacked(model, {}, elsewhere=off)), run(chosen)
    for layer in layers[:-1]:
        jax.tree.map(np.testing.assert_array_equal, base[1][layer], steered[1][layer])
    assert not (np.asarray(base[1][layers[-1]]["experts"]) == 1).any(-1).all()
    assert (np.asarray(steered[1][layers[-1]]["experts"]) == 1).any(-1).all()
    assert not np.array_equal(base[0], steered[0])
    with pytest.raises(UserError, match=r"layer 99 has no router: the MoE layers are \d to \d"):
        stacked(model, {99: on}, elsewhere=off)

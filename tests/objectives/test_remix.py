"""RLOO: its gradient is that of the expected loss, by enumeration of every choice."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.adapters.remix import ReMix, log_probability
from moejax.errors import UserError
from moejax.layers.mixing.bank import LoRABank
from moejax.models.adapter import Adapter
from moejax.objectives.lm import NextToken
from moejax.objectives.remix import RLOO, leave_one_out
from moejax.objectives.roma import RoMA
from moejax.types import Batch
from moejax.verification.contracts.cases import quick_jit
from tests.models.tiny_model import VOCAB, dense, random_model_variables

TUPLES = np.array(list(itertools.permutations(range(4), 2)))  # ordered choices of 2 of 4
LOSSES = np.random.default_rng(0).standard_normal(len(TUPLES))


def probabilities(logits):
    repeated = jnp.broadcast_to(logits, (len(TUPLES), 1, 4))
    return jnp.exp(log_probability(repeated, jnp.asarray(TUPLES)[:, None])[:, 0])


@pytest.mark.parametrize("num_draws", [2, 3])
def test_its_expectation_is_the_gradient_of_the_expected_loss(num_draws):
    """Over all of the 12^M outcomes, weighted by what each is worth; and finite differences."""
    with jax.enable_x64(True):
        logits = jnp.asarray([0.3, -0.5, 0.1, 0.8])
        table = jnp.asarray(LOSSES)
        outcomes = np.array(list(itertools.product(range(len(TUPLES)), repeat=num_draws)))
        chance = probabilities(logits)[outcomes].prod(axis=1)

        def expected_surrogate(logits):
            log_prob = jnp.log(probabilities(logits))[outcomes]
            return (chance * leave_one_out(table[outcomes], log_prob)).sum()

        found = quick_jit(jax.grad(expected_surrogate))(logits)
        loss = quick_jit(lambda logits: (probabilities(logits) * table).sum())
        exact = quick_jit(jax.grad(lambda logits: (probabilities(logits) * table).sum()))(logits)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-14)
        for i in range(4):
            step = np.eye(4)[i] * 1e-5
            difference = (loss(logits + step) - loss(logits - step)) / 2e-5
            np.testing.assert_allclose(found[i], difference, atol=1e-9)


def test_equal_losses_teach_nothing_and_a_constant_changes_nothing():
    log_prob = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4)))
    grad = quick_jit(jax.grad(lambda lp, losses: leave_one_out(losses, lp).sum()))
    assert not np.asarray(grad(log_prob, jnp.full((3, 4), 2.5))).any()
    losses = jnp.asarray(np.random.default_rng(2).integers(0, 8, (3, 4)), jnp.float32)
    np.testing.assert_array_equal(grad(log_prob, losses), grad(log_prob, losses + 16))


ADAPTER = Adapter(
    targets=("q_proj", "mlp.up_proj"), linear=ReMix(bank=LoRABank(num_adapters=4, rank=2))
)
MODEL = dense(adapter=ADAPTER)
BATCH = Batch(
    tokens=jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 6)), jnp.int32),
    targets=jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (2, 6)), jnp.int32),
    loss_mask=jnp.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool),
    segment_ids=jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]], jnp.int32),
    positions=jnp.asarray([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 0]], jnp.int32),
)


def result_of(objective, variables, key, model=MODEL):
    return objective(model, variables, BATCH, token_bytes=jnp.ones(VOCAB, jnp.int32), key=key)


@pytest.fixture(scope="module")
def variables():
    return random_model_variables(MODEL)


def test_the_loss_is_the_mean_over_draws_and_each_draw_is_a_rows_own(variables):
    objective = RLOO(num_draws=3)
    run = quick_jit(lambda v, key: result_of(objective, v, key))
    result = run(variables, jax.random.key(0))
    assert result.terms["lm"][1] == BATCH.loss_mask.sum()
    assert result.terms["policy"] == (0, BATCH.loss_mask.sum())
    assert result.measures["draw_spread"][0] > 0
    sizes = [k for k in result.measures if k.startswith("support_size")]
    assert sizes == ["support_size/0"]
    total, count = result.measures["support_size/0"]
    assert total == 2 * count  # k of every unit, exactly
    others = run(variables, jax.random.key(1))
    assert result.terms["lm"][0] != others.terms["lm"][0]


def test_the_router_learns_by_the_policy_term_alone_and_the_adapters_not_by_it(variables):
    objective = RLOO(num_draws=4)

    def term(lora, name):
        result = result_of(objective, variables | {"lora": lora}, jax.random.key(0))
        return result.terms[name][0]

    grad = quick_jit(jax.grad(term), static_argnums=1)
    for name, learns in (("lm", {"adapters"}), ("policy", {"routing"})):
        found = jax.tree_util.tree_leaves_with_path(grad(variables["lora"], name))
        moved = {p for p, g in found if np.abs(g).max() > 0}
        kinds = {next(k.key for k in p if k.key in ("adapters", "routing")) for p in moved}
        assert kinds == learns
        assert len(moved) == (4 if name == "lm" else 2)


def test_without_a_key_it_is_next_token_prediction(variables):
    ours, plain = (
        quick_jit(lambda v, o=objective: result_of(o, v, None))(variables)
        for objective in (RLOO(), NextToken())
    )
    assert ours.terms == plain.terms
    assert ours.terms.keys() == {"lm"}


def test_an_objective_that_would_not_teach_the_router_is_refused_in_training_only(variables):
    tuned = (NextToken(), RoMA(neighbours="", weight=0.0))
    for objective in tuned:
        run = lambda v, key, o=objective: result_of(o, v, key)
        with pytest.raises(UserError, match=r"does not use it: set objective to .*\.RLOO"):
            jax.eval_shape(run, variables, jax.random.key(0))
        jax.eval_shape(run, variables, None)


def test_what_it_cannot_teach_is_refused(variables):
    plain = dense()
    run = lambda v: result_of(RLOO(), v, jax.random.key(0), plain)
    with pytest.raises(UserError, match="nothing in this model does: set adapter.linear to ReMix"):
        jax.eval_shape(run, random_model_variables(plain))
    with pytest.raises(UserError, match="num_draws=1 must be at least 2"):
        result_of(RLOO(num_draws=1), variables, jax.random.key(0))

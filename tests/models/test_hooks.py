"""The hooks of router methods: the routing trace, and interventions in the routers' logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.balance.z_loss import RouterZLoss
from moejax.errors import UserError
from moejax.interventions.add import Add
from moejax.verification.contracts.cases import quick_jit
from tests.models.tiny_model import moe, random_model_variables, tiny

TOKENS = np.random.default_rng(0).integers(1, 16, (2, 6))
SEGMENTS = np.array([[1] * 6, [1] * 4 + [0] * 2])
E = 4


@pytest.fixture(scope="module")
def model():
    return tiny(ffn=moe(balance=(RouterZLoss(weight=1e-2),)))


@pytest.fixture(scope="module")
def variables(model):
    return random_model_variables(model)


@pytest.fixture(scope="module")
def traced(model):
    def run(variables, delta=None, selection=None):
        added = delta and {name: Add(delta=own) for name, own in delta.items()}
        return model.apply(
            variables,
            TOKENS,
            segment_ids=jnp.asarray(SEGMENTS),
            intervention=added,
            selection=selection,
            record=True,
        )

    return run


@pytest.fixture(scope="module")
def apply(traced):
    return quick_jit(traced)


def traces(output):
    return {name: own["trace"] for name, own in output.stats.items() if "trace" in own}


def deltas(model, shape):
    """Zeros `[count, *shape]` for every stack of MoE layers."""
    counts = {name: 0 for name, _ in model.moe_layers.values()}
    for name, _ in model.moe_layers.values():
        counts[name] += 1
    return {name: jnp.zeros((count, *shape)) for name, count in counts.items()}


def test_the_trace_holds_the_routing_of_every_token(model, variables, apply):
    found = traces(apply(variables))
    assert set(found) == {name for name, _ in model.moe_layers.values()}
    for trace in found.values():
        real = SEGMENTS.reshape(-1) > 0
        np.testing.assert_allclose(trace["probs"][:, real].sum(-1), 1, rtol=1e-5)
        assert (np.asarray(trace["experts"])[:, ~real] == E).all()
        assert (np.asarray(trace["weights"])[:, ~real] == 0).all()
        k = trace["experts"].shape[-1]
        best = np.argsort(-np.asarray(trace["logits"]), axis=-1)[:, real, :k]
        np.testing.assert_array_equal(np.sort(best), np.sort(trace["experts"][:, real]))


def test_nothing_is_recorded_unasked(model, variables):
    stats = jax.eval_shape(lambda v: model.apply(v, TOKENS).stats, variables)
    assert not any("trace" in own for own in stats.values())


def test_recorded_choices_replay_bit_for_bit(variables, apply):
    first = apply(variables)
    choices = {name: trace["experts"] for name, trace in traces(first).items()}
    again = apply(variables, selection=choices)
    np.testing.assert_array_equal(first.logits, again.logits)
    other = {name: (own + 1) % E for name, own in choices.items()}
    assert not np.array_equal(first.logits, apply(variables, selection=other).logits)


@pytest.mark.parametrize("shape", [(E,), (2, 1, E), (2, 6, E)])
def test_a_delta_of_zero_changes_no_bit(model, variables, apply, shape):
    moved = apply(variables, delta=deltas(model, shape))
    np.testing.assert_array_equal(apply(variables).logits, moved.logits)


def test_the_same_constant_for_all_experts_changes_nothing(model, variables, apply):
    delta = {name: own + 3.0 for name, own in deltas(model, (E,)).items()}
    found = apply(variables, delta=delta)
    np.testing.assert_allclose(apply(variables).logits, found.logits, rtol=1e-4, atol=1e-5)


def test_the_delta_of_one_sequence_does_not_reach_another(model, variables, apply):
    delta = {name: own.at[:, 0, 0, 1].set(30) for name, own in deltas(model, (2, 1, E)).items()}
    base, moved = apply(variables), apply(variables, delta=delta)
    np.testing.assert_array_equal(base.logits[1], moved.logits[1])
    assert not np.array_equal(base.logits[0], moved.logits[0])
    for trace in traces(moved).values():
        assert (np.asarray(trace["experts"])[:, :6] == 1).any(axis=-1).all()


def test_gradients_flow_through_the_trace_and_sum_to_zero_over_experts(model, variables, traced):
    """Softmax does not see a shift of all logits."""
    weights = np.random.default_rng(1).standard_normal(E)

    def loss(delta):
        found = traces(traced(variables, delta=delta))
        return sum((trace["probs"] * weights).sum() for trace in found.values())

    gradient = quick_jit(jax.grad(loss))(deltas(model, (E,)))
    for own in gradient.values():
        assert np.abs(own).max() > 1e-3
        np.testing.assert_allclose(own.sum(-1), 0, atol=1e-4)


@pytest.mark.parametrize("field", ["intervention", "selection", "loads"])
def test_a_name_that_no_layers_have_is_an_error(model, variables, field):
    (name,) = {name for name, _ in model.moe_layers.values()}
    with pytest.raises(UserError, match=f"{field} is given for 'layers_9', and .* are {name}: "):
        model.apply(variables, TOKENS, **{field: {"layers_9": jnp.zeros(1)}})

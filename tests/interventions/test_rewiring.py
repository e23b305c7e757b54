"""Rewiring: what the method's definition implies, on a small random model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.experts.dense import DenseGLU
from moejax.interventions.rewiring import Rewiring, generate_rewired
from moejax.models.generate import Sampling, generate
from tests.models.tiny_model import moe, random_model_variables, tiny

TOKENS = np.random.default_rng(0).integers(1, 16, (3, 8)).astype(np.int32)
LENGTHS = np.array([8, 5, 1])


@pytest.fixture(scope="module")
def model():
    return tiny(ffn=moe())


@pytest.fixture(scope="module")
def variables(model):
    return random_model_variables(model)


@pytest.fixture(scope="module")
def adapt(model, variables):
    def run(rewiring, tokens=TOKENS, lengths=LENGTHS):
        start = rewiring.start(model, len(tokens))
        deltas, losses = rewiring.adapt(model, variables, tokens, lengths, start)
        by_layer = [np.asarray(deltas[name].delta[row]) for name, row in model.moe_layers.values()]
        return np.stack(by_layer)[:, :, 0], np.asarray(losses)  # [L, B, E], [steps, B]

    return run


STEPS = Rewiring(learning_rate=1e-2, num_steps=2)


@pytest.fixture(scope="module")
def adapted(adapt):
    return adapt(STEPS)


def test_a_step_lowers_each_loss_by_what_its_gradient_says(adapt, adapted):
    first, _ = adapt(dataclasses.replace(STEPS, num_steps=1))
    _, losses = adapted
    expected = np.square(first).sum((0, 2)) / STEPS.learning_rate  # rate * |gradient|^2
    assert (expected[:2] > 1e-6).all()
    np.testing.assert_allclose((losses[0] - losses[1])[:2], expected[:2], rtol=0.1, atol=1e-6)


def test_a_context_of_one_token_changes_nothing(adapted):
    deltas, losses = adapted
    assert not deltas[:, 2].any()
    assert not losses[:, 2].any()


def test_the_experts_of_a_layer_move_by_zero_in_sum(adapted):
    """Softmax does not see a shift of all logits, so neither does the gradient."""
    deltas, _ = adapted
    assert np.abs(deltas[:, :2]).max(-1).min() > 1e-6
    np.testing.assert_allclose(deltas.sum(-1), 0, atol=1e-7)


def test_no_sequence_and_nothing_behind_one_reaches_another(adapt, adapted):
    tokens = TOKENS.copy()
    tokens[0] = tokens[0][::-1]  # another sequence
    tokens[1, 5:] = 15  # behind the end
    deltas, losses = adapt(STEPS, tokens)
    np.testing.assert_array_equal(deltas[:, 1], adapted[0][:, 1])
    np.testing.assert_array_equal(losses[:, 1], adapted[1][:, 1])
    assert not np.array_equal(deltas[:, 0], adapted[0][:, 0])


@pytest.mark.slow
def test_a_share_of_the_layers_is_those_of_largest_score(adapt):
    count = 2
    assert len(adapt(STEPS)[0]) == count, "the test needs a model of two MoE layers"
    one = functools.partial(Rewiring, learning_rate=1e-2, num_steps=1, share=1 / count)
    moved = [np.abs(adapt(one(score=s))[0][:, :2]).max(-1) > 0 for s in ("formula", "decisive")]
    np.testing.assert_array_equal(moved[0].sum(0), 1)
    np.testing.assert_array_equal(moved[0], ~moved[1])


@pytest.mark.slow
def test_generation_without_a_step_of_any_size_is_the_models_own(model, variables):
    prompts = [TOKENS[0], TOKENS[1, :5]]
    sampling = Sampling(max_new_tokens=4, temperature=0)
    still = Rewiring(learning_rate=0.0, num_steps=1, every=2)
    found = generate_rewired(model, variables, prompts, sampling, still)
    expected = generate(model, variables, prompts, sampling)
    assert [len(row) for row in found] == [4, 4]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    stop = int(expected[0][1])
    cut = generate_rewired(model, variables, prompts, sampling, still, stop_id=stop)
    np.testing.assert_array_equal(cut[0], expected[0][: list(expected[0]).index(stop)])


@pytest.mark.slow
def test_generation_is_adapted(model, variables):
    prompts = [TOKENS[0]]
    sampling = Sampling(max_new_tokens=4, temperature=0)
    strong = Rewiring(learning_rate=50.0, num_steps=3, every=2)
    found = generate_rewired(model, variables, prompts, sampling, strong)
    assert not np.array_equal(found[0], generate(model, variables, prompts, sampling)[0])


@pytest.mark.parametrize(
    "wrong", [{"share": 0.0}, {"num_steps": 0}, {"every": 0}, {"score": "entropy"}]
)
def test_bad_settings_are_named(wrong, unchecked):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Rewiring(**wrong)


def test_a_dense_model_cannot_be_rewired(model):
    dense = dataclasses.replace(model, block=model.block.clone(ffn=DenseGLU(d_ff=8)))
    with pytest.raises(UserError, match="needs a model with MoE layers"):
        Rewiring().start(dense, 1)


def test_deltas_are_zero_at_the_start(model):
    for leaf in jax.tree.leaves(Rewiring().start(model, 2)):
        assert leaf.shape[1:] == (2, 1, model.moe.num_experts)
        assert not jnp.any(leaf)

"""Unlearning through one expert: its terms, and what trains."""

import contextlib
import dataclasses

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.data.mixture import Mixture
from moejax.data.source import package_readmes, python_stdlib
from moejax.errors import UserError
from moejax.objectives.lm import forward
from moejax.objectives.seuf import UnlearnExpert
from moejax.types import Batch
from moejax.verification.contracts.cases import quick_jit
from tests.models.tiny_model import VOCAB, moe, random_model_variables, tiny
from tests.objectives.test_samples import packed

PACKED = packed([[([5, 6, 7, 8], 1)], [([9, 1, 2], 2)], [([3, 3], 1)]])
SOURCES = np.broadcast_to(np.array([0, 1, 0], np.int32)[:, None], PACKED.tokens.shape).copy()
BATCH = dataclasses.replace(PACKED, sources=SOURCES)
TOKEN_BYTES = np.arange(VOCAB, dtype=np.int32)
OBJECTIVE = UnlearnExpert(layer=1, expert=2, retain_weight=0.5)


@pytest.fixture(scope="module")
def model():
    return tiny(ffn=moe())


@pytest.fixture(scope="module")
def variables(model):
    return random_model_variables(model)


def result(model, variables, batch=BATCH, objective=OBJECTIVE):
    batch = jax.tree.map(jnp.asarray, batch)
    return objective(model, variables, batch, token_bytes=TOKEN_BYTES)


@pytest.fixture(scope="module")
def found(model, variables):
    return quick_jit(lambda v: result(model, v))(variables)


@pytest.fixture(scope="module")
def by_hand(model, variables):
    """(nats [B, S], squared distance of the router from the expert's indicator [B, S])."""
    out = forward(model, variables, jax.tree.map(jnp.asarray, BATCH), record=True)
    logits = np.asarray(out.logits, np.float64)
    nll = (
        np.log(np.exp(logits).sum(-1))
        - np.take_along_axis(logits, BATCH.targets[..., None], axis=-1)[..., 0]
    )
    segment, row = model.moe_layers[1]
    probs = np.asarray(out.stats[segment]["trace"]["probs"][row], np.float64)
    distance = np.square(probs - np.eye(4)[2]).sum(-1).reshape(BATCH.tokens.shape)
    return nll, distance


def test_the_terms_are_of_the_right_source(found, by_hand):
    nll, distance = by_hand
    forgets, scored, real = SOURCES == 0, BATCH.loss_mask, BATCH.segment_ids > 0
    expected = {
        "forget": (nll, scored & forgets),
        "lm": (nll, scored & ~forgets),
        "anchor": (distance, real & forgets),
    }
    for name, (values, mask) in expected.items():
        total, count = found.terms[name]
        assert count == mask.sum() > 0
        np.testing.assert_allclose(total, values[mask].sum(), rtol=1e-5)
    nats, num_bytes = found.measures["bits_per_byte"]
    np.testing.assert_allclose(nats * np.log(2), nll[scored].sum(), rtol=1e-5)
    assert num_bytes == BATCH.targets[scored].sum()
    assert not any("trace" in own for own in found.stats.values())


def test_an_unknown_target_has_no_bytes_and_no_finite_loss(model, variables):
    targets = BATCH.targets.copy()
    at = tuple(np.argwhere(BATCH.loss_mask & (SOURCES == 0))[0])
    targets[at] = -1
    batch = dataclasses.replace(BATCH, targets=targets)
    found = quick_jit(lambda v: result(model, v, batch))(variables)
    assert np.isnan(found.terms["forget"][0])
    known = BATCH.loss_mask & (targets >= 0)
    assert found.measures["bits_per_byte"][1] == targets[known].sum()


def test_the_weights_ascend_on_what_is_forgotten(model):
    weights = OBJECTIVE.weights(model)
    assert (weights["forget"], weights["lm"], weights["anchor"]) == (-1.0, 0.5, 1.0)
    assert weights.keys() >= model.loss_weights().keys()


def test_uniform_routing_is_one_less_an_expert_share_from_the_indicator(model, variables):
    flat = jax.tree.map(lambda a: a, variables)
    for segment, _ in model.moe_layers.values():
        router = flat["params"][segment]["ffn"]["router"]
        router["kernel"] = np.zeros_like(router["kernel"])
    total, count = quick_jit(lambda v: result(model, v))(flat).terms["anchor"]
    np.testing.assert_allclose(total / count, 1 - 1 / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("objective", "batch", "words"),
    [
        (OBJECTIVE, PACKED, "needs data.train to be a Mixture"),
        (dataclasses.replace(OBJECTIVE, layer=7), BATCH, "layer=7 has no router"),
        (dataclasses.replace(OBJECTIVE, expert=4), BATCH, "expert=4 must be between 0 and"),
    ],
)
def test_what_cannot_be_is_said(model, variables, objective, batch: Batch, words):
    with pytest.raises(UserError, match=words):
        jax.eval_shape(lambda v: result(model, v, batch, objective), variables)


@pytest.mark.parametrize(
    ("trainable", "trains"),
    [
        (["*"], True),
        (["layers_1/ffn/experts/*@expert=2", "layers_1/ffn/router/*"], True),
        (["*/router/*"], False),
        (["layers_1/ffn/experts/*@expert=1,3"], False),
        (["layers_0/ffn/experts/*@expert=2"], False),
    ],
)
def test_the_expert_has_to_train(trainable, trains):
    config = load_config("configs/router_tuning.py:smoke")
    config.data.train = fdl.Config(
        Mixture,
        sources=(fdl.Config(package_readmes), fdl.Config(python_stdlib)),
        weights=(1.0, 1.0),
    )
    config.objective = fdl.Config(UnlearnExpert, layer=1, expert=2)
    config.model.boundaries = (1,)
    config.trainable = tuple(trainable)
    words = (
        "expert 2 of layer 1 does not train, and .* give model.boundaries=\\[1\\] and "
        'trainable=\\["layers_1/ffn/experts/\\*@expert=2", "layers_1/ffn/router/\\*"\\]'
    )
    with contextlib.nullcontext() if trains else pytest.raises(UserError, match=words):
        build_config(config).check()

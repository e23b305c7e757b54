"""RoMA: the term, its gradient, and plain tuning where it is switched off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.objectives.lm import NextToken, forward
from moejax.objectives.neighbours import Neighbours
from moejax.objectives.roma import RoMA
from moejax.objectives.sample_routing import sample_routing
from moejax.objectives.samples import document_keys
from moejax.verification.contracts.cases import quick_jit
from tests.models.tiny_model import VOCAB, moe, random_model_variables, tiny
from tests.objectives.test_samples import packed

A, B, C, UNKNOWN = ([5, 6, 7, 8], 2), ([5, 6, 8, 7], 3), ([9, 1, 2], 1), ([3, 3, 3], 2)
BATCH = packed([[A, B], [C, UNKNOWN]])
LAYERS = (0, 1)
RNG = np.random.default_rng(0)
TOKEN_BYTES = np.ones(VOCAB, np.int32)


@pytest.fixture(scope="module")
def model():
    return tiny(ffn=moe())


@pytest.fixture(scope="module")
def variables(model):
    return random_model_variables(model)


def table(model, documents=(A, B, C)):
    alone = packed([[document] for document in documents])
    keys = np.asarray(document_keys(alone, salt=2))[:, :, 0]
    order = np.argsort(keys[0])
    return Neighbours(
        keys=keys[:, order],
        salt=2,
        means=RNG.dirichlet(np.ones(4), size=(len(documents), 2)).astype(np.float32)[order],
        spreads=np.array([0.25, 0.5, 0.125], np.float32)[order],
        layers=LAYERS,
    )


@pytest.fixture(scope="module")
def stored(model, tmp_path_factory):
    found = table(model)
    path = tmp_path_factory.mktemp("roma") / "n.npz"
    found.save(path)
    return found, str(path)


def result(objective, model, variables, batch=BATCH):
    batch = jax.tree.map(jnp.asarray, batch)
    return objective(model, variables, batch, token_bytes=TOKEN_BYTES)


@pytest.fixture(scope="module")
def found(model, variables, stored):
    objective = RoMA(neighbours=stored[1])
    return quick_jit(lambda v: result(objective, model, v))(variables)


def test_the_term_is_the_squared_distance_to_the_neighbours(model, variables, stored, found):
    traces = forward(model, variables, jax.tree.map(jnp.asarray, BATCH), record=True).stats
    place = {"A": 1, "B": 4 + 2, "C": BATCH.tokens.shape[1]}  # of the token before the response
    total = 0.0
    for name, document in {"A": A, "B": B, "C": C}.items():
        key = np.asarray(document_keys(packed([[document]]), salt=2))[:, 0, 0]
        entry = int(np.flatnonzero((stored[0].keys == key[:, None]).all(0)).item())
        for index, layer in enumerate(LAYERS):
            segment, row = model.moe_layers[layer]
            probs = np.asarray(traces[segment]["trace"]["probs"][row, place[name]], np.float64)
            total += np.square(probs - stored[0].means[entry, index]).sum()
        total += stored[0].spreads[entry]
    value, count = found.terms["manifold"]
    assert count == 3
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert 0 <= value / count <= 2 * len(LAYERS)
    assert [float(x) for x in found.measures["aligned"]] == [3, 4]


def test_the_other_terms_are_those_of_next_token_prediction(model, variables, found):
    plain = quick_jit(lambda v: result(NextToken(), model, v))(variables)
    for name, term in plain.terms.items():
        np.testing.assert_allclose(found.terms[name], term, rtol=1e-6)
    assert found.stats.keys() == plain.stats.keys()
    assert not any("trace" in own for own in found.stats.values())


def test_without_weight_it_is_next_token_prediction_and_nothing_is_read(model):
    batch = jax.tree.map(jnp.asarray, BATCH)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    texts = [
        str(jax.make_jaxpr(lambda v, o=o: result(o, model, v, batch).terms)(variables))
        for o in (RoMA(neighbours="nowhere.npz", weight=0.0), NextToken())
    ]
    assert texts[0] == texts[1], "the same program, so the same bits"
    assert RoMA(neighbours="nowhere.npz", weight=0.0).weights(model) == NextToken().weights(model)
    assert RoMA(neighbours="x", weight=0.5).weights(model)["manifold"] == 0.5


def test_its_gradient_reaches_the_routers(model, variables, stored):
    objective = RoMA(neighbours=stored[1])

    def loss(params):
        return result(objective, model, variables | {"params": params}).terms["manifold"][0]

    gradient = quick_jit(jax.grad(loss))(variables["params"])
    for segment, _ in model.moe_layers.values():
        assert np.abs(gradient[segment]["ffn"]["router"]["kernel"]).max() > 1e-4


def test_a_table_of_another_model_is_refused(model, variables, stored, tmp_path):
    for change, words in (
        ({"layers": (0, 9)}, "about layer 9, which has no router here"),
        ({"means": np.zeros((3, 2, 64), np.float32)}, "about 64 experts and the model has 4"),
    ):
        dataclasses.replace(stored[0], **change).save(tmp_path / "other.npz")
        other = RoMA(neighbours=str(tmp_path / "other.npz"))
        with pytest.raises(UserError, match=words):
            result(other, model, variables)
    with pytest.raises(UserError, match="there is no file of neighbours 'nowhere.npz'"):
        result(RoMA(neighbours="nowhere.npz"), model, variables)


def test_sample_routing_reads_the_last_token_of_the_prompt(model, variables):
    documents = [A, B, C]
    alone = packed([[d] for d in documents] + [[]])
    out = forward(model, variables, jax.tree.map(jnp.asarray, alone), record=True)
    best = np.asarray(out.logits.argmax(-1))
    targets = alone.targets.copy()
    targets[1, 2] = best[1, 2]  # the second document's answer is what the model would say,
    targets[1, 3] = (best[1, 3] + 1) % VOCAB  # though it would not stop there
    targets[2] = (best[2] + 1) % VOCAB
    batch = dataclasses.replace(alone, targets=targets)
    found = sample_routing(model, variables, lambda: [batch], layers=(1,))
    segment, row = model.moe_layers[1]
    probs = np.asarray(out.stats[segment]["trace"]["probs"][row]).reshape(*alone.tokens.shape, -1)
    assert found.routing.shape == (3, 1, 4)
    for i, (_, num_prompt) in enumerate(documents):
        np.testing.assert_allclose(found.routing[i, 0], probs[i, num_prompt - 1], rtol=1e-5)
    assert found.successful[1:].tolist() == [True, False]
    assert found.has_prompt.tolist() == [True, True, False]
    np.testing.assert_array_equal(
        found.keys, np.asarray(document_keys(alone, salt=found.salt))[:, :3, 0]
    )

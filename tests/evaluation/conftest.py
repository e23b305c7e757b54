"""A small model of bytes that the tests of moejax.evaluation share."""

import jax
import pytest

from moejax.data.tokenizer import Bytes
from moejax.evaluation.likelihood import Scorer
from moejax.parallel.mesh import Mesh
from moejax.parallel.sharding import parameter_shardings
from tests.models.tiny_model import dense, random_model_variables


@pytest.fixture(scope="session")
def model():
    return dense(vocab_size=Bytes.vocab_size)


@pytest.fixture(scope="session")
def variables(model):
    return random_model_variables(model)


@pytest.fixture(scope="session")
def scorer_of(model, variables):
    """A scorer of so many inputs, on a mesh of these sizes."""

    def make(max_length, *, batch_tokens=64, **sizes):
        mesh = Mesh(**({"data": 1} | sizes)).build()
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        where = parameter_shardings(mesh, shapes, model.logical_axes(), max_replicated=2**27)
        placed = jax.device_put(variables, where)
        return Scorer(model, placed, mesh, max_length=max_length, batch_tokens=batch_tokens)

    return make

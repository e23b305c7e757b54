"""Evaluation computes the model of the step that its weights are from."""

import types

import jax
import numpy as np

from moejax.attention.moba import MoBA
from moejax.data.pipeline import Loaders
from moejax.objectives.lm import NextToken
from moejax.parallel.mesh import Mesh
from moejax.train.evaluate import Evaluator
from moejax.types import Batch
from tests.models.tiny_model import VOCAB, dense, random_model_variables, tokens

LENGTH = 12
BLOCKS = MoBA(num_heads=4, num_kv_heads=2, block_size=2, top_k=2)


def held_out(attention, step):
    """The held-out loss of a model whose weights are the same whatever its attention."""
    ids = np.asarray(tokens((2, LENGTH + 1)))
    ones = np.ones((2, LENGTH), np.int32)
    batch = Batch(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        loss_mask=ones > 0,
        segment_ids=ones,
        positions=np.arange(LENGTH, dtype=np.int32) * ones,
    )
    tokenizer = types.SimpleNamespace(token_bytes=lambda: np.ones(VOCAB, np.int32))
    data = object.__new__(Loaders)  # of which evaluation reads these two
    data.__dict__.update(eval=[batch], tokenizer=tokenizer)
    model = dense(attention=attention)
    mesh = Mesh(data=1).build()
    with jax.set_mesh(mesh):
        evaluator = Evaluator(model, NextToken(), data, mesh)
        return evaluator.run(random_model_variables(model), step)["eval/loss"]


def test_layers_that_switch_are_evaluated_as_they_are_at_the_step():
    switched, full = BLOCKS.copy(until_step=7), BLOCKS.full()
    blocks, everything = held_out(BLOCKS, 0), held_out(full, 0)
    assert abs(blocks - everything) > 1e-4
    np.testing.assert_allclose(held_out(switched, 6), blocks, rtol=1e-6)
    np.testing.assert_allclose(held_out(switched, 7), everything, rtol=1e-6)

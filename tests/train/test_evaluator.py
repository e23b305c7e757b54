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
NUM_BYTES = 100  # of the text; of its 24 tokens one each
BLOCKS = MoBA(num_heads=4, num_kv_heads=2, block_size=2, top_k=2)


def held_out(attention, step):
    """The held-out figures of a model whose weights are the same whatever its attention."""
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
    data = object.__new__(Loaders)  # of which evaluation reads these
    data.__dict__.update(eval=[batch], tokenizer=tokenizer, held_out_bytes=NUM_BYTES)
    model = dense(attention=attention)
    mesh = Mesh(data=1).build()
    with jax.set_mesh(mesh):
        evaluator = Evaluator(model, NextToken(), data, mesh)
        return evaluator.run(random_model_variables(model), step)


def test_layers_that_switch_are_evaluated_as_they_are_at_the_step():
    switched, full = BLOCKS.copy(until_step=7), BLOCKS.full()
    loss = lambda attention, step: held_out(attention, step)["eval/loss"]
    blocks, everything = loss(BLOCKS, 0), loss(full, 0)
    assert abs(blocks - everything) > 1e-4
    np.testing.assert_allclose(loss(switched, 6), blocks, rtol=1e-6)
    np.testing.assert_allclose(loss(switched, 7), everything, rtol=1e-6)


def test_bits_per_byte_are_of_the_text_where_tokens_do_not_keep_all_of_it():
    found = held_out(BLOCKS, 0)
    bits = found["eval/loss"] * 2 * LENGTH / np.log(2)
    np.testing.assert_allclose(found["eval/bits_per_byte"], bits / NUM_BYTES, rtol=1e-6)

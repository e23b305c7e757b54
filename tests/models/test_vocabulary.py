"""Embeddings are looked up in the activations' dtype; their gradient is summed in the table's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models import vocabulary


def gradient(tokens, *, dtype):
    loss = lambda table: jnp.nansum(
        vocabulary.embedded({"embed": {"embedding": table}}, tokens, dtype=dtype)
    )
    return jax.jit(jax.grad(loss))(jnp.ones((4, 2)))


def test_the_gradient_of_a_frequent_token_does_not_stop_growing():
    tokens = jnp.zeros((8, 1000), jnp.int32).at[0, 0].set(3)
    found = gradient(tokens, dtype=jnp.bfloat16)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.outer([7999, 0, 0, 1], [1, 1]))  # 256 in bfloat16


@pytest.mark.parametrize("unknown", [-1, 4])
def test_an_unknown_id_reaches_no_row(unknown):
    found = gradient(jnp.array([[1, unknown, 1]]), dtype=jnp.float32)
    np.testing.assert_array_equal(found, np.outer([0, 2, 0, 0], [1, 1]))

"""What every transport's frame promises, whatever the transport does."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.parallel.mesh import Mesh
from moejax.parallel.token_shards import on_token_shards
from moejax.types import Routing


def test_integers_among_the_weights_arrive_as_they_are():
    """A float32 cannot hold this one."""
    large = 2**24 + 1
    routing = Routing(
        experts=jnp.zeros((8, 1), jnp.int32),
        weights=jnp.ones((8, 1)),
        probs=jnp.ones((8, 4)),
        logits=jnp.ones((8, 4)),
        extras={},
    )

    def body(x, experts, gate, weights):
        same = jnp.sum(weights == large, dtype=jnp.int32)
        return x, {"same": same}

    with jax.set_mesh(Mesh(data=8).build()):
        run = jax.jit(lambda x, w: on_token_shards(body, x, routing, w, None, split=("expert",)))
        _, counts = run(np.ones((8, 2), np.float32), np.full((4,), large, np.int32))
    assert counts["same"] == 8 * 4

"""Router z-loss against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.balance.z_loss import RouterZLoss
from moejax.types import Routing, mean
from moejax.verification.contracts.cases import make_context


def test_mean_square_of_the_log_partition_over_real_tokens():
    logits = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    mask = np.array([[True, True, False, True]])
    routing = Routing(
        experts=jnp.zeros((4, 1), jnp.int32),
        weights=jnp.ones((4, 1)),
        probs=jnp.asarray(logits),
        logits=jnp.asarray(logits),
        extras={},
    )
    terms = RouterZLoss(weight=1.0).terms(routing, make_context(mask), {})
    expected = np.mean(np.log(np.exp(logits[mask[0]]).sum(-1)) ** 2)
    assert float(mean(terms["router_z"])) == pytest.approx(expected, rel=1e-6)

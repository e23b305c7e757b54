"""The bias rises where the load is below the mean and falls where it is above."""

import jax.numpy as jnp
import numpy as np

from moejax.balance.loss_free import LossFreeBias


def test_one_update():
    rule = LossFreeBias(rate=0.5)
    state = rule.update(rule.state(4), {"load": jnp.array([10, 2, 4, 0])})  # mean 4
    np.testing.assert_array_equal(state["correction_bias"], [-0.5, 0.5, 0.0, 0.5])
    np.testing.assert_array_equal(rule.selection_bias(state), state["correction_bias"])
    state = rule.update(state, {"load": jnp.array([0, 0, 0, 8])})
    np.testing.assert_array_equal(state["correction_bias"], [0.0, 1.0, 0.5, 0.0])


def test_it_balances_a_fixed_preference():
    """Experts chosen by score + bias: with fixed unequal scores the loads even out."""
    rng = np.random.default_rng(0)
    scores = 1 / (1 + np.exp(-rng.standard_normal((400, 4)) - np.array([2.0, 1.0, 0.0, -1.0])))
    rule = LossFreeBias(rate=0.01)
    state = rule.state(4)
    share = lambda bias: np.bincount(np.argmax(scores + np.asarray(bias), 1), minlength=4) / 400
    assert share(state["correction_bias"]).max() > 0.5
    for _ in range(150):
        load = share(state["correction_bias"]) * 400
        state = rule.update(state, {"load": jnp.asarray(load, jnp.int32)})
    assert share(state["correction_bias"]).max() < 0.3

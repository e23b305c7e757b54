"""Frozen parameters have no gradient, no moments and not one changed bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.errors import UserError
from moejax.optim.freeze import merge, report, split
from moejax.optim.optimizer import AdamW, global_norm
from moejax.optim.schedule import WarmupCosine
from moejax.train.fingerprint import fingerprints

PARAMS = {
    "block": {
        "router": {"kernel": jnp.ones((4, 3))},
        "experts": {"w": jnp.full((3, 4, 2), 0.5, jnp.bfloat16)},
    },
    "head": {"kernel": jnp.ones((2, 5))},
}


def loss(params, x):
    gate = jax.nn.softmax(x @ params["block"]["router"]["kernel"])
    hidden = jnp.einsum("td,edf,te->tf", x, params["block"]["experts"]["w"], gate)
    return jnp.sum((hidden @ params["head"]["kernel"]) ** 2)


def test_split_and_merge_are_inverse():
    trainable, frozen = split(PARAMS, ("*/router/*",))
    assert jax.tree.leaves(trainable) == [PARAMS["block"]["router"]["kernel"]]
    assert len(jax.tree.leaves(frozen)) == 2
    merged = merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    assert fingerprints(merged) == fingerprints(PARAMS)
    everything, nothing = split(PARAMS)
    assert jax.tree.leaves(nothing) == []
    assert jax.tree.structure(merge(everything, nothing)) == jax.tree.structure(PARAMS)


def test_training_moves_the_trainable_and_leaves_every_frozen_bit():
    trainable, frozen = split(PARAMS, ("*/router/*",))
    optimizer = AdamW(schedule=WarmupCosine(peak=0.1, warmup_steps=0)).build(trainable, 5)
    state = optimizer.init(trainable)
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * 12
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)

    @jax.jit
    def step(trainable, state):
        gradient = jax.grad(lambda t: loss(merge(t, frozen), x))(trainable)
        norm = global_norm(gradient)
        updates, state = optimizer.update(gradient, state, trainable, grad_norm=norm)
        return optax.apply_updates(trainable, updates), state

    for _ in range(3):
        trainable, state = step(trainable, state)
    before, after = fingerprints(PARAMS), fingerprints(merge(trainable, frozen))
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {"block/router/kernel"}


def test_report():
    found = report(jax.eval_shape(lambda: PARAMS), ("*/router/*", "head/*"))
    assert found.matched == {"*/router/*": 1, "head/*": 1}
    assert (found.num_trainable, found.num_frozen) == (22, 24)
    assert (found.trainable_bytes, found.frozen_bytes) == (88, 48)
    assert str(found).startswith("22 of 46 parameters train (47.83%")


def test_a_pattern_that_matches_nothing_is_an_error_that_names_near_ones():
    with pytest.raises(UserError, match="'block/ruoter/kernel' matches none.*block/router/kernel"):
        split(PARAMS, ("head/*", "block/ruoter/kernel"))
    with pytest.raises(UserError, match="no parameters to train"):
        report({}, ())


def test_merge_of_parts_that_overlap_or_miss_a_leaf():
    trainable, frozen = split(PARAMS, ("head/*",))
    with pytest.raises(ValueError, match="exactly one"):
        merge(PARAMS, frozen)
    with pytest.raises(ValueError, match="exactly one"):
        merge(trainable, trainable)

"""Frozen parameters have no gradient, no moments and not one changed bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.errors import UserError
from moejax.optim.freeze import chosen_experts, merge, only_experts, report, split
from moejax.optim.optimizer import AdamW, global_norm
from moejax.optim.schedule import WarmupCosine
from moejax.train.fingerprint import fingerprints
from moejax.types import named_leaves

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


def test_everything_but_the_routers_is_one_pattern():
    """The one that docs/router_methods.md names."""
    _, frozen = split(PARAMS, ("re:(?!.*/router/).*",))
    assert set(named_leaves(frozen)) == {"block/router/kernel"}


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


AXES = {"block/experts/w": 0}
ONE = ("*/router/*", "*/experts/*@expert=1")


def test_one_expert_of_a_stacked_leaf_trains_and_no_bit_of_the_others_changes():
    trainable, frozen = split(PARAMS, ONE)
    only = only_experts(chosen_experts(PARAMS, ONE, AXES))
    optimizer = AdamW(schedule=WarmupCosine(peak=0.1, warmup_steps=0), weight_decay=0.5)
    optimizer = optimizer.build(trainable, 5)
    state = optimizer.init(trainable)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
    for _ in range(2):
        gradient = only(jax.grad(lambda t: loss(merge(t, frozen), x))(trainable))
        norm = global_norm(gradient)
        updates, state = optimizer.update(gradient, state, trainable, grad_norm=norm)
        trainable = optax.apply_updates(trainable, only(updates))
    before, after = PARAMS["block"]["experts"]["w"], trainable["block"]["experts"]["w"]
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[2], after[2])
    assert (np.asarray(before[1]) != np.asarray(after[1])).all()
    assert (trainable["block"]["router"]["kernel"] != 1).any()


def test_a_nan_in_the_gradient_of_another_expert_reaches_nothing():
    only = only_experts(chosen_experts(PARAMS, ONE, AXES))
    gradient = jnp.ones((3, 4, 2)).at[0].set(jnp.nan)
    found = only({"block": {"experts": {"w": gradient}, "router": {"kernel": jnp.ones(2)}}})
    np.testing.assert_array_equal(found["block"]["experts"]["w"].sum((1, 2)), [0, 8, 0])
    np.testing.assert_array_equal(found["block"]["router"]["kernel"], 1)


def test_a_leaf_that_is_also_matched_whole_trains_whole():
    assert chosen_experts(PARAMS, ("*/experts/*", "*/experts/*@expert=1"), AXES) == {}
    both = chosen_experts(PARAMS, ("*w@expert=2", "*/experts/*@expert=0,2"), AXES)
    assert both["block/experts/w"].chosen == (0, 2)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*/experts/*@expert=3", "block/experts/w has no expert 3, but 3"),
        ("head/*@expert=0", r"head/\*@expert=... matches head/kernel, which has no experts"),
        ("*/experts/*@layer=0", "must end in @expert=3 or @expert=3,7"),
        ("*/experts/*@expert=-1", "must end in @expert=3"),
    ],
)
def test_patterns_that_name_no_expert(pattern, message):
    with pytest.raises(UserError, match=message):
        chosen_experts(PARAMS, (pattern,), AXES)


def test_regular_expressions_match_whole_paths():
    trainable, _ = split(PARAMS, (r"re:block/(router|experts)/\w",))
    assert list(named_leaves(trainable)) == ["block/experts/w"]
    with pytest.raises(UserError, match=r"'re:\(head' is no regular expression"):
        split(PARAMS, ("re:(head",))


def test_the_report_of_one_expert_counts_its_numbers_and_the_whole_memory():
    found = report(PARAMS, ONE, chosen_experts(PARAMS, ONE, AXES))
    assert found.matched == {"*/router/*": 1, "*/experts/*@expert=1": 1}
    assert (found.num_trainable, found.num_frozen) == (12 + 8, 26)
    assert (found.trainable_bytes, found.frozen_bytes) == (48 + 48, 40)
    assert "of block/experts/w some experts, with a whole gradient" in str(found)


def test_the_report_names_every_pattern_of_the_same_paths():
    several = ("*/experts/*", "*/experts/*@expert=1", "*/experts/*@expert=0,2")
    found = report(PARAMS, several, chosen_experts(PARAMS, several, AXES))
    assert found.matched == dict.fromkeys(several, 1)
    assert all(repr(pattern) in str(found) for pattern in several)

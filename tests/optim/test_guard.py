"""The guard: what it refuses, what it lets through, and that it recovers at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.errors import UserError
from moejax.optim.guard import Guard, select
from moejax.train.checkpoint import Checkpointer

GUARD = Guard(window=16, min_history=8, max_consecutive_skips=4)
NAN, INF = float("nan"), float("inf")


def run(guard, values, state=None):
    """[accepted], state after each (loss, gradient norm, update norm)."""
    decide = jax.jit(guard.decide)
    state = guard.init() if state is None else state
    accepted = []
    for loss, grad_norm, update_norm in values:
        accept, state = decide(state, loss, grad_norm, update_norm)
        accepted.append(bool(accept))
        windows = np.concatenate([state.losses, state.grad_norms])
        assert np.all(np.isfinite(windows)), "a value that is not finite entered the window"
    return accepted, state


def normal(num, seed=0, loss=3.0, noise=0.05):
    rng = np.random.default_rng(seed)
    return [
        (loss + noise * a, 1.0 + 0.1 * b, 0.01) for a, b in rng.standard_normal((num, 2)).tolist()
    ]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("at", [0, 3, 30])
def test_one_value_that_is_not_finite(bad, which, at):
    """At step 0, before the spike rule starts, and later; in any of the three alone."""
    values = normal(60)
    broken = list(values[at])
    broken[which] = bad
    accepted, state = run(GUARD, values[:at] + [tuple(broken)] + values[at:])
    assert accepted == [step != at for step in range(61)]  # recovers with the very next step
    assert int(state.num_nonfinite) == 1
    assert int(state.num_spikes) == 0
    assert int(state.num_accepted) == 60
    assert int(state.consecutive_skips) == 0


def test_one_nan_costs_one_step_not_a_window():
    """With the NaN written into a window of 128, the same run loses 129 steps (300 to 428)."""
    values = normal(600)
    values[300] = (NAN, NAN, NAN)
    accepted, _ = run(Guard(window=128, min_history=64), values)
    assert [step for step, ok in enumerate(accepted) if not ok] == [300]


def test_a_value_beyond_float32_counts_as_infinite():
    with jax.enable_x64(True):
        accepted, _ = run(GUARD, [(jnp.float64(1e300), 1.0, 1.0), (3.0, 1.0, 1.0)])
    assert accepted == [False, True]


@pytest.mark.parametrize("spike", [(30.0, 1.0, 0.01), (3.0, 50.0, 0.01)])
def test_a_spike_in_loss_or_gradient_is_refused_and_does_not_raise_the_limit(spike):
    values = normal(40)
    values[20:23] = [spike] * 3
    accepted, state = run(GUARD, values)
    assert [step for step, ok in enumerate(accepted) if not ok] == [20, 21, 22]
    assert int(state.num_spikes) == 3
    assert int(state.num_nonfinite) == 0
    assert max(state.losses) < 4.0
    assert max(state.grad_norms) < 2.0


def test_no_spike_rule_before_its_history():
    values = normal(40)
    values[7] = (30.0, 1.0, 0.01)
    accepted, _ = run(GUARD, values)
    assert all(accepted)
    values[8] = (3000.0, 1.0, 0.01)
    assert not run(GUARD, values)[0][8]


@pytest.mark.parametrize(
    "loss",
    [
        lambda t: 11.0 * 0.97**t + 2.0,  # falling fast
        lambda t: 2.0 + 0.01 * t,  # rising slowly
        lambda t: 2.0 * 1.02**t,  # rising by 2% a step
        lambda t: 3.0,  # constant: no variance at all
        lambda t: 3.0 + 0.05 * (t == 100),  # and a small step up from it
        lambda t: 3.0 + 0.2 * np.sin(t / 5),
        lambda t: -5.0 + 0.01 * t,  # a reward, through zero
    ],
)
def test_legitimate_drift_is_not_refused(loss):
    accepted, _ = run(Guard(), [(loss(t), 1.0, 0.01) for t in range(250)])
    assert all(accepted)


def test_a_better_step_is_never_a_spike():
    values = normal(40)
    values[20] = (0.001, 0.001, 0.0)
    assert all(run(GUARD, values)[0])


def test_too_many_in_a_row_ask_for_a_roll_back():
    values = normal(20) + [(NAN, 1.0, 1.0)] * 5
    _, state = run(GUARD, values[:-1])
    assert int(state.consecutive_skips) == 4
    assert not GUARD.exhausted(state)
    _, state = run(GUARD, values[-1:], state)
    assert GUARD.exhausted(state)
    _, state = run(GUARD, normal(1), state)
    assert not GUARD.exhausted(state)


def test_the_window_survives_a_checkpoint(tmp_path):
    """Without it, the spike rule would be off for `min_history` steps after every resume."""
    values = normal(30) + [(30.0, 1.0, 0.01)] + normal(10, seed=1)
    whole, end = run(GUARD, values)
    _, state = run(GUARD, values[:30])
    state = jax.device_put(state, jax.devices()[0])
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(30, state, {})
        state = checkpointer.restore(state).state
    resumed, found = run(GUARD, values[30:], state)
    assert resumed == whole[30:]
    assert not resumed[0]
    jax.tree.map(np.testing.assert_array_equal, found, end)


def test_select_keeps_every_bit_of_the_old_tree():
    old = {"w": jnp.arange(3.0), "key": jax.random.key(1), "n": jnp.int32(3), "b": jnp.bfloat16(1)}
    new = {"w": jnp.full(3, NAN), "key": jax.random.key(2), "n": jnp.int32(4), "b": jnp.bfloat16(2)}
    kept = jax.jit(select)(jnp.bool_(False), new, old)
    taken = jax.jit(select)(jnp.bool_(True), new, old)
    for got, want in ((kept, old), (taken, new)):
        np.testing.assert_array_equal(got["w"], want["w"])
        assert got["n"] == want["n"]
        assert got["b"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(*(jax.random.key_data(x["key"]) for x in (got, want)))


def test_a_refused_step_of_a_real_optimizer_changes_nothing_but_the_counters():
    """The trap: multiplying an update that is NaN by 0 still gives NaN in weights and moments."""
    optimizer = optax.adam(0.1)
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)

    @jax.jit
    def step(gradient, params, state, guard_state):
        updates, new_state = optimizer.update(gradient, state, params)
        norms = optax.tree.norm(gradient), optax.tree.norm(updates)
        accept, guard_state = GUARD.decide(guard_state, 3.0, *norms)
        new = (optax.apply_updates(params, updates), new_state)
        return new, select(accept, new, (params, state)), guard_state

    unguarded, kept, guard_state = step(
        {"w": jnp.array([1.0, NAN, 1.0])}, params, state, GUARD.init()
    )
    assert np.isnan(unguarded[0]["w"][1])
    jax.tree.map(np.testing.assert_array_equal, kept, (params, state))
    assert int(guard_state.num_nonfinite) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_history": 1},
        {"window": 4, "min_history": 8},
        {"num_sigmas": 0.0},
        {"max_consecutive_skips": 0},
        {"num_sigmas": NAN},
        {"num_sigmas": INF},
        {"min_rise": -0.1},
        {"min_rise": NAN},
        {"min_rise": INF},
        {"max_consecutive_skips": NAN},
        {"max_consecutive_skips": INF},
        {"window": INF},
    ],
)
def test_values_out_of_range(wrong, unchecked):
    with pytest.raises(UserError, match="Guard: "):
        Guard(**wrong)

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.expert_mlp.slots import sort_slots

E = 4
EXPERTS = np.array([[2, 0], [4, -1], [0, 0], [3, 2], [9, 3]])  # three empty slots


@pytest.fixture
def slots():
    return sort_slots(jnp.asarray(EXPERTS), E)


def test_sorts_stably_with_empty_slots_last(slots):
    np.testing.assert_array_equal(slots.group_sizes, [3, 0, 2, 2])
    np.testing.assert_array_equal(slots.order, [1, 4, 5, 0, 7, 6, 9, 2, 3, 8])
    np.testing.assert_array_equal(slots.order[slots.row.reshape(-1)], np.arange(EXPERTS.size))
    np.testing.assert_array_equal(slots.token()[:7], [0, 2, 2, 0, 3, 3, 4])


def test_values_go_to_rows_and_back_and_empty_slots_become_zero(slots):
    filled = (EXPERTS >= 0) & (EXPERTS < E)
    values = np.where(filled, np.arange(EXPERTS.size).reshape(EXPERTS.shape) + 1.0, np.nan)
    rows = slots.to_rows(jnp.asarray(values))
    np.testing.assert_array_equal(rows, [2, 5, 6, 1, 8, 7, 10, 0, 0, 0])
    back = slots.from_rows(rows.at[7:].set(jnp.nan))
    np.testing.assert_array_equal(back, np.where(filled, values, 0))


def test_sums_each_tokens_rows_and_leaves_out_empty_slots(slots):
    rows = jnp.asarray([[1.0], [2], [4], [8], [16], [32], [64], [np.nan], [np.nan], [np.nan]])
    total = slots.sum_by_token(rows, jnp.float32)
    np.testing.assert_array_equal(total[:, 0], [9, 0, 6, 48, 64])


def test_sums_in_float32():
    slots = sort_slots(jnp.zeros((1, 3), jnp.int32), 1)
    rows = jnp.asarray([[256.0], [1], [1]], jnp.bfloat16)  # 256 + 1 is 256 in bfloat16
    assert slots.sum_by_token(rows, jnp.bfloat16)[0, 0] == 258

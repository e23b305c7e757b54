"""What grouped_matmul refuses, and how it says so."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

from moejax.errors import UserError
from moejax.kernels.grouped_matmul import grouped_matmul

LHS, RHS, SIZES = jnp.zeros((300, 40)), jnp.zeros((8, 40, 72)), jnp.zeros(8, jnp.int32)


@pytest.mark.parametrize(
    "dtype, reason",
    [("float32", "runs on TPU, and this is cpu"), ("float16", "not in float16")],
)
def test_tpu_kernels_say_why_they_cannot_serve(dtype, reason):
    with pytest.raises(UserError, match=f"grouped_matmul: implementation 'tpu' cannot.*{reason}"):
        grouped_matmul(LHS.astype(dtype), RHS.astype(dtype), SIZES, implementation="tpu")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"implementation": "cublas"},
            "no implementation 'cublas'.*hopper, tile_scan, tokamax, tpu, xla",
        ),
        ({"transpose_rhs": True}, r"needs lhs and rhs of shapes \[R, K\] and \[G, N, K\]"),
        ({"group_sizes": jnp.zeros(3, jnp.int32)}, "3 group sizes for 8 matrices.*group_offset"),
        ({"group_sizes": jnp.zeros(8)}, "vector of integers"),
        ({"lhs": jnp.zeros((300, 40), jnp.int32)}, "floating-point lhs; got int32"),
    ],
)
def test_errors_name_the_condition(change, message, unchecked):
    call = {"lhs": LHS, "rhs": RHS, "group_sizes": SIZES} | change
    with pytest.raises((ValueError, UserError), match=message):
        grouped_matmul(**call)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ([100, -1, 0, 0, 0, 0, 0, 0], "negative group size: -1"),
        ([100, 100, 101, 0, 0, 0, 0, 0], "sum to 301, more than its 300 rows"),
        ([100, 100, 100, 0, 0, 0, 0, 0], None),
    ],
)
def test_checkify_finds_wrong_sizes_and_costs_nothing_else(sizes, message):
    def loss(lhs, sizes):
        return grouped_matmul(lhs, RHS, sizes).sum()

    gradient = jax.jit(checkify.checkify(jax.grad(loss)))
    error, _ = gradient(LHS, jnp.asarray(sizes))
    assert (error.get() is None) if message is None else (message in error.get())
    jax.jit(jax.grad(loss))(LHS, jnp.asarray(sizes))  # unchecked: no error, no checkify needed

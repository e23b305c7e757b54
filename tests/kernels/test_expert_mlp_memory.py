"""The temporaries of expert_mlp forwards and backwards, as users compile it."""

import os
import subprocess
import sys

import pytest

MEASURE = """
import functools, sys, jax, jax.numpy as jnp
from moejax.kernels.expert_mlp import expert_mlp

t, d, f, e, k = map(int, sys.argv[1:])
shapes = [(t, d), (e, d, f), (e, d, f), (e, f, d), (t, k)]
args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]

def run(x, gate, up, down, weights, experts, dout):
    mlp = functools.partial(expert_mlp, implementation="tile_scan")
    out, vjp = jax.vjp(lambda *a: mlp(*a[:4], experts, a[4]), x, gate, up, down, weights)
    return out, vjp(dout)

indices = jax.ShapeDtypeStruct((t, k), jnp.int32)
compiled = jax.jit(run).lower(*args, indices, args[0]).compile()
print(compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
def test_temporaries_stay_within_the_saved_activations_and_two_row_buffers():
    """At a larger size: y and dx by row, the saved rows, the weight gradients, and tiles.

    In a process of its own, as users compile it: the tests' XLA_FLAGS change the schedule, and how
    much is alive at once.
    """
    t, d, f, e, k = sizes = 2048, 128, 128, 8, 4
    command = [sys.executable, "-c", MEASURE, *map(str, sizes)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = t * k
    activations = 4 * 2 * rows * f
    row_buffer = 4 * rows * d
    one_tile = 4 * 512 * (4 * d + 10 * f)
    bound = activations + row_buffer + one_tile + 4 * 3 * e * d * f + 4 * 16 * rows
    assert int(found.stdout) < bound

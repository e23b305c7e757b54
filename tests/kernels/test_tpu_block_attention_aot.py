"""The TPU kernels of block attention pass the real TPU compiler, without a TPU."""

import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest

from moejax.kernels.block_attention import moba_attention
from moejax.kernels.block_attention.tpu import routed
from moejax.kernels.expert_mlp.slots import Slots
from tests.kernels.test_tpu_aot import array, lowered_for
from tests.kernels.test_tpu_aot import mesh as mesh  # the fixture

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install libtpu",
    ),
]

N, HEADS, KV_HEADS, WIDTH, BLOCK, TOP_K = 8192, 8, 2, 128, 128, 8
ROWS = N * HEADS // KV_HEADS * (TOP_K - 1)


def largest(text: str) -> int:
    """Elements of the largest array of a compiled program."""
    shapes = set(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("segmented", [False, True])
def test_value_and_gradients_compile_and_no_array_is_over_all_pairs(mesh, segmented):
    def run(q, k, v, d_out, ids):
        sizes = {"block_size": BLOCK, "top_k": TOP_K}
        attend = functools.partial(moba_attention, implementation="tpu", segment_ids=ids, **sizes)
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(d_out)

    q, k = (array(mesh, 1, N, heads, WIDTH) for heads in (HEADS, KV_HEADS))
    ids = array(mesh, 1, N, dtype=jnp.int32) if segmented else None
    lowered = lowered_for(mesh, run, (q, k, k, q, ids), [q.shape, q.shape, k.shape, k.shape])
    assert lowered.as_text().count("@tpu_custom_call") == 2
    compiled = lowered.compile()
    row_bytes = ROWS * WIDTH * 2
    assert ROWS * WIDTH <= largest(compiled.as_text()) < N * N
    # Packed queries, cotangents and their gradient, of one head; a few arrays over the tokens.
    assert 3 * row_bytes < compiled.memory_analysis().temp_size_in_bytes < 8 * row_bytes


# Tokens, choices, targets, keys in a block, width of keys and of values.
SIZES = {
    "128": (32768, 7, 63, 128, 128, 128),
    "a long sequence": (524288, 7, 1023, 128, 128, 128),
    "large blocks": (65536, 2, 7, 2048, 128, 128),
    "wide heads in large blocks": (8192, 2, 3, 2048, 256, 256),
    "small blocks, narrow heads": (8192, 15, 255, 32, 64, 64),
    "values narrower than keys": (8192, 3, 31, 64, 192, 128),
    "widths off every register": (5000, 3, 31, 48, 80, 40),
    "a few rows": (20, 3, 7, 16, 16, 8),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SIZES)
def test_both_kernels_compile_at_every_size(mesh, name, dtype):
    """In the highest precision, as `jax.default_matmul_precision` asks for."""
    tokens, choices, targets, block, width, value_width = SIZES[name]
    rows = tokens * choices
    operand = functools.partial(array, mesh, dtype=dtype)
    index = functools.partial(array, mesh, dtype=jnp.int32)
    number = array(mesh, tokens, dtype=jnp.float32)
    arguments = (
        operand(tokens, width),
        operand(targets, block, width),
        operand(targets, block, value_width),
        operand(tokens, value_width),
        number,
        number,
        index(rows),
        index(tokens, choices),
        index(targets),
    )

    def run(q, k, v, d_out, lse, mean, order, row, group_sizes):
        slots = Slots(order, row, group_sizes)
        out, out_lse = routed.forward(q, k, v, slots, scale=0.1)
        return out, out_lse, *routed.backward(q, k, v, d_out, lse, mean, slots, scale=0.1)

    results = (rows, value_width), (rows,), (rows, width), *(x.shape for x in arguments[1:3])
    with jax.default_matmul_precision("highest"):
        lowered = lowered_for(mesh, run, arguments, results)
        assert lowered.as_text().count("@tpu_custom_call") == 2
        lowered.compile()

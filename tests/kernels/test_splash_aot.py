"""Splash attention passes the real TPU compiler at the sizes of published models, without a TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from moejax.kernels.full_attention import full_attention
from tests.kernels.test_tpu_aot import array, lowered_for
from tests.kernels.test_tpu_aot import mesh as mesh  # the fixture

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install libtpu",
    ),
]
LENGTH = 4096
# (heads, heads of keys, width of keys, of values, options)
SHAPES = {
    "mixtral": (32, 8, 128, 128, {}),
    "olmoe": (16, 16, 128, 128, {}),
    "gpt-oss": (64, 8, 64, 64, {"window": 128, "sinks": jnp.ones(64)}),
    "deepseek": (16, 16, 192, 128, {"scale": 0.1}),
    "gemma 2": (8, 4, 256, 256, {"soft_cap": 50.0}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward_compile(mesh, name):
    heads, kv_heads, width, value_width, options = SHAPES[name]
    q = array(mesh, 1, LENGTH, heads, width)
    k, v = (array(mesh, 1, LENGTH, kv_heads, n) for n in (width, value_width))
    ids = array(mesh, 1, LENGTH, dtype=jnp.int32)

    def run(q, k, v, ids):
        attend = lambda *x: full_attention(*x, segment_ids=ids, implementation="splash", **options)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(out)

    results = [(*q.shape[:3], value_width), q.shape, k.shape, v.shape]
    lowered = lowered_for(mesh, run, (q, k, v, ids), results)
    assert lowered.as_text().count("@tpu_custom_call") == 3
    lowered.compile()

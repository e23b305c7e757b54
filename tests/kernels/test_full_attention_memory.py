"""Attention never holds an array as long as sequence times sequence, on any platform."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention.full import FullAttention
from moejax.attention.mla import MultiHeadLatentAttention
from moejax.attention.moba import MoBA
from moejax.kernels import compat
from moejax.kernels.full_attention import full_attention
from moejax.verification.contracts.cases import make_context
from tests.configs.test_no_dense import PLATFORMS

LENGTH, WIDTH = 4096, 16
ATTENTIONS = {
    "full": FullAttention(num_heads=2, num_kv_heads=1, use_sinks=True, soft_cap=9.0),
    "latent": MultiHeadLatentAttention(
        num_heads=2, kv_lora_rank=6, nope_head_dim=4, rope_head_dim=2, v_head_dim=3
    ),
    "blocks, then all": MoBA(num_heads=2, num_kv_heads=1, top_k=4, until_step=5),
}


def as_on(platform):
    """A mesh of one device as of this platform."""
    ours, kind = PLATFORMS[platform]
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=ours)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def traced_layer(attention, length, *, window=None):
    """Value and gradients of one packed row."""
    segment_ids = np.arange(length)[None] // 1000 + 1
    context = make_context(segment_ids > 0, segment_ids=segment_ids, window=window)
    x = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)
    params = jax.eval_shape(lambda x: attention.init(jax.random.key(0), x, context), x)["params"]
    loss = lambda p, x: jnp.square(attention.apply({"params": p}, x, context)).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(params, x)


def largest(program):
    """Elements of the largest array that any operation of the program takes or gives."""
    found = re.findall(r"tensor<((?:\d+x)+)\w+>", program)
    return max(math.prod(int(d) for d in dims.split("x")[:-1]) for dims in found)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_no_array_is_as_long_as_sequence_times_sequence(unchecked, name, window, platform):
    with as_on(platform):
        traced = traced_layer(ATTENTIONS[name], LENGTH, window=window)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert WIDTH * LENGTH <= largest(program) < LENGTH**2 / 32


def test_the_guard_finds_the_definition():
    traced = traced_layer(ATTENTIONS["full"].copy(implementation="reference"), LENGTH)
    assert largest(traced.lower().as_text()) >= LENGTH**2


def test_memory_of_the_compiled_program_grows_as_the_sequence():
    """All temporary buffers together; the definition's would be four times as large."""
    temporaries = []
    for length in (2048, 4096):
        compiled = traced_layer(ATTENTIONS["full"], length).lower().compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporaries[1] < 2.2 * temporaries[0]
    assert temporaries[1] < 4 * LENGTH**2 / 4  # bytes of a quarter of one head's scores


def lowered_kernel(platform, implementation, **options):
    """Forward and backward in bfloat16, for CUDA or TPU."""
    q = jax.ShapeDtypeStruct((2, LENGTH, 4, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, LENGTH, 2, 64), jnp.bfloat16)

    def run(q, k, v):
        attend = lambda *x: full_attention(*x, implementation=implementation, **options)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(out)

    with as_on(platform):
        traced = jax.jit(run).trace(q, kv, kv)
    return traced.lower(lowering_platforms=(platform,)).as_text()


class _FakeVersions:
    @staticmethod
    def cudnn_get_version():
        return 91300


@pytest.mark.parametrize("window", [None, 512])
def test_cudnn_becomes_its_kernels(unchecked, monkeypatch, window):
    import jax._src.cudnn.fused_attention_stablehlo as fused

    monkeypatch.setattr(compat, "has_cudnn", lambda: True)
    monkeypatch.setattr(fused, "cuda_versions", _FakeVersions)
    program = lowered_kernel("cuda", "cudnn", window=window)
    assert "__cudnn$fmhaSoftmax" in program
    assert "__cudnn$fmhaSoftmaxBackward" in program
    assert "CAUSAL" in program
    assert (r"sliding_window_length\22: 512" in program) == (window == 512)
    assert largest(program) < LENGTH**2


@pytest.mark.parametrize("window", [None, 512])
def test_splash_becomes_its_kernels(unchecked, window):
    program = lowered_kernel("tpu", "splash", window=window, sinks=jnp.ones(4))
    assert program.count("@tpu_custom_call") == 3  # forward, dq, dkv
    assert largest(program) < LENGTH**2

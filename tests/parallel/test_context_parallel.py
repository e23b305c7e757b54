"""Attention over rows that lie on several devices: exactly what one device computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention.full import FullAttention
from moejax.attention.mla import MultiHeadLatentAttention
from moejax.errors import UserError
from moejax.kernels import compat
from moejax.kernels.full_attention import full_attention
from moejax.parallel.context_parallel import (
    FewestBytes,
    GatheredKeys,
    Ulysses,
    bytes_of_gather,
    bytes_of_ulysses,
)
from moejax.parallel.mesh import Mesh
from moejax.verification.contracts.cases import make_context, random_variables, to_dtype

BATCH, LENGTH, HEADS, WIDTH, VALUE_WIDTH = 4, 32, 8, 6, 4
MESHES = {
    "data=2 context=4": Mesh(data=2, context=4),
    "tensor=2 context=4": Mesh(data=1, tensor=2, context=4),
    "context=8": Mesh(data=1, context=8),
}
WAYS = {"ulysses": Ulysses(), "gathered keys": GatheredKeys()}
NAMES = ("result", "dq", "dk", "dv", "dsinks")
TOLERANCE = {jnp.float32: 2e-6, jnp.float64: 1e-12}


def operands(dtype, *, heads=HEADS, kv_heads=2):
    """(q, k, v, sinks, cotangent) and the segment ids of packed rows with padding."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    rows = (BATCH, LENGTH)
    ids = np.sort(rng.integers(1, 4, rows), axis=1)
    ids[1, -5:] = 0
    arrays = (
        draw(*rows, heads, WIDTH),
        draw(*rows, kv_heads, WIDTH),
        draw(*rows, kv_heads, VALUE_WIDTH),
        draw(heads),
        draw(*rows, heads, VALUE_WIDTH),
    )
    return arrays, ids


def attend(q, k, v, segment_ids, q_offset, sinks, *, window):
    return full_attention(
        q, k, v, segment_ids=segment_ids, q_offset=q_offset, sinks=sinks, window=window
    )


def value_and_gradients(way, window, arrays, ids):
    """On the mesh in use, or on one device without one."""

    def run(q, k, v, sinks, cotangent):
        call = lambda *x: way(functools.partial(attend, window=window), *x[:3], ids, x[3])
        y, pull = jax.vjp(call, q, k, v, sinks)
        return y, *pull(cotangent)

    return jax.tree.map(np.asarray, jax.jit(run)(*arrays))


def assert_equal_one_device(way, mesh, dtype, *, window=None, **heads):
    with jax.enable_x64(dtype == jnp.float64):
        arrays, ids = operands(dtype, **heads)
        expected = value_and_gradients(way, window, arrays, ids)
        with jax.set_mesh(mesh.build()):
            got = value_and_gradients(way, window, arrays, ids)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert a.dtype == b.dtype == dtype
        assert np.abs(b).max() > 1e-2, name
        assert np.abs(a - b).max() <= TOLERANCE[dtype] * np.abs(b).max(), name


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("way", WAYS)
def test_equals_one_device_in_float64(way, mesh):
    assert_equal_one_device(WAYS[way], MESHES[mesh], jnp.float64, window=11)


@pytest.mark.parametrize("way", WAYS)
def test_equals_one_device_in_float32(way):
    assert_equal_one_device(WAYS[way], MESHES["tensor=2 context=4"], jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("way", WAYS)
def test_equals_one_device_everywhere(way, mesh, window, dtype):
    assert_equal_one_device(WAYS[way], MESHES[mesh], dtype, window=window)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "mesh, heads, kv_heads",
    [
        (Mesh(data=1, tensor=2, context=4), 8, 1),  # one head of keys, for eight parts
        (Mesh(data=1, tensor=2, context=2), 12, 6),  # six for four
        (Mesh(data=1, tensor=4, context=2), 6, 2),  # tensor divides neither: its devices repeat
        (Mesh(data=8, context=1), 4, 2),  # nor does data divide the batch
        (Mesh(data=2, fsdp=2, expert=1, tensor=2), 4, 2),
    ],
)
def test_heads_and_batches_that_do_not_divide(way, mesh, heads, kv_heads):
    assert_equal_one_device(WAYS[way], mesh, jnp.float64, heads=heads, kv_heads=kv_heads)


def collectives(way, mesh, *, dtype=jnp.float32):
    """The collectives over `context`, by name, of forward and backward."""
    arrays, ids = operands(dtype)
    with jax.set_mesh(mesh.build()):
        call = lambda *x: way(functools.partial(attend, window=None), *x[:3], ids, x[3])
        step = lambda *x: jax.vjp(call, *x[:4])[1](x[4])
        program = str(jax.make_jaxpr(step)(*arrays))
    names = ("all_to_all", "all_gather", "reduce_scatter", "ppermute")
    return {name: program.count(f" {name}[") for name in names if f" {name}[" in program}


def test_each_way_moves_what_it_says():
    mesh = MESHES["data=2 context=4"]
    assert collectives(Ulysses(), mesh) == {"all_to_all": 4}  # there and back, and transposed
    assert collectives(GatheredKeys(), mesh) == {"all_gather": 1, "reduce_scatter": 1}
    alone = Mesh(data=8)
    assert collectives(Ulysses(), alone) == collectives(GatheredKeys(), alone) == {}


def test_gradients_of_gathered_keys_are_added_in_float32():
    arrays, ids = operands(jnp.bfloat16)
    with jax.set_mesh(MESHES["context=8"].build()):
        call = lambda k: GatheredKeys()(
            functools.partial(attend, window=None), arrays[0], k, arrays[2], ids, arrays[3]
        )
        jaxpr = str(jax.make_jaxpr(lambda k: jax.vjp(call, k)[1](arrays[4]))(arrays[1]))
    (line,) = [text for text in jaxpr.splitlines() if " reduce_scatter[" in text]
    assert f"f32[{BATCH},{LENGTH // 8}," in line


@pytest.mark.parametrize(
    "kv_heads, context, expected",
    [
        (8, 2, Ulysses),  # as many bytes, and equal work
        (2, 2, GatheredKeys),  # four queries per key: 5 / 2 of the bytes
        (4, 8, Ulysses),  # 8 parts of 4 heads: each stands twice, and still half of the bytes
        (1, 4, GatheredKeys),
    ],
)
def test_what_moves_fewest_bytes_is_taken(kv_heads, context, expected):
    (q, k, v, *_), _ = operands(jnp.float32, kv_heads=kv_heads)
    with jax.set_mesh(Mesh(data=1, context=context).build()):
        assert type(FewestBytes().of(q, k, v)) is expected
        least = min(bytes_of_ulysses(q, k, v), bytes_of_gather(q, k, v))
        found = bytes_of_ulysses if expected is Ulysses else bytes_of_gather
        assert found(q, k, v) == least


def test_heads_that_ulysses_cannot_split_are_for_gathered_keys():
    (q, k, v, sinks, _), ids = operands(jnp.float32, heads=6)
    call = functools.partial(attend, window=None)
    with jax.set_mesh(MESHES["context=8"].build()):
        with pytest.raises(UserError, match=r"attention has 6: mesh.context=8.*GatheredKeys\(\)"):
            Ulysses()(call, q, k, v, ids, sinks)
        assert type(FewestBytes().of(q, k, v)) is GatheredKeys


@pytest.mark.parametrize("way", WAYS)
def test_a_sequence_that_does_not_divide_is_one_clear_sentence(way):
    (q, k, v, sinks, _), ids = operands(jnp.float32)
    odd = [x[:, :30] for x in (q, k, v, ids)]
    with (
        jax.set_mesh(MESHES["data=2 context=4"].build()),
        pytest.raises(UserError, match=r"30 positions cannot be split 4 ways \(mesh.context=4\)"),
    ):
        WAYS[way](functools.partial(attend, window=None), *odd, sinks)


@pytest.mark.parametrize("length", [LENGTH, 600])
def test_the_kernel_within_a_shard_map_that_checks_what_varies(length):
    """Sinks that all devices share get the sum of their gradients; rows short and long."""
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.standard_normal((2, length, n, 4)), jnp.float32) for n in (2, 1, 1))
    sinks = jnp.asarray(rng.standard_normal(2), jnp.float32)
    attend = lambda q, k, v, sinks: full_attention(q, k, v, sinks=sinks)
    rows = jax.P("data")
    sharded = jax.shard_map(attend, in_specs=(rows, rows, rows, jax.P()), out_specs=rows)
    loss = lambda f: jax.grad(lambda *x: jnp.square(f(*x)).sum(), argnums=(0, 1, 2, 3))
    expected = jax.jit(loss(attend))(q, k, v, sinks)
    with jax.set_mesh(Mesh(data=2).build()):
        got = jax.jit(loss(sharded))(q, k, v, sinks)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


ATTENTIONS = {
    "full": FullAttention(num_heads=8, num_kv_heads=2, head_dim=4, use_sinks=True, soft_cap=3.0),
    "latent": MultiHeadLatentAttention(
        num_heads=8, kv_lora_rank=6, nope_head_dim=4, rope_head_dim=2, v_head_dim=3
    ),
}


@pytest.mark.parametrize("mesh", ["tensor=2 context=4", "context=8"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_layers_equal_one_device(name, mesh):
    attention, ids = ATTENTIONS[name], operands(jnp.float32)[1]
    position = np.arange(LENGTH)[None] + np.zeros_like(ids)
    context = make_context(ids > 0, segment_ids=ids, positions=jnp.asarray(position), window=13)
    x = np.random.default_rng(1).standard_normal((BATCH, LENGTH, 16))
    with jax.enable_x64(True):
        params = random_variables(attention, x.astype(np.float32), context)["params"]
        params, x = to_dtype((params, x), jnp.float64)
        loss = lambda p, x: jnp.square(attention.apply({"params": p}, x, context)).sum()
        step = lambda: jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
        expected = step()
        with jax.set_mesh(MESHES[mesh].build()):
            got = step()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_pallas_kernel_runs_within(way):
    """Splash attention, simulated, on the whole rows that Ulysses gives it; the other has none."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 256, n, 64)), jnp.float32) for n in (4, 2, 2))
    ids = jnp.ones((2, 256), jnp.int32)

    def attend(q, k, v, ids, offset):
        options = {"segment_ids": ids, "q_offset": offset, "implementation": "splash"}
        return full_attention(q, k, v, **options)

    step = jax.jit(jax.grad(lambda q: jnp.square(WAYS[way](attend, q, k, v, ids)).sum()))
    with compat.interpret_tpu():
        expected = step(q)
        jax.clear_caches()
        with jax.set_mesh(Mesh(data=2, tensor=2, context=2).build()):
            if way == "gathered keys":
                with pytest.raises(UserError, match="q_offset must be known"):
                    step(q)
            else:
                np.testing.assert_allclose(step(q), expected, rtol=1e-4, atol=1e-4)

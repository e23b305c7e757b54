"""What must hold of block attention whatever the numbers are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.kernels.block_attention import moba_attention, operands

EVERY = pytest.mark.parametrize(
    "implementation", ["packed", pytest.param("scan", marks=pytest.mark.slow)]
)
B, K = 8, 3


def draw(length=64, *, heads=2, kv_heads=2, width=8, seed=0, rows=1):
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)


def with_gradients(q, k, v, d_out, **options):
    attend = functools.partial(moba_attention, **({"block_size": B, "top_k": K} | options))
    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(d_out)


def compiled(**options):
    return jax.jit(functools.partial(with_gradients, **options))


def close(got, want, atol=2e-6):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * np.abs(b).max())


@EVERY
def test_what_comes_later_changes_nothing(implementation):
    attend = jax.jit(
        functools.partial(moba_attention, block_size=B, top_k=K, implementation=implementation)
    )
    q, k, v, _ = draw()
    want = attend(q, k, v)
    for t in (0, 7, 8, 30, 62):
        other = (
            jnp.where(jnp.arange(64)[:, None, None] > t, x[..., ::-1] * 3, x) for x in (q, k, v)
        )
        got = attend(*other)
        np.testing.assert_array_equal(got[:, : t + 1], want[:, : t + 1])
        assert np.abs(np.asarray(got - want))[:, t + 1].max() > 1e-3


@EVERY
def test_enough_blocks_are_full_causal_attention(implementation):
    q, k, v, d_out = draw(60)
    full = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    want, vjp = jax.vjp(full, q, k, v)
    for top_k in (8, 50):
        got = compiled(top_k=top_k, implementation=implementation)(q, k, v, d_out)
        close(got, (want, *vjp(d_out)))
    fewer = compiled(top_k=4, implementation=implementation)(q, k, v, d_out)
    assert np.abs(fewer[0] - want).max() > 1e-2


@EVERY
def test_a_block_that_nobody_chose_gets_no_gradient(implementation):
    """And one that all choose gets one: the first is such a sink."""
    q, k, v, d_out = draw()
    towards = jnp.zeros((64,)).at[:B].set(4).at[2 * B : 3 * B].set(-4)
    q, k = q.at[..., 0].set(4), k.at[..., 0].set(towards[:, None])
    d_out = d_out.at[:, : 3 * B].set(0)  # what the blocks' own queries attend
    _, _, d_k, d_v = compiled(top_k=2, implementation=implementation)(q, k, v, d_out)
    chosen = np.arange(64) < B
    alone = (np.arange(64) >= 2 * B) & (np.arange(64) < 3 * B)
    for gradient in (d_k, d_v):
        np.testing.assert_array_equal(gradient[:, alone], 0)
        assert (np.abs(gradient[:, chosen]).max(axis=(0, 2, 3)) > 0).all()


@EVERY
def test_gradients_are_those_of_constant_choices(monkeypatch, implementation):
    arrays = draw(heads=4)
    made = []

    def recorded(*args, select=operands.select, **options):
        made.append(select(*args, **options))
        return made[0]

    options = {"block_size": B, "top_k": K, "implementation": implementation}
    monkeypatch.setattr(operands, "select", recorded)
    moba_attention(*arrays[:3], **options)  # now known, and a constant from here on
    constant = compiled(**options)(*arrays)
    monkeypatch.undo()
    for a, b in zip(compiled(**options)(*arrays), constant, strict=True):
        np.testing.assert_array_equal(a, b)


@EVERY
def test_two_runs_are_equal_bit_for_bit_and_routing_compiles_nothing(implementation):
    run = compiled(implementation=implementation)
    first = run(*draw(heads=4))
    again = run(*draw(heads=4))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    run(*draw(heads=4, seed=1))
    q, k, v, d_out = draw(heads=4)
    run(q.at[..., 0].set(9), k.at[:, :B, :, 0].set(9), v, d_out)
    assert run._cache_size() == 1


@EVERY
def test_segments_may_change_without_compiling(implementation):
    run = jax.jit(
        lambda ids, *a: with_gradients(*a, segment_ids=ids, implementation=implementation)
    )
    arrays = draw(rows=2)
    for lengths in ([64, 0], [10, 54], [1, 20]):
        ids = np.repeat([1, 2, 0], [*lengths, 64 - sum(lengths)])
        ids = np.stack([ids, np.ones_like(ids)]).astype(np.int32)
        got = run(ids, *arrays)
        want = with_gradients(*arrays, segment_ids=ids, implementation="reference")
        close(got, want)
    assert run._cache_size() == 1


@EVERY
def test_chosen_by_the_group_is_the_same_choice_for_every_head(implementation):
    """With equal query heads the group chooses what each head would."""
    q, k, v, d_out = draw(heads=2, kv_heads=2)
    q = jnp.repeat(q, 2, axis=2)
    d_out = jnp.concatenate([d_out, d_out], axis=2)
    options = {"implementation": implementation}
    close(
        compiled(heads="group", **options)(q, k, v, d_out),
        compiled(heads="query", **options)(q, k, v, d_out),
    )


@EVERY
def test_recomputed_in_the_backward_pass(implementation):
    q, k, v, d_out = draw()
    options = {"block_size": B, "top_k": K, "implementation": implementation}
    attend = jax.checkpoint(functools.partial(moba_attention, **options))
    run = jax.jit(lambda *a: jax.vjp(attend, *a[:3])[1](a[3]))
    for a, b in zip(run(q, k, v, d_out), compiled(**options)(q, k, v, d_out)[1:], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("implementation", ["packed", "scan"])
def test_queries_over_devices_inside_shard_map(implementation, segmented):
    """Each device has its part of the queries and all keys, whose gradients are summed."""
    mesh = jax.make_mesh((4,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.P
    ids = np.repeat([[1, 2, 0]], 1, 0).repeat([30, 26, 8], 1) if segmented else None
    options = {"block_size": B, "top_k": K, "implementation": implementation}

    def part(q, k, v, ids):
        offset = jax.lax.axis_index("context") * q.shape[1]
        return moba_attention(q, k, v, q_offset=offset, segment_ids=ids, **options)

    split = P(None, "context")
    sharded = jax.shard_map(
        part, mesh=mesh, in_specs=(split, P(), P(), P()), out_specs=split, check_vma=True
    )
    q, k, v, d_out = draw(heads=4)
    got, vjp = jax.vjp(jax.jit(lambda q, k, v: sharded(q, k, v, ids)), q, k, v)
    want = with_gradients(q, k, v, d_out, segment_ids=ids, implementation="reference")
    close((got, *vjp(d_out)), want)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["packed", "scan"])
def test_batch_over_devices_inside_shard_map(implementation):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    attend = functools.partial(moba_attention, block_size=B, top_k=K, implementation=implementation)
    spec = jax.P("data")
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    q, k, v, d_out = draw(rows=2)
    got, vjp = jax.vjp(jax.jit(sharded), q, k, v)
    close((got, *vjp(d_out)), with_gradients(q, k, v, d_out, implementation="reference"))


@pytest.mark.parametrize(
    "row", [[1] * 8 + [2] * 4 + [1] * 4, [1] * 8 + [0] * 4 + [2] * 4, [0] * 4 + [1] * 12, [-1] * 16]
)
def test_segments_in_disorder_are_an_error_or_nan(row):
    ids = np.stack([np.ones(16, int), row]).astype(np.int32)
    q, k, v, _ = draw(16, rows=2)
    attend = functools.partial(moba_attention, block_size=4, top_k=2, implementation="packed")
    with pytest.raises(UserError, match="row 1 decreases, or goes on after padding"):
        attend(q, k, v, segment_ids=ids)
    out = jax.jit(attend)(q, k, v, segment_ids=ids)
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


def test_an_offset_outside_the_keys_is_an_error_or_nan():
    q, k, v, _ = draw(16)
    attend = functools.partial(moba_attention, block_size=4, top_k=2, implementation="scan")
    for offset in (-1, 9):
        with pytest.raises(UserError, match=f"q_offset {offset} for 8 queries and 16 keys"):
            attend(q[:, :8], k, v, q_offset=offset)
    run = jax.jit(lambda o: attend(q[:, :8], k, v, q_offset=o))
    assert [bool(np.isnan(run(o)).all()) for o in (-1, 0, 8, 9)] == [True, False, False, True]
    assert [bool(np.isnan(run(o)).any()) for o in (0, 8)] == [False, False]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"top_k": 0}, "top_k 0; it must be at least 1"),
        ({"block_size": 0}, "block_size 0; it must be at least 1"),
        ({"heads": "token"}, "heads 'token'; use one of query, group"),
        ({"implementation": "dense"}, "no implementation 'dense'; use one of packed, scan"),
    ],
)
def test_errors_name_the_thing_and_the_fix(unchecked, options, words):
    q, k, v, _ = draw(16)
    with pytest.raises(UserError, match=words):
        moba_attention(q, k, v, **({"block_size": 4, "top_k": 2} | options))


def test_heads_that_do_not_fit_are_an_error():
    q, _, _, _ = draw(16, heads=3)
    _, k, v, _ = draw(16, kv_heads=2)
    with pytest.raises(UserError, match="3 query heads for 2 key heads"):
        moba_attention(q, k, v, block_size=4, top_k=2)
    with pytest.raises(UserError, match="a key for every query"):
        moba_attention(q, k[:, :8, :1], v[:, :8, :1], block_size=4, top_k=2)

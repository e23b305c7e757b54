"""Every backend delivers what the definition says, bit for bit, forwards and backwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import PartitionSpec as Spec

from moejax.parallel.exchange import exchange, lost_rows
from tests.parallel.simulated import emulate_ragged, mesh_of

A = 29  # rows that each device holds; divided by no number of devices here
R = 37  # rows that each has room for
BACKENDS = ["ragged", "two_hop", "gather"]


def routes(sizes, num_held=A, num_rows=R):
    """[d, r] -> (source, its row) of what arrives there, or (-1, -1); by the definition."""
    arriving = [[] for _ in sizes]
    for source, counts in enumerate(sizes):
        held = iter(range(num_held))
        for target, count in enumerate(counts):
            arriving[target] += [(source, row) for _, row in zip(range(count), held)]  # noqa: B905
    nothing = [(-1, -1)] * num_rows
    return np.array([(rows + nothing)[:num_rows] for rows in arriving])


def rows_on(num_devices, num_rows, num_used, seed):
    """Random rows `[P * num_rows, ...]` of several dtypes; NaN behind the used ones.

    Among them are values that arithmetic would not keep; but no subnormal bfloat16, of which even a
    `select` makes zero in jaxlib 0.12, on processors that have bfloat16 instructions.
    """
    rng = np.random.default_rng(seed)
    unused = np.arange(num_rows) >= np.asarray(num_used)[:, None]
    wide = rng.standard_normal((num_devices, num_rows, 2, 3)).astype(np.float32)
    wide[:, ::5, 0] = [-0.0, 1e-39, np.inf]
    wide[:, ::7, 0] = [np.nan, -np.inf, -1e-39]
    wide[unused] = np.nan
    wide = wide.reshape(-1, 2, 3)
    narrow = np.where(np.abs(wide[:, 0]) == np.float32(1e-39), 0, wide[:, 0])
    return {"wide": wide, "narrow": narrow.astype(jnp.bfloat16)}


@functools.cache  # sizes are values: one program for all patterns
def sent_and_returned(num_devices, backend, num_rows):
    def run(rows, ids, sizes, cotangents):
        send = functools.partial(exchange, axis="expert", num_rows=num_rows, backend=backend)

        def arrive(rows):
            out = send(rows | {"ids": ids}, sizes)
            return out, out.pop("ids")

        out, vjp, ids_out = jax.vjp(arrive, rows, has_aux=True)
        return out | {"ids": ids_out}, *vjp(cotangents)

    own, same = Spec("expert"), Spec()
    mesh = mesh_of(expert=num_devices)
    return jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(own, own, same, own), out_specs=(own, own))
    )


def assert_same_bits(got, want, name):
    assert got.dtype == want.dtype
    as_bits = lambda x: x.view(f"uint{8 * x.dtype.itemsize}")
    np.testing.assert_array_equal(as_bits(got), as_bits(want), err_msg=name)


def check(backend, sizes, num_rows=R, seed=0):
    num_devices = len(sizes)
    source, row = np.moveaxis(routes(sizes, A, num_rows), -1, 0)
    used = source >= 0  # [P, R]
    rows = rows_on(num_devices, A, sizes.sum(1), seed)
    cotangents = rows_on(num_devices, num_rows, used.sum(1), seed + 1)
    ids = np.arange(num_devices * A, dtype=np.int32) + 1000

    run = sent_and_returned(num_devices, backend, num_rows)
    out, returned = jax.tree.map(np.asarray, run(rows, ids, jnp.asarray(sizes), cotangents))

    used, sent = used.reshape(-1), (source * A + row).reshape(-1)
    for name, leaf in (rows | {"ids": ids}).items():
        want = np.zeros((num_devices * num_rows, *leaf.shape[1:]), leaf.dtype)
        want[used] = leaf[sent[used]]
        assert_same_bits(out[name], want, name)
    for name, leaf in cotangents.items():
        want = np.zeros((num_devices * A, *leaf.shape[1:]), leaf.dtype)
        want[sent[used]] = leaf[used]
        assert_same_bits(returned[name], want, f"cotangent of {name}")


def patterns(num_devices):
    """Name -> sizes of which every device has the rows and, with room for all, takes them."""
    rng = np.random.default_rng(num_devices)
    device = np.arange(num_devices)
    zero = np.zeros((num_devices, num_devices), np.int32)
    cases = {"nothing": zero.copy(), "permutation": zero.copy(), "one sender": zero.copy()}
    cases["permutation"][device, (device + 1) % num_devices] = A
    cases["one sender"][num_devices // 2] = A // num_devices
    cases["one receiver"] = zero.copy()
    cases["one receiver"][:, 1] = A
    cases["even"] = zero + A // num_devices
    cases["random"] = rng.multinomial(A - 2, rng.dirichlet(np.full(num_devices, 0.3)), num_devices)
    return {name: sizes.astype(np.int32) for name, sizes in cases.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_devices", [3, 8])
def test_everything_arrives_where_there_is_room_for_all(num_devices, backend, monkeypatch):
    emulate_ragged(monkeypatch)
    for sizes in patterns(num_devices).values():
        check(backend, sizes, num_rows=num_devices * A)


@st.composite
def traffic(draw, num_devices):
    """Mostly one-sided sizes, cut so that no device has too few rows; R may be too small."""
    count = st.sampled_from([0, 0, 1, 2, 5, A - 1, A])
    sizes = draw(arrays(np.int32, (num_devices, num_devices), elements=count, fill=st.nothing()))
    return np.diff(np.minimum(np.cumsum(sizes, 1), A), axis=1, prepend=0).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_any_traffic_arrives_and_what_finds_no_room_is_counted(num_devices, backend, monkeypatch):
    emulate_ragged(monkeypatch)
    seen = []

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(sizes=traffic(num_devices))
    def any_traffic(sizes):
        check(backend, sizes)
        lost = sizes.sum() - (routes(sizes)[..., 0] >= 0).sum()
        assert lost_rows(jnp.asarray(sizes), R) == lost
        seen.append(lost > 0)

    any_traffic()
    assert any(seen), "nothing was ever lost: the test shows nothing about it"
    assert not all(seen)


def test_what_a_device_does_not_have_is_not_sent(monkeypatch):
    emulate_ragged(monkeypatch)
    sizes = np.array([[5, A], [A, 3]], np.int32)
    for backend in BACKENDS:
        check(backend, sizes)


@pytest.mark.parametrize("num_rows", [R, A - 10])
def test_one_device_keeps_its_rows(num_rows):
    check("two_hop", np.array([[A - 4]], np.int32), num_rows)


@pytest.mark.parametrize("num_held, num_rows", [(0, 5), (5, 0)])
def test_no_rows_or_no_room(num_held, num_rows):
    run = jax.shard_map(
        lambda x: exchange(x, jnp.zeros((2, 2), jnp.int32), axis="expert", num_rows=num_rows),
        mesh=mesh_of(expert=2),
        in_specs=Spec("expert"),
        out_specs=Spec("expert"),
    )
    out, vjp = jax.vjp(run, jnp.ones((2 * num_held, 3)))
    np.testing.assert_array_equal(out, np.zeros((2 * num_rows, 3)))
    assert vjp(out)[0].shape == (2 * num_held, 3)

"""The exchange inside what a training step does: scan, remat, gradients, meshes with other axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

from moejax.errors import UserError
from moejax.kernels import compat
from moejax.parallel.exchange import chosen_backend, exchange
from tests.parallel.simulated import emulate_ragged, mesh_of
from tests.parallel.test_exchange import A, R

NUM_LAYERS, NUM_GROUPS, NUM_DEVICES = 3, 2, 4


def layers(exchange_both_ways, x, weights, sizes):
    """x + tanh(x * weight of the device that the row is sent to), layer by layer."""

    @jax.checkpoint
    def layer(x, operands):
        weight, sizes = operands
        return x + exchange_both_ways(x, weight, sizes), None

    return jax.lax.scan(layer, x, (weights, sizes))[0]


def loss_on(mesh, backend):
    """Loss of `x` `[groups * P * A, 2]`; weights `[L, P, 2]`, sizes `[L, groups, P, P]`."""

    def there_and_back(x, weight, sizes):
        sizes = sizes[0]  # varies over groups, and is the same within one
        send = functools.partial(exchange, axis="expert", backend=backend)
        rows = send(x, sizes, num_rows=R)
        return send(jnp.tanh(rows * weight), sizes.T, num_rows=A)

    def on_device(x, weights, sizes):
        y = layers(there_and_back, x, weights, sizes)
        return jax.lax.psum((y**2).sum(), ("data", "expert"))

    specs = Spec(("data", "expert")), Spec(None, "expert"), Spec(None, "data")
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=Spec())


def problem():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((NUM_GROUPS * NUM_DEVICES * A, 2))
    weights = rng.standard_normal((NUM_LAYERS, NUM_DEVICES, 2))
    shape = (NUM_LAYERS, NUM_GROUPS, NUM_DEVICES)
    sizes = rng.multinomial(A - 3, np.full(NUM_DEVICES, 1 / NUM_DEVICES), shape)
    sizes[1, 0] = (A - 3) * np.roll(np.eye(NUM_DEVICES, dtype=int), 1, axis=0)  # a permutation
    assert sizes.sum(-2).max() <= R
    return x, weights, sizes.astype(np.int32)


def loss_by_definition(x, weights, sizes):
    """The same on one device, which looks up each row's weight and moves nothing."""
    targets = np.full((NUM_LAYERS, NUM_GROUPS, NUM_DEVICES, A), -1)
    for index in np.ndindex(*sizes.shape[:3]):
        row = np.repeat(np.arange(NUM_DEVICES), sizes[index])
        targets[index][: row.size] = row
    targets = targets.reshape(NUM_LAYERS, -1, 1)

    def compute(x, weights, targets):
        own = jnp.take_along_axis(weights, jnp.maximum(targets, 0), axis=0)
        return jnp.where(targets >= 0, jnp.tanh(x * own), 0)

    return (layers(compute, x, weights, targets) ** 2).sum()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ragged", "two_hop", "gather"])
def test_gradients_through_scan_and_remat_on_a_mesh_with_another_axis(backend, monkeypatch):
    emulate_ragged(monkeypatch)
    mesh = mesh_of(data=NUM_GROUPS, expert=NUM_DEVICES)
    with jax.enable_x64(True):
        x, weights, sizes = map(jnp.asarray, problem())
        assert x.dtype == jnp.float64
        run = jax.jit(jax.value_and_grad(loss_on(mesh, backend), argnums=(0, 1)))
        loss, grads = run(x, weights, sizes)
        expected = jax.value_and_grad(loss_by_definition, argnums=(0, 1))(x, weights, sizes)
        np.testing.assert_allclose(loss, expected[0], rtol=1e-12)
        for got, want in zip(grads, expected[1], strict=True):
            assert np.abs(want).min() > 0
            np.testing.assert_allclose(got, want, rtol=1e-9)


def on_own_rows(f, mesh, *, check_vma=True):
    own = Spec("expert")
    run = jax.shard_map(f, mesh=mesh, in_specs=own, out_specs=own, check_vma=check_vma)
    return jax.jit(run)


SIZES = np.array([[3, 2], [0, 4]], np.int32)


def test_rows_that_are_the_same_everywhere_get_the_sum_of_the_gradients():
    """An array that does not vary over the axis may be sent too."""
    mesh = mesh_of(expert=2)

    def loss(rows):
        def on_device(rows):
            out = exchange(rows, jnp.asarray(SIZES), axis="expert", num_rows=8)
            return jax.lax.psum((out * out).sum(), "expert")

        return jax.shard_map(on_device, mesh=mesh, in_specs=Spec(), out_specs=Spec())(rows)

    rows = jnp.arange(1.0, 7.0)
    # Device 0 sends rows 0 to 4, device 1 rows 0 to 3.
    np.testing.assert_array_equal(
        jax.jit(jax.grad(loss))(rows), 2 * rows * np.array([2, 2, 2, 2, 1, 0])
    )


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_sizes_may_differ_in_type_from_device_to_device(check_vma):
    """As sizes from an `all_gather` do: the same values, marked as varying."""
    x = jnp.arange(12.0).reshape(12, 1)

    def send(x, sizes):
        return exchange(x, sizes, axis="expert", num_rows=8)

    def with_gathered(x):
        mine = jnp.asarray(SIZES)[jax.lax.axis_index("expert")]
        return send(x, jax.lax.all_gather(mine, "expert"))

    mesh = mesh_of(expert=2)
    for f in (with_gathered, lambda x: send(x, jnp.asarray(SIZES))):
        run = on_own_rows(f, mesh, check_vma=check_vma)
        out, vjp = jax.vjp(run, x)
        arriving = np.array([0, 1, 2, 0, 0, 0, 0, 0, 3, 4, 6, 7, 8, 9, 0, 0])
        np.testing.assert_array_equal(out[:, 0], arriving)
        sent = [0, 1, 2, 3, 4, 0, 6, 7, 8, 9, 0, 0]
        np.testing.assert_array_equal(vjp(out)[0][:, 0], sent)


def test_can_be_differentiated_twice():
    send = lambda x: exchange(x, jnp.asarray(SIZES), axis="expert", num_rows=8)
    run = on_own_rows(send, mesh_of(expert=2))
    x = jnp.arange(1.0, 13.0)
    slope = lambda x: jax.grad(lambda x: (run(x) ** 3).sum())(x).sum()
    sent = np.array([1, 1, 1, 1, 1, 0] + [1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(jax.jit(jax.grad(slope))(x), 6 * x * sent)


def test_backends_by_platform(monkeypatch):
    assert chosen_backend(None) == "two_hop"
    message = "exchange='ragged' does not exist on cpu: use 'two_hop' or 'gather'"
    with pytest.raises(UserError, match=message):
        chosen_backend("ragged")
    with pytest.raises(UserError, match="exchange='rugged' is unknown: use 'two_hop' or 'gather'"):
        chosen_backend("rugged")
    monkeypatch.setattr(compat, "target_platform", lambda: "gpu")
    assert (chosen_backend(None), chosen_backend("ragged")) == ("two_hop", "ragged")
    with pytest.raises(UserError, match="use 'ragged', 'two_hop' or 'gather'"):
        chosen_backend("rugged")
    monkeypatch.setattr(compat, "target_platform", lambda: "tpu")
    assert chosen_backend(None) == "ragged"


@pytest.mark.parametrize(
    "rows, sizes, num_rows, named",
    [
        pytest.param([(4, 2)], (3, 3), 4, r"integers \[2, 2\]; got int32\[3, 3\]", id="devices"),
        pytest.param([(4, 2), (5,)], (2, 2), 4, r"\(4, 2\), \(5,\)", id="rows"),
        pytest.param([()], (2, 2), 4, r"shapes \(\)", id="scalar"),
        pytest.param([(4,)], (2, 2), -1, "at least 0; got -1", id="num_rows"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(rows, sizes, num_rows, named):
    def send():
        leaves = [jnp.ones(shape) for shape in rows]
        return exchange(leaves, jnp.zeros(sizes, jnp.int32), axis="expert", num_rows=num_rows)

    run = jax.shard_map(send, mesh=mesh_of(expert=2), in_specs=(), out_specs=Spec("expert"))
    with pytest.raises(ValueError, match=named):
        run()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_ragged_lowers_to_one_collective_per_array_and_direction(platform, monkeypatch):
    monkeypatch.setattr(compat, "target_platform", lambda: "tpu")

    def there_and_back(x):
        rows = {"x": x, "y": x[:, 0].astype(jnp.bfloat16)}
        send = lambda v: exchange(
            v, jnp.asarray(SIZES), axis="expert", num_rows=8, backend="ragged"
        )
        out, vjp = jax.vjp(send, rows)
        return vjp(out)[0]

    run = on_own_rows(there_and_back, mesh_of(expert=2))
    traced = run.trace(jax.ShapeDtypeStruct((12, 3), jnp.float32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@ragged_all_to_all(") == 4
    assert "all_gather" not in text
    assert '"stablehlo.all_to_all"' not in text

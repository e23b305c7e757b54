"""expert_mlp against the dense definition in float64: values, all gradients, and saved memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.kernels.expert_mlp import Biases, expert_mlp, reference

T, D, F, E, K = 48, 24, 40, 6, 3  # 144 rows: tiles of three heights
SMALL = 10  # tokens: tiles of one height, where the heights do not matter and compiling costs
TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}
PORTABLE = ("tile_scan", "xla")  # TPU and GPU kernels: test_expert_mlp_simulated.py


def parameters(dtype="float32", biased=False, num_tokens=T):
    """(x, w_gate, w_up, w_down, weights, biases)."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    x, gate, up, down = draw(num_tokens, D), draw(E, D, F) / 4, draw(E, D, F) / 4, draw(E, F, D) / 6
    weights = jnp.asarray(rng.random((num_tokens, K)), jnp.float32)
    biases = Biases(draw(E, F), draw(E, F), draw(E, D)) if biased else None
    return x, gate, up, down, weights, biases


def cotangent(dtype, num_tokens=T):
    return jnp.asarray(np.random.default_rng(1).standard_normal((num_tokens, D)), dtype)


def routes() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    some_empty = rng.integers(0, E, (T, K))
    some_empty[rng.random((T, K)) < 0.3] = E
    some_empty[::7] = -1
    some_empty[3, 0] = 1000
    return {
        "random, with duplicates": rng.integers(0, E, (T, K)),
        "distinct": np.argsort(rng.random((T, E)), 1)[:, :K],
        "all to one expert": np.full((T, K), 4),
        "half of the experts unused": 2 * rng.integers(0, E // 2, (T, K)),
        "empty slots": some_empty,
        "only empty slots": np.full((T, K), E),
        "one slot": np.where(np.arange(T * K).reshape(T, K) == 20, 2, E),
    }


@functools.cache
def compiled(implementation: str, activation: str):
    """(parameters, experts, cotangent) -> (out, gradients); routes are values, so one compile."""

    @jax.jit
    def run(params, experts, dout):
        def mlp(x, gate, up, down, weights, biases):
            return expert_mlp(
                *(x, gate, up, down, experts, weights),
                biases=biases,
                activation=activation,
                implementation=implementation,
            )

        out, vjp = jax.vjp(mlp, *params)
        return out, vjp(dout)

    return run


def definition(params, experts, dout, activation):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), params)

        def mlp(x, gate, up, down, weights, biases):
            return reference.expert_mlp(
                *(x, gate, up, down, jnp.asarray(experts), weights),
                biases=biases,
                activation=activation,
            )

        out, vjp = jax.vjp(mlp, *wide)
        return jax.tree.map(np.asarray, (out, vjp(jnp.asarray(np.asarray(dout, np.float64)))))


def assert_matches(got, want, dtype):
    """Relative error of every leaf, and of every expert where the leaf has an axis of experts."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a = np.asarray(a, np.float64)
        assert a.shape == b.shape
        parts = zip(a, b, strict=True) if len(b) == E else [(a, b)]
        for part, true in parts:
            scale = max(np.linalg.norm(true), 1e-6 * np.linalg.norm(b), 1e-30)
            assert np.linalg.norm(part - true) / scale < TOLERANCE[dtype]


@pytest.mark.parametrize("route", routes())
@pytest.mark.parametrize("implementation", PORTABLE)
def test_value_and_gradients_match_the_definition(implementation, route):
    params, dout, experts = parameters(), cotangent("float32"), routes()[route]
    got = compiled(implementation, "silu")(params, jnp.asarray(experts), dout)
    assert_matches(got, definition(params, experts, dout, "silu"), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_clamped"])
@pytest.mark.parametrize("implementation", PORTABLE)
def test_biases_and_activations(implementation, activation):
    params, dout = parameters(biased=True, num_tokens=SMALL), cotangent("float32", SMALL)
    experts = routes()["empty slots"][:SMALL]
    got = compiled(implementation, activation)(params, jnp.asarray(experts), dout)
    assert_matches(got, definition(params, experts, dout, activation), "float32")


@pytest.mark.parametrize("implementation", PORTABLE)
def test_bfloat16(implementation):
    params, dout = parameters("bfloat16", num_tokens=SMALL), cotangent("bfloat16", SMALL)
    experts = routes()["distinct"][:SMALL]
    out, grads = got = compiled(implementation, "silu")(params, jnp.asarray(experts), dout)
    assert_matches(got, definition(params, experts, dout, "silu"), "bfloat16")
    assert out.dtype == jnp.bfloat16
    assert [g.dtype for g in jax.tree.leaves(grads)] == [p.dtype for p in jax.tree.leaves(params)]


@pytest.mark.parametrize("implementation", [*PORTABLE, "reference"])
def test_nan_in_unused_rows_and_empty_slots_reaches_nothing(implementation):
    experts = routes()["empty slots"]
    empty = (experts < 0) | (experts >= E)
    unused = empty.all(1)
    assert unused.any()
    x, gate, up, down, weights, biases = parameters()
    dout = cotangent("float32")
    poisoned = (
        jnp.where(unused[:, None], jnp.nan, x),
        *(gate, up, down),
        jnp.where(empty, jnp.nan, weights),
        biases,
    )
    bad_dout = jnp.where(unused[:, None], jnp.nan, dout)
    run = compiled(implementation, "silu")
    got = run(poisoned, jnp.asarray(experts), bad_dout)
    want = run((x, gate, up, down, weights, biases), jnp.asarray(experts), dout)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_tile_scan_keeps_a_nan_within_its_expert():
    """A NaN token of expert 1 must not reach the gradients of the experts beside it."""
    experts = np.repeat(np.arange(E), T // E)[:, None].repeat(K, 1)
    x, *rest = parameters()
    token = int(np.flatnonzero(experts[:, 0] == 1)[-1])
    run = compiled("tile_scan", "silu")
    out, grads = run((x.at[token].set(jnp.nan), *rest), jnp.asarray(experts), cotangent("float32"))
    assert np.isnan(out[token]).all()
    assert np.isfinite(np.delete(np.asarray(out), token, 0)).all()
    for grad in grads[1:4]:
        assert np.isnan(grad[1]).any()
        assert np.isfinite(np.delete(np.asarray(grad), 1, 0)).all()


@pytest.mark.parametrize("implementation", PORTABLE)
def test_float64_stays_float64(implementation):
    with jax.enable_x64(True):
        widen = lambda a: jnp.asarray(np.asarray(a, np.float64))
        small = parameters(biased=True, num_tokens=SMALL), cotangent("float32", SMALL)
        params, dout = jax.tree.map(widen, small)
        experts = routes()["empty slots"][:SMALL]
        got = compiled(implementation, "silu")(params, jnp.asarray(experts), dout)
        want = definition(params, experts, dout, "silu")
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", PORTABLE)
def test_saves_x_preactivations_scores_and_indices_exactly(implementation, dtype):
    """The residuals of the gradient, beyond the weights themselves, to the byte."""
    params, experts = parameters(dtype), jnp.asarray(routes()["distinct"], jnp.int32)
    x, gate, up, down, weights, _ = params

    def mlp(x, gate, up, down, weights):
        return expert_mlp(x, gate, up, down, experts, weights, implementation=implementation)

    _, vjp = jax.vjp(mlp, x, gate, up, down, weights)
    saved = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "nbytes")]
    rows, item = T * K, x.dtype.itemsize
    activations = item * (T * D + 2 * rows * F)  # x, gate, up
    scores_and_indices = 4 * rows + 4 * (2 * rows + E)  # weights; order, row, group sizes
    weight_bytes = gate.nbytes + up.nbytes + down.nbytes
    assert sum(leaf.nbytes for leaf in saved) == activations + scores_and_indices + weight_bytes
    assert (rows, D) not in [leaf.shape for leaf in saved]  # no gathered copy, no y


@pytest.mark.slow
@pytest.mark.parametrize("implementation", PORTABLE)
def test_inside_scan_over_layers_with_remat(implementation):
    x, gate, up, down, weights, _ = parameters(num_tokens=SMALL)
    experts = jnp.asarray(routes()["distinct"][:SMALL])
    stack = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), (gate, up, down))

    def loss(x, stack):
        def layer(x, w):
            return x + expert_mlp(x, *w, experts, weights, implementation=implementation), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, stack)[0] ** 2)

    def unrolled(x, stack):
        for i in range(2):
            w = jax.tree.map(lambda a, i=i: a[i], stack)
            x = x + reference.expert_mlp(x, *w, experts, weights)
        return jnp.sum(x**2)

    got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, stack)
    want = jax.value_and_grad(unrolled, argnums=(0, 1))(x, stack)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_inside_shard_map_with_replicated_weights():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shard, whole = jax.P("data"), jax.P()
    params, dout = parameters(num_tokens=2 * SMALL), cotangent("float32", 2 * SMALL)
    experts = routes()["empty slots"][: 2 * SMALL]

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(shard, whole, whole, whole, shard, shard, shard),
        out_specs=(shard, (shard, whole, whole, whole, shard)),
    )
    def run(x, gate, up, down, weights, experts, dout):
        mlp = lambda *a: expert_mlp(*a[:4], experts, a[4])
        out, vjp = jax.vjp(mlp, x, gate, up, down, weights)
        return out, vjp(dout)

    got = run(*params[:5], jnp.asarray(experts), dout)
    out, grads = definition(params, experts, dout, "silu")
    assert_matches(got, (out, grads[:5]), "float32")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"implementation": "cuda"}, "expert_mlp has no implementation 'cuda'"),
        ({"activation": "relu"}, "unknown gated activation 'relu'"),
        ({"w_down": jnp.zeros((E, D, F))}, r"needs w_down of shape \(6, 40, 24\)"),
        ({"weights": jnp.zeros((T, K + 1))}, r"needs weights of shape \(48, 3\)"),
        ({"experts": jnp.zeros((T, K))}, "needs integer experts"),
        ({"biases": (jnp.zeros((E, F)),) * 3}, r"needs biases.down of shape \(6, 24\)"),
    ],
)
def test_errors_name_the_condition(change, message, unchecked):
    x, gate, up, down, weights, _ = parameters()
    call = {"x": x, "w_gate": gate, "w_up": up, "w_down": down, "weights": weights}
    call |= {"experts": jnp.zeros((T, K), jnp.int32)} | change
    with pytest.raises((ValueError, UserError), match=message):
        expert_mlp(**call)


def test_the_definition_can_be_named_and_rounds_once():
    params = parameters("bfloat16", biased=True, num_tokens=SMALL)
    dout, experts = cotangent("bfloat16", SMALL), routes()["empty slots"][:SMALL]
    got = compiled("reference", "silu")(params, jnp.asarray(experts), dout)
    want = definition(params, experts, dout, "silu")
    assert_matches(got, want, "bfloat16")
    np.testing.assert_allclose(np.asarray(got[0], np.float64), want[0], rtol=2.0**-8, atol=1e-6)

"""Every transport on several devices equals one device: values, gradients, and nothing dropped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax.transport
from moejax.errors import UserError
from moejax.experts.glu import GLU
from moejax.parallel.mesh import Mesh
from moejax.transport.all_gather import AllGather
from moejax.transport.all_to_all import AllToAll
from moejax.transport.least_loaded import LeastLoaded
from moejax.transport.local import Local
from moejax.types import Routing
from tests.contract import methods

T, D, F, E, K = 64, 8, 12, 8, 2

# One slot for foreign experts makes rows wait for a second round, and so does little room.
TRANSPORTS = {
    "local": Local(),
    "all_gather": AllGather(),
    "all_to_all": AllToAll(),
    "least_loaded": LeastLoaded(min_chunk=1),
    "one slot": LeastLoaded(min_chunk=1, num_slots=1, skip_below=1.0, alpha=1.0),
    "in rounds": LeastLoaded(min_chunk=1, num_slots=1, room=0.7),
}
MESHES = {
    "expert=8": Mesh(expert=8),
    "expert=2 fsdp=2 tensor=2": Mesh(expert=2, fsdp=2, tensor=2),
}


def test_every_transport_is_here():
    here = {type(transport) for transport in TRANSPORTS.values()}
    assert {type(found.values[0]) for found in methods(moejax.transport)} <= here


def choices(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Chosen experts [T, K] of a kind of routing; E is an empty slot."""
    experts = np.stack([rng.permutation(E)[:K] for _ in range(T)])
    if kind == "one hot expert":
        experts = np.stack([[0, 1 + rng.integers(E - 1)] for _ in range(T)])
    elif kind == "one hot device":
        experts = np.stack([rng.permutation(2) for _ in range(T)])
    elif kind == "four hot experts":
        experts = np.stack([rng.permutation(4)[:K] for _ in range(T)])
    elif kind == "each device's tokens to the next":
        experts = np.repeat((np.arange(T) // (T // E) + 1) % E, K).reshape(T, K)
    elif kind == "padding and empty slots":
        experts[::3] = E
        experts[1, 0] = E
    elif kind == "no choices":
        experts[:] = E
    return experts.astype(np.int32)


KINDS = (
    "uniform",
    "one hot expert",
    "one hot device",
    "four hot experts",
    "each device's tokens to the next",
    "padding and empty slots",
    "no choices",
)


@functools.cache
def weights_and_axes():
    layer = GLU(d_ff=F, use_bias=True)
    variables = layer.init(jax.random.key(0), E, D)
    rng = np.random.default_rng(1)
    random = jax.tree.map(lambda w: rng.standard_normal(w.shape, np.float32), variables)
    return layer.apply(random, E, D)


def layer(transport):
    """(x, experts, gate, weights, dy) -> (y, gradients, counts), to be jitted once per mesh."""
    _, axes, compute = weights_and_axes()

    def forward(x, gate, weights, experts):
        unused = jnp.zeros((T, E))
        routing = Routing(experts=experts, weights=gate, probs=unused, logits=unused, extras={})
        return transport(x, routing, weights, compute, axes=axes)

    def both(x, experts, gate, weights, dy):
        y, vjp, counts = jax.vjp(
            lambda x, gate, w: forward(x, gate, w, experts), x, gate, weights, has_aux=True
        )
        return y, vjp(dy), counts

    return jax.jit(both)


def operands(kind: str):
    rng = np.random.default_rng(0)
    experts = choices(kind, rng)
    x, dy = rng.standard_normal((2, T, D)).astype(np.float32)
    gate = np.where(experts < E, rng.random((T, K)), 0).astype(np.float32)
    return x, experts, gate, jax.tree.map(np.asarray, weights_and_axes()[0]), dy


@functools.cache
def on_one_device(kind: str):
    return jax.device_get(layer(Local())(*operands(kind))[:2])


def worst_error(found, expected) -> float:
    """The largest error of any expert of any tensor, relative to the largest entry there."""
    errors = []
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (v.reshape(E, -1) if v.shape[0] == E else v.reshape(1, -1) for v in (a, b))
        scale = np.abs(b).max(axis=1)
        errors.append(np.max(np.abs(a - b).max(axis=1) / np.where(scale > 0, scale, 1)))
    return max(errors)


@functools.cache
def on_mesh(name: str, shape: str):
    """{kind of routing: (y, gradients, counts)} from one compilation."""
    with jax.set_mesh(MESHES[shape].build()):
        run = layer(TRANSPORTS[name])
        return {kind: jax.device_get(run(*operands(kind))) for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", TRANSPORTS)
def test_equals_one_device_whatever_the_routing(name, shape):
    for kind, (*found, counts) in on_mesh(name, shape).items():
        assert counts["dropped"] == 0, kind
        assert worst_error(found, on_one_device(kind)) < 1e-5, kind


@pytest.mark.slow
def test_rows_beyond_the_room_are_computed_in_further_rounds():
    counts = {kind: c for kind, (*_, c) in on_mesh("one slot", "expert=2 fsdp=2 tensor=2").items()}
    assert counts["four hot experts"]["extra_rounds"] > 0
    assert counts["one hot expert"]["foreign_experts"] > 0
    assert counts["no choices"]["foreign_experts"] == 0


def test_experts_that_do_not_divide_over_the_axis_are_an_error():
    odd = jax.tree.map(lambda w: jnp.asarray(w[:6]), weights_and_axes()[0])
    _, axes, compute = weights_and_axes()
    unused = jnp.zeros((T, 6))
    routing = Routing(
        experts=jnp.zeros((T, K), jnp.int32),
        weights=jnp.zeros((T, K)),
        probs=unused,
        logits=unused,
        extras={},
    )
    with (
        jax.set_mesh(Mesh(data=2, expert=4).build()),
        pytest.raises(UserError, match=r"mesh.expert=4 does not divide the 6 .* 'expert'"),
    ):
        AllToAll()(jnp.zeros((T, D)), routing, odd, compute, axes=axes)


@pytest.mark.parametrize(
    ("field", "value"), [("alpha", 0.9), ("skip_below", 0.5), ("min_chunk", 0), ("num_slots", 0)]
)
def test_settings_that_no_plan_can_keep_are_errors(field, value):
    with pytest.raises(UserError, match=f"transport.{field}={value} must be at least 1"):
        LeastLoaded(**{field: value})


def test_room_must_be_above_zero():
    with pytest.raises(UserError, match="transport.room=0.0 must be above 0"):
        LeastLoaded(room=0.0)

"""Grouping layers changes neither initial values nor results; every per-layer input arrives."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.layers.reports import Report, tell
from moejax.models import stack
from moejax.types import mean
from moejax.verification.contracts.cases import make_context, quick_jit

NUM_LAYERS, D_MODEL = 6, 4
X = np.random.default_rng(0).standard_normal((1, 3, D_MODEL)).astype(np.float32)
CONTEXT = make_context(np.ones((1, 3), bool)).replace(router_carry=jnp.zeros((3,)))


class Talker(nn.Module):
    """A part of a layer that can only report."""

    def __call__(self, y, layer):
        told = {"told": (jnp.sum(y), jnp.float32(2))}
        index = (jnp.asarray(layer, jnp.float32), jnp.float32(1))
        tell(self, Report(terms=told, measures={"index": index}, log_prob=y.sum((1, 2))))


class Toy(nn.Module):
    """Uses everything a layer may be given: window, key, loads, index and the router's carry."""

    @nn.compact
    def __call__(self, x, context):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.5), ("embed", None))
        kernel = self.param("kernel", init, (x.shape[-1], x.shape[-1]), jnp.float32)
        state = self.variable("router_state", "offset", lambda: jnp.zeros((), jnp.float32))
        y = jnp.tanh(x @ kernel) + 0.1 * (context.window or 0) + state.value
        if context.key is not None:
            y = y + 0.1 * jax.random.normal(context.key[0], x.shape)
        if context.loads is not None:
            y = y + context.loads.sum()
        carry = 0.5 * context.router_carry + y.reshape(3, -1).sum(-1)
        terms = {"toy": (jnp.sum(y * context.layer_index), jnp.float32(3))}
        stats = {
            "index": context.layer_index,
            "seen": context.router_carry.sum(),
            "window": jnp.int32(context.window or 0),
            "load": jnp.zeros(()) if context.loads is None else context.loads.sum(),
        }
        for name in ("one", "two"):
            Talker(name=name)(y, context.layer_index)
        return x + y + 0.01 * carry.reshape(1, 3, 1), terms, stats, carry


def layers_of(windows):
    return [stack.Layer(block=Toy(), kind=(w,), window=w) for w in windows]


def one_by_one(layers):
    return [stack.Segment(i, 1, (layer,)) for i, layer in enumerate(layers)]


LAYERS = layers_of([4, None, 4, None, 4, None])
LAYOUTS = {"scanned": stack.segments(LAYERS), "segmented": one_by_one(LAYERS)}


def by_layer(layout, trees):
    """{layer: its own tree} from trees stacked by segment name."""
    out = {}
    for segment in layout:
        for member, name in enumerate(segment.names):
            for row, index in enumerate(segment.indices(member)):
                out[index] = jax.tree.map(lambda a, row=row: np.asarray(a[row]), trees[name])
    return [out[i] for i in range(len(out))]


def init(layout):
    x = jax.ShapeDtypeStruct(X.shape, X.dtype)
    return quick_jit(lambda key: nn.meta.unbox(stack.init(layout, key, x, CONTEXT)))(
        jax.random.key(3)
    )


@pytest.fixture(scope="module")
def variables():
    return {name: init(layout) for name, layout in LAYOUTS.items()}


def run(layout, variables, *, unroll=1, remat="none"):
    context = CONTEXT.replace(key=jax.random.split(jax.random.key(5), 1))
    share = np.linspace(0, 1, NUM_LAYERS)
    loads = {
        name: jnp.asarray([[share[i]] for i in segment.indices(member)], jnp.float32)
        for segment in layout
        for member, name in enumerate(segment.names)
    }
    return stack.apply(
        layout,
        variables,
        jnp.asarray(X),
        context,
        per_layer={"loads": loads},
        remat=remat,
        unroll=unroll,
    )


def kinds(text):
    return [stack.Layer(block=Toy(), kind=(c,), window=None) for c in text]


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("AAAA", [(0, 4, 1)]),
        ("DAAAA", [(0, 1, 1), (1, 4, 1)]),
        ("ABABAB", [(0, 3, 2)]),
        ("DDABABABA", [(0, 2, 1), (2, 3, 2), (8, 1, 1)]),
        ("ABC", [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
        ("AABAAB", [(0, 2, 3)]),
    ],
)
def test_like_layers_are_grouped_into_few_runs(pattern, expected):
    layout = stack.segments(kinds(pattern))
    assert [(s.start, s.count, len(s.layers)) for s in layout] == expected
    members = itertools.chain.from_iterable(
        [(i, s.layers[j].kind) for j in range(len(s.layers)) for i in s.indices(j)] for s in layout
    )
    assert sorted(members) == [(i, (c,)) for i, c in enumerate(pattern)]


def test_initial_values_do_not_depend_on_the_grouping(variables):
    scanned, segmented = (by_layer(LAYOUTS[n], variables[n]["params"]) for n in LAYOUTS)
    for a, b in zip(scanned, segmented, strict=True):
        np.testing.assert_array_equal(a["kernel"], b["kernel"])
    assert len({float(layer["kernel"][0, 0]) for layer in scanned}) == NUM_LAYERS


@pytest.fixture(scope="module")
def reference(variables):
    return quick_jit(lambda v: run(LAYOUTS["segmented"], v))(variables["segmented"])


@pytest.mark.parametrize("unroll", [1, 2])
def test_results_do_not_depend_on_the_grouping(variables, reference, unroll):
    layout = LAYOUTS["scanned"]
    found = quick_jit(lambda v: run(layout, v, unroll=unroll))(variables["scanned"])
    np.testing.assert_allclose(found.x, reference.x, rtol=1e-5)
    np.testing.assert_allclose(mean(found.terms["toy"]), mean(reference.terms["toy"]), rtol=1e-5)
    ours = by_layer(layout, found.stats)
    theirs = by_layer(LAYOUTS["segmented"], reference.stats)
    assert [s["index"] for s in ours] == list(range(NUM_LAYERS))
    assert [s["window"] for s in ours] == [4, 0, 4, 0, 4, 0]
    np.testing.assert_allclose([s["load"] for s in ours], np.linspace(0, 1, NUM_LAYERS), rtol=1e-6)
    np.testing.assert_allclose([s["seen"] for s in ours], [s["seen"] for s in theirs], rtol=1e-5)
    assert ours[0]["seen"] == 0
    assert ours[1]["seen"] != 0


@pytest.mark.parametrize("remat", ["none", "full"])
def test_what_parts_of_layers_report_arrives_once(variables, reference, remat):
    """Of two parts in every layer; the measures are each layer's own."""
    run_it = lambda v: run(LAYOUTS["scanned"], v, remat=remat)
    grad = lambda v: jax.grad(lambda v: run_it(v).terms["told"][0], allow_int=True)(v)["params"]
    found = quick_jit(run_it)(variables["scanned"])
    assert found.terms["told"][1] == 2 * 2 * NUM_LAYERS
    assert {f"index/{i}" for i in range(NUM_LAYERS)} == found.measures.keys()
    for layer in range(NUM_LAYERS):
        np.testing.assert_allclose(found.measures[f"index/{layer}"], (2 * layer, 2))
    np.testing.assert_allclose(found.log_prob, found.terms["told"][0][None], rtol=1e-5)
    np.testing.assert_allclose(found.log_prob, reference.log_prob, rtol=1e-5)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(quick_jit(grad)(variables["scanned"])))


def value_and_grad(variables, remat):
    def loss(params, own):
        return jnp.sum(jnp.sin(run(LAYOUTS["scanned"], own | {"params": params}, remat=remat).x))

    own = variables["scanned"]
    return quick_jit(jax.value_and_grad(loss))(own["params"], own)


@pytest.fixture(scope="module")
def without_remat(variables):
    return value_and_grad(variables, "none")


@pytest.mark.parametrize("remat", [r for r in stack.REMAT_POLICIES if r != "none"])
def test_remat_changes_neither_values_nor_gradients(variables, without_remat, remat):
    saved = value_and_grad(variables, remat)
    for a, b in zip(jax.tree.leaves(without_remat), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_full_remat_computes_the_layers_again_in_the_backward_pass(variables):
    def num_tanh(remat):
        loss = lambda v: jnp.sum(run(LAYOUTS["scanned"], v, remat=remat).x)
        return str(jax.make_jaxpr(jax.grad(loss))(variables["scanned"])).count("= tanh ")

    assert num_tanh("none") == 2  # the scan body has two members
    assert num_tanh("full") == 4

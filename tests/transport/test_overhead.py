"""While the routing is balanced, least_loaded does no more than all_to_all: counted in programs."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from moejax.parallel.mesh import Mesh
from moejax.transport.all_to_all import AllToAll
from moejax.transport.least_loaded import LeastLoaded
from moejax.types import Routing

TOKENS, NUM_EXPERTS, K, D = 256, 16, 2, 32

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"
with pytest.MonkeyPatch.context() as _patch:
    _patch.setattr(sys, "path", [str(TOOLS), *sys.path])
    from transport_bench.program import balanced


def compute(rows, local_ids, gate, weights):
    """One product over all rows, so that the program's FLOPs are those of its rows."""
    return gate.astype(rows.dtype) * (rows @ weights[0])


def balanced_work(transport, mesh):
    """Of the forward and backward program of one layer."""
    built = mesh.build()

    def layer(x, gate, weights, experts):
        probs = jnp.zeros((x.shape[0], NUM_EXPERTS))
        routing = Routing(experts=experts, weights=gate, probs=probs, logits=probs, extras={})
        y, counts = transport(x, routing, weights, compute)
        return jnp.sum(jnp.square(y)), counts

    with jax.set_mesh(built):
        lowered = jax.jit(jax.grad(layer, argnums=(0, 1, 2), has_aux=True)).lower(
            jax.ShapeDtypeStruct((TOKENS, D), jnp.float32),
            jax.ShapeDtypeStruct((TOKENS, K), jnp.float32),
            jax.ShapeDtypeStruct((NUM_EXPERTS, D, D), jnp.float32),
            jax.ShapeDtypeStruct((TOKENS, K), jnp.int32),
        )
        return balanced(lowered.compile().as_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "agreements"),
    [(Mesh(expert=8), 0), (Mesh(data=2, expert=4), 1)],
    ids=["expert=8", "data=2 expert=4"],
)
def test_balanced_rows_cost_no_more_than_all_to_all(mesh, agreements):
    """Groups of devices that plan apart agree on their branches: two integers more."""
    plain = balanced_work(AllToAll(exchange="two_hop"), mesh)
    ours = balanced_work(LeastLoaded(exchange="two_hop"), mesh)
    # Rows and gates there, results back, and the same for cotangents, each in two hops.
    assert plain.collectives["all-to-all"] == 12
    more = ours.collectives - plain.collectives
    assert more == ({"all-reduce": agreements} if agreements else {})
    for kind, size in ours.num_bytes.items():
        allowed = 8 * agreements + 8 if kind == "all-reduce" else 0  # two more statistics
        assert size <= plain.num_bytes[kind] + allowed, kind
    assert 0 < ours.flops <= plain.flops


def test_collectives_are_counted_on_the_balanced_path():
    text = """HloModule m
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  ROOT %t = (s32[], f32[8,4]) all-to-all(%p), replica_groups={}
}
%rounds (p: f32[8,4]) -> f32[8,4] {
  ROOT %w = f32[8,4] while(%p), condition=%sum, body=%body
}
%single (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4] parameter(0)
  %a = (f32[8,4], f32[8,4]) all-to-all-start(%p), replica_groups={}
  %b = f32[8,4] all-to-all-done(%a)
  ROOT %c = f32[8,4] all-to-all(%b), replica_groups={}
}
%fetch (p: f32[8,4]) -> f32[8,4] {
  ROOT %g = f32[8,4] all-gather(%p), replica_groups={}
}
%nothing (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4] parameter(0)
  ROOT %d = f32[8,6] dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4] parameter(0)
  %r = f32[8,4] all-reduce(%x), replica_groups={}, to_apply=%sum
  %f = f32[8,4] conditional(%r, %x, %x), branch_computations={%nothing, %fetch}
  ROOT %y = f32[8,4] conditional(%r, %f, %f), true_computation=%rounds, false_computation=%single
}
"""
    work = balanced(text)
    assert work.collectives == {"all-reduce": 1, "all-to-all": 2}
    assert work.num_bytes == {"all-reduce": 128, "all-to-all": 256}
    assert work.flops == 2 * 8 * 6 * 4

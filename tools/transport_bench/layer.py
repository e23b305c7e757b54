"""One layer of experts under a transport, forward and backward, as a program for eight devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moejax.experts.glu import GLU
from moejax.parallel.mesh import Mesh
from moejax.parallel.sharding import RULES
from moejax.types import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer's sizes.

    Attributes:
      num_experts: N. num_choices: K, experts per token.
      tokens: B, on each device.
      d_model: D. d_expert: H, the width of one expert.
      dtype: of tokens. weight_dtype: of the experts' weights as they are stored.
    """

    num_experts: int
    num_choices: int
    tokens: int
    d_model: int
    d_expert: int
    dtype: str = "bfloat16"
    weight_dtype: str = "float32"


SHAPES = {
    # The shape of the prototype that showed a factor of five.
    "small": Shape(
        num_experts=128, num_choices=4, tokens=2048, d_model=512, d_expert=512, dtype="float32"
    ),
    "gpt-oss-120b": Shape(num_experts=128, num_choices=4, tokens=8192, d_model=2880, d_expert=2880),
    "DeepSeek-V3": Shape(num_experts=256, num_choices=8, tokens=4096, d_model=7168, d_expert=2048),
}


def forward_and_backward(transport: Any, shape: Shape, implementation: str | None):
    """f(x, gate, weights, experts, dy) -> (y, the gradients of the first three, counts)."""
    experts_of = GLU(d_ff=shape.d_expert, implementation=implementation)
    axes = {
        "gate": ("expert", "expert_embed", "expert_mlp"),
        "up": ("expert", "expert_embed", "expert_mlp"),
        "down": ("expert", "expert_mlp", "expert_embed"),
    }

    def layer(x, gate, weights, experts):
        probs = jnp.zeros((x.shape[0], shape.num_experts), jnp.float32)  # only its shape is read
        routing = Routing(experts=experts, weights=gate, probs=probs, logits=probs, extras={})
        return transport(x, routing, weights, experts_of.compute, axes=axes)

    def both(x, gate, weights, experts, dy):
        run = lambda x, gate, weights: layer(x, gate, weights, experts)
        y, pull, counts = jax.vjp(run, x, gate, weights, has_aux=True)
        return y, pull(dy), counts

    return both


def arguments(shape: Shape, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """Abstract arguments of `forward_and_backward`, laid out as in training."""
    total = shape.tokens * mesh.size
    tokens = NamedSharding(mesh, PartitionSpec(RULES["tokens"]))
    experts = NamedSharding(mesh, PartitionSpec("expert"))

    def array(where, dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=where)

    wide, narrow = shape.d_model, shape.d_expert
    x = array(tokens, shape.dtype, total, wide)
    into = array(experts, shape.weight_dtype, shape.num_experts, wide, narrow)
    weights = {
        "gate": into,
        "up": into,
        "down": array(experts, shape.weight_dtype, shape.num_experts, narrow, wide),
    }
    choices = total, shape.num_choices
    return x, array(tokens, "float32", *choices), weights, array(tokens, "int32", *choices), x


def compiled(
    transport: Any,
    shape: Shape,
    devices: list[jax.Device],
    *,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> jax.stages.Compiled:
    """The program for `devices`, of which `mesh` (default: all on the axis `expert`) says more."""
    built = (mesh or Mesh(expert=len(devices))).build(devices)
    with jax.set_mesh(built):
        given = arguments(shape, built)
        where = lambda tree: jax.tree.map(lambda a: a.sharding, tree)
        x, gate, weights, *_ = where(given)
        whole = NamedSharding(built, PartitionSpec())
        run = forward_and_backward(transport, shape, implementation)
        results = (x, (x, gate, weights), whole)
        return jax.jit(run, out_shardings=results).lower(*given).compile()

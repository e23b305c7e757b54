"""Logical axes: what they become, and that nothing is split twice, unnamed or silently whole."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from moejax.errors import UserError
from moejax.parallel.mesh import Mesh
from moejax.parallel.sharding import constrain, once, parameter_shardings, partition_spec


@pytest.fixture(scope="module")
def mesh():
    return Mesh(fsdp=2, expert=2, tensor=2).build()


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_experts_and_everything_else_use_the_expert_axis_differently():
    assert partition_spec(("embed", "heads")) == PartitionSpec(
        ("fsdp", "expert", "context"), "tensor"
    )
    assert partition_spec(("expert", "expert_embed", "expert_mlp")) == PartitionSpec(
        "expert", ("fsdp", "context"), "tensor"
    )
    assert partition_spec(("layers", None)) == PartitionSpec(None, None)


def test_a_mesh_axis_that_would_split_two_axes_is_an_error():
    with pytest.raises(UserError, match="'expert' would split both 'expert' and 'embed'"):
        partition_spec(("expert", "embed"), what="the parameter w")


def test_a_name_without_a_rule_is_an_error_that_lists_the_rules():
    with pytest.raises(UserError, match="the parameter w has the logical axis 'embd'.*embed"):
        partition_spec(("embd",), what="the parameter w")


def test_parameters_lie_by_their_axes(mesh):
    shapes = {"a": abstract(8, 4), "b": {"c": abstract(3)}}
    names = {"a": ("embed", "mlp"), "b": {"c": (None,)}}
    found = parameter_shardings(mesh, shapes, names, max_replicated=100)
    assert found["a"].shard_shape((8, 4)) == (2, 2)
    assert found["b"]["c"].is_fully_replicated


def test_an_axis_that_does_not_divide_names_the_parameter_and_the_sizes(mesh):
    text = r"the parameter b/a \[6, 4\].*'embed' of size 6 .* 4 ways \(mesh.fsdp=2, mesh.expert=2"
    with pytest.raises(UserError, match=text):
        parameter_shardings(
            mesh, {"b": {"a": abstract(6, 4)}}, {"b": {"a": ("embed", "mlp")}}, max_replicated=100
        )


def test_a_large_parameter_that_nothing_splits_is_an_error_on_several_devices(mesh):
    shapes, names = {"a": abstract(100, 4)}, {"a": (None, None)}
    parameter_shardings(mesh, shapes, names, max_replicated=1600)
    with pytest.raises(UserError, match=r"a \[100, 4\] .* mesh.max_replicated_bytes=1600"):
        parameter_shardings(mesh, shapes, names, max_replicated=1599)
    one = Mesh(data=1).build()
    parameter_shardings(one, shapes, names, max_replicated=1599)


def test_constrain_splits_what_divides_and_leaves_the_rest(mesh):
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: constrain(x, "batch", None))(jnp.zeros((8, 3)))
        odd = jax.jit(lambda x: constrain(x, "batch", None))(jnp.zeros((6, 3)))
    assert x.sharding.shard_shape(x.shape)[0] == 2
    assert odd.shape == (6, 3)
    assert constrain(jnp.zeros((8, 3)), "batch", None).sharding.is_fully_replicated  # no mesh


def test_once_counts_a_value_on_one_of_the_devices_that_share_an_axis(mesh):
    def body(x):
        return jax.lax.psum(once(x, "expert_mlp"), "tensor")

    with jax.set_mesh(mesh):
        run = jax.shard_map(body, in_specs=PartitionSpec(), out_specs=PartitionSpec())
        x = jnp.arange(3.0)
        assert (jax.jit(run)(x) == x).all()
        gradient = jax.jit(jax.grad(lambda x: run(x).sum()))(x)
    assert (gradient == 1).all()

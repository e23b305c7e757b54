"""The tests check the package's annotations: shapes, dtypes and types, of arguments and results."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.layers.norm import RMSNorm
from moejax.models import moe
from moejax.types import Batch, Routing

LHS, RHS, SIZES = jnp.ones((6, 4)), jnp.ones((2, 4, 3)), jnp.array([2, 4])
ROUTING = Routing(
    experts=jnp.zeros((3, 2), jnp.int32),
    weights=jnp.ones((3, 2)),
    probs=jnp.ones((3, 4)),
    logits=jnp.ones((3, 4)),
    extras={},
)


@pytest.mark.parametrize(
    "change, named",
    [
        pytest.param({"lhs": LHS[0]}, "lhs", id="rank"),
        pytest.param({"lhs": jnp.ones((6, 5))}, "rhs", id="size of a shared dimension"),
        pytest.param({"group_sizes": SIZES.astype(jnp.float32)}, "group_sizes", id="dtype"),
        pytest.param({"implementation": 1}, "implementation", id="type"),
    ],
)
def test_a_wrong_argument_of_a_function_is_an_error(change, named):
    call = {"lhs": LHS, "rhs": RHS, "group_sizes": SIZES}
    assert grouped_matmul(**call).shape == (6, 3)
    with pytest.raises(TypeCheckError, match=f"typechecking parameter '{named}'"):
        grouped_matmul(**call | change)


def test_traced_arguments_are_checked():
    with pytest.raises(TypeCheckError, match="'group_sizes'"):
        jax.eval_shape(grouped_matmul, LHS, RHS, SIZES.astype(jnp.float32))


def test_a_wrong_result_is_an_error(monkeypatch):
    monkeypatch.setattr(moe, "Routing", lambda **fields: fields)
    with pytest.raises(TypeCheckError, match="return value of moejax.models.moe.without_padding"):
        moe.without_padding(ROUTING, jnp.ones(3, bool))


def test_methods_and_fields_of_modules_are_checked():
    with pytest.raises(TypeCheckError, match="'x'"):
        RMSNorm().init(jax.random.key(0), jnp.ones((2, 4), jnp.int32))
    with pytest.raises(TypeCheckError, match="'num_axes'"):
        RMSNorm(num_axes=1.5)


@pytest.mark.parametrize("bad", [jnp.zeros((3, 1), jnp.int32), jnp.zeros((3, 2)), [[0, 1]] * 3])
def test_fields_of_a_pytree_are_checked_where_it_is_built(bad):
    with pytest.raises(TypeCheckError):
        dataclasses.replace(ROUTING, experts=bad)


def test_fields_of_a_pytree_are_not_checked_where_jax_rebuilds_it():
    structure = jax.tree.structure(ROUTING)
    assert jax.tree.unflatten(structure, ["a", "b", "c", "d"]).logits == "d"
    assert jax.tree.map(lambda x: x[None], ROUTING).experts.shape == (1, 3, 2)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(ROUTING)]
    assert paths == [".experts", ".weights", ".probs", ".logits"]


def test_a_batch_may_be_on_the_host_or_abstract():
    ids, mask = np.ones((2, 3), np.int32), np.ones((2, 3), bool)
    batch = Batch(tokens=ids, targets=ids, loss_mask=mask, segment_ids=ids, positions=ids)
    fields = vars(jax.eval_shape(lambda b: b, batch))
    assert Batch(**fields).tokens.shape == (2, 3)
    with pytest.raises(TypeCheckError, match="'loss_mask'"):
        dataclasses.replace(batch, loss_mask=ids)


@pytest.mark.usefixtures("unchecked")
def test_the_fixture_switches_it_off():
    with pytest.raises(ValueError, match="vector of integers"):
        grouped_matmul(LHS, RHS, SIZES.astype(jnp.float32))

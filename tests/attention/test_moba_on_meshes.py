"""Attention to blocks where the mesh splits sequences, heads and rows: what one device computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention.moba import MoBA
from moejax.errors import UserError
from moejax.layers.short_convolution import ShortConvolution
from moejax.parallel.context_parallel import GatheredKeys, Ulysses
from moejax.parallel.mesh import Mesh
from moejax.verification.contracts.cases import make_context, random_variables, to_dtype

BATCH, LENGTH, D_MODEL = 4, 32, 16
PLAIN = MoBA(num_heads=8, num_kv_heads=2, head_dim=4, block_size=3, top_k=3)
MESHES = {
    "data=2 context=4": Mesh(data=2, context=4),
    "tensor=2 context=4": Mesh(data=1, tensor=2, context=4),
    "context=8": Mesh(data=1, context=8),
}


def packed():
    """Segment ids of rows of several segments, and padding; blocks that cross every shard's end."""
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(1, 3, (BATCH, LENGTH)), axis=1)
    ids[0] = 1
    ids[1, -5:] = 0
    positions = [[int(t - np.argmax(row == i)) for t, i in enumerate(row)] for row in ids]
    return make_context(ids > 0, segment_ids=ids, positions=jnp.asarray(positions, jnp.int32))


def value_and_gradients(attention, mesh):
    """On one device, and on the mesh, in float64."""
    context = packed()
    x = np.random.default_rng(1).standard_normal((BATCH, LENGTH, D_MODEL))
    with jax.enable_x64(True):
        params = random_variables(attention, x.astype(np.float32), context)["params"]
        params, x = to_dtype((params, x), jnp.float64)
        keep = context.token_mask[..., None]

        def loss(params, x):
            y = attention.apply({"params": params}, x, context)
            return jnp.square(jnp.where(keep, y, 0)).sum()

        step = lambda: jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
        expected = step()
        with jax.set_mesh(mesh.build()):
            return step(), expected


def assert_equal_one_device(attention, mesh):
    got, expected = value_and_gradients(attention, mesh)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * np.abs(b).max())


def test_ulysses_with_a_convolution_and_a_switch():
    attention = PLAIN.copy(
        context_parallel=Ulysses(), key_conv=ShortConvolution(width=5), until_step=1
    )
    assert_equal_one_device(attention, MESHES["tensor=2 context=4"])


def test_gathered_keys_that_choose_by_group():
    attention = PLAIN.copy(context_parallel=GatheredKeys(), selection="group")
    assert_equal_one_device(attention, MESHES["tensor=2 context=4"])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("implementation", ["packed", "scan"])
@pytest.mark.parametrize("way", [Ulysses(), GatheredKeys()], ids=["ulysses", "gathered keys"])
def test_equals_one_device_everywhere(way, implementation, mesh):
    attention = PLAIN.copy(context_parallel=way, implementation=implementation)
    assert_equal_one_device(attention, MESHES[mesh])


def test_heads_that_choose_together_and_do_not_divide_are_one_clear_sentence():
    """Each device would sum the scores of a part of the group, and choose otherwise."""
    attention = PLAIN.copy(context_parallel=Ulysses(), selection="group")
    with pytest.raises(UserError, match="needs the 4 query heads of a key head on one device"):
        value_and_gradients(attention, MESHES["context=8"])


def test_a_sequence_that_does_not_divide_is_one_clear_sentence():
    x = jnp.zeros((1, 30, D_MODEL))
    context = make_context(np.ones((1, 30), bool))
    params = random_variables(PLAIN, np.zeros((1, 30, D_MODEL), np.float32), context)
    with (
        jax.set_mesh(MESHES["data=2 context=4"].build()),
        pytest.raises(UserError, match=r"30 positions cannot be split 4 ways \(mesh.context=4\)"),
    ):
        PLAIN.apply(params, x, context)

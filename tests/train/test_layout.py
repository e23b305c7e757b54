"""Where a run's arrays lie: its parameters, its optimiser's state, its batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.errors import UserError
from moejax.parallel.mesh import Mesh
from moejax.train import layout
from moejax.train.state import init_state
from moejax.types import Batch, named_leaves


@pytest.fixture(scope="module")
def experiment():
    overrides = ["mesh.data=1", "mesh.expert=2", "mesh.fsdp=2", "mesh.tensor=2", "batch_size=8"]
    return build_config(apply_overrides(load_config("configs/tiny.py:smoke"), overrides))


@pytest.fixture(scope="module")
def placed(experiment):
    """({path: shape}, {path: shape on one device}) of the whole state."""
    model, mesh = experiment.build_model(64), experiment.mesh.build()
    variables = experiment.variable_shardings(model, mesh)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = experiment.optimizer.build(shapes["params"], experiment.steps)
    state = jax.eval_shape(lambda: init_state(model, optimizer, experiment.guard, 0))
    found = named_leaves(layout.state_shardings(state, variables, mesh))
    whole = {path: leaf.shape for path, leaf in named_leaves(state).items()}
    return whole, {path: found[path].shard_shape(shape) for path, shape in whole.items()}


def test_experts_and_attention_are_split_over_different_axes(placed):
    whole, parts = placed
    experts = "params/layers_0/ffn/experts/gate"
    assert (whole[experts], parts[experts]) == ((2, 4, 32, 16), (2, 2, 16, 8))
    query = "params/layers_0/attention/query/kernel"
    assert (whole[query], parts[query]) == ((2, 32, 32), (2, 8, 16))


def test_moments_lie_as_their_parameters_do(placed):
    whole, parts = placed
    moments = [path for path in whole if path.startswith("opt_state") and "layers_0" in path]
    assert len(moments) >= 2 * sum(path.startswith("params/layers_0") for path in whole)
    for path in moments:
        assert parts[path] == parts["params/" + path[path.index("layers_0") :]]


def test_a_batch_is_split_over_data_and_keeps_its_values():
    tokens = np.arange(8 * 4).reshape(8, 4)
    fields = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), tokens)
    mesh = Mesh(data=2, expert=2, context=2).build()
    batch = layout.global_batch(Batch(**fields, loss_mask=tokens > 3), mesh)
    assert batch.tokens.sharding.shard_shape((8, 4)) == (2, 2)
    np.testing.assert_array_equal(batch.tokens, tokens)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["mesh.expert=8"], r"mesh needs 8|'expert' of size 4 cannot be split 8 ways"),
        (["mesh.data=2"], "batch_size / num_microbatches = 3 cannot be split 2 ways"),
        (["mesh.expert=16"], r"the mesh needs 16 devices and there are 8"),
        (["mesh.data=2", "mesh.max_replicated_bytes=1000"], "would lie whole on each of 2 devices"),
    ],
)
def test_what_the_mesh_cannot_do_is_known_before_the_data_are_prepared(overrides, text):
    size = "batch_size=3" if "3 cannot" in text else "batch_size=16"
    config = apply_overrides(load_config("configs/tiny.py:smoke"), [size, *overrides])
    with pytest.raises(UserError, match=text):
        build_config(config).check()


def test_every_leaf_of_the_optimiser_has_a_place():
    mesh = Mesh(fsdp=4, data=1).build()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    state = {"params": {"w": jnp.zeros(8)}, "opt": ({"w": jnp.zeros(8)}, {"w": jnp.zeros(3)})}
    found = layout.state_shardings(state, {"params": {"w": sharding}}, mesh)
    assert found["opt"][0]["w"] == sharding
    assert found["opt"][1]["w"].is_fully_replicated  # of another shape: not the parameter's

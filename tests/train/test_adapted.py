"""Training what an adapter adds to a frozen model: state, step, and what a run starts from."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.adapters.lora import LoRA
from moejax.balance.unbalanced import Unbalanced
from moejax.errors import UserError
from moejax.models.adapter import Adapter
from moejax.models.flops import size
from moejax.models.stack import stacked_layers
from moejax.models.variables import collections, parameters
from moejax.parallel.mesh import Mesh
from moejax.parallel.sharding import parameter_shardings
from moejax.train.checkpoint import Checkpointer
from moejax.train.init_from import CHECKPOINTS, LAYERS, in_checkpoints, read_weights
from moejax.train.state import changing, init_state
from moejax.types import named_leaves
from moejax.verification.contracts.cases import quick_jit
from tests.models.tiny_model import dense, moe, random_model_variables
from tests.train.step_cases import GUARD, make_batch, make_step

BASE = dense(ffn=moe(balance=(Unbalanced(),)), num_layers=2)
ADAPTER = Adapter(targets=("q_proj", "shared_expert.down_proj"), linear=LoRA(rank=2))
MODEL = dataclasses.replace(BASE, adapter=ADAPTER)
OPTIMIZER = optax.adamw(1e-2, weight_decay=0.1)


def test_only_what_the_adapter_adds_moves_and_has_state():
    fresh = lambda: init_state(MODEL, OPTIMIZER, GUARD, 0, trainable=("lora/*",))
    state = quick_jit(fresh)()
    before = jax.device_get(named_leaves(state))
    step = quick_jit(make_step(MODEL, OPTIMIZER))
    for _ in range(3):
        state, metrics = step(state, make_batch())
    after = jax.device_get(named_leaves(state))
    trained = {path for path in after if path.startswith("params/")}
    assert all(path.startswith("params/lora/layers_0/") for path in trained)
    assert len(trained) == 4  # A and B of two projections
    for path in trained:
        assert np.abs(after[path] - before[path]).max() > 1e-3, path
    frozen = [path for path in after if path.startswith("frozen/")]
    assert {path.removeprefix("frozen/") for path in frozen} == set(
        named_leaves(jax.eval_shape(BASE.init, jax.random.key(0))["params"])
    )
    for path in frozen:
        np.testing.assert_array_equal(after[path], before[path])
    moments = [x for x in jax.tree.leaves(state.opt_state) if jnp.ndim(x) > 0]
    assert sum(x.size for x in moments) == 2 * sum(after[path].size for path in trained)
    assert metrics["grad_norm"] > 0


def test_collections_and_the_one_tree_are_each_others_inverse():
    variables = random_model_variables(MODEL)
    tree = parameters(variables)
    assert "lora/layers_0/attention/query/a" in named_leaves(tree)
    again = collections(tree)
    jax.tree.map(np.testing.assert_array_equal, again, {k: variables[k] for k in again})
    assert parameters(random_model_variables(BASE)).keys() == {"embed", "final_norm", "head"} | {
        "layers_0"
    }


def test_counted_parameters_include_the_adapters():
    added = size(MODEL, 8).params - size(BASE, 8).params
    assert added == 2 * 2 * ((16 + 16) + (6 + 16))  # layers, rank, in + out of each


def saved(folder: pathlib.Path, model, variables) -> pathlib.Path:
    with Checkpointer(str(folder / CHECKPOINTS)) as store:
        extra = {LAYERS: stacked_layers(model.segments)}
        store.save(5, in_checkpoints(variables), extra)
    return folder


def read(folder, model):
    mesh = Mesh(data=1).build(jax.devices()[:1])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    where = parameter_shardings(mesh, shapes, model.logical_axes(), max_replicated=10**9)
    return read_weights(folder, model, where)


def test_a_run_starts_from_a_model_without_adapters(tmp_path):
    given = read(saved(tmp_path, BASE, random_model_variables(BASE)), MODEL)
    assert "lora" not in given
    state = init_state(MODEL, OPTIMIZER, GUARD, 0, trainable=("lora/*",), variables=given)
    leaves = named_leaves(changing(state))
    assert not np.asarray(leaves["params/lora/layers_0/attention/query/b"]).any()
    assert np.asarray(leaves["params/lora/layers_0/attention/query/a"]).any()


@pytest.mark.parametrize("boundaries", [(), (1,)])
def test_a_run_starts_from_adapted_weights_however_layers_are_stacked(tmp_path, boundaries):
    source = dataclasses.replace(MODEL, boundaries=boundaries)
    variables = random_model_variables(source)
    given = read(saved(tmp_path, source, variables), MODEL)
    row = lambda tree, layer: (
        tree["layers_0"]["attention"]["query"]["a"][layer]
        if not boundaries
        else tree[f"layers_{layer}"]["attention"]["query"]["a"][0]
    )
    found = given["lora"]["layers_0"]["attention"]["query"]["a"]
    for layer in range(2):
        np.testing.assert_array_equal(found[layer], row(variables["lora"], layer))


def test_another_adapter_is_an_error_that_names_the_leaf(tmp_path):
    folder = saved(tmp_path, MODEL, random_model_variables(MODEL))
    other = dataclasses.replace(ADAPTER, targets=("k_proj",))
    with pytest.raises(UserError, match=r"lacks params/lora/layers_0/attention/key/a"):
        read(folder, dataclasses.replace(BASE, adapter=other))
    with pytest.raises(UserError, match=r"has params/lora/.*, which the model lacks"):
        read(folder, BASE)
    wide = dataclasses.replace(ADAPTER, linear=LoRA(rank=3))
    with pytest.raises(UserError, match=r"query/a has shape \[16, 2\].*and \[16, 3\]"):
        read(folder, dataclasses.replace(BASE, adapter=wide))

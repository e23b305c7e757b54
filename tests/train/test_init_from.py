"""Runs that start from weights: of a run, of an import, of a Hugging Face checkpoint."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from moejax.balance.load_balance import SequenceLoadBalance
from moejax.balance.loss_free import LossFreeBias
from moejax.balance.unbalanced import Unbalanced
from moejax.errors import UserError
from moejax.interop import hf
from moejax.models.stack import stacked_layers
from moejax.parallel.mesh import Mesh
from moejax.parallel.sharding import parameter_shardings
from moejax.train.checkpoint import Checkpointer
from moejax.train.init_from import CHECKPOINTS, LAYERS, read_weights
from moejax.types import named_leaves
from tests.interop.tiny_checkpoints import MODELS, variables, written

OLMOE = MODELS["olmoe"]


def shardings(model, mesh):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return parameter_shardings(mesh, shapes, model.logical_axes(), max_replicated=10**9)


def read(folder, model, mesh=None):
    mesh = (mesh or Mesh(data=1)).build(jax.devices()[: 1 if mesh is None else None])
    return read_weights(pathlib.Path(folder), model, shardings(model, mesh))


def saved_run(folder, model, values):
    """What a run's newest checkpoint would hold."""
    state = dict(values) | {"opt_state": {"count": np.int32(5)}}
    with Checkpointer(str(folder / CHECKPOINTS)) as store:
        store.save(5, state, {LAYERS: stacked_layers(model.segments)})
    return folder


def by_layer(model, values):
    """{(layer, path within it) or path: array}, however layers are stacked."""
    stacks, out = stacked_layers(model.segments), {}
    for path, leaf in named_leaves(values["params"]).items():
        first, _, rest = path.partition("/")
        if first in stacks:
            out |= {(layer, rest): leaf[row] for row, layer in enumerate(stacks[first])}
        else:
            out[path] = leaf
    return out


def assert_same(left, right):
    assert left.keys() == right.keys()
    for path, value in left.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(right[path]), err_msg=str(path))


@pytest.mark.parametrize("boundaries", [(), (1,)])
def test_layer_l_goes_to_layer_l_however_they_are_stacked(tmp_path, boundaries):
    values = variables("olmoe")
    target = dataclasses.replace(OLMOE, boundaries=boundaries)
    for folder in (saved_run(tmp_path / "run", OLMOE, values), written("olmoe", tmp_path / "hf")):
        found = read(folder, target)
        assert len(named_leaves(found)) == len(named_leaves(values)) + 12 * len(boundaries)
        assert_same(by_layer(target, found), by_layer(OLMOE, values))
    back = read(saved_run(tmp_path / "split", target, found), OLMOE)
    assert_same(named_leaves(back), named_leaves({"params": values["params"]}))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [Mesh(data=1, fsdp=2, expert=4), Mesh(data=2, tensor=2, expert=2)])
def test_every_device_gets_its_slices(tmp_path, mesh):
    values = variables("olmoe")
    for folder in (saved_run(tmp_path / "run", OLMOE, values), written("olmoe", tmp_path / "hf")):
        found = read(folder, OLMOE, mesh)
        placed = named_leaves(shardings(OLMOE, mesh.build()))
        for path, leaf in named_leaves(found).items():
            assert leaf.sharding.is_equivalent_to(placed[path], leaf.ndim), path
        assert_same(named_leaves(found), named_leaves({"params": values["params"]}))


def test_router_state_comes_along_where_the_model_has_it(tmp_path):
    model, values = MODELS["glm4_moe"], variables("glm4_moe")
    for folder in (saved_run(tmp_path / "a", model, values), written("glm4_moe", tmp_path / "hf")):
        found = read(folder, model)
        assert_same(named_leaves(found["router_state"]), named_leaves(values["router_state"]))
    params = {"params": values["params"]}
    assert "router_state" not in read(saved_run(tmp_path / "c", model, params), model)


def with_balance(model, *rules):
    return dataclasses.replace(
        model, block=model.block.clone(ffn=model.block.ffn.clone(balance=rules))
    )


def test_a_correction_bias_is_found_wherever_its_rule_stands(tmp_path):
    """DeepSeek-V3's bias decides which experts are chosen: zeros would be another model."""
    values = variables("glm4_moe")
    (bias,) = named_leaves(values["router_state"]).values()
    assert np.abs(bias).max() > 0.01
    run = saved_run(tmp_path / "run", MODELS["glm4_moe"], values)
    published = written("glm4_moe", tmp_path / "hf")
    balance = SequenceLoadBalance(weight=0.01)
    for rules in ((balance, LossFreeBias()), (LossFreeBias(), balance)):
        for folder in (run, published):
            found = read(folder, with_balance(MODELS["glm4_moe"], *rules))
            (path,) = named_leaves(found["router_state"])
            where = [isinstance(rule, LossFreeBias) for rule in rules].index(True)
            assert path.endswith(f"/ffn/balance_{where}_correction_bias")
            np.testing.assert_array_equal(named_leaves(found["router_state"])[path], bias)
    moved = with_balance(MODELS["glm4_moe"], balance, LossFreeBias())
    back = read(saved_run(tmp_path / "back", moved, read(run, moved)), MODELS["glm4_moe"])
    assert_same(named_leaves(back["router_state"]), named_leaves(values["router_state"]))


def test_a_correction_bias_without_a_place_is_refused(tmp_path):
    model = with_balance(MODELS["glm4_moe"], Unbalanced())
    run = saved_run(tmp_path / "run", MODELS["glm4_moe"], variables("glm4_moe"))
    with pytest.raises(UserError, match="correction_bias, by which experts are chosen.*rate=0.0"):
        read(run, model)
    with pytest.raises(UserError, match="e_score_correction_bias"):
        read(written("glm4_moe", tmp_path / "hf"), model)


def test_a_correction_bias_of_some_layers_only_is_refused(tmp_path):
    model = dataclasses.replace(MODELS["glm4_moe"], num_layers=4, boundaries=(2,))
    values = model.init(jax.random.key(0))
    first, _ = sorted(values["router_state"])
    values["router_state"].pop(first)
    run = saved_run(tmp_path / "run", model, values)
    with pytest.raises(UserError, match=f"lacks router_state/{first}/.*correction_bias"):
        read(run, dataclasses.replace(model, boundaries=()))


def test_a_model_that_config_json_does_not_describe_is_a_warning(tmp_path, caplog):
    folder = written("mixtral", tmp_path / "hf")
    read(folder, dataclasses.replace(MODELS["mixtral"], windows=(None,)))
    assert "model.windows is (None,) and not (5,)" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "has 2 layers and model.num_layers is 3"),
        ({"d_model": 8}, r"params/\S+ has shape \[.*16.*\] in .*run.* and \[.*8.*\] in the model"),
        ({"tied_head": True}, "has params/head/kernel, which the model lacks"),
    ],
)
def test_another_model_is_refused(tmp_path, change, message):
    folder = saved_run(tmp_path / "run", OLMOE, variables("olmoe"))
    with pytest.raises(UserError, match=message):
        read(folder, dataclasses.replace(OLMOE, **change))


def test_a_missing_parameter_is_named(tmp_path):
    values = variables("olmoe")
    lost = {"params": {k: v for k, v in values["params"].items() if k != "final_norm"}}
    with pytest.raises(UserError, match="lacks params/final_norm/scale, which the model has"):
        read(saved_run(tmp_path / "run", OLMOE, lost), OLMOE)


def test_a_folder_without_weights_says_what_is_wanted(tmp_path):
    with pytest.raises(UserError, match="nowhere holds no weights: name a run"):
        read(tmp_path / "nowhere", OLMOE)


def test_a_damaged_checkpoint_is_no_start(tmp_path):
    folder = saved_run(tmp_path / "run", OLMOE, variables("olmoe"))
    manifest = folder / CHECKPOINTS / "step_00000005" / "manifest" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 5', '"step": 6').replace(":5", ":6"))
    with pytest.raises(UserError, match="does not match its checksum|not readable"):
        read(folder, OLMOE)


def test_nothing_of_a_checkpoint_is_computed_on(tmp_path):
    """bfloat16 stays bfloat16 until the state is made."""
    folder = written("olmoe", tmp_path / "hf", dtype="bfloat16")
    found = read(folder, OLMOE)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found)} == {"bfloat16"}
    assert_same(named_leaves(found), named_leaves({"params": hf.load(folder)[1]["params"]}))

"""A config without a model gets that of the folder, in which what trains is kept in float32."""

import contextlib

import fiddle as fdl
import jax
import numpy as np
import pytest

from moejax.adapters.lora import LoRA
from moejax.commands import main
from moejax.commands.given_model import compare_with_source, complete
from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.config.run_directory import store
from moejax.errors import UserError
from moejax.interop import hf
from moejax.models.adapter import Adapter
from moejax.train.manifest import versions
from moejax.train.state import init_state
from moejax.types import named_leaves
from tests.interop.tiny_checkpoints import written

TUNING = "configs/router_tuning.py"


@pytest.fixture
def published(tmp_path):
    """As published models are: stored in bfloat16."""
    return written("olmoe", tmp_path / "hf", dtype="bfloat16")


def given(folder) -> fdl.Config:
    return complete(load_config(TUNING), [f"init_from={folder}"], trusted=False)


@pytest.mark.parametrize("imported", [False, True])
def test_what_trains_is_float32_and_products_are_as_published(published, tmp_path, imported):
    folder = published
    if imported:
        folder = tmp_path / "imported"
        assert main(["import-hf", str(published), str(folder)]) == 0
    config = given(folder)
    assert (config.model.dtype, config.model.param_dtype) == ("bfloat16", "float32")
    stored = apply_overrides(config, ["model.param_dtype=bfloat16"])
    assert stored.model.param_dtype == "bfloat16"


def test_what_is_frozen_keeps_its_bits(published):
    experiment = build_config(given(published))
    model, (_, variables) = experiment.build_model(24), hf.load(published)
    shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
    optimizer = experiment.build_optimizer(shapes)
    trainable = experiment.trainable
    state = init_state(
        model, optimizer, experiment.guard, 0, trainable=trainable, variables=variables
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    frozen, loaded = named_leaves(state.frozen), named_leaves(variables["params"])
    for path, leaf in frozen.items():
        assert leaf.dtype == "bfloat16"
        np.testing.assert_array_equal(leaf, loaded[path])


def test_a_runs_model_is_as_the_run_trained_it(tmp_path):
    config = load_config("configs/tiny.py:smoke")
    config.model.param_dtype = "bfloat16"
    store(tmp_path, config, versions())
    assert given(tmp_path).model.param_dtype == "bfloat16"


def test_the_adapter_of_the_folder_is_taken_where_the_config_has_none(tmp_path):
    """Of a run and of an import; `init_from` compares its leaves with those of another."""
    adapter = fdl.Config(Adapter, targets=("q_proj",), linear=fdl.Config(LoRA, rank=3))
    run = load_config("configs/tiny.py:smoke")
    run.adapter = adapter
    for folder in ("run", "imported"):
        (tmp_path / folder).mkdir()
    store(tmp_path / "run", run, versions())
    imported = load_config("configs/tiny.py:smoke").model
    imported.adapter = adapter
    store(tmp_path / "imported", imported, versions())
    for folder in ("run", "imported"):
        config = given(tmp_path / folder)
        assert config.adapter == adapter
        assert config.model.adapter is None
        own = complete(
            load_config("configs/lora.py"), [f"init_from={tmp_path / folder}"], trusted=False
        )
        assert own.adapter.targets == "all-linear"
        assert own.model.adapter is None


@pytest.mark.parametrize("imported", [False, True])
def test_another_model_of_the_same_shapes_is_a_warning(tmp_path, caplog, imported):
    """No shape tells of an angle of RoPE; only an export would have found out."""
    theirs = load_config("configs/tiny.py:smoke")
    store(tmp_path, theirs.model if imported else theirs, versions())
    overrides = [f"init_from={tmp_path}", "model.boundaries=[1]", "model.remat=full"]
    ours = apply_overrides(load_config("configs/tiny.py:smoke"), overrides)
    compare_with_source(build_config(ours), trusted=False)
    assert not caplog.records
    ours.model.block.attention.rope.theta *= 10
    compare_with_source(build_config(ours), trusted=False)
    (record,) = caplog.records
    assert "holds another model: here model.block.attention.rope.theta is" in record.message


def test_train_says_that_the_model_is_another(tmp_path, capsys):
    store(tmp_path, load_config("configs/tiny.py:smoke"), versions())
    arguments = ["configs/tiny.py:smoke", f"init_from={tmp_path}", f"workdir={tmp_path}/run"]
    overrides = [f"data.cache_dir={tmp_path}/cache", "model.block.norm.epsilon=0.1"]
    assert main(["train", *arguments, *overrides]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} holds another model: here model.block.norm.epsilon is 0.1" in error
    assert "holds no weights" in error


def test_a_model_that_cannot_be_compared_is_said(tmp_path, caplog):
    ours = apply_overrides(load_config("configs/tiny.py:smoke"), [f"init_from={tmp_path}"])
    compare_with_source(build_config(ours), trusted=False)
    assert f"whether the model is that of {tmp_path} cannot be told" in caplog.text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("adapter.linear.alpha=320", r"adapter.linear.alpha is 320.0 and not 32.0"),
        ("adapter.linear=moejax.adapters.lora:RsLoRA", "adapter.linear is RsLoRA and not LoRA"),
        ("adapter.experts.alpha=80", r"adapter.experts.alpha is 80.0 and not"),
        ("adapter.linear.dropout=0.5", None),
    ],
)
def test_another_adapter_of_the_same_shapes_is_refused(tmp_path, change, text):
    """With another scale its factors would not be what was learnt."""
    store(tmp_path, load_config("configs/lora.py:smoke"), versions())
    overrides = [f"init_from={tmp_path}", change]
    ours = apply_overrides(load_config("configs/lora.py:smoke"), overrides)
    refused = pytest.raises(UserError, match=f"{tmp_path} holds another adapter: here {text}")
    with refused if text else contextlib.nullcontext():
        compare_with_source(build_config(ours), trusted=False)

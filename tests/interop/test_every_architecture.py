"""What config.json may ask of any architecture, and most of them have in one form alone."""

import dataclasses
import json

import fiddle as fdl
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.interop import hf
from tests.interop.tiny_checkpoints import MODELS, edit_config, variables, written

PARTIAL = "glm4_moe"  # where transformers reads partial_rotary_factor
WHOLE = [name for name in MODELS if name != PARTIAL]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A folder with a config.json of ours for each architecture."""
    folders = tmp_path_factory.mktemp("hf")
    return {name: written(name, folders / name) for name in MODELS}


def edited(folder, target, **changes):
    """A folder with the config.json of another, changed."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    edit_config(target, **changes)
    return target


def values_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "key, value, text",
    [
        ("is_causal", False, "is_causal=False is not supported, only True"),
        ("is_causal", 0, "is_causal=0 is not supported, only True"),
        ("is_causal", None, "is_causal=None is not supported, only True"),
        ("use_bidirectional_attention", True, "attention=True is not supported, only False"),
        ("use_bidirectional_attention", "all", "attention='all' is not supported, only False"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_attention_that_looks_ahead_is_refused(name, key, value, text, folder_of, tmp_path):
    folder = edited(folder_of[name], tmp_path / "hf", **{key: value})
    with pytest.raises(UserError, match=f"hf/config.json: .*{text}") as error:
        hf.model_config(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_moves_the_bias_of_published_weights(name, folder_of):
    """Whoever trains them states a rule that does."""
    moe = fdl.build(hf.model_config(folder_of[name])).moe
    for rule in moe.balance if moe else ():
        state = {key: value + 0.25 for key, value in rule.state(4).items()}
        after = rule.update(state, {"load": np.array([9.0, 1.0, 0.0, 2.0])})
        for key in state:
            np.testing.assert_array_equal(after[key], state[key])


@pytest.mark.parametrize("name", MODELS)
def test_causal_attention_may_be_stated_and_is_not_written(name, folder_of, tmp_path, caplog):
    assert not values_of(folder_of[name]).keys() & {"is_causal", "use_bidirectional_attention"}
    causal = {"is_causal": True, "use_bidirectional_attention": False}
    stated = hf.model_config(edited(folder_of[name], tmp_path / "hf", **causal))
    assert stated == hf.model_config(folder_of[name])
    assert not caplog.records


def partial(folder, where):
    """The values of config.json that rotate half of each head."""
    rope = values_of(folder).get("rope_parameters", {})
    if where == "beside":
        return {"partial_rotary_factor": 0.5, "rope_parameters": rope}
    return {"rope_parameters": rope | {"partial_rotary_factor": 0.5}}


@pytest.mark.parametrize("where", ["beside", "within"])
@pytest.mark.parametrize("name", WHOLE)
def test_part_of_a_head_is_refused_where_transformers_rotates_all(name, where, folder_of, tmp_path):
    folder = edited(folder_of[name], tmp_path / "hf", **partial(folder_of[name], where))
    with pytest.raises(UserError, match="partial_rotary_factor=0.5 is not supported, only 1") as e:
        hf.model_config(folder)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", WHOLE)
def test_all_of_a_head_may_be_stated(name, folder_of, tmp_path):
    stated = hf.model_config(edited(folder_of[name], tmp_path / "hf", partial_rotary_factor=1.0))
    assert stated == hf.model_config(folder_of[name])
    assert "partial_rotary_factor" not in (folder_of[name] / "config.json").read_text()


@pytest.mark.parametrize("where", ["beside", "within"])
def test_part_of_a_head_is_read_where_transformers_reads_it(where, folder_of, tmp_path):
    base = edited(folder_of[PARTIAL], tmp_path / "base", partial_rotary_factor=...)
    rope = values_of(base)["rope_parameters"]
    rope.pop("partial_rotary_factor")
    edit_config(base, rope_parameters=rope, rope_scaling=...)
    assert hf.model_config(base).block.attention.rope.fraction == 0.5  # as files without it mean
    quarter = {"partial_rotary_factor": 0.25}
    changes = quarter if where == "beside" else {"rope_parameters": rope | quarter}
    edit_config(base, **changes)
    assert hf.model_config(base).block.attention.rope.fraction == 0.25


@pytest.mark.parametrize("name", [name for name in WHOLE if "deepseek" not in name])
def test_part_of_a_head_is_not_written_where_transformers_rotates_all(name, folder_of, tmp_path):
    """Latent attention refuses it itself."""
    block = MODELS[name].block
    rope = dataclasses.replace(block.attention.rope, fraction=0.5)
    block = block.clone(attention=block.attention.clone(rope=rope))
    model = dataclasses.replace(MODELS[name], block=block)
    with pytest.raises(UserError, match=r"rope.fraction is 0.5 and not 1.0"):
        hf.save(model, variables(name), tmp_path / "new")
    with pytest.raises(UserError, match=r"describes another model: .*rope.fraction is 0.5"):
        hf.save(model, variables(name), tmp_path / "new", source=folder_of[name])
    assert not list(tmp_path.iterdir())

"""What an adapter cannot be read or written for, and that the error names it."""

import dataclasses
import functools
import re
import shutil

import jax
import numpy as np
import pytest

from moejax.adapters.lora import LoRA, RsLoRA
from moejax.errors import UserError
from moejax.experts.lora_glu import LoRAGLU, RsLoRAGLU
from moejax.interop import hf, peft
from moejax.models.adapter import Adapter
from tests.interop.peft_folders import (
    CONFIG,
    WEIGHTS,
    adapted,
    assert_same_bits,
    edit,
    factors,
)
from tests.interop.tiny_checkpoints import MODELS, edit_config
from tests.models.tiny_model import random_model_variables

BASE = MODELS["olmoe"]
QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ADAPTER = Adapter(
    targets=("q_proj", "experts.gate", "experts.up", "experts.down"),
    linear=LoRA(rank=2),
    experts=LoRAGLU(rank=2),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    model = adapted(BASE, ADAPTER)
    peft.save(model, factors(model), folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "adapter")


def refused(folder, text, model=BASE):
    with pytest.raises(UserError, match=re.escape(text)):
        peft.adapter_config(folder, model)


@pytest.mark.parametrize(
    "name, value",
    [
        ("r", 0),
        ("rank_pattern", {"q_proj": 0}),
        ("r", "8"),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", "q_proj("),
        ("peft_type", "LOHA"),
        ("task_type", "SEQ_CLS"),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "pissa"),
        ("what_comes_next", 1),
    ],
)
def test_a_setting_that_has_no_place(folder, name, value):
    stated = {
        "r": "rank 0" if value == 0 else "r=",
        "rank_pattern": "rank_pattern states the rank 0",
    }
    texts = {"target_modules": "q_proj"}
    edit(folder, **{name: value})
    refused(folder, stated.get(name, texts.get(name, f"{name}=")))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"r": 3}, "q_proj.lora_A.weight has shape [2, 16], but this base model and the rank 3"),
        ({"target_modules": ["k_proj"]}, "holds base_model.model.model.layers.0.self_attn.q_proj"),
        ({"target_modules": ["q_proj", "k_proj"]}, "lacks base_model.model.model.layers.0.self_at"),
        ({"layers_to_transform": [1]}, f"holds {QUERY} and 1 more"),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, f"holds {QUERY}"),
        ({"target_parameters": None}, "holds base_model.model.model.layers.0.mlp.experts.base_"),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 3}}, "q_proj rank 2 and scale 1.5, but"),
        ({"alpha_pattern": {}}, "gate_up_proj rank 4 and scale 2, but"),
    ],
)
def test_settings_that_are_not_those_of_the_tensors(folder, changes, text):
    refused(edit(folder, **changes), text)


def renamed(values):
    for name in [name for name in values if "q_proj" in name]:
        values[name.replace("self_attn.q_proj", "attn.c_attn")] = values.pop(name)


def another_dtype(values):
    values[QUERY] = values[QUERY].astype(np.float64)


def entangled(values):
    """One entry of B by which a gate uses what belongs to an up."""
    name = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
    b = values[name].reshape(16, 4, 4).copy()
    b[0, 3, 1] = -0.0
    values[name] = b.reshape(16, 16)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda values: values.pop(QUERY), f"lacks {QUERY}"),
        (
            lambda values: values.update(more=np.zeros(1, np.float32)),
            "holds more, which is no LoRA",
        ),
        (renamed, "attn.c_attn.lora_A.weight and 3 more"),
        (another_dtype, "is stored as F64"),
    ],
)
def test_tensors_that_are_not_the_models(folder, change, text):
    refused(edit(folder, change), text)


def test_one_negative_zero_makes_an_entangled_pair(folder):
    """It is then read in the larger rank, in which every bit has a place."""
    edit(folder, entangled)
    config = peft.adapter_config(folder, BASE)
    assert config.experts.rank == 4
    with pytest.raises(UserError, match="holds a LoRAGLU of rank 4 .* is a LoRAGLU of rank 2"):
        peft.load(folder, adapted(BASE, ADAPTER))


def test_an_adapter_of_another_base(folder):
    wide = dataclasses.replace(BASE, d_model=32)
    refused(folder, "q_proj.lora_A.weight has shape [2, 16], but this base model", wide)
    refused(folder, "holds base_model.model.model.layers.0.mlp", MODELS["qwen3"])
    refused(folder, "base_model.model.model.layers.1", dataclasses.replace(BASE, num_layers=1))


@pytest.mark.parametrize(
    "file, edit_file, text",
    [
        (CONFIG, lambda path: path.unlink(), "adapter_config.json is missing"),
        (CONFIG, lambda path: path.write_text("{"), "cannot be read as JSON"),
        (WEIGHTS, lambda path: path.unlink(), f"holds no {WEIGHTS}"),
        (WEIGHTS, lambda path: path.rename(path.with_name("adapter_model.bin")), "pickle"),
        (WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:-4]), "truncated"),
    ],
)
def test_files_that_are_missing_or_damaged(folder, file, edit_file, text):
    edit_file(folder / file)
    refused(folder, text)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"targets": ("q_proj",)}, "only the adapter in the folder reaches layers.0.ffn.experts."),
        ({"targets": "all-linear"}, "only the adapter reaches layers.0.attention.key"),
        ({"linear": LoRA(rank=3)}, "holds a LoRA of rank 2 and scale 4, and adapter.linear is"),
        ({"linear": LoRA(rank=2, alpha=7.0)}, "and adapter.linear is a LoRA of rank 2 and scale 3"),
        ({"linear": RsLoRA(rank=2)}, "adapter.linear is a RsLoRA"),
        ({"experts": LoRAGLU(rank=2, alpha=1.0)}, "adapter.experts is a LoRAGLU of rank 2 and sca"),
        ({"experts": LoRAGLU(rank=2, share_b=True)}, "share a factor"),
    ],
)
def test_a_model_with_another_adapter(original, changes, text):
    model = adapted(BASE, dataclasses.replace(ADAPTER, **changes))
    with pytest.raises(UserError, match=re.escape(text)):
        peft.load(original, model)


class _Doubled(LoRA):
    """A LoRA that PEFT does not have."""

    @property
    def scale(self) -> float:
        """Twice the usual."""
        return 2 * super().scale


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"targets": ("experts.gate",)}, "gate is adapted alone"),
        ({"experts": LoRAGLU(rank=2, share_a=True)}, "share a factor"),
        ({"experts": RsLoRAGLU(rank=2)}, "LoRA and RsLoRAGLU, but PEFT has one use_rslora"),
        ({"linear": _Doubled(rank=2)}, "no words for a _Doubled"),
    ],
)
def test_an_adapter_that_peft_cannot_express_is_not_written(changes, text, tmp_path):
    model = adapted(BASE, dataclasses.replace(ADAPTER, **changes))
    with pytest.raises(UserError, match=re.escape(text)):
        peft.save(model, factors(model), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


UNSETTLED = "rope_interleave in the base model's config.json says how the adapter of attention."


@pytest.mark.parametrize(
    "changes, targets, named",
    [
        ({}, ("q_b_proj", "o_proj"), "query_up"),
        ({}, ("kv_a_proj_with_mqa",), "kv_down"),
        ({"q_lora_rank": None}, ("q_proj",), "query"),
    ],
)
def test_an_order_that_only_config_json_says_asks_for_it(changes, targets, named, tmp_path):
    """Two files of this model may store the outputs of a projection in different orders."""
    base = MODELS["deepseek_v3"]
    attention = base.block.attention.clone(**changes)
    base = dataclasses.replace(base, block=base.block.clone(attention=attention))
    model = adapted(base, Adapter(targets=targets, linear=LoRA(rank=2)))
    whole = random_model_variables(base)
    hf.save(base, whole, tmp_path / "base")
    variables, folder = factors(model), tmp_path / "adapter"
    text = re.escape(f"{UNSETTLED}{named} is stored, and the model does not: give source=")
    with pytest.raises(UserError, match=text):
        peft.save(model, variables, folder)
    assert not folder.exists()
    peft.save(model, variables, folder, source=tmp_path / "base")
    for read in (peft.load, peft.stored, peft.adapter_config):
        for one in (base, model) if read is peft.adapter_config else (model,):
            with pytest.raises(UserError, match=text):
                read(folder, one)
            read(folder, one, source=tmp_path / "base")
    edit_config(tmp_path / "base", rope_interleave=False)
    other = peft.load(folder, model, source=tmp_path / "base")["lora"]["layers_1"]["attention"]
    ours = variables["lora"]["layers_1"]["attention"]
    assert np.array_equal(other[named]["a"], ours[named]["a"])
    assert not np.array_equal(other[named]["b"], ours[named]["b"])


@pytest.mark.parametrize(
    "name, targets",
    [
        ("deepseek_v3", ("q_a_proj", "kv_b_proj", "o_proj", "experts.down")),
        ("deepseek_v2", ("q_proj", "kv_a_proj_with_mqa")),  # which has one order
    ],
)
def test_an_order_that_is_known_asks_for_nothing(name, targets, tmp_path):
    adapter = Adapter(targets=targets, linear=LoRA(rank=2), experts=LoRAGLU(rank=2))
    model = adapted(MODELS[name], adapter)
    peft.save(model, factors(model), tmp_path / "adapter")
    peft.adapter_config(tmp_path / "adapter", MODELS[name])
    assert_same_bits(peft.load(tmp_path / "adapter", model), factors(model))


def test_factors_that_are_not_the_models_are_not_written(tmp_path):
    model = adapted(BASE, ADAPTER)
    save = functools.partial(peft.save, directory=tmp_path / "adapter")
    given = factors(model)
    with pytest.raises(UserError, match="has no adapter"):
        save(BASE, given)
    with pytest.raises(UserError, match="variables lack the leaf lora/layers_0/attention/query/a"):
        save(model, {})
    wider = jax.tree.map(lambda x: np.concatenate([x, x]), given)
    with pytest.raises(UserError, match=r"has shape \[4, 16, 2\], but the model asks for \[2, 16"):
        save(model, wider)
    with pytest.raises(UserError, match="float64: use float32"):
        save(model, jax.tree.map(lambda x: x.astype(np.float64), given))
    given["lora"]["layers_0"]["attention"]["other"] = {"a": np.zeros(2, np.float32)}
    with pytest.raises(UserError, match="attention/other/a is none of the model's"):
        save(model, given)
    assert not list(tmp_path.iterdir())

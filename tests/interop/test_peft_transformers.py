"""Adapters beside PEFT itself: equal logits both ways, and what it wrote is written again."""

import dataclasses

import numpy as np
import pytest

from moejax.adapters.lora import LoRA, RsLoRA
from moejax.commands import main
from moejax.errors import UserError
from moejax.experts.lora_glu import LoRAGLU, RsLoRAGLU
from moejax.interop import hf, peft
from moejax.models.adapter import Adapter
from moejax.types import tree_of
from tests.interop.peft_folders import adapted, assert_same_bits, factors, opened, tensors

torch = pytest.importorskip("torch", reason="the extra hf (torch) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
theirs_peft = pytest.importorskip("peft", reason="the extra hf (peft) is not installed")

from tests.interop.test_hf_transformers import (  # noqa: E402  (it imports torch)
    ARCHITECTURES,
    our_logits,
    their_logits,
    theirs,
)

TOLERANCE = 1e-5
ATTENTION = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def base(name, folder):
    """(a folder of the base model, the model as transformers reads it)."""
    theirs(name).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    return folder, model


def logits_of_peft(name, folder, tmp_path):
    _, model = base(name, tmp_path / "again")
    return their_logits(theirs_peft.PeftModel.from_pretrained(model, folder).eval())


def agree(ours, expected, plain):
    assert np.abs(expected - plain).max() > 0.1  # the adapter does something
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("linear, experts", [(LoRA, LoRAGLU), (RsLoRA, RsLoRAGLU)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_computes_what_we_compute(name, linear, experts, tmp_path):
    """Every projection that there is, of ranks and scales of their own."""
    folder, _ = base(name, tmp_path / "base")
    adapter = Adapter(
        targets="all-linear",
        linear=linear(rank=2, alpha=3.0),
        experts=experts(rank=3, alpha=2.0),
    )
    model, leaves = hf.stored(folder, adapter=adapter)
    variables = tree_of({leaf.path: np.asarray(leaf[()]) for leaf in leaves}) | factors(model)
    peft.save(model, variables, tmp_path / "adapter", source=folder)
    expected = logits_of_peft(name, tmp_path / "adapter", tmp_path)
    agree(our_logits(model, variables), expected, their_logits(theirs(name)))


@pytest.mark.parametrize("layers", [None, (1,)])
def test_layers_and_names_that_differ_reach_peft(layers, tmp_path):
    """Layer 0 of this model is dense, and whole paths are named where no rule describes them."""
    folder, _ = base("glm4_moe", tmp_path / "base")
    ragged = ("layers.0.attention.query", "layers.1.attention.key", "layers.1.ffn.experts")
    ragged = (*ragged[:2], *(f"{ragged[2]}.{part}" for part in ("gate", "up", "down")))
    targets = ("q_proj", "experts.gate_proj", "experts.up_proj") if layers else ragged
    adapter = Adapter(targets=targets, linear=LoRA(rank=2), experts=LoRAGLU(rank=2), layers=layers)
    model, leaves = hf.stored(folder, adapter=adapter)
    variables = tree_of({leaf.path: np.asarray(leaf[()]) for leaf in leaves}) | factors(model)
    peft.save(model, variables, tmp_path / "adapter", source=folder)
    expected = logits_of_peft("glm4_moe", tmp_path / "adapter", tmp_path)
    agree(our_logits(model, variables), expected, their_logits(theirs("glm4_moe")))


# As users of PEFT write them. Where gate_proj is named in a mixture of experts, PEFT adapts
# `gate_up_proj` in twice the rank.
TRAINED = {
    "llama": {"target_modules": ATTENTION + MLP, "layers_to_transform": [1]},
    "qwen3": {"target_modules": r".*layers\.[01]\.self_attn\.(q|k)_proj", "use_rslora": True},
    "olmoe": {"target_modules": ATTENTION + MLP},
    "mixtral": {"target_modules": ["w1", "w2", "w3", "o_proj"]},
    "qwen2_moe": {"target_modules": [*ATTENTION, "shared_expert.up_proj"]},
    "qwen3_moe": {"target_modules": MLP, "target_parameters": ["mlp.up_proj.weight"]},
    "glm4_moe": {"target_modules": [], "target_parameters": EXPERTS[1:], "use_rslora": True},
    "gpt_oss": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "phimoe": {
        "target_modules": ATTENTION,
        "target_parameters": EXPERTS[:1],
        "rank_pattern": {"q_proj": 2, "v_proj": 2},
        "alpha_pattern": {"q_proj": 5, "v_proj": 5},
    },
    "deepseek_v2": {"target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    "deepseek_v3": {"target_modules": ["q_a_proj", "q_b_proj"], "exclude_modules": ["q_a_proj"]},
}


def trained(name, folder, tmp_path, **changes):
    """An adapter of PEFT with random factors; returns its logits."""
    torch.manual_seed(0)
    _, model = base(name, tmp_path / "base")
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | TRAINED[name] | changes
    config = theirs_peft.LoraConfig(**settings)
    model = theirs_peft.get_peft_model(model, config)
    for key, value in model.named_parameters():
        if "lora_" in key:
            value.data = 0.3 * torch.randn(value.shape)
    model.save_pretrained(folder)
    return their_logits(model.eval())


@pytest.mark.parametrize("name", TRAINED)
def test_we_compute_what_peft_computes_and_write_what_it_wrote(name, tmp_path):
    folder = tmp_path / "adapter"
    expected = trained(name, folder, tmp_path)
    model, variables = opened(tmp_path / "base", folder)
    agree(our_logits(model, variables), expected, their_logits(theirs(name)))
    peft.save(model, variables, tmp_path / "written", source=tmp_path / "base")
    assert_same_bits(tensors(tmp_path / "written"), tensors(folder))
    again = logits_of_peft(name, tmp_path / "written", tmp_path)
    # Not to the bit: what was a module there may be written as that module's parameter.
    np.testing.assert_allclose(again, expected, atol=2e-6, rtol=0)


def test_scales_of_experts_that_differ_are_refused(tmp_path):
    """With rsLoRA, PEFT doubles rank and alpha of `gate_up_proj`, and so changes its scale."""
    trained("mixtral", tmp_path / "adapter", tmp_path, use_rslora=True)
    with pytest.raises(
        UserError, match=r"gate_up_proj rank 8 and scale 4.2.*, but .*down_proj rank 4 and scale 3:"
    ):
        opened(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.slow
def test_the_check_of_an_import_asks_peft(tmp_path, capsys):
    trained("olmoe", tmp_path / "adapter", tmp_path)
    words = ["import-hf", tmp_path / "base", tmp_path / "out", "--adapter", tmp_path / "adapter"]
    assert main([*map(str, words), "--check"]) == 0
    assert "verdict: the logits agree" in capsys.readouterr().out


def test_another_scale_would_be_noticed(tmp_path):
    trained("llama", tmp_path / "adapter", tmp_path)
    model, variables = opened(tmp_path / "base", tmp_path / "adapter")
    linear = model.adapter.linear.clone(alpha=6.06)
    wrong = adapted(model, dataclasses.replace(model.adapter, linear=linear))
    ours, other = our_logits(model, variables), our_logits(wrong, variables)
    assert np.abs(ours - other).max() > 100 * TOLERANCE

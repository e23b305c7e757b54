"""What a mixture of MoE-PEFT cannot be read for, and that the error names it."""

import dataclasses
import importlib
import re
import shutil

import numpy as np
import pytest

from moejax.adapters.lora import LoRA
from moejax.adapters.mixed import MixedLinear
from moejax.errors import UserError
from moejax.experts.dense import DenseGLU
from moejax.interop import hf, peft, torch_file
from moejax.layers.mixing.router import TopK
from moejax.models.adapter import Adapter
from tests.interop.mixtures import ADAPTERS, BANK, LLAMA, MOLA
from tests.interop.peft_folders import CONFIG, WEIGHTS, adapted, edit, factors
from tests.interop.tiny_checkpoints import MODELS
from tests.models.tiny_model import random_model_variables

GATE = "mixlora.layers.0.mlp.moe_gate.weight"
EXPERT = "mixlora.layers.1.mlp.up_proj.experts.2.lora_B.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe_peft")
    for name in ("mixlora", "mola", "dynmole"):
        model = adapted(LLAMA, ADAPTERS[name])
        peft.save(model, factors(model), folder / name)
    return folder


@pytest.fixture
def folders(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "adapters")


def refused(folder, text, model=LLAMA):
    with pytest.raises(UserError, match=re.escape(text)):
        peft.adapter_config(folder, model)


@pytest.mark.parametrize(
    "kind, name, value",
    [
        ("mixlora", "peft_type", "LORAMOE"),
        ("mixlora", "routing_strategy", "mixlora-dynamic"),
        ("mixlora", "routing_strategy", "mixlora-switch"),
        ("mixlora", "routing_strategy", None),
        ("mola", "routing_strategy", "mixlora"),
        ("mixlora", "jitter_noise", 0.01),
        ("mixlora", "act_fn", "relu"),
        ("mixlora", "act_fn", "gelu"),
        ("mixlora", "act_fn", ["silu"]),
        ("mixlora", "use_dora", True),
        ("mixlora", "bias", "all"),
        ("mixlora", "lora_init", "pissa"),
        ("mixlora", "task_type", "SEQ_CLS"),
        ("mixlora", "router_z_loss_coef", 0.1),
        ("mola", "expert_lora", {"r": 3}),
        ("mola", "act_fn", "silu"),
        ("mola", "what_comes_next", 0),
        ("mola", "r", 0),
        ("mola", "r", "2"),
        ("mola", "r", None),
        ("mola", "lora_alpha", 0),
        ("mola", "lora_alpha", True),
        ("mola", "lora_dropout", 1),
        ("mola", "use_rslora", "no"),
        ("mola", "num_experts", 0),
        ("mola", "num_experts", None),
        ("mola", "top_k", 0),
        ("mola", "router_loss", 1),
        ("mola", "router_aux_loss_coef", -1.0),
        ("mola", "router_aux_loss_coef", float("nan")),
        ("mola", "router_init_range", "5"),
        ("mola", "target_modules", []),
        ("mola", "target_modules", "q_proj"),
        ("mola", "target_modules", {"q_proj": False}),
        ("mola", "target_modules", {"q_proj": 1}),
        ("mixlora", "target_modules", ["q_proj"]),
        ("dynmole", "entropy_type", "renyi"),
        ("dynmole", "entropy_eps", 1e-6),
        ("dynmole", "entropy_index", 1.0),
        ("dynmole", "entropy_index", 2.5),
        ("dynmole", "top_p", 1.5),
        ("dynmole", "entropy_threshold", 0),
        ("dynmole", "top_k", 2),
    ],
)
def test_a_setting_that_has_no_place(folders, kind, name, value):
    edit(folders / kind, **{name: value})
    refused(folders / kind, f"lacks {name}" if value is None else f"{name}=")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"use_dora": True}, "expert_lora: use_dora=True is not supported"),
        ({"r": 0}, "expert_lora: r=0"),
        ({"target_modules": ["q_proj"]}, "expert_lora: target_modules="),
        ({"num_experts": 3}, "expert_lora: num_experts=3"),
        ({"r": 5}, "mlp.down_proj.experts.0.lora_A.weight has shape [2, 12], but this base model"),
    ],
)
def test_a_setting_of_the_experts_that_has_no_place(folders, change, text):
    refused(edit(folders / "mixlora", expert_lora=change), text)


@pytest.mark.parametrize(
    "kind, changes, text",
    [
        ("mixlora", {"r": 4}, "lora_A.weight has shape [3, 16], but this base model and"),
        ("mixlora", {"num_experts": 4}, "lacks mixlora.layers.0.mlp.down_proj.experts.3.lora_A"),
        ("mixlora", {"num_experts": 2}, "experts.2.lora_A.weight and 11 more, which is no part"),
        ("mixlora", {"peft_type": "MOLA", "routing_strategy": "mola"}, "expert_lora="),
        ("mola", {"peft_type": "MIXLORA", "routing_strategy": "mixlora"}, "holds mola.layers.0"),
        ("mola", {"target_modules": ["q_proj"]}, "holds mola.layers.0.mlp.up_proj.experts.0"),
        ("mola", {"target_modules": ["q_proj", "up_proj", "k_proj"]}, "lacks mola.layers.0.self_"),
        ("mola", {"target_modules": ["fc1"]}, "names fc1, which this base model does not have at "),
        ("mola", {"top_k": 4}, "4 of num_experts=3 cannot be chosen"),
        ("dynmole", {"keep_top_k": 4}, "4 of num_experts=3 cannot be chosen"),
    ],
)
def test_settings_that_are_not_those_of_the_tensors(folders, kind, changes, text):
    refused(edit(folders / kind, **changes), text)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda values: values.pop(GATE), f"lacks {GATE}"),
        (lambda values: values.pop(EXPERT), f"lacks {EXPERT}"),
        (lambda values: values.update(classifier=np.zeros(2, np.float32)), "holds classifier, "),
        (lambda values: values.update({GATE: values[GATE].T}), "has shape [16, 3], but this base"),
        (lambda values: values.update({EXPERT: values[EXPERT][:, :0]}), "has shape [12, 0], but"),
        (lambda values: values.update({GATE: values[GATE].astype("f8")}), "is stored as F64"),
    ],
)
def test_tensors_that_are_not_the_models(folders, change, text):
    refused(edit(folders / "mixlora", change), text)


def test_an_adapter_of_another_base(folders):
    wide = dataclasses.replace(LLAMA, d_model=32)
    refused(folders / "mola", "lora_A.weight has shape [2, 16], but this base model", wide)
    deep = dataclasses.replace(LLAMA, num_layers=3)
    refused(folders / "mola", "lacks mola.layers.2.", deep)
    shallow = dataclasses.replace(LLAMA, num_layers=1)
    refused(folders / "mola", "holds mola.layers.1.", shallow)
    refused(folders / "mixlora", "names down_proj, which this base model", MODELS["olmoe"])
    partly = MODELS["qwen3_moe"]  # dense in every second layer
    refused(folders / "dynmole", "names down_proj, which this base model does not have in", partly)
    gelu = LLAMA.block.clone(ffn=DenseGLU(d_ff=12, activation="gelu"))
    edit(folders / "mixlora", act_fn="silu")
    refused(folders / "mixlora", "act_fn='silu'", dataclasses.replace(LLAMA, block=gelu))


@pytest.mark.parametrize(
    "file, edit_file, text",
    [
        (CONFIG, lambda path: path.unlink(), "adapter_config.json is missing"),
        (CONFIG, lambda path: path.write_text("{"), "cannot be read as JSON"),
        (WEIGHTS, lambda path: path.unlink(), f"holds no {WEIGHTS}"),
        (WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:-4]), "truncated"),
    ],
)
def test_files_that_are_missing_or_damaged(folders, file, edit_file, text):
    edit_file(folders / "mola" / file)
    refused(folders / "mola", text)


def test_a_pickle_without_torch_says_how_to_convert_it(folders, monkeypatch):
    def no_torch(name):
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return import_module(name)

    import_module = importlib.import_module
    (folders / "mola" / WEIGHTS).rename(folders / "mola" / "adapter_model.bin")
    monkeypatch.setattr(torch_file.importlib, "import_module", no_torch)
    refused(
        folders / "mola",
        "safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
        "'adapter_model.safetensors')",
    )


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"targets": "all-linear"}, "states target_modules q_proj, up_proj, and the model's"),
        ({"linear": MixedLinear(bank=BANK.clone(rank=3))}, "states r 2, and the model's"),
        ({"linear": MixedLinear(bank=BANK.clone(alpha=7.0))}, "states scale 1.5, and the model's"),
        ({"linear": MixedLinear(bank=BANK.clone(num_adapters=4))}, "states num_experts 3"),
        ({"linear": MixedLinear(router=TopK(k=1), bank=BANK)}, "states top_k 2, and"),
        ({"linear": ADAPTERS["dynmole"].linear}, "states peft_type MOLA"),
        ({"linear": LoRA(rank=2)}, "holds a mixture of adapters, and the model's adapter is plain"),
    ],
)
def test_a_model_with_another_adapter(originals, changes, text):
    model = adapted(LLAMA, dataclasses.replace(MOLA, **changes))
    with pytest.raises(UserError, match=re.escape(text)):
        peft.load(originals / "mola", model)


def test_an_order_that_only_config_json_says_asks_for_it(tmp_path):
    """Queries of DeepSeek-V3 without a latent, the one projection there that MoE-PEFT can name."""
    block = MODELS["deepseek_v3"].block
    block = block.clone(attention=block.attention.clone(q_lora_rank=None))
    base = dataclasses.replace(MODELS["deepseek_v3"], block=block)
    model = adapted(base, dataclasses.replace(MOLA, targets=("attention.query",)))
    hf.save(base, random_model_variables(base), tmp_path / "base")
    folder, source, variables = tmp_path / "adapter", tmp_path / "base", factors(model)
    asked = "rope_interleave .* attention.query is .*: give source="
    with pytest.raises(UserError, match=asked):
        peft.save(model, variables, folder)
    peft.save(model, variables, folder, source=source)
    for read in (peft.adapter_config, peft.load):
        with pytest.raises(UserError, match=asked):
            read(folder, model)
        read(folder, model, source=source)


def test_a_mixture_where_the_folder_holds_plain_lora(tmp_path):
    plain = adapted(LLAMA, Adapter(targets=("q_proj",), linear=LoRA(rank=2)))
    peft.save(plain, factors(plain), tmp_path / "adapter")
    with pytest.raises(UserError, match="holds plain LoRA, and the model's adapter is a mixture"):
        peft.load(tmp_path / "adapter", adapted(LLAMA, MOLA))

"""Mixtures of MoE-PEFT: the layout of its sources, its formulas, and every bit both ways."""

import dataclasses

import fiddle as fdl
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moejax.adapters.mixed import MixedLinear
from moejax.interop import hf, peft
from moejax.layers.mixing.bank import LoRABank
from moejax.layers.mixing.router import TopK
from moejax.models.adapter import Adapter
from moejax.types import named_leaves, tree_of
from moejax.verification.contracts.cases import quick_jit
from tests.interop import mixtures, numpy_llama
from tests.interop.mixtures import ADAPTERS, BANK, LAYERS, LLAMA, D, E, F, R
from tests.interop.peft_folders import (
    CONFIG,
    WEIGHTS,
    adapted,
    assert_same_bits,
    factors,
    opened,
    settings,
    tensors,
)
from tests.interop.tiny_checkpoints import MODELS

TOKENS = np.random.default_rng(1).integers(0, 24, (2, 7))
ATTENTION = Adapter(targets=("q_proj", "o_proj"), linear=MixedLinear(bank=BANK))


@pytest.mark.parametrize(
    "base, name, dtype",
    [("llama", name, "float32") for name in ADAPTERS]
    + [("qwen3", "mixlora", "bfloat16"), ("olmoe", "attention", "float32")],
)
def test_what_is_written_is_read_with_every_bit(base, name, dtype, tmp_path):
    adapter = ADAPTERS.get(name, ATTENTION)
    model = adapted(MODELS[base], adapter)
    flat = named_leaves(factors(model)["lora"]).items()
    variables = {"lora": tree_of({path: x.astype(dtype) for path, x in flat})}
    peft.save(model, variables, tmp_path / "adapter", base_model="a/base")
    assert settings(tmp_path / "adapter")["base_model_name_or_path"] == "a/base"
    again = adapted(
        MODELS[base], fdl.build(peft.adapter_config(tmp_path / "adapter", MODELS[base]))
    )
    assert_same_bits(peft.load(tmp_path / "adapter", model), variables)
    assert_same_bits(peft.load(tmp_path / "adapter", again), variables)
    for part in ("linear", "mlp"):
        assert_same_settings(getattr(again.adapter, part), getattr(adapter, part))
    peft.save(again, variables, tmp_path / "second", base_model="a/base")
    for file in (CONFIG, WEIGHTS):
        first, second = (tmp_path / folder / file for folder in ("adapter", "second"))
        assert first.read_bytes() == second.read_bytes()


def assert_same_settings(found, wanted):
    """All of them but what fresh gates are drawn from, which is a function."""
    assert type(found) is type(wanted)
    for name in ("rank", "alpha", "dropout", "bank"):
        assert getattr(found, name, None) == getattr(wanted, name, None)
    for field in dataclasses.fields(getattr(wanted, "router", TopK())):
        if hasattr(wanted, "router") and field.name not in ("gate_init", "parent"):
            assert getattr(found.router, field.name) == getattr(wanted.router, field.name)


def test_names_and_shapes_are_those_of_moe_peft(tmp_path):
    model = adapted(LLAMA, ADAPTERS["mixlora"])
    peft.save(model, factors(model), tmp_path / "adapter")
    found = {name: x.shape for name, x in tensors(tmp_path / "adapter").items()}
    wanted = {}
    for layer in range(LAYERS):
        where = f"mixlora.layers.{layer}"
        wanted[f"{where}.mlp.moe_gate.weight"] = (E, D)
        for name, out in (("q", D), ("k", D // 2), ("v", D // 2), ("o", D)):
            wanted[f"{where}.self_attn.{name}_proj.lora_A.weight"] = (3, D)
            wanted[f"{where}.self_attn.{name}_proj.lora_B.weight"] = (out, 3)
        for name, into, out in (("gate", D, F), ("up", D, F), ("down", F, D)):
            for e in range(E):
                expert = f"{where}.mlp.{name}_proj.experts.{e}"
                wanted[f"{expert}.lora_A.weight"] = (R, into)
                wanted[f"{expert}.lora_B.weight"] = (out, R)
    assert found == wanted
    assert settings(tmp_path / "adapter") == {
        "bias": "none",
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.05,
        "use_rslora": False,
        "expert_lora": {"r": R, "lora_alpha": 3, "lora_dropout": 0.1, "use_rslora": False},
        "target_modules": [f"{x}_proj" for x in ("down", "gate", "k", "o", "q", "up", "v")],
        "routing_strategy": "mixlora",
        "num_experts": E,
        "top_k": 2,
        "router_aux_loss_coef": 0.01,
        "router_loss": True,
    }


ALL = tuple(mixtures.WIDTHS)
CASES = {
    "mixlora": ("MIXLORA", ALL, {"act_fn": "silu"}),
    "mixlora_expert_lora": (
        "MIXLORA",
        ("self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"),
        {"use_rslora": True, "expert_lora": {"lora_alpha": 5, "use_rslora": False}},
    ),
    "mola": (
        "MOLA",
        ALL,
        {"target_modules": {m.split(".")[1]: True for m in ALL} | {"fc1": False}},
    ),
    "dynmole": (
        "DYNMOLE",
        ALL,
        {"entropy_index": 1.1, "entropy_threshold": 0.9, "top_p": 0.75, "keep_top_k": 2},
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return mixtures.base(tmp_path_factory.mktemp("llama") / "base")


def ours(model, variables):
    """In float64, in which rounding cannot hide a wrong factor or choose another expert."""
    model = dataclasses.replace(model, dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
        return np.asarray(quick_jit(lambda v, t: model.apply(v, t).logits)(variables, TOKENS))


def theirs(model):
    return np.stack([numpy_llama.logits(model, row) for row in TOKENS])


def test_the_reference_computes_the_base_model(base):
    stored = safetensors.numpy.load_file(base / "model.safetensors")
    found, wanted = ours(*hf.load(base)), theirs(numpy_llama.Plain(stored))
    np.testing.assert_allclose(found, wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_moe_peft(base, name, tmp_path):
    kind, modules, values = CASES[name]
    given, stated = (
        mixtures.mixture_tensors(kind, modules),
        mixtures.described(kind, modules, **values),
    )
    folder = mixtures.by_hand(tmp_path / "adapter", given, stated)
    model, variables = opened(base, folder)
    stored = safetensors.numpy.load_file(base / "model.safetensors")
    reference = numpy_llama.Mixed(stored, given, stated)
    wanted = theirs(reference)
    assert reference.num_chosen == ({2, 3} if kind == "DYNMOLE" else set())
    np.testing.assert_allclose(ours(model, variables), wanted, atol=1e-9, rtol=0)
    assert np.abs(wanted - theirs(numpy_llama.Plain(stored))).max() > 0.1
    # One expert's factor turned round would be noticed.
    turned = given | {k: -x for k, x in given.items() if "experts.1.lora_B" in k}
    assert np.abs(wanted - theirs(numpy_llama.Mixed(stored, turned, stated))).max() > 1e-3
    peft.save(model, variables, tmp_path / "again")
    assert_same_bits(tensors(tmp_path / "again"), given)


@pytest.mark.parametrize(
    "kind, values, weights",
    [
        ("MIXLORA", {}, {"adapter_balance": 1e-3}),
        ("MIXLORA", {"router_loss": False}, {}),
        ("MIXLORA", {"router_aux_loss_coef": 0.5}, {"adapter_balance": 0.5}),
        ("MOLA", {}, {}),
        ("MOLA", {"router_loss": True}, {"adapter_balance": 1e-3}),
        ("DYNMOLE", {}, {"adapter_balance": 1e-3, "adapter_entropy": 1e-2}),
        ("DYNMOLE", {"router_dyn_loss_coef": 0.0}, {"adapter_balance": 1e-3}),
    ],
)
def test_losses_are_those_that_moe_peft_would_train_on_with(kind, values, weights, tmp_path):
    modules = ("mlp.up_proj",)
    given, stated = (
        mixtures.mixture_tensors(kind, modules),
        mixtures.described(kind, modules, **values),
    )
    folder = mixtures.by_hand(tmp_path / "adapter", given, stated)
    assert fdl.build(peft.adapter_config(folder, LLAMA)).loss_weights == weights


@pytest.mark.parametrize(
    "kind, values, bound",
    [
        ("MIXLORA", {"router_init_range": 0.5}, None),
        ("MOLA", {"router_init_range": 2.0}, "uniform"),
    ],
)
def test_fresh_gates_would_be_drawn_as_there(kind, values, bound, tmp_path):
    modules = ("mlp.up_proj",)
    given, stated = (
        mixtures.mixture_tensors(kind, modules),
        mixtures.described(kind, modules, **values),
    )
    folder = mixtures.by_hand(tmp_path / "adapter", given, stated)
    adapter = fdl.build(peft.adapter_config(folder, LLAMA))
    router = (adapter.mlp or adapter.linear).router
    drawn = np.asarray(router.gate_init(jax.random.key(0), (200, 50), jnp.float32))
    if bound:  # kaiming_uniform with a squared of 2: sqrt(6 / ((1 + 2) 200))
        assert 0.099 < np.abs(drawn).max() <= 0.1 * (1 + 1e-6)
    else:
        assert abs(drawn.std() - 0.5) < 0.02


def test_factors_of_several_dtypes_are_held_exactly(tmp_path):
    modules = ("self_attn.q_proj",)
    given = mixtures.mixture_tensors("MOLA", modules)
    name = "mola.layers.1.self_attn.q_proj.experts.2.lora_A.weight"
    given[name] = given[name].astype(ml_dtypes.bfloat16)
    folder = mixtures.by_hand(tmp_path / "adapter", given, mixtures.described("MOLA", modules))
    model = adapted(LLAMA, fdl.build(peft.adapter_config(folder, LLAMA)))
    a = peft.load(folder, model)["lora"]["layers_0"]["attention"]["query"]["adapters"]["a"]
    assert a.dtype == np.float32
    np.testing.assert_array_equal(a[1, 2], given[name].T.astype(np.float32))


def test_no_dropout_is_said(tmp_path, caplog):
    adapter = Adapter(targets=("q_proj",), linear=MixedLinear(bank=LoRABank(num_adapters=2)))
    model = adapted(LLAMA, adapter)
    peft.save(model, factors(model), tmp_path / "adapter")
    assert "lora_dropout is written as 0" in caplog.text

"""Adapters of PEFT without PEFT: the layout it documents, and every bit both ways."""

import dataclasses
import functools
import itertools
import json

import fiddle as fdl
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moejax.adapters.lora import LoRA, RsLoRA
from moejax.experts.lora_glu import LoRAGLU, RsLoRAGLU
from moejax.interop import hf, peft
from moejax.models.adapter import Adapter
from moejax.types import named_leaves, tree_of
from moejax.verification.contracts.cases import quick_jit
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
from tests.interop.tiny_checkpoints import MODELS, edit_config, edit_tensors, written

GATED = ("ffn.experts.gate", "ffn.experts.up")
E, R, D, F = 4, 2, 16, 8  # of the tiny OLMoE
EXPERTS = "base_model.model.model.layers.{layer}.mlp.experts"


def logits(model, variables):
    tokens = np.random.default_rng(1).integers(0, 24, (2, 9))
    return np.asarray(quick_jit(lambda v, t: model.apply(v, t).logits)(variables, tokens))


ADAPTERS = {
    "olmoe": Adapter(
        targets="all-linear", linear=LoRA(rank=2, alpha=3.0), experts=LoRAGLU(rank=3, alpha=1.0)
    ),
    "gpt_oss": Adapter(
        targets="all-linear", linear=RsLoRA(rank=2, alpha=0.3), experts=RsLoRAGLU(rank=2, alpha=0.7)
    ),
    "deepseek_v3": Adapter(
        targets=("query_up", "kv_down", "shared.gate", "experts.down"),
        linear=LoRA(rank=1),
        experts=LoRAGLU(rank=5),
        layers=(1,),
    ),
    "glm4_moe": Adapter(
        targets=("layers.0.ffn.up", "layers.1.attention.key"), linear=RsLoRA(rank=2, dropout=0.0)
    ),
    "mixtral": Adapter(targets=GATED, experts=LoRAGLU(rank=3)),
    "llama": Adapter(targets=r".*\.(q|k)_proj", linear=LoRA(dropout=0.1), layers=(0,)),
}


@pytest.mark.parametrize(
    "name, dtype", [(name, "float32") for name in ADAPTERS] + [("olmoe", "bfloat16")]
)
def test_what_is_written_is_read_with_every_bit(name, dtype, tmp_path):
    model = adapted(MODELS[name], ADAPTERS[name])
    variables = factors(model)
    variables = {"lora": tree_of({p: x.astype(dtype) for p, x in _flat(variables)})}
    source = written(name, tmp_path / "base") if name == "deepseek_v3" else None
    save = functools.partial(peft.save, base_model="a/base", source=source)
    save(model, variables, tmp_path / "adapter")
    assert settings(tmp_path / "adapter")["base_model_name_or_path"] == "a/base"
    described = fdl.build(peft.adapter_config(tmp_path / "adapter", MODELS[name], source=source))
    again = adapted(MODELS[name], described)
    assert_same_bits(peft.load(tmp_path / "adapter", model, source=source), variables)
    assert_same_bits(peft.load(tmp_path / "adapter", again, source=source), variables)
    if name != "mixtral":
        assert type(described.linear) is type(model.adapter.linear)
        assert described.linear.alpha == model.adapter.linear.alpha
    if model.adapter.experts is not None:
        assert described.experts == model.adapter.experts
    save(again, variables, tmp_path / "second")
    for file in (CONFIG, WEIGHTS):
        first, second = (
            (tmp_path / folder / file).read_bytes() for folder in ("adapter", "second")
        )
        assert first == second


def _flat(variables):
    return named_leaves(variables["lora"]).items()


RNG = np.random.default_rng(0)


def random(*shape):
    return (0.5 * RNG.standard_normal(shape)).astype(np.float32)


def by_hand(folder, pairs, **values):
    """A folder as PEFT documents it; `pairs` is {path in its model: (A, B)}."""
    folder.mkdir()
    named = {f"{path}.lora_A.weight": a for path, (a, _) in pairs.items()}
    named |= {f"{path}.lora_B.weight": b for path, (_, b) in pairs.items()}
    safetensors.numpy.save_file(named, folder / WEIGHTS)
    values = {"peft_type": "LORA", "r": R, "lora_alpha": 3, "target_modules": []} | values
    (folder / CONFIG).write_text(json.dumps(values))
    return folder


def assert_computes(base, folder, merge, tmp_path):
    """The adapter gives the logits of a base whose tensors `merge` changed."""
    model, variables = opened(base, folder)
    ours = logits(model, variables)
    plain = logits(*hf.load(base))
    edit_tensors(base, merge)
    np.testing.assert_allclose(ours, logits(*hf.load(base)), atol=2e-5, rtol=0)
    assert np.abs(ours - plain).max() > 0.1
    peft.save(model, variables, tmp_path / "again", source=base)
    return model


LATENT = ("q_b_proj", "kv_a_proj_with_mqa")


@pytest.mark.parametrize(
    "name, modules, paths, rslora, changes",
    [
        ("olmoe", ("q_proj", "o_proj"), ("output", "query"), True, {}),
        # In a model whose outputs are stored in another order than ours, or are not.
        ("deepseek_v3", LATENT, ("kv_down", "query_up"), False, {}),
        ("deepseek_v3", LATENT, ("kv_down", "query_up"), False, {"rope_interleave": False}),
    ],
)
def test_projections_lie_as_peft_documents(name, modules, paths, rslora, changes, tmp_path):
    """W [out, in] + s B A, with A [r, in] and B [out, r]."""
    base = written(name, tmp_path / "base")
    edit_config(base, **changes)
    stored = safetensors.numpy.load_file(base / "model.safetensors")
    names = [f"model.layers.{layer}.self_attn.{module}" for layer in (0, 1) for module in modules]
    shapes = {name: stored[f"{name}.weight"].shape for name in names}
    pairs = {name: (random(R, into), random(out, R)) for name, (out, into) in shapes.items()}
    prefixed = {f"base_model.model.{name}": pair for name, pair in pairs.items()}
    values = {"target_modules": list(modules), "use_rslora": rslora}
    folder = by_hand(tmp_path / "adapter", prefixed, **values)
    scale = np.float32(3 / np.sqrt(R) if rslora else 3 / R)

    def merge(values):
        for name, (a, b) in pairs.items():
            values[f"{name}.weight"] = values[f"{name}.weight"] + scale * (b @ a)

    model = assert_computes(base, folder, merge, tmp_path)
    assert model.adapter.targets == tuple(f"attention.{path}" for path in paths)
    assert type(model.adapter.linear) is (RsLoRA if rslora else LoRA)
    assert_same_bits(tensors(tmp_path / "again"), tensors(folder))


def add_per_expert(values, layer, gate_up, down):
    """To OLMoE's tensors; gate lies before up."""
    added = {"down": down}
    added["gate"], added["up"] = np.split(gate_up, 2, axis=1)
    for name, e in itertools.product(added, range(E)):
        key = f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight"
        values[key] = values[key] + added[name][e]


def add_turned(values, layer, gate_up, down):
    """To gpt-oss's tensors, which have inputs before outputs, as PEFT's delta has then."""
    for name, delta in (("gate_up_proj", gate_up), ("down_proj", down)):
        key = f"model.layers.{layer}.mlp.experts.{name}"
        values[key] = values[key] + delta.swapaxes(1, 2)


@pytest.mark.parametrize("name, add", [("olmoe", add_per_expert), ("gpt_oss", add_turned)])
def test_experts_lie_as_peft_documents(name, add, tmp_path):
    """A [r E, in] with an expert's rows together, B [out, r E] with a rank's columns together."""
    base = written(name, tmp_path / "base")
    parts = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    gate_up = {layer: (random(R * E, D), random(2 * F, R * E)) for layer in (0, 1)}
    down = {layer: (random(R * E, F), random(D, R * E)) for layer in (0, 1)}
    pairs = {}
    for layer in (0, 1):  # one wrapper is around the other
        pairs[f"{EXPERTS.format(layer=layer)}.base_layer"] = gate_up[layer]
        pairs[EXPERTS.format(layer=layer)] = down[layer]
    folder = by_hand(tmp_path / "adapter", pairs, target_parameters=parts)

    def delta(a, b):
        split = a.reshape(E, R, -1), b.reshape(-1, R, E)
        return np.float32(1.5) * np.einsum("eri,ore->eoi", *split)

    def merge(values):
        for layer in (0, 1):
            add(values, layer, delta(*gate_up[layer]), delta(*down[layer]))

    model = assert_computes(base, folder, merge, tmp_path)
    assert model.adapter.experts == LoRAGLU(rank=R, alpha=3.0)
    assert_same_bits(tensors(tmp_path / "again"), tensors(folder))


def test_a_module_for_every_expert_is_read_too(tmp_path):
    """As adapters were that were trained with transformers 4."""
    base = written("mixtral", tmp_path / "base")
    where = itertools.product((0, 1), range(E))
    names = [f"model.layers.{layer}.block_sparse_moe.experts.{e}" for layer, e in where]
    pairs = {f"{name}.w1": (random(R, D), random(F, R)) for name in names}
    pairs |= {f"{name}.w2": (random(R, F), random(D, R)) for name in names}
    prefixed = {f"base_model.model.{name}": pair for name, pair in pairs.items()}
    folder = by_hand(tmp_path / "adapter", prefixed, target_modules=["w1", "w2"])
    model, variables = opened(base, folder)
    assert model.adapter.targets == ("ffn.experts.down", "ffn.experts.gate")
    ours = logits(model, variables)

    def merge(values):
        for name, (a, b) in pairs.items():
            values[f"{name}.weight"] = values[f"{name}.weight"] + np.float32(1.5) * (b @ a)

    edit_tensors(base, merge)
    np.testing.assert_allclose(ours, logits(*hf.load(base)), atol=2e-5, rtol=0)


def test_what_is_filled_up_is_left_out_again(tmp_path):
    """`gate_up_proj` in twice the rank of the others, for both of its parts together."""
    pairs = {}
    for layer in (0, 1):
        pairs[f"{EXPERTS.format(layer=layer)}.base_layer"] = random(2 * E, D), random(2 * F, 2 * E)
        pairs[EXPERTS.format(layer=layer)] = random(E, F), random(D, E)
    pattern = {"rank_pattern": {".*gate_up_proj": 2}, "alpha_pattern": {".*gate_up_proj": 8}}
    names = ["gate_up_proj", "down_proj"]
    folder = by_hand(
        tmp_path / "adapter", pairs, r=1, lora_alpha=4, target_parameters=names, **pattern
    )
    model, variables = opened(written("olmoe", tmp_path / "base"), folder)
    assert model.adapter.experts == LoRAGLU(rank=2, alpha=8.0)
    down = variables["lora"]["layers_0"]["ffn"]["experts"]
    assert not down["down_a"][..., 1].any()
    assert not down["down_b"][..., 1, :].any()
    peft.save(model, variables, tmp_path / "again")
    assert_same_bits(tensors(tmp_path / "again"), tensors(folder))
    assert settings(tmp_path / "again")["alpha_pattern"] == {r"mlp\.experts\.down_proj": 4}


def test_factors_of_several_dtypes_are_held_exactly(tmp_path):
    pairs = {}
    for layer, dtype in enumerate((ml_dtypes.bfloat16, np.float32)):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        pairs[name] = random(R, D).astype(dtype), random(D, R).astype(dtype)
    folder = by_hand(tmp_path / "adapter", pairs, target_modules=["q_proj"])
    _, variables = opened(written("olmoe", tmp_path / "base"), folder)
    a = variables["lora"]["layers_0"]["attention"]["query"]["a"]
    assert a.dtype == jnp.float32
    for row, (stored, _) in enumerate(pairs.values()):
        np.testing.assert_array_equal(a[row], stored.T.astype(np.float32))


def test_dropout_that_peft_cannot_have_is_said(tmp_path, caplog):
    adapter = dataclasses.replace(ADAPTERS["olmoe"], linear=LoRA(rank=2, dropout=0.25))
    model = adapted(MODELS["olmoe"], adapter)
    peft.save(model, factors(model), tmp_path / "adapter")
    assert "lora_dropout is written as 0 and not as 0.25" in caplog.text
    assert settings(tmp_path / "adapter")["lora_dropout"] == 0

"""Which projections an adapter reaches, and what it leaves as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.adapters.lora import LoRA
from moejax.attention.mla import MultiHeadLatentAttention
from moejax.errors import UserError
from moejax.experts.dense import DenseGLU
from moejax.experts.lora_glu import LoRAGLU
from moejax.models.adapter import Adapter
from moejax.models.block import Block
from moejax.types import named_leaves
from moejax.verification.contracts.cases import quick_jit
from tests.models.tiny_model import (
    attention,
    dense,
    moe,
    random_model_variables,
    tiny,
    tokens,
)


def adapted(model, targets, **settings):
    adapter = Adapter(targets=targets, **({"experts": LoRAGLU(rank=2)} | settings))
    return dataclasses.replace(model, adapter=adapter)


def reached(model):
    """{layer: the projections with leaves of their own}."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    names = {name: segment for segment in model.segments for name in segment.names}
    out = {}
    for path in named_leaves(shapes["lora"]):
        stack, *rest = path.split("/")
        rest = rest if "experts" in rest else rest[:-1]
        segment = names[stack]
        for index in segment.indices(segment.names.index(stack)):
            out.setdefault(index, set()).add("/".join(rest))
    return out


def in_experts(*names):
    """The leaves of routed experts' projections."""
    return {f"ffn/experts/{name}_{factor}" for name in names for factor in "ab"}


ATTENTION = {f"attention/{name}" for name in ("query", "key", "value", "output")}
SHARED = {f"ffn/shared/{name}" for name in ("gate", "up", "down", "shared_gate")}
QV = {"attention/query", "attention/value"}


@pytest.mark.parametrize(
    "targets, expected",
    [
        (("q_proj", "v_proj"), QV),
        (("query", "value"), QV),
        (("attention.query", "self_attn.v_proj"), QV),
        (r"model\.layers\.\d+\.self_attn\.(q|v)_proj", QV),
        (r".*\.attention\.(query|value)", QV),
        (("gate_proj",), {"ffn/shared/gate"} | in_experts("gate")),
        (("shared_expert.gate_proj",), {"ffn/shared/gate"}),
        (("experts.up_proj",), in_experts("up")),
        ("all-linear", ATTENTION | SHARED | in_experts("gate", "up", "down")),
    ],
)
def test_targets_are_matched_as_peft_does(targets, expected):
    assert reached(adapted(tiny(), targets)) == {0: expected, 1: expected}


def test_an_end_of_a_path_begins_at_a_dot():
    with pytest.raises(UserError, match="'roj' matches no projection"):
        adapted(tiny(), ("roj",)).segments  # noqa: B018


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter(targets=("q_proj",), layers=(1, 3)),
        Adapter(targets=("layers.1.attention.query", "layers.3.attention.query")),
        Adapter(targets=r"model\.layers\.[13]\.self_attn\.q_proj"),
    ],
)
def test_layers_that_differ_by_their_adapter_are_of_another_kind(adapter):
    model = dataclasses.replace(tiny(), num_layers=4, adapter=adapter)
    only = {"attention/query"}
    assert reached(model) == {1: only, 3: only}
    assert [(s.names, s.count) for s in model.segments] == [(("layers_0", "layers_1"), 2)]


def test_dense_layers_and_moe_layers_have_their_own_projections():
    model = tiny(num_layers=3, first_k_dense=1, dense_ffn=DenseGLU(d_ff=8))
    found = reached(adapted(model, ("down_proj",)))
    moe_layer = {"ffn/shared/down"} | in_experts("down")
    assert found == {0: {"ffn/down"}, 1: moe_layer, 2: moe_layer}


def test_a_fresh_adapter_changes_neither_params_nor_results():
    base = tiny()
    model = adapted(base, ".*self_attn.*|.*shared.*", linear=LoRA(rank=2))
    draw = lambda model: quick_jit(model.init)(jax.random.key(3))
    plain, fresh = draw(base), draw(model)
    assert named_leaves(plain["params"]).keys() == named_leaves(fresh["params"]).keys()
    jax.tree.map(np.testing.assert_array_equal, plain["params"], fresh["params"])
    logits = lambda model, variables: quick_jit(model.apply)(variables, tokens((2, 6))).logits
    np.testing.assert_array_equal(logits(model, fresh), logits(base, plain))


def test_adapters_are_kept_in_float32_whatever_the_parameters_are():
    model = adapted(tiny(dtype="bfloat16", param_dtype="bfloat16"), ("q_proj",))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(shapes["lora"])} == {"float32"}


def test_latent_attention_decodes_with_the_adapted_matrix():
    """kv_up is multiplied in another order when decoding: by W + s A B there too."""
    latent = MultiHeadLatentAttention(
        num_heads=2, kv_lora_rank=8, nope_head_dim=4, rope_head_dim=4, v_head_dim=4
    )
    model = adapted(dense(attention=latent), ("kv_b_proj",), linear=LoRA(rank=2))
    variables = random_model_variables(model)
    ids = tokens((2, 5))
    whole = quick_jit(model.apply)(variables, ids).logits
    cached = variables | {"cache": model.init_cache(variables, 2, 5)}
    at = jnp.broadcast_to(jnp.arange(5), ids.shape)
    out = quick_jit(lambda v: model.apply(v, ids, positions=at, cache_length=5))(cached)
    np.testing.assert_allclose(out.logits, whole, rtol=1e-5, atol=1e-5)
    without = variables | {"lora": jax.tree.map(jnp.zeros_like, variables["lora"])}
    assert np.abs(quick_jit(model.apply)(without, ids).logits - whole).max() > 1e-2


@pytest.mark.parametrize(
    "adapter, text",
    [
        (Adapter(targets=("c_attn",)), "'c_attn' matches no projection of the model; there are"),
        (Adapter(targets=("q_proj", "nope")), "'nope' matches no projection"),
        (Adapter(targets=()), "adapter.targets is empty"),
        (Adapter(targets="(q_proj"), r"'\(q_proj' is no regular expression"),
        (Adapter(targets=("q_proj",), layers=(7,)), "adapter.layers names layer 7 of 2"),
        (Adapter(targets="all-linear"), r"reaches the routed experts \(ffn/experts/down\)"),
    ],
)
def test_mistakes_say_what_is_there(adapter, text):
    with pytest.raises(UserError, match=text):
        dataclasses.replace(tiny(), adapter=adapter).segments  # noqa: B018


def test_an_adapter_on_an_adapter_is_an_error():
    block = Block(attention=attention(linear=LoRA()), ffn=moe())
    with pytest.raises(UserError, match="FullAttention.linear is a LoRA already"):
        adapted(tiny(block=block), ("q_proj",)).segments  # noqa: B018

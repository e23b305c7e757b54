"""Merging an adapter into the matrices that it adapts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.adapters.lora import LoRA, RsLoRA
from moejax.adapters.mixed import MixedLinear
from moejax.errors import UserError
from moejax.experts.lora_glu import LoRAGLU
from moejax.experts.mixlora import MixLoRA
from moejax.layers.mixing.bank import LoRABank
from moejax.layers.mixing.granularity import Static
from moejax.layers.mixing.router import Softmax
from moejax.models.adapter import Adapter
from moejax.models.merge import merge, merged_leaves, unmerge
from moejax.models.variables import parameters
from moejax.types import named_leaves
from moejax.verification.contracts.cases import quick_jit
from tests.models.tiny_model import dense, random_model_variables, tiny, tokens


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter(
            targets="all-linear",
            linear=LoRA(rank=2, alpha=3.0),
            experts=LoRAGLU(rank=2, alpha=1.0, share_a=True),
        ),
        Adapter(targets=("q_proj",), linear=RsLoRA(rank=4), layers=(1, 3)),
        Adapter(
            targets=("k_proj", "o_proj"),
            linear=MixedLinear(
                router=Softmax(granularity=Static()), bank=LoRABank(num_adapters=3, rank=2)
            ),
        ),
    ],
)
def test_the_merged_model_gives_the_same_logits(adapter):
    model = dataclasses.replace(tiny(num_layers=4), adapter=adapter)
    variables = random_model_variables(model)
    plain, merged = merge(model, variables)
    assert "lora" not in merged
    assert plain.adapter is None
    shapes = lambda tree: {path: leaf.shape for path, leaf in named_leaves(tree).items()}
    assert shapes(merged) == shapes(jax.eval_shape(plain.init, jax.random.key(0)))
    ids = tokens((2, 6))
    adapted = quick_jit(model.apply)(variables, ids)
    found = quick_jit(plain.apply)(merged, ids)
    np.testing.assert_allclose(found.logits, adapted.logits, rtol=1e-4, atol=1e-5)
    back = unmerge(model, merged, variables["lora"])
    assert back.keys() == variables.keys()
    for path, leaf in named_leaves(back).items():
        was = named_leaves(variables)[path]
        assert (leaf.shape, leaf.dtype) == (was.shape, was.dtype)
        np.testing.assert_allclose(leaf, was, rtol=0, atol=1e-5)
    without = variables | {"lora": jax.tree.map(jnp.zeros_like, variables["lora"])}
    base = quick_jit(model.apply)(without, ids)
    assert np.abs(base.logits - adapted.logits).max() > 0.1


def test_a_merged_kernel_keeps_its_dtype_and_is_rounded_once():
    adapter = Adapter(targets=("q_proj",), linear=LoRA(rank=2))
    model = dataclasses.replace(tiny(), adapter=adapter)
    variables = random_model_variables(model)
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    _, merged = merge(model, variables | {"params": half(variables["params"])})
    kernel = merged["params"]["layers_0"]["attention"]["query"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    a, b = variables["lora"]["layers_0"]["attention"]["query"].values()
    base = half(variables["params"])["layers_0"]["attention"]["query"]["kernel"]
    exact = base.astype(jnp.float32) + 4 * jnp.einsum("lir,lro->lio", a, b)
    np.testing.assert_array_equal(kernel, exact.astype(jnp.bfloat16))


def test_what_a_merged_kernel_cannot_hold_is_refused():
    model = dataclasses.replace(tiny(), adapter=Adapter(targets=("q_proj",), linear=LoRA(rank=2)))
    variables = random_model_variables(model)
    variables["lora"] = jax.tree.map(lambda x: jnp.full_like(x, 200.0), variables["lora"])
    leaves = named_leaves(parameters(variables))
    path = "layers_0/attention/query/kernel"
    assert np.isfinite(merged_leaves(model, leaves, dtype="float32")[path][(0,)]).all()
    with pytest.raises(UserError, match="a merged kernel holds values too large for float16"):
        merged_leaves(model, leaves, dtype="float16")[path][(0,)]


@pytest.mark.parametrize(
    "adapter, text",
    [
        (Adapter(targets=("q_proj",), linear=MixedLinear()), "weighed for every token anew"),
        (Adapter(targets=("mlp.up_proj",), mlp=MixLoRA()), "belongs to no single matrix"),
    ],
)
def test_what_no_matrix_stands_for_is_refused(adapter, text):
    model = dense(adapter=adapter)
    with pytest.raises(UserError, match=text):
        merge(model, random_model_variables(model))

"""In a bfloat16 model every parameter's gradient is summed in float32, but a device's experts'.

A sum that was rounded on its way holds numbers of bfloat16 alone, whatever its dtype in the end.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.adapters.comol import CoMoL, CoreBank
from moejax.adapters.lora import LoRA
from moejax.adapters.mixed import MixedLinear
from moejax.attention.mla import MultiHeadLatentAttention
from moejax.experts.dense import DenseGLU
from moejax.layers.mixing.bank import LoRABank
from moejax.layers.mixing.router import Softmax
from moejax.layers.norm import LayerNorm
from moejax.models.adapter import Adapter
from moejax.models.block import Block
from moejax.routers.topk import TopK
from moejax.types import named_leaves
from tests.models.tiny_model import (
    attention,
    dense,
    moe,
    random_model_variables,
    tiny,
    tokens,
)

MLA = MultiHeadLatentAttention(
    num_heads=2, kv_lora_rank=8, q_lora_rank=8, nope_head_dim=8, rope_head_dim=4, v_head_dim=8
)
MIXTURE = MixedLinear(router=Softmax(), bank=LoRABank(num_adapters=3, rank=2))
CORES = CoMoL(bank=CoreBank(num_adapters=3, rank=2))
adapted = lambda linear: dataclasses.replace(
    dense(), adapter=Adapter(targets=("q_proj", "down_proj"), linear=linear)
)
MODELS = {
    "moe with biases and sinks": lambda: tiny(
        attention=attention(use_bias=True, use_sinks=True), ffn=moe(router=TopK(k=2))
    ),
    "latent attention": lambda: dense(attention=MLA),
    "tied head, layer norm": lambda: dense(
        tied_head=True, block=Block(attention=attention(), ffn=DenseGLU(d_ff=8), norm=LayerNorm())
    ),
    "LoRA": lambda: adapted(LoRA(rank=2)),
    "mixture of LoRA": lambda: adapted(MIXTURE),
    "CoMoL": lambda: adapted(CORES),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_was_rounded(name):
    model = dataclasses.replace(MODELS[name](), dtype="bfloat16")
    variables = random_model_variables(model)
    ids = tokens((4, 32))
    trained = {k: v for k, v in variables.items() if k in ("params", "lora")}

    def loss(trained):
        logits = model.apply(variables | trained, ids).logits
        return jnp.mean(jnp.square(logits - jnp.sin(jnp.arange(logits.shape[-1]))))

    for path, gradient in named_leaves(jax.jit(jax.grad(loss))(trained)).items():
        if "/experts/" in path:  # rounded once by the kernel, and then summed in float32
            continue
        values = np.asarray(gradient)
        values = values[values != 0]
        rounded = values.astype(jnp.bfloat16).astype(np.float32)
        assert values.size, path
        assert np.mean(values == rounded) < 0.5, path

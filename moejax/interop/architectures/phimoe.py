"""Phi-3.5-MoE (arXiv 2404.14219, 2409.12136): LayerNorm, biases, SparseMixer router, LongRoPE.

Noise on the input of MoE layers in training (`input_jitter_noise`) is not part of the model here.
"""

import fiddle as fdl

from moejax.interop import llama_style as llama
from moejax.interop.architecture import Architecture
from moejax.interop.fields import Field, Only, Windows, every_layer
from moejax.interop.rope_fields import LONGROPE, RopeField
from moejax.interop.views import TRANSPOSED, Form
from moejax.layers.norm import LayerNorm
from moejax.routers.sparsemixer import SparseMixer


def _template() -> fdl.Config:
    config = llama.template()
    config.block.norm = fdl.Config(LayerNorm)
    config.block.ffn.router = fdl.Config(SparseMixer)
    return config


_W = {"gate": "w1", "up": "w3", "down": "w2"}
_ROUTERS = ("block_sparse_moe.gate.weight", "mlp.router.weight")
_NORM_BIASES = {
    "attention_norm/bias": (Form(llama.in_layer("input_layernorm.bias")),),
    "ffn_norm/bias": (Form(llama.in_layer("post_attention_layernorm.bias")),),
    "final_norm/bias": (Form("model.norm.bias"),),
}

ARCHITECTURE = Architecture(
    class_name="PhimoeForCausalLM",
    template=_template,
    fields=(
        *(field for field in llama.FIELDS if field.key != "num_experts_per_tok"),
        Only("num_experts_per_tok", 2),
        RopeField(theta=1e6, known=LONGROPE),
        llama.epsilon(default=1e-5),
        llama.activation(),
        llama.attention_bias(output=True, default=False),
        Field("num_local_experts", ("block.ffn.num_experts",)),
        Field("intermediate_size", ("block.ffn.experts.d_ff",)),
        Field("router_jitter_noise", ("block.ffn.router.jitter",), default=0.01),
        Windows(every_layer),
        Field("lm_head_bias", ("head_bias",), default=False),
    ),
    tensors=llama.BACKBONE
    | _NORM_BIASES
    | {"head/bias": (Form("lm_head.bias"),)}
    | {"ffn/router/kernel": tuple(Form(llama.in_layer(n), TRANSPOSED) for n in _ROUTERS)}
    | llama.experts(
        {part: f"block_sparse_moe.experts.{{expert}}.{w}.weight" for part, w in _W.items()}
    ),
)

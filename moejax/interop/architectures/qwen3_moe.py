"""Qwen3-MoE (arXiv 2505.09388): QK-norm per head, dense layers possible between MoE layers."""

import fiddle as fdl

from moejax.interop import llama_style as llama
from moejax.interop.architecture import Architecture
from moejax.interop.fields import DenseBetween, Field, Windows, if_used
from moejax.interop.rope_fields import RopeField
from moejax.layers.norm import RMSNorm


def _template() -> fdl.Config:
    config = llama.template()
    config.block.attention.qk_norm = fdl.Config(RMSNorm)
    return config


ARCHITECTURE = Architecture(
    class_name="Qwen3MoeForCausalLM",
    template=_template,
    fields=(
        *llama.FIELDS,
        DenseBetween(),
        RopeField(),
        llama.epsilon(default=1e-6),
        llama.activation(),
        llama.renormalised(default=False),
        llama.attention_bias(output=True, default=False),
        Field("num_experts", ("block.ffn.num_experts",)),
        Field("moe_intermediate_size", ("block.ffn.experts.d_ff",)),
        Windows(if_used, default=4096, states=("use_sliding_window",)),
    ),
    tensors=llama.BACKBONE
    | llama.QK_NORM
    | llama.router("mlp.gate")
    | llama.EXPERTS
    | llama.glu("ffn", "mlp"),
)

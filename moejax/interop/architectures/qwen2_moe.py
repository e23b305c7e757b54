"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): a shared expert behind a sigmoid gate."""

import fiddle as fdl

from moejax.experts.dense import DenseGLU
from moejax.interop import llama_style as llama
from moejax.interop.architecture import Architecture
from moejax.interop.config_json import ConfigJson
from moejax.interop.fields import (
    DenseBetween,
    Field,
    Windows,
    by_layer_types_if_used,
    window_used,
)
from moejax.interop.rope_fields import RopeField
from moejax.interop.views import TRANSPOSED, Form


def _template() -> fdl.Config:
    config = llama.template()
    config.block.ffn.shared = fdl.Config(DenseGLU, gated=True)
    return config


def _alternating(source: ConfigJson, num_layers: int) -> list[bool]:
    """Every other layer below `max_window_layers`, where windows are used at all."""
    used = window_used(source)
    last = source.get("max_window_layers", 28)
    return [used and i % 2 == 0 and i < last for i in range(num_layers)]


_SHARED_GATE = Form(llama.in_layer("mlp.shared_expert_gate.weight"), TRANSPOSED)

ARCHITECTURE = Architecture(
    class_name="Qwen2MoeForCausalLM",
    template=_template,
    fields=(
        *llama.FIELDS,
        DenseBetween(),
        RopeField(),
        llama.epsilon(default=1e-6),
        llama.activation(),
        llama.renormalised(default=False),
        llama.attention_bias(key="qkv_bias", output=False, default=True),
        Field("num_experts", ("block.ffn.num_experts",)),
        Field("moe_intermediate_size", ("block.ffn.experts.d_ff",)),
        Field("shared_expert_intermediate_size", ("block.ffn.shared.d_ff",)),
        Windows(
            by_layer_types_if_used(_alternating),
            default=4096,
            states=("layer_types", "use_sliding_window"),
        ),
    ),
    tensors=llama.BACKBONE
    | llama.router("mlp.gate")
    | llama.EXPERTS
    | llama.glu("ffn/shared", "mlp.shared_expert")
    | {"ffn/shared/shared_gate/kernel": (_SHARED_GATE,)}
    | llama.glu("ffn", "mlp"),
)

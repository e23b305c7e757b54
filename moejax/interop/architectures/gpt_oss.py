"""gpt-oss (arXiv 2508.10925): sinks, alternating windows, biases, clamped SwiGLU, fused experts.

The experts of published files are in MXFP4, which is read and not written.
"""

import fiddle as fdl

from moejax.interop import llama_style as llama
from moejax.interop.architecture import Architecture
from moejax.interop.config_json import ConfigJson
from moejax.interop.fields import Field, Only, Windows, by_layer_types
from moejax.interop.mxfp4 import Mxfp4Files
from moejax.interop.rope_fields import RopeField
from moejax.interop.views import Every, Form


def _template() -> fdl.Config:
    config = llama.template()
    config.block.attention.use_sinks = True
    config.block.ffn.router.use_bias = True
    config.block.ffn.experts.activation = "swiglu_clamped"
    config.block.ffn.experts.use_bias = True
    return config


def _alternating(source: ConfigJson, num_layers: int) -> list[bool]:
    return [i % 2 == 0 for i in range(num_layers)]


_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

# Input before output, as ours; along the output a gate, its up, the next gate, ...
_GATE, _UP = Every(num_parts=2), Every(num_parts=2, index=1)
_FUSED = {
    "gate": Form(llama.in_layer("mlp.experts.gate_up_proj"), _GATE),
    "up": Form(llama.in_layer("mlp.experts.gate_up_proj"), _UP),
    "down": Form(llama.in_layer("mlp.experts.down_proj")),
    "gate_bias": Form(llama.in_layer("mlp.experts.gate_up_proj_bias"), _GATE),
    "up_bias": Form(llama.in_layer("mlp.experts.gate_up_proj_bias"), _UP),
    "down_bias": Form(llama.in_layer("mlp.experts.down_proj_bias")),
}

ARCHITECTURE = Architecture(
    class_name="GptOssForCausalLM",
    template=_template,
    fields=(
        *llama.FIELDS,
        Field("head_dim", ("block.attention.head_dim",), default=64),
        RopeField(theta=150_000.0, scaling=_YARN),
        llama.epsilon(default=1e-5),
        llama.attention_bias(output=True, default=True),
        Field("num_local_experts", ("block.ffn.num_experts",)),
        Field("intermediate_size", ("block.ffn.experts.d_ff",)),
        Windows(by_layer_types(_alternating), default=128, states=("layer_types",)),
        Only("hidden_act", "silu"),
        Only("swiglu_alpha", 1.702),
        Only("swiglu_limit", 7.0),
    ),
    tensors=llama.BACKBONE
    | llama.router("mlp.router")
    | {"attention/sinks": (Form(llama.in_layer("self_attn.sinks")),)}
    | {f"ffn/experts/{part}": (form,) for part, form in _FUSED.items()},
    quantised={"mxfp4": Mxfp4Files},
)

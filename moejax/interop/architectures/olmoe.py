"""OLMoE (Muennighoff et al., arXiv 2409.02060): QK-norm over all heads, top-k not renormalised."""

import fiddle as fdl

from moejax.interop import llama_style as llama
from moejax.interop.architecture import Architecture
from moejax.interop.fields import Field, Only
from moejax.interop.rope_fields import RopeField
from moejax.layers.norm import RMSNorm


def _template() -> fdl.Config:
    config = llama.template()
    config.block.attention.qk_norm = fdl.Config(RMSNorm, num_axes=2)
    return config


ARCHITECTURE = Architecture(
    class_name="OlmoeForCausalLM",
    template=_template,
    fields=(
        *llama.FIELDS,
        RopeField(),
        llama.epsilon(default=1e-5),
        llama.activation(),
        llama.renormalised(default=False),
        llama.attention_bias(output=True, default=False),
        Field("num_experts", ("block.ffn.num_experts",)),
        Field("intermediate_size", ("block.ffn.experts.d_ff",)),
        Only("clip_qkv", None),
    ),
    tensors=llama.BACKBONE | llama.QK_NORM | llama.router("mlp.gate") | llama.EXPERTS,
)

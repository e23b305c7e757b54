"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783): dense layers, grouped queries, scaled RoPE."""

from moejax.interop import llama_style as llama
from moejax.interop.architecture import Architecture
from moejax.interop.fields import Field
from moejax.interop.rope_fields import RopeField

ARCHITECTURE = Architecture(
    class_name="LlamaForCausalLM",
    template=llama.dense_template,
    fields=(
        *llama.DENSE_FIELDS,
        RopeField(),
        llama.epsilon(default=1e-6),
        llama.attention_bias(output=True, default=False),
        Field("mlp_bias", (f"{llama.FFN}.use_bias",), default=False),
    ),
    tensors=llama.DENSE,
)

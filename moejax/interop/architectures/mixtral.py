"""Mixtral (Jiang et al., arXiv 2401.04088): top-2 renormalised; a window in some checkpoints.

transformers 5 renamed `block_sparse_moe` to `mlp` and fused the experts in memory; its files keep
the published names.
"""

from moejax.interop import llama_style as llama
from moejax.interop.architecture import Architecture
from moejax.interop.fields import Field, Windows, every_layer
from moejax.interop.rope_fields import RopeField
from moejax.interop.views import TRANSPOSED, Form

_W = {"gate": "w1", "up": "w3", "down": "w2"}
_ROUTERS = ("block_sparse_moe.gate.weight", "mlp.gate.weight")

ARCHITECTURE = Architecture(
    class_name="MixtralForCausalLM",
    template=llama.template,
    fields=(
        *llama.FIELDS,
        RopeField(theta=1e6),
        llama.epsilon(default=1e-5),
        llama.activation(),
        Field("num_local_experts", ("block.ffn.num_experts",)),
        Field("intermediate_size", ("block.ffn.experts.d_ff",)),
        Windows(every_layer),
    ),
    tensors=llama.BACKBONE
    | {"ffn/router/kernel": tuple(Form(llama.in_layer(n), TRANSPOSED) for n in _ROUTERS)}
    | llama.experts(
        {part: f"block_sparse_moe.experts.{{expert}}.{w}.weight" for part, w in _W.items()}
    ),
)

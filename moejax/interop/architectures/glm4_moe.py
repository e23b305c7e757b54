"""GLM-4.5 (arXiv 2508.06471): DeepSeek-V3's router, half of each head rotated, dense first layers.

The layer after the last one predicts further tokens in training; neither transformers nor this
package loads it.
"""

from __future__ import annotations

import fiddle as fdl

from moejax.balance.loss_free import LossFreeBias
from moejax.experts.dense import DenseGLU
from moejax.interop import llama_style as llama
from moejax.interop.architecture import Architecture
from moejax.interop.fields import DenseFirst, Field, SharedExperts
from moejax.interop.rope_fields import RopeField
from moejax.interop.views import Form
from moejax.layers.norm import RMSNorm

_ROUTER = "block.ffn.router"


def _template() -> fdl.Config:
    config = llama.template()
    config.block.ffn.router.score = "sigmoid"
    config.block.ffn.shared = fdl.Config(DenseGLU)
    config.block.ffn.balance = (fdl.Config(LossFreeBias, rate=0.0),)  # see llama.template
    return config


def _norm(used: bool) -> fdl.Config | None:
    return fdl.Config(RMSNorm) if used else None


ARCHITECTURE = Architecture(
    class_name="Glm4MoeForCausalLM",
    template=_template,
    fields=(
        *llama.FIELDS,
        DenseFirst(),
        RopeField(fraction=0.5),
        Field(
            "use_qk_norm",
            ("block.attention.qk_norm",),
            default=False,
            decode=_norm,
            encode=lambda norm: norm is not None,
        ),
        llama.epsilon(default=1e-5),
        llama.activation(),
        llama.renormalised(default=True),
        llama.attention_bias(output=False, default=False),
        Field("n_routed_experts", ("block.ffn.num_experts",)),
        Field("moe_intermediate_size", ("block.ffn.experts.d_ff",)),
        SharedExperts(default=1),
        Field("routed_scaling_factor", (f"{_ROUTER}.scale",), default=1.0, decode=float),
        Field("n_group", (f"{_ROUTER}.num_groups",), default=1),
        Field("topk_group", (f"{_ROUTER}.num_groups_kept",), default=1),
    ),
    tensors=llama.BACKBONE
    | llama.QK_NORM
    | llama.router("mlp.gate")
    | {"ffn/correction_bias": (Form(llama.in_layer("mlp.gate.e_score_correction_bias")),)}
    | llama.EXPERTS
    | llama.glu("ffn/shared", "mlp.shared_experts")
    | llama.glu("ffn", "mlp"),
    skipped=lambda num_layers: (f"model.layers.{num_layers}.",),
)

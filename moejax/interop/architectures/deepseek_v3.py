"""DeepSeek-V3 (arXiv 2412.19437): latent attention, sigmoid router with correction bias and groups.

The layer after the last one predicts further tokens in training; neither transformers nor this
package loads it.
"""

from __future__ import annotations

import fiddle as fdl

from moejax.balance.loss_free import LossFreeBias
from moejax.interop import deepseek_style as deepseek
from moejax.interop import llama_style as llama
from moejax.interop.architecture import Architecture
from moejax.interop.fields import Field, Only, Stated
from moejax.interop.views import Form

_ROUTER = "block.ffn.router"
_BIAS = "mlp.gate.e_score_correction_bias"


def _template() -> fdl.Config:
    config = deepseek.template()
    config.block.ffn.router.score = "sigmoid"
    config.block.ffn.balance = (fdl.Config(LossFreeBias, rate=0.0),)  # see llama.template
    return config


ARCHITECTURE = Architecture(
    class_name="DeepseekV3ForCausalLM",
    template=_template,
    fields=(
        *deepseek.FIELDS,
        Only("scoring_func", "sigmoid"),
        Only("topk_method", "noaux_tc"),
        llama.renormalised(default=True),
        Field("routed_scaling_factor", (f"{_ROUTER}.scale",), decode=float),
        Field("n_group", (f"{_ROUTER}.num_groups",)),
        Field("topk_group", (f"{_ROUTER}.num_groups_kept",)),
        Stated("rope_interleave", True),
        Stated("num_nextn_predict_layers", 0),
    ),
    tensors=deepseek.TENSORS | {"ffn/correction_bias": (Form(llama.in_layer(_BIAS)),)},
    tensors_of=lambda source: deepseek.attention(
        source, interleaved=source.get("rope_interleave", True)
    ),
    skipped=lambda num_layers: (f"model.layers.{num_layers}.",),
)

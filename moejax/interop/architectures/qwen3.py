"""Qwen3 (arXiv 2505.09388), the dense models: QK-norm per head, a window in the last layers."""

from __future__ import annotations

import fiddle as fdl

from moejax.interop import llama_style as llama
from moejax.interop.architecture import Architecture
from moejax.interop.config_json import ConfigJson
from moejax.interop.fields import Field, Windows, by_layer_types_if_used, window_used
from moejax.interop.rope_fields import RopeField
from moejax.layers.norm import RMSNorm


def _template() -> fdl.Config:
    config = llama.dense_template()
    config.block.attention.qk_norm = fdl.Config(RMSNorm)
    return config


def _last_layers(source: ConfigJson, num_layers: int) -> list[bool]:
    """The layers from `max_window_layers` on."""
    first = source.get("max_window_layers", 28)
    return [window_used(source) and i >= first for i in range(num_layers)]


ARCHITECTURE = Architecture(
    class_name="Qwen3ForCausalLM",
    template=_template,
    fields=(
        *llama.DENSE_FIELDS,
        Field("head_dim", (f"{llama.ATTENTION}.head_dim",), default=128),
        RopeField(),
        llama.epsilon(default=1e-6),
        llama.attention_bias(output=True, default=False),
        Windows(
            by_layer_types_if_used(_last_layers),
            default=4096,
            states=("layer_types", "use_sliding_window"),
        ),
    ),
    tensors=llama.DENSE | llama.QK_NORM,
)

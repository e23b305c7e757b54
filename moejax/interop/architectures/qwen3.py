"""Qwen3 (arXiv 2505.09388), the dense models: QK-norm per head, a window in the last layers."""

from __future__ import annotations

import fiddle as fdl

from moejax.interop import llama_style as llama
from moejax.interop.architecture import Architecture
from moejax.interop.config_json import ConfigJson
from moejax.interop.fields import Field, Windows, by_layer_types
from moejax.interop.rope_fields import RopeField
from moejax.layers.norm import RMSNorm


def _template() -> fdl.Config:
    config = llama.dense_template()
    config.block.attention.qk_norm = fdl.Config(RMSNorm)
    return config


def _used(source: ConfigJson) -> bool:
    """Whether any layer may slide: a width of null is none, and no width is transformers' 4096."""
    width = source.values.get("sliding_window", 4096)
    return bool(source.get("use_sliding_window", False)) and width is not None


def _last_layers(source: ConfigJson, num_layers: int) -> list[bool]:
    """The layers from `max_window_layers` on."""
    first = source.get("max_window_layers", 28)
    return [_used(source) and i >= first for i in range(num_layers)]


def _slides(source: ConfigJson, num_layers: int) -> list[bool]:
    layers = by_layer_types(_last_layers)(source, num_layers)
    if any(layers) and not _used(source):
        raise source.refuse(
            "layer_types names sliding_attention, but use_sliding_window and sliding_window give "
            "it no width"
        )
    return layers


ARCHITECTURE = Architecture(
    class_name="Qwen3ForCausalLM",
    template=_template,
    fields=(
        *llama.DENSE_FIELDS,
        Field("head_dim", (f"{llama.ATTENTION}.head_dim",), default=128),
        RopeField(),
        llama.epsilon(default=1e-6),
        llama.attention_bias(output=True, default=False),
        Windows(_slides, default=4096, states=("layer_types", "use_sliding_window")),
    ),
    tensors=llama.DENSE | llama.QK_NORM,
)

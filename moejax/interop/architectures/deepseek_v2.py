"""DeepSeek-V2 (arXiv 2405.04434): latent attention, softmax router, perhaps limited to groups."""

from __future__ import annotations

import dataclasses
from typing import Any

import fiddle as fdl

from moejax.interop import deepseek_style as deepseek
from moejax.interop.architecture import Architecture
from moejax.interop.config_json import ConfigJson
from moejax.interop.fields import Field, Json, Only, value_at


def _template() -> fdl.Config:
    config = deepseek.template()
    config.block.ffn.router.normalise = "before"
    config.block.ffn.router.group_score = "max"
    return config


@dataclasses.dataclass(frozen=True)
class _Groups:
    """`topk_method`: `greedy` over all experts, which ignores groups, or the best groups' only."""

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        method = source.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise source.refuse(
                f"topk_method={method!r} is not supported, only 'greedy', 'group_limited_greedy'"
            )
        default = {"default": 1} if method == "greedy" else {}
        groups, kept = source.get("n_group", **default), source.get("topk_group", **default)
        if method == "greedy":
            groups, kept = 1, 1
        router = config.block.ffn.router
        router.num_groups, router.num_groups_kept = groups, kept

    def write(self, model: Any) -> Json:
        router = value_at(model, ["block", "ffn", "router"])
        groups = getattr(router, "num_groups", 1)
        method = "greedy" if groups == 1 else "group_limited_greedy"
        kept = getattr(router, "num_groups_kept", 1)
        return {"topk_method": method, "n_group": groups, "topk_group": kept}


ARCHITECTURE = Architecture(
    class_name="DeepseekV2ForCausalLM",
    template=_template,
    fields=(
        *deepseek.FIELDS,
        Only("scoring_func", "softmax"),
        _Groups(),
        # Transformers scales and never normalises; DeepSeek's own code would do one of both.
        Only("norm_topk_prob", False),
        Field("routed_scaling_factor", ("block.ffn.router.scale",), default=1.0, decode=float),
        Only("mlp_bias", False),
    ),
    tensors=deepseek.TENSORS,
    tensors_of=lambda source: deepseek.attention(source, interleaved=True),
)

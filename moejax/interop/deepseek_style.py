"""What DeepSeek-V2 and V3 share: latent attention, dense first layers, shared experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import fiddle as fdl

from moejax.attention.mla import MultiHeadLatentAttention
from moejax.errors import UserError
from moejax.experts.dense import DenseGLU
from moejax.interop import llama_style as llama
from moejax.interop.config_json import ConfigJson
from moejax.interop.fields import (
    DenseFirst,
    Field,
    FieldLike,
    Json,
    Only,
    SharedExperts,
    Stated,
    value_at,
)
from moejax.interop.rope_fields import RopeField, rope_parameters
from moejax.interop.views import AS_IS, TRANSPOSED, Form, Pairs, Tensors, View
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import Rope, YarnScaling

ATTENTION = llama.ATTENTION


def template() -> fdl.Config:
    """Latent attention, and shared experts beside the routed ones.

    The norms of the latents do not read `rms_norm_eps`: transformers gives them 1e-6.
    """
    config = llama.template()
    config.block.attention = fdl.Config(
        MultiHeadLatentAttention,
        rope=fdl.Config(Rope),
        latent_norm=fdl.Config(RMSNorm, epsilon=1e-6),
        linear=fdl.Config(Linear),
    )
    config.block.ffn.shared = fdl.Config(DenseGLU)
    return config


@dataclasses.dataclass(frozen=True)
class _QueryRank:
    """`q_lora_rank`, where null is a value: queries without a latent.

    It has to be there, because transformers reads 1536 where it is not.
    """

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        if "q_lora_rank" not in source.values:
            raise UserError(f"{source.path} lacks q_lora_rank")
        config.block.attention.q_lora_rank = source.get("q_lora_rank", None)

    def write(self, model: Any) -> Json:
        return {"q_lora_rank": value_at(model, ["block", "attention", "q_lora_rank"])}


@dataclasses.dataclass(frozen=True)
class _KeyHeads:
    """`num_key_value_heads`: as many as queries, because every head expands its own."""

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        heads = source.get("num_attention_heads")
        if (stated := source.get("num_key_value_heads", heads)) != heads:
            raise source.refuse(
                f"num_key_value_heads={stated} is not supported, only num_attention_heads={heads}"
            )

    def write(self, model: Any) -> Json:
        return {"num_key_value_heads": value_at(model, ["block", "attention", "num_heads"])}


@dataclasses.dataclass(frozen=True)
class _Rope(RopeField):
    """`mscale_all_dim` multiplies the logits by any rule in transformers, and by YaRN's here."""

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        super().read(source, config)
        scaling = config.block.attention.rope.scaling
        factor = rope_parameters(source).get("mscale_all_dim")
        if factor and scaling is not None and fdl.get_callable(scaling) is not YarnScaling:
            raise source.refuse(
                f"mscale_all_dim={factor} is not supported with this rope_type, only with 'yarn': "
                "remove it if the model was trained without"
            )


FIELDS: tuple[FieldLike, ...] = (
    *(f for f in llama.FIELDS if f.key not in ("num_key_value_heads", "head_dim")),
    _KeyHeads(),
    _QueryRank(),
    Field("kv_lora_rank", (f"{ATTENTION}.kv_lora_rank",)),
    Field("qk_nope_head_dim", (f"{ATTENTION}.nope_head_dim",)),
    Field("qk_rope_head_dim", (f"{ATTENTION}.rope_head_dim",)),
    Field("v_head_dim", (f"{ATTENTION}.v_head_dim",)),
    # Transformers writes both and derives them anew when it reads.
    Stated("head_dim"),
    Stated("qk_head_dim"),
    Field("attention_bias", (f"{ATTENTION}.use_bias",), default=False),
    _Rope(),
    DenseFirst(),
    Only("moe_layer_freq", 1),
    llama.epsilon(default=1e-6),
    llama.activation(),
    Field("n_routed_experts", (f"{llama.FFN}.num_experts",)),
    Field("moe_intermediate_size", (f"{llama.FFN}.experts.d_ff",)),
    SharedExperts(),
)


def attention(source: ConfigJson, *, interleaved: bool) -> Tensors:
    """Latent attention. `interleaved`: rotated pairs are stored side by side (see `Pairs`)."""
    rotated = source.get("qk_rope_head_dim")

    def rotating(kept: int, *, transpose: bool) -> View:
        if not interleaved:
            return View(transpose=transpose)
        return Pairs(transpose=transpose, kept=kept, rotated=rotated)

    nope, latent = source.get("qk_nope_head_dim"), source.get("kv_lora_rank")
    of_heads = rotating(nope, transpose=True)
    stored = {
        "query/kernel": ("q_proj.weight", of_heads),
        "query_down/kernel": ("q_a_proj.weight", TRANSPOSED),
        "query_down/bias": ("q_a_proj.bias", AS_IS),
        "query_norm/scale": ("q_a_layernorm.weight", AS_IS),
        "query_up/kernel": ("q_b_proj.weight", of_heads),
        "kv_down/kernel": ("kv_a_proj_with_mqa.weight", rotating(latent, transpose=True)),
        "kv_down/bias": ("kv_a_proj_with_mqa.bias", rotating(latent, transpose=False)),
        "kv_norm/scale": ("kv_a_layernorm.weight", AS_IS),
        "kv_up/kernel": ("kv_b_proj.weight", TRANSPOSED),
    }
    return {
        f"attention/{leaf}": (Form(llama.in_layer(f"self_attn.{name}"), view),)
        for leaf, (name, view) in stored.items()
    }


TENSORS: Tensors = (
    llama.BACKBONE
    | llama.router("mlp.gate")
    | llama.EXPERTS
    | llama.glu("ffn/shared", "mlp.shared_experts")
    | llama.glu("ffn", "mlp")
)

"""What the architectures that grew out of Llama share: the template, field and tensor names."""

from __future__ import annotations

import fiddle as fdl

from moejax.attention.full import FullAttention
from moejax.balance.unbalanced import Unbalanced
from moejax.experts.dense import DenseGLU
from moejax.experts.glu import GLU
from moejax.interop.fields import Field, FieldLike, Named
from moejax.interop.views import TRANSPOSED, Form, Run, Tensors
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import Rope
from moejax.models.block import Block
from moejax.models.moe import MoE
from moejax.models.transformer import Transformer
from moejax.routers.topk import TopK
from moejax.transport.local import Local

ATTENTION, FFN = "block.attention", "block.ffn"

# Models compute in float32 or bfloat16; float16 values are exact in float32.
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}
# {name in transformers: ours}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def template() -> fdl.Config:
    """Grouped-query attention with RoPE, top-k routed SwiGLU experts in every layer.

    Nothing balances the experts: a config.json's weights are for losses defined otherwise than
    ours (`balance/load_balance.py`), so whoever trains states the rule. Correction biases that
    are stored with them are kept as they are, by a `LossFreeBias` of rate 0.
    """
    return fdl.Config(
        Transformer,
        block=fdl.Config(
            Block,
            attention=fdl.Config(FullAttention, rope=fdl.Config(Rope), linear=fdl.Config(Linear)),
            ffn=fdl.Config(
                MoE,
                router=fdl.Config(TopK),
                experts=fdl.Config(GLU),
                transport=fdl.Config(Local),
                balance=(fdl.Config(Unbalanced),),
            ),
            norm=fdl.Config(RMSNorm),
        ),
    )


def dense_template() -> fdl.Config:
    """The same with a dense SwiGLU in every layer and no experts."""
    config = template()
    config.block.ffn = fdl.Config(DenseGLU, linear=fdl.Config(Linear))
    return config


_FIELDS: tuple[FieldLike, ...] = (
    Field("vocab_size", ("vocab_size",)),
    Field("hidden_size", ("d_model",)),
    Field("num_hidden_layers", ("num_layers",)),
    Field("max_position_embeddings", ("max_length",), default=None),
    Field("tie_word_embeddings", ("tied_head",), default=False),
    Field("num_attention_heads", (f"{ATTENTION}.num_heads",)),
    Field(
        "num_key_value_heads",
        (f"{ATTENTION}.num_kv_heads",),
        default=lambda source: source.get("num_attention_heads"),
    ),
    Field("head_dim", (f"{ATTENTION}.head_dim",), default=None),
    Named("dtype", ("dtype", "param_dtype"), _DTYPES, default="float32"),
)
FIELDS = (*_FIELDS, Field("num_experts_per_tok", (f"{FFN}.router.k",)))


def epsilon(default: float) -> Field:
    """`rms_norm_eps`, of every norm."""
    paths = ("block.norm.epsilon", f"{ATTENTION}.qk_norm.epsilon")
    return Field("rms_norm_eps", paths, default=default)


def activation() -> Named:
    """`hidden_act`, of experts, shared experts and dense layers."""
    paths = (f"{FFN}.experts.activation", f"{FFN}.shared.activation", "dense_ffn.activation")
    return _activation(paths)


def _activation(paths: tuple[str, ...]) -> Named:
    return Named("hidden_act", paths, ACTIVATIONS, default="silu")


DENSE_FIELDS = (
    *_FIELDS,
    _activation((f"{FFN}.activation",)),
    Field("intermediate_size", (f"{FFN}.d_ff",)),
)


def renormalised(*, default: bool) -> Named:
    """`norm_topk_prob`: whether the chosen experts' weights sum to 1."""
    names = {True: "after", False: "before"}
    return Named("norm_topk_prob", (f"{FFN}.router.normalise",), names, default=default)


def attention_bias(*, key: str = "attention_bias", output: bool, default: bool) -> Field:
    """Biases on queries, keys and values, and with `output` on the output projection too."""
    paths = (f"{ATTENTION}.use_bias", *([f"{ATTENTION}.use_output_bias"] if output else []))
    return Field(key, paths, default=default)


def in_layer(name: str) -> str:
    """The full name of a tensor of a layer."""
    return f"model.layers.{{layer}}.{name}"


def _linear(leaf: str, name: str) -> Tensors:
    """A projection, with the bias that it may have."""
    return {
        f"{leaf}/kernel": (Form(in_layer(f"{name}.weight"), TRANSPOSED),),
        f"{leaf}/bias": (Form(in_layer(f"{name}.bias")),),
    }


def glu(leaf: str, name: str) -> Tensors:
    """A dense gated MLP."""
    gate, up, down = (
        _linear(f"{leaf}/{part}", f"{name}.{part}_proj") for part in ("gate", "up", "down")
    )
    return gate | up | down


def router(name: str) -> Tensors:
    """The router's matrix and the bias that it may have."""
    return _linear("ffn/router", name)


def experts(each: dict[str, str]) -> Tensors:
    """Expert weights: a tensor per expert named by `each`, or the fused ones of transformers 5.

    Fused, gate and up share `[E, 2F, D]`, gate first.
    """
    fused = {
        "gate": Form(in_layer("mlp.experts.gate_up_proj"), Run(transpose=True, num_parts=2)),
        "up": Form(in_layer("mlp.experts.gate_up_proj"), Run(transpose=True, num_parts=2, index=1)),
        "down": Form(in_layer("mlp.experts.down_proj"), TRANSPOSED),
    }
    return {
        f"ffn/experts/{part}": (Form(in_layer(each[part]), TRANSPOSED), fused[part])
        for part in fused
    }


EXPERTS = experts(
    {part: f"mlp.experts.{{expert}}.{part}_proj.weight" for part in ("gate", "up", "down")}
)

QK_NORM: Tensors = {
    "attention/query_norm/scale": (Form(in_layer("self_attn.q_norm.weight")),),
    "attention/key_norm/scale": (Form(in_layer("self_attn.k_norm.weight")),),
}

BACKBONE: Tensors = {
    "embed/embedding": (Form("model.embed_tokens.weight"),),
    "final_norm/scale": (Form("model.norm.weight"),),
    "head/kernel": (Form("lm_head.weight", TRANSPOSED),),
    "attention_norm/scale": (Form(in_layer("input_layernorm.weight")),),
    "ffn_norm/scale": (Form(in_layer("post_attention_layernorm.weight")),),
    **_linear("attention/query", "self_attn.q_proj"),
    **_linear("attention/key", "self_attn.k_proj"),
    **_linear("attention/value", "self_attn.v_proj"),
    **_linear("attention/output", "self_attn.o_proj"),
}

DENSE: Tensors = BACKBONE | glu("ffn", "mlp")

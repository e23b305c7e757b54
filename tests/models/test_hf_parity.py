"""Families of transformers, tiny and random: the same weights give the same logits."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention.full import FullAttention
from moejax.attention.mla import MultiHeadLatentAttention
from moejax.balance.loss_free import LossFreeBias
from moejax.balance.unbalanced import Unbalanced
from moejax.experts.dense import DenseGLU
from moejax.experts.glu import GLU
from moejax.layers.norm import LayerNorm, RMSNorm
from moejax.layers.rope import Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from moejax.models.block import Block
from moejax.models.moe import MoE
from moejax.models.transformer import Transformer
from moejax.routers.sparsemixer import SparseMixer
from moejax.routers.topk import TopK
from moejax.transport.local import Local
from moejax.verification.contracts.cases import quick_jit

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
GRID = 32  # the golden files store multiples of 1/32


def _model(attention, *, router=None, epsilon=1e-6, moe=None, dense=None, norm=RMSNorm, **options):
    if isinstance(attention, dict):
        heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
        attention = FullAttention(**heads | attention)
    layer = {"num_experts": 4, "experts": GLU(d_ff=8), "balance": (Unbalanced(),)} | (moe or {})
    ffn = dense or MoE(router=router or TopK(k=2), transport=Local(), **layer)
    block = Block(attention=attention, ffn=ffn, norm=norm(epsilon=epsilon))
    return Transformer(num_layers=2, d_model=16, vocab_size=24, block=block, **options)


LATENT = {"kv_lora_rank": 10, "nope_head_dim": 6, "rope_head_dim": 8, "v_head_dim": 5}
PHI_SCALING = LongRopeScaling(
    short_factors=(1.0, 1.25, 1.5, 2.0),
    long_factors=(1.0, 2.0, 4.0, 8.0),
    short_amplitude=1.125,
    long_amplitude=1.25,
    original_context=16,
)
MSCALES = {"mscale": 1.0, "mscale_all_dim": 0.7}

MODELS = {
    "mixtral": _model({"rope": Rope(theta=1e6)}, epsilon=1e-5, windows=(5,)),
    "olmoe": _model(
        {
            "num_kv_heads": 4,
            "head_dim": None,
            "qk_norm": RMSNorm(epsilon=1e-5, num_axes=2),
        },
        router=TopK(k=2, normalise="before"),
        epsilon=1e-5,
    ),
    "qwen2_moe": _model(
        {"use_bias": True},
        router=TopK(k=2, normalise="before"),
        moe={"shared": DenseGLU(d_ff=12, gated=True)},
    ),
    "qwen3_moe": _model({"qk_norm": RMSNorm()}, moe_every=2, dense_ffn=DenseGLU(d_ff=12)),
    "glm4_moe": _model(
        {"qk_norm": RMSNorm(epsilon=1e-5), "rope": Rope(fraction=0.5)},
        router=TopK(k=2, score="sigmoid", scale=2.5, num_groups=2, num_groups_kept=1),
        moe={"shared": DenseGLU(d_ff=8), "balance": (LossFreeBias(rate=0.0),)},
        epsilon=1e-5,
        first_k_dense=1,
        dense_ffn=DenseGLU(d_ff=12),
    ),
    "gpt_oss": _model(
        {
            "use_bias": True,
            "use_output_bias": True,
            "use_sinks": True,
            "rope": Rope(
                theta=150_000.0,
                scaling=YarnScaling(factor=32.0, original_context=64, truncate=False),
            ),
        },
        router=TopK(k=2, use_bias=True),
        moe={"experts": GLU(d_ff=8, activation="swiglu_clamped", use_bias=True)},
        epsilon=1e-5,
        windows=(5, None),
    ),
    "deepseek_v2": _model(
        MultiHeadLatentAttention(num_heads=4, use_bias=True, **LATENT),
        router=TopK(
            k=2,
            normalise="before",
            scale=4.0,
            num_groups=4,
            num_groups_kept=2,
            group_score="max",
        ),
        moe={"num_experts": 8, "shared": DenseGLU(d_ff=16)},
        first_k_dense=1,
        dense_ffn=DenseGLU(d_ff=12),
    ),
    "deepseek_v3": _model(
        MultiHeadLatentAttention(
            num_heads=4,
            q_lora_rank=12,
            rope=Rope(scaling=YarnScaling(factor=40.0, original_context=16, **MSCALES)),
            **LATENT,
        ),
        router=TopK(k=2, score="sigmoid", scale=2.5, num_groups=2, num_groups_kept=1),
        moe={"num_experts": 8, "shared": DenseGLU(d_ff=16), "balance": (LossFreeBias(rate=0.0),)},
        first_k_dense=1,
        dense_ffn=DenseGLU(d_ff=12),
    ),
    "llama": _model(
        {
            "head_dim": None,
            "use_bias": True,
            "use_output_bias": True,
            "rope": Rope(theta=500_000.0, scaling=Llama3Scaling(original_context=16)),
        },
        dense=DenseGLU(d_ff=12, use_bias=True),
    ),
    "qwen3": _model({"qk_norm": RMSNorm()}, dense=DenseGLU(d_ff=12), windows=(None, 5)),
    "phimoe": _model(
        {"use_bias": True, "use_output_bias": True, "rope": Rope(scaling=PHI_SCALING)},
        router=SparseMixer(jitter=0.4),
        epsilon=1e-5,
        norm=LayerNorm,
        windows=(5,),
        head_bias=True,
    ),
}


def _variables(model: Transformer, golden) -> dict:
    """Golden parameters, layer by layer, stacked as the model's segments want them."""
    flat, start = {}, 0
    for path, shape in json.loads(str(golden["layout"])).items():
        size = int(np.prod(shape))
        flat[path] = golden["params"][start : start + size].reshape(shape) / np.float32(GRID)
        start += size
    variables = {"params": {}}
    for path in [path for path in flat if not path[0].isdigit()]:
        _put(variables["params"], path, flat.pop(path))
    for segment in model.segments:
        for member, name in enumerate(segment.names):
            layers = segment.indices(member)
            for path in [p.split("/", 1)[1] for p in flat if p.startswith(f"{layers[0]}/")]:
                value = np.stack([flat[f"{layer}/{path}"] for layer in layers])
                if path == "ffn/correction_bias":
                    state = {"ffn": {"balance_0_correction_bias": value}}
                    variables["router_state"] = {name: state}
                else:
                    _put(variables["params"], f"{name}/{path}", value)
    return variables


def _put(tree: dict, path: str, value: np.ndarray) -> None:
    *parents, leaf = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name):
    golden, model = np.load(GOLDEN / f"{name}.npz"), MODELS[name]
    variables = _variables(model, golden)
    logits = quick_jit(lambda v, t: model.apply(v, t).logits)(variables, golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5, rtol=1e-5)
    assert jnp.std(logits) > 0.5  # large enough for the tolerance to mean something

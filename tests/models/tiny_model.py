"""Small models for tests: every option a test needs is a keyword."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.attention.full import FullAttention
from moejax.balance.loss_free import LossFreeBias
from moejax.balance.z_loss import RouterZLoss
from moejax.experts.dense import DenseGLU
from moejax.experts.glu import GLU
from moejax.layers.norm import RMSNorm
from moejax.models.block import Block
from moejax.models.moe import MoE
from moejax.models.transformer import Transformer
from moejax.routers.topk import TopK
from moejax.transport.local import Local
from moejax.verification.contracts.cases import random_tree

VOCAB = 24


def moe(**changes: Any) -> MoE:
    """Four experts, two per token, a shared expert, z-loss and a loss-free bias."""
    options = {
        "num_experts": 4,
        "router": TopK(k=2),
        "experts": GLU(d_ff=8),
        "transport": Local(),
        "balance": (RouterZLoss(weight=1e-2), LossFreeBias(rate=1e-2)),
        "shared": DenseGLU(d_ff=6, gated=True),
    }
    return MoE(**(options | changes))


def attention(**changes: Any) -> FullAttention:
    """Two query heads per key head, with QK-norm."""
    return FullAttention(**({"num_heads": 4, "num_kv_heads": 2, "qk_norm": RMSNorm()} | changes))


def tiny(*, ffn: Any = None, **changes: Any) -> Transformer:
    """Two layers of width 16."""
    block = Block(attention=changes.pop("attention", attention()), ffn=ffn or moe())
    options = {"num_layers": 2, "d_model": 16, "block": block, "vocab_size": VOCAB}
    return Transformer(**(options | changes))


def dense(**changes: Any) -> Transformer:
    """One dense layer: the quickest model to compile."""
    ffn = DenseGLU(d_ff=8)
    return tiny(**({"ffn": ffn, "attention": attention(qk_norm=None), "num_layers": 1} | changes))


def random_model_variables(model: Transformer, *, seed: int = 0) -> Any:
    """Variables of the model's shapes without compiling its initialisers."""
    variables = random_tree(jax.eval_shape(model.init, jax.random.key(0)), seed=seed)
    state = jax.tree.map(lambda a: 0.1 * a, variables.pop("router_state", {}))
    return variables | ({"router_state": state} if state else {})


def as_float64(model: Transformer) -> Transformer:
    """The same model in double precision."""
    return dataclasses.replace(model, dtype="float64", param_dtype="float64")


def tokens(shape: tuple[int, ...], *, seed: int = 0) -> jax.Array:
    """Random ids below VOCAB."""
    return jax.random.randint(jax.random.key(seed), shape, 0, VOCAB, jnp.int32)

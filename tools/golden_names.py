"""The paths in moejax of parameters of transformers, for `update_golden.py`.

Written without the maps of `moejax.interop`, which the fixtures test.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_PROJECTIONS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "q_a_proj": "query_down",
    "q_b_proj": "query_up",
    "kv_a_proj_with_mqa": "kv_down",
    "kv_b_proj": "kv_up",
    "q_a_layernorm": "query_norm",
    "kv_a_layernorm": "kv_norm",
    "q_norm": "query_norm",
    "k_norm": "key_norm",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_PARENTS = {
    "self_attn": "attention",
    "mlp": "ffn",
    "gate": "router",
    "router": "router",
    "shared_expert": "shared",
    "shared_experts": "shared",
}


def converted(path: str, value: np.ndarray, config: Any) -> dict[str, np.ndarray]:
    """{moejax path within the layer: array} for one leaf of a model with that `config`."""
    *parents, leaf = path.split(".")
    if parents[-1] == "experts":
        return _experts(leaf, value, interleaved=config.model_type == "gpt_oss")
    if kept := _kept(parents[-1], config):
        value = _without_pairs(value, kept, config.qk_rope_head_dim)
    if leaf == "e_score_correction_bias":
        return {"ffn/correction_bias": value}
    if parents[-1] == "shared_expert_gate":
        return {"ffn/shared/shared_gate/kernel": value.T}
    if leaf == "sinks":
        return {"attention/sinks": value}
    parts = [_PROJECTIONS.get(p, _PARENTS.get(p, p)) for p in parents]
    if leaf == "weight":
        leaf = "scale" if "norm" in parents[-1] else "kernel"
    return {"/".join([*parts, leaf]): value.T if value.ndim == 2 else value}


def _experts(leaf: str, value: np.ndarray, *, interleaved: bool) -> dict[str, np.ndarray]:
    """Splits gate and up, and puts the input axis before the output axis."""
    suffix = "_bias" if leaf.endswith("_bias") else ""
    if not interleaved:
        value = value.swapaxes(1, 2)  # [E, in, out]
    if leaf.startswith("down"):
        return {f"ffn/experts/down{suffix}": value}
    if interleaved:
        gate, up = value[..., ::2], value[..., 1::2]
    else:
        gate, up = np.split(value, 2, axis=-1)
    return {f"ffn/experts/gate{suffix}": gate, f"ffn/experts/up{suffix}": up}


def _kept(projection: str, config: Any) -> int | None:
    """Outputs before each rotated run of latent attention; None where nothing is rotated."""
    if not hasattr(config, "qk_rope_head_dim"):
        return None
    heads = dict.fromkeys(("q_proj", "q_b_proj"), config.qk_nope_head_dim)
    return (heads | {"kv_a_proj_with_mqa": config.kv_lora_rank}).get(projection)


def _without_pairs(value: np.ndarray, kept: int, rotated: int) -> np.ndarray:
    """Outputs (the first axis) with the rotated ones of each head as all firsts, all seconds."""
    rows = []
    for start in range(0, len(value), kept + rotated):
        head = value[start : start + kept + rotated]
        rows += [head[:kept], head[kept::2], head[kept + 1 :: 2]]
    return np.concatenate(rows)

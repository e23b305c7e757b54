"""Llama in numpy from the tensors of a checkpoint, alone or with a mixture of MoE-PEFT.

Written after the formulas of MoE-PEFT, token by token and expert by expert, for tests of what is
read from files: it shares nothing with the package.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

NUM_HEADS, NUM_KV_HEADS = 4, 2
THETA, EPSILON = 10_000.0, 1e-6


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x)."""
    return x / (1 + np.exp(-x))


@dataclasses.dataclass
class Plain:
    """The base model's projections."""

    base: dict[str, np.ndarray]

    def weight(self, layer: int, module: str) -> np.ndarray:
        """`[out, in]` in float64."""
        return self.base[f"model.layers.{layer}.{module}.weight"].astype(np.float64)

    def project(self, layer: int, module: str, x: np.ndarray) -> np.ndarray:
        """One token through a projection."""
        return self.weight(layer, module) @ x

    def mlp(self, layer: int, x: np.ndarray) -> np.ndarray:
        """One token through the MLP."""
        gate, up = (self.project(layer, f"mlp.{name}_proj", x) for name in ("gate", "up"))
        return self.project(layer, "mlp.down_proj", silu(gate) * up)


@dataclasses.dataclass
class Mixed(Plain):
    """With an adapter: its tensors, what its JSON says, and the share of each expert."""

    adapter: dict[str, np.ndarray]
    settings: dict[str, Any]
    num_chosen: set[int] = dataclasses.field(default_factory=set)  # of any token so far

    def _tensor(self, layer: int, name: str) -> np.ndarray | None:
        prefix = self.settings["peft_type"].lower()
        found = self.adapter.get(f"{prefix}.layers.{layer}.{name}.weight")
        return None if found is None else found.astype(np.float64)

    def delta(self, layer: int, name: str, numbers: dict[str, Any]) -> np.ndarray:
        """s B A, or 0 where there is none."""
        a, b = (self._tensor(layer, f"{name}.lora_{factor}") for factor in "AB")
        if a is None:
            return np.zeros_like(self.weight(layer, name.split(".experts")[0]))
        root = numbers.get("use_rslora", False)
        return numbers["lora_alpha"] / (np.sqrt(len(a)) if root else len(a)) * (b @ a)

    def shares(self, gate: np.ndarray, x: np.ndarray) -> dict[int, float]:
        """{expert: weight} of one token."""
        probs = softmax(gate @ x)
        order = np.argsort(-probs, kind="stable")
        if self.settings["peft_type"] == "DYNMOLE":
            return self._by_entropy(probs, order)
        chosen = order[: self.settings["top_k"]]
        return {e: probs[e] / probs[chosen].sum() for e in chosen}

    def _by_entropy(self, probs: np.ndarray, order: np.ndarray) -> dict[int, float]:
        q, size = self.settings["entropy_index"], len(probs)
        entropy = (1 - ((probs + 1e-5) ** q).sum()) / (1 - size ** (1 - q))
        total = np.cumsum(probs[order])
        few = order[
            (total <= self.settings["top_p"]) | (np.arange(size) < self.settings["keep_top_k"])
        ]
        chosen = order if entropy > self.settings["entropy_threshold"] else few
        self.num_chosen.add(len(chosen))
        return {e: probs[e] for e in chosen}

    def project(self, layer: int, module: str, x: np.ndarray) -> np.ndarray:
        """With a plain LoRA, or a mixture that is plugged in."""
        y = super().project(layer, module, x)
        gate = self._tensor(layer, f"{module}.moe_gate")
        if gate is None:
            return y + self.delta(layer, module, self.settings) @ x
        for e, weight in self.shares(gate, x).items():
            y = y + weight * self.delta(layer, f"{module}.experts.{e}", self.settings) @ x
        return y

    def mlp(self, layer: int, x: np.ndarray) -> np.ndarray:
        """Whole MLPs of adapted weights, weighed."""
        gate = self._tensor(layer, "mlp.moe_gate")
        if gate is None:
            return super().mlp(layer, x)
        numbers = self.settings | self.settings.get("expert_lora", {})
        total = np.zeros_like(x)
        for e, weight in self.shares(gate, x).items():
            own = {
                name: self.weight(layer, f"mlp.{name}_proj")
                + self.delta(layer, f"mlp.{name}_proj.experts.{e}", numbers)
                for name in ("gate", "up", "down")
            }
            total += weight * (own["down"] @ (silu(own["gate"] @ x) * (own["up"] @ x)))
        return total


def _normed(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale


def _turned(x: np.ndarray) -> np.ndarray:
    """`[S, heads, D]`, rotated by position; halves belong together."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] / THETA ** (np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def logits(model: Plain, tokens: np.ndarray) -> np.ndarray:
    """`[S, V]` of one row of tokens."""
    base, layer = model.base, 0
    x = base["model.embed_tokens.weight"].astype(np.float64)[tokens]
    while f"model.layers.{layer}.input_layernorm.weight" in base:
        name = f"model.layers.{layer}"
        inner = _normed(x, base[f"{name}.input_layernorm.weight"])
        each = lambda module, rows, layer=layer: np.stack(
            [model.project(layer, f"self_attn.{module}_proj", row) for row in rows]
        )
        query = _turned(each("q", inner).reshape(len(x), NUM_HEADS, -1))
        key = _turned(each("k", inner).reshape(len(x), NUM_KV_HEADS, -1))
        value = each("v", inner).reshape(len(x), NUM_KV_HEADS, -1)
        key, value = (np.repeat(y, NUM_HEADS // NUM_KV_HEADS, axis=1) for y in (key, value))
        scores = np.einsum("shd,thd->hst", query, key) / np.sqrt(query.shape[-1])
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        out = np.einsum("hst,thd->shd", softmax(scores), value).reshape(len(x), -1)
        x = x + each("o", out)
        inner = _normed(x, base[f"{name}.post_attention_layernorm.weight"])
        x = x + np.stack([model.mlp(layer, row) for row in inner])
        layer += 1
    return _normed(x, base["model.norm.weight"]) @ base["lm_head.weight"].astype(np.float64).T

"""What `bench_kernels.py` times: model shapes, distributions of rows over groups, and products.

Sources of the shapes: the models' published configurations. T is 16,384 tokens a device; the
expert-parallel share of DeepSeek-V3 is what one of 8 devices receives for 32 of the 256 experts.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from moejax.kernels.expert_mlp.slots import sort_slots


@dataclasses.dataclass(frozen=True)
class Model:
    """The shape of one MoE layer on one device: K = `k` experts per token, R = `rows`."""

    name: str
    d: int
    f: int
    experts: int
    k: int
    tokens: int = 16384

    @property
    def rows(self) -> int:
        return self.tokens * self.k

    def scaled(self, by: int) -> Model:
        """Tokens and both widths divided; widths stay multiples of 16."""
        if by == 1:
            return self
        narrow = lambda width: max(16, width // by // 16 * 16)
        small = {"d": narrow(self.d), "f": narrow(self.f), "tokens": max(8, self.tokens // by)}
        return dataclasses.replace(self, name=f"{self.name}/{by}", **small)


MODELS = {
    "mixtral": Model("Mixtral-8x7B", 4096, 14336, 8, 2),
    "deepseek": Model("DeepSeek-V3 EP8", 7168, 2048, 32, 1, 131072),
    "qwen3": Model("Qwen3-30B-A3B", 2048, 768, 128, 8),
    "olmoe": Model("OLMoE-1B-7B", 2048, 1024, 64, 8),
    "gpt_oss": Model("gpt-oss-120b", 2880, 2880, 128, 4),
}
# For a CPU, 64 groups of 32 to 512 rows, 512 wide inside and 1,024 outside; never scaled.
CPU_MODELS = {
    f"groups64x{rows}": Model(f"64 groups of {rows}", 512, 512, 64, 8, 8 * rows)
    for rows in (32, 128, 256, 512)
}

DISTRIBUTIONS = ("balanced", "zipf", "four", "one", "half_empty")


def group_sizes(distribution: str, model: Model, seed: int = 0) -> np.ndarray:
    """Rows per expert, int32 `[E]`, summing to R. Which experts are popular is random."""
    rng = np.random.default_rng([seed, zlib.crc32(distribution.encode())])
    e = model.experts
    share = {
        "balanced": np.ones(e),
        "zipf": 1 / np.arange(1, e + 1),
        "four": np.where(np.arange(e) < min(4, e), 0.8 / min(4, e), 0.2 / max(e - 4, 1)),
        "one": np.arange(e) == 0,
        "half_empty": np.arange(e) < -(-e // 2),
    }[distribution].astype(float)
    return rng.multinomial(model.rows, rng.permutation(share / share.sum())).astype(np.int32)


# Most wanted first: a time budget cuts the end. `gate_up` is `[R, D] [E, D, 2F]`, `down` is
# `[R, F] [E, F, D]`; `dlhs` and `drhs` are the gradients of gate_up, `down_*` those of down.
PRODUCTS = (
    "gate_up",
    "drhs",
    "dlhs",
    "glu",
    "expert_mlp_grad",
    "down",
    "expert_mlp",
    "permute",
    "combine",
    "down_drhs",
    "down_dlhs",
    "forward_backward",
)
FORWARD, GRAD_LHS, GRAD_RHS = ("gate_up", "down"), ("dlhs", "down_dlhs"), ("drhs", "down_drhs")
MOVES = ("permute", "combine")


@dataclasses.dataclass(frozen=True)
class Case:
    """One product of one model's layer."""

    model: Model
    product: str
    dtype: str

    @property
    def widths(self) -> tuple[int, int]:
        """K and N of the grouped matmul."""
        m = self.model
        return (m.f, m.d) if self.product.startswith("down") else (m.d, 2 * m.f)

    @property
    def wide(self) -> str:
        """The dtype of weight gradients: they are summed and kept in at least float32."""
        return "float32"

    def shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Random operands, in the order of the arguments: name -> shape, fan-in."""
        m, (k, n) = self.model, self.widths
        lhs, rhs, dout = ((m.rows, k), 1), ((m.experts, k, n), k), ((m.rows, n), n)
        into, out_of = ((m.experts, m.d, m.f), m.d), ((m.experts, m.f, m.d), m.f)
        if self.product in FORWARD:
            return {"lhs": lhs, "rhs": rhs}
        if self.product in GRAD_LHS:
            return {"dout": dout, "rhs": rhs}
        if self.product in GRAD_RHS:
            return {"lhs": lhs, "dout": dout}
        tokens = ((m.tokens, m.d), 1)
        return {
            "forward_backward": {"lhs": lhs, "rhs": rhs, "dout": dout},
            "glu": {"rows": lhs, "gate": into, "up": into},
            "permute": {"x": tokens},
            "combine": {"rows": ((m.rows, m.d), 1)},
            "expert_mlp": {"x": tokens, "gate": into, "up": into, "down": out_of},
            "expert_mlp_grad": {
                "x": tokens,
                "gate": into,
                "up": into,
                "down": out_of,
                "dout": tokens,
            },
        }[self.product]

    def operands(self, seed: int) -> tuple[jax.Array, ...]:
        """Fresh random arrays in the order of `shapes`."""
        keys = jax.random.split(jax.random.key(seed), len(self.shapes()))
        return tuple(
            _normal(key, shape, self.dtype, fan_in)
            for key, (shape, fan_in) in zip(keys, self.shapes().values(), strict=True)
        )

    def routing(self, sizes: np.ndarray, seed: int) -> tuple[jax.Array, ...]:
        """The arguments behind the operands, which alone depend on the distribution.

        Group sizes for the products of rows; experts (and weights) `[T, K]` for `permute` and
        `expert_mlp`; the row of each slot `[T, K]` and the token of each row `[R]` for `combine`.
        """
        m = self.model
        if self.product not in ("permute", "combine", "expert_mlp", "expert_mlp_grad"):
            return (jnp.asarray(sizes, jnp.int32),)
        rng = np.random.default_rng(seed)
        experts = rng.permutation(np.repeat(np.arange(m.experts), sizes)).reshape(m.tokens, m.k)
        experts = jnp.asarray(experts, jnp.int32)
        if self.product == "permute":
            return (experts,)
        if self.product == "combine":
            slots = sort_slots(experts, m.experts)
            return slots.row, slots.token()
        return experts, jnp.asarray(rng.random((m.tokens, m.k)), jnp.float32)

    @property
    def flops(self) -> float:
        """Useful floating-point operations."""
        m, (k, n) = self.model, self.widths
        if self.product in MOVES:
            return 0.0
        if self.product.startswith("expert_mlp"):
            return 6.0 * m.rows * m.d * m.f * (3 if self.product == "expert_mlp_grad" else 1)
        return 2.0 * m.rows * k * n * (3 if self.product == "forward_backward" else 1)

    def moved(self, sizes: np.ndarray) -> float:
        """Bytes that must cross the device's memory: every operand and result once.

        Weights of empty groups are not read; weight gradients are float32 and all are written.
        """
        m, (k, n) = self.model, self.widths
        item, held = jnp.dtype(self.dtype).itemsize, int((sizes > 0).sum())
        lhs, dout, tokens = m.rows * k, m.rows * n, m.tokens * m.d
        rhs, drhs = held * k * n, m.experts * k * n
        product = item * (lhs + rhs + dout)
        weight_grad = item * (lhs + dout) + 4 * drhs
        if self.product in GRAD_RHS:
            return weight_grad
        by_row = item * 2 * m.rows * m.d
        combine = item * (m.rows * m.d + tokens)
        glu = item * (m.rows * (m.d + 3 * m.f) + held * 2 * m.d * m.f)
        down = item * (m.rows * (m.f + m.d) + held * m.d * m.f)
        mlp = by_row + glu + down + combine
        # Backward: gather dout; da and dWd; dx, dWg and dWu from the saved pre-activations.
        grads = by_row + 2 * down + 2 * glu + combine + 4 * m.experts * 3 * m.d * m.f
        return {
            "forward_backward": 2 * product + weight_grad,
            "glu": glu,
            "permute": by_row,
            "combine": combine,
            "expert_mlp": mlp,
            "expert_mlp_grad": mlp + grads,
        }.get(self.product, product)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str, fan_in: int) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)

"""What every implementation must get right in `expert_mlp`: value and all gradients, by expert."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.kernels.expert_mlp import Biases, expert_mlp, reference

T, D, F, E, K = 48, 24, 40, 6, 3
# Relative to the norm of the gradient of the expert in question. Several roundings follow another.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
_NAMES = (
    "out",
    "dx",
    "dw_gate",
    "dw_up",
    "dw_down",
    "dweights",
    "dbias_gate",
    "dbias_up",
    "dbias_down",
)


def failures(implementation: str | None, *, dtype: str, activation: str, biased: bool) -> list[str]:
    """What `expert_mlp` gets wrong with that implementation; empty if nothing.

    Some slots are empty, one expert gets nothing, and tokens without a slot hold NaN.
    """
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
    x, dout = draw(T, D), draw(T, D)
    w = draw(E, D, F) / 4, draw(E, D, F) / 4, draw(E, F, D) / 6
    weights = jnp.asarray(rng.random((T, K), np.float32))
    biases = Biases(draw(E, F), draw(E, F), draw(E, D)) if biased else None
    experts = rng.integers(0, E - 1, (T, K))
    experts[rng.random((T, K)) < 0.3] = E
    experts[::7] = -1
    unused = ((experts < 0) | (experts >= E)).all(1)[:, None]
    experts = jnp.asarray(experts, jnp.int32)

    def run(mlp, x, dout):
        call = lambda x, g, u, d, weights, b: mlp(
            x, g, u, d, experts, weights, biases=b, activation=activation
        )
        out, vjp = jax.vjp(call, x, *w, weights, biases)
        return jax.tree.leaves((out, vjp(dout)))

    mlp = functools.partial(expert_mlp, implementation=implementation)
    with jax.default_matmul_precision("highest"):
        poison = lambda a: jnp.where(unused, jnp.nan, a)
        got = jax.jit(functools.partial(run, mlp))(poison(x), poison(dout))
        wide = jnp.float32
        x, dout, w, biases = jax.tree.map(lambda a: a.astype(wide), (x, dout, w, biases))
        want = jax.jit(functools.partial(run, reference.expert_mlp))(x, dout)
    found = []
    for name, a, b in zip(_NAMES, got, want, strict=False):
        parts = zip(a, b, strict=True) if len(b) == E else [(a, b)]
        for part, true in parts:
            part, true = (np.asarray(v, np.float64) for v in (part, true))
            scale = max(np.linalg.norm(true), 1e-6 * np.linalg.norm(np.asarray(b, np.float64)))
            error = np.linalg.norm(part - true) / max(scale, 1e-30)
            if not error <= TOLERANCE[dtype]:
                found.append(f"expert_mlp ({activation}): {name} is off by {error:.2g}")
    return found

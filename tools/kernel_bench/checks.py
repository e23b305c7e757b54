"""Whether a timed result is right, by dense products of the groups it came from.

Operands are what the timed function got, products accumulate in float32, and the error is relative
and per group, so that one wrong group cannot hide behind the others. Forward products and dlhs are
checked on rows at both ends and inside of every group; weight gradients on the largest, the
smallest, the first and the last group that has rows, and on all that have none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from kernel_bench.cases import FORWARD, GRAD_LHS, GRAD_RHS, Case

from moejax.kernels.activations import glu_activation
from moejax.kernels.expert_mlp.slots import sort_slots

CHUNK = 1024
_silu = glu_activation("silu")
_high = {"preferred_element_type": jnp.float32, "precision": lax.Precision.HIGHEST}


def tolerance(case: Case) -> float:
    """The largest relative error of a group; a few roundings of the operands' dtype."""
    chained = case.product.startswith("expert_mlp") or case.product == "glu"
    if case.dtype == "float32":
        return 1e-3 if jax.default_backend() != "cpu" else 1e-4
    return 3e-2 if chained else 1e-2


class Reference:
    """What `case` must give for `args`; computed once for all variants."""

    def __init__(self, case: Case, args: tuple[Array, ...], sizes: np.ndarray):
        self._parts = list(_parts(case, args, sizes))

    def error(self, outputs: tuple[Array, ...]) -> float:
        """The largest relative error of any group of any output; NaN where one is NaN."""
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        worst = 0.0
        for index, select, wanted in self._parts:
            error = float(_relative_error(select(outputs[index]), wanted))
            worst = error if not error <= worst else worst
        return worst


def _parts(case: Case, args: tuple[Array, ...], sizes: np.ndarray):
    """(which output, what to take of it `[groups, ...]`, what that must be)."""
    if case.product in FORWARD:
        lhs, rhs, _ = args
        yield _rows_part(0, lhs, rhs, sizes)
    elif case.product in GRAD_LHS:
        dout, rhs, _ = args
        yield _rows_part(0, dout, rhs, sizes, transposed=True)
    elif case.product in GRAD_RHS:
        lhs, dout, _ = args
        yield from _weights_parts(0, lhs, dout, sizes)
    elif case.product == "forward_backward":
        lhs, rhs, dout, _ = args
        yield _rows_part(0, lhs, rhs, sizes)
        yield _rows_part(1, dout, rhs, sizes, transposed=True)
        yield from _weights_parts(2, lhs, dout, sizes)
    elif case.product == "glu":
        rows, gate, up, _ = args
        gate, up = (_rows_part(i, rows, w, sizes) for i, w in enumerate((gate, up)))
        yield from (gate, up, (2, gate[1], _silu(gate[2], up[2])))
    elif case.product == "permute":
        x, experts = args
        slots = sort_slots(experts, sizes.size)
        yield 0, lambda out: out[None], x[slots.token()][None]
    elif case.product == "combine":
        rows, row, _ = args
        yield 0, lambda out: out[None], rows.astype(jnp.float32)[row].sum(1)[None]
    else:
        yield from _mlp_parts(case, args, sizes)


def _rows_part(index: int, lhs: Array, rhs: Array, sizes: np.ndarray, transposed: bool = False):
    """Sampled rows of every group against the dense product with the group's matrix."""
    held = np.flatnonzero(sizes)
    starts = (np.cumsum(sizes) - sizes)[held, None]
    near = max(8, min(64, 4096 // len(held)))
    ends = np.concatenate([np.arange(near), -1 - np.arange(near)])
    inside = np.linspace(0.1, 0.9, near)[None] * sizes[held, None]
    own = np.clip(ends[None], -sizes[held, None], sizes[held, None] - 1) % sizes[held, None]
    pick = jnp.asarray(starts + np.concatenate([own, inside.astype(int)], 1))
    return index, lambda out: out[pick], _dense_rows(lhs, rhs, pick, jnp.asarray(held), transposed)


@functools.partial(jax.jit, static_argnums=4)
def _dense_rows(lhs, rhs, pick, held, transposed):
    subscripts = "rk,nk->rn" if transposed else "rk,kn->rn"
    one = lambda at: jnp.einsum(subscripts, lhs[at[0]], rhs[at[1]], **_high)
    return lax.map(one, (pick, held))


def _weights_parts(index: int, lhs: Array, dout: Array, sizes: np.ndarray):
    """Whole weight gradients of a few groups, and zero for every empty one."""
    held, empty = np.flatnonzero(sizes), np.flatnonzero(sizes == 0)
    order = held[np.argsort(sizes[held])]
    few = jnp.asarray(np.unique([order[0], order[-1], held[0], held[-1]]))
    starts = np.cumsum(sizes) - sizes
    wanted = [_dense_outer(lhs, dout, starts[g], starts[g] + sizes[g]) for g in np.asarray(few)]
    yield index, lambda out: out[few], jnp.stack(wanted)
    if empty.size:
        largest = lambda out: jnp.max(jnp.abs(out), axis=(1, 2))[jnp.asarray(empty)][:, None]
        yield index, largest, jnp.zeros((empty.size, 1))


@jax.jit
def _dense_outer(lhs: Array, dout: Array, start: Array, stop: Array) -> Array:
    """Sum of lhs[r]^T dout[r] over the rows of `[start, stop)`, a chunk at a time."""
    height = min(CHUNK, lhs.shape[0])

    def step(i, total):
        begin = start + i * height
        first = jnp.minimum(begin, lhs.shape[0] - height)
        row = first + jnp.arange(height)
        own = ((row >= begin) & (row < stop))[:, None]
        a, b = (jnp.where(own, lax.dynamic_slice_in_dim(x, first, height), 0) for x in (lhs, dout))
        return total + jnp.einsum("rk,rn->kn", a, b, **_high)

    zero = jnp.zeros((lhs.shape[1], dout.shape[1]), jnp.float32)
    return lax.fori_loop(0, -(-(stop - start) // height), step, zero)


def _mlp_parts(case: Case, args: tuple[Array, ...], sizes: np.ndarray):
    """A few tokens through every expert; with gradients, dx, dweights and a few experts' dW."""
    x, gate, up, down, *dout, experts, weights = args
    pick = jnp.asarray(np.unique(np.linspace(0, x.shape[0] - 1, 64).astype(int)))
    score = _scores(experts[pick], weights[pick], gate.shape[0])
    forward = lambda v, s: _dense_mlp(v, gate, up, down, s)
    take = lambda out: out[pick]
    if case.product == "expert_mlp":
        yield 0, take, jax.jit(forward)(x[pick], score)
        return
    out, vjp = jax.jit(lambda v, s: jax.vjp(forward, v, s))(x[pick], score)
    dx, dscore = vjp(dout[0][pick].astype(out.dtype))
    yield 0, take, out
    yield 1, take, dx
    yield 5, lambda out: take(out)[None], jnp.take_along_axis(dscore, experts[pick], 1)[None]
    slots = sort_slots(experts, gate.shape[0])
    token, score = slots.token(), slots.to_rows(weights)
    held = np.flatnonzero(sizes)
    few = np.unique([held[np.argmin(sizes[held])], held[-1]])
    starts = np.cumsum(sizes) - sizes
    for g in few:
        one = tuple(w[g] for w in (gate, up, down))
        bounds = starts[g], starts[g] + sizes[g]
        grads = _expert_grads(x, dout[0], token, score, one, *bounds)
        for i, grad in enumerate(grads):
            yield 2 + i, lambda out, g=g: out[g][None], grad[None]
    empty = np.flatnonzero(sizes == 0)
    if empty.size:
        for i in range(3):
            largest = lambda out: jnp.max(jnp.abs(out), axis=(1, 2))[jnp.asarray(empty)][:, None]
            yield 2 + i, largest, jnp.zeros((empty.size, 1))


def _scores(experts: Array, weights: Array, num_experts: int) -> Array:
    """What every expert counts for, `[S, E]`."""
    return jnp.sum(jax.nn.one_hot(experts, num_experts) * weights[..., None], 1)


def _dense_mlp(x: Array, gate: Array, up: Array, down: Array, score: Array) -> Array:
    """Every token through every expert, `[S, D]` in float32."""

    def add(total, expert):
        *w, s = expert
        return total + _expert(x, *w) * s[:, None], None

    zero = jnp.zeros(x.shape, jnp.float32)
    return lax.scan(jax.checkpoint(add), zero, (gate, up, down, score.T))[0]


def _expert(x: Array, gate: Array, up: Array, down: Array) -> Array:
    product = lambda a, w: jnp.einsum("rk,kn->rn", a, w, **_high)
    hidden = _silu(product(x, gate), product(x, up))
    return product(hidden.astype(x.dtype), down)


@jax.jit
def _expert_grads(x, dout, token, score, expert, start, stop):
    """Gradients of one expert's three matrices from all its rows, a chunk at a time."""
    height = min(CHUNK, token.size)

    def step(i, totals):
        begin = start + i * height
        first = jnp.minimum(begin, token.size - height)
        row = first + jnp.arange(height)
        own = (row >= begin) & (row < stop)
        at, s = token[row], jnp.where(own, score[row], 0)[:, None]
        dy = s * dout[at].astype(jnp.float32)
        grads = jax.vjp(functools.partial(_expert, x[at]), *expert)[1](dy)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), totals, grads)

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), expert)
    return lax.fori_loop(0, -(-(stop - start) // height), step, zeros)


@jax.jit
def _relative_error(out: Array, wanted: Array) -> Array:
    """Largest over groups of |out - wanted| / |wanted|; plain |out| where `wanted` is zero."""
    norm: Callable = lambda v: jnp.sqrt(
        jnp.sum(v.astype(jnp.float32) ** 2, tuple(range(1, v.ndim)))
    )
    size = norm(wanted)
    return jnp.max(norm(out.astype(jnp.float32) - wanted) / jnp.where(size > 0, size, 1))

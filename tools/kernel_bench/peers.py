"""The variants that `bench_kernels.py` times: moejax's own kernels and what others offer.

A variant gives, for one case, a function of the case's operands and routing, or says in
`CannotRun` why it has none.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from kernel_bench.cases import FORWARD, GRAD_LHS, GRAD_RHS, MOVES, Case

from moejax.kernels import compat
from moejax.kernels.activations import glu_activation
from moejax.kernels.expert_mlp import expert_mlp
from moejax.kernels.expert_mlp.slots import Slots, sort_slots
from moejax.kernels.grouped_matmul import grouped_matmul, implementations
from moejax.kernels.grouped_matmul.groups import LocalGroups

_silu = glu_activation("silu")


class CannotRun(Exception):
    """Why a variant cannot compute a case that it should."""


class NotAVariant(Exception):
    """The case is no business of this variant's: nothing is missing."""


@dataclasses.dataclass(frozen=True)
class Dense:
    """The ceiling: matmuls of the same FLOPs with one matrix; a copy where there are no FLOPs."""

    name: str = "dense"

    def function(self, case: Case) -> Callable:
        if case.product in FORWARD:
            return lambda lhs, rhs, sizes: lhs @ rhs[0]
        if case.product in GRAD_LHS:
            return lambda dout, rhs, sizes: dout @ rhs[0].T
        if case.product in GRAD_RHS:
            return lambda lhs, dout, sizes: _over_rows(lhs, dout)
        return {
            "forward_backward": _dense_both,
            "glu": lambda rows, gate, up, sizes: rows @ jnp.concatenate([gate[0], up[0]], 1),
            "permute": lambda x, experts: jnp.repeat(x, experts.shape[1], 0),
            "combine": lambda rows, row, token: rows.reshape(*row.shape, -1).sum(1),
            "expert_mlp": _dense_mlp,
            "expert_mlp_grad": _dense_mlp_grad,
        }[case.product]


def _over_rows(lhs: Array, dout: Array) -> Array:
    dims = (((0,), (0,)), ((), ()))
    return lax.dot_general(lhs, dout, dims, preferred_element_type=jnp.float32)


def _dense_both(lhs, rhs, dout, sizes):
    return lhs @ rhs[0], dout @ rhs[0].T, _over_rows(lhs, dout)


def _dense_mlp(x, gate, up, down, experts, weights):
    """The bare matmuls on as many rows: no routing, no activation."""
    rows = jnp.tile(x, (experts.shape[1], 1))
    hidden = rows @ jnp.concatenate([gate[0], up[0]], 1)
    return hidden[:, : gate.shape[2]] @ down[0]


def _dense_mlp_grad(x, gate, up, down, dout, experts, weights):
    rows, drows = (jnp.tile(v, (experts.shape[1], 1)) for v in (x, dout))
    both = jnp.concatenate([gate[0], up[0]], 1)
    hidden = rows @ both
    out = hidden[:, : gate.shape[2]] @ down[0]
    da = drows @ down[0].T
    dboth = jnp.concatenate([da, 2 * da], 1)
    return out, dboth @ both.T, _over_rows(rows, dboth), _over_rows(da, drows)


@dataclasses.dataclass(frozen=True)
class Moejax:
    """One of moejax's implementations, by name."""

    implementation: str

    @property
    def name(self) -> str:
        return f"moejax {self.implementation}"

    def function(self, case: Case) -> Callable:
        if case.product in MOVES:
            raise NotAVariant  # rows move in one way on every implementation: `Moves`
        try:
            reason = implementations.obstacle(self.implementation, case.dtype)
            kernels = implementations.module(self.implementation)
        except ImportError as error:
            raise CannotRun(f"it cannot be imported: {error}") from error
        if reason is not None:
            raise CannotRun(reason)
        return self._whole(case) or self._product(case, kernels)

    def _product(self, case: Case, kernels: Any) -> Callable:
        def call(product, dtype):
            return lambda a, b, sizes: product(
                a, b, LocalGroups(sizes, 0), transpose_rhs=False, dtype=jnp.dtype(dtype)
            )

        if case.product in FORWARD:
            return call(kernels.forward, case.dtype)
        if case.product in GRAD_LHS:
            return call(kernels.grad_lhs, case.dtype)
        return call(kernels.grad_rhs, case.wide)

    def _whole(self, case: Case) -> Callable | None:
        name = self.implementation
        if case.product == "glu":
            return lambda rows, gate, up, sizes: implementations.glu(
                name, rows, gate, up, None, LocalGroups(sizes, 0), act=_silu
            )
        matmul = lambda a, b, sizes: grouped_matmul(a, b, sizes, implementation=name)
        mlp = lambda *args: expert_mlp(*args, implementation=name)
        return {
            "forward_backward": with_gradients(matmul),
            "expert_mlp": mlp,
            "expert_mlp_grad": mlp_with_gradients(mlp),
        }.get(case.product)


@dataclasses.dataclass(frozen=True)
class MoejaxUnfused:
    """The GLU of an implementation that has a fused kernel, without it."""

    implementation: str

    @property
    def name(self) -> str:
        return f"moejax {self.implementation}, act apart"

    def function(self, case: Case) -> Callable:
        if case.product != "glu":
            raise NotAVariant
        try:
            kernels = implementations.module(self.implementation)
        except ImportError as error:
            raise NotAVariant from error  # `Moejax` says so
        if not hasattr(kernels, "glu"):
            raise NotAVariant
        Moejax(self.implementation).function(case)
        return lambda rows, gate, up, sizes: glu_of_dot(
            lambda a, b, s: kernels.forward(
                a, b, LocalGroups(s, 0), transpose_rhs=False, dtype=a.dtype
            ),
        )(rows, gate, up, sizes)


@dataclasses.dataclass(frozen=True)
class Moves:
    """How rows get to their experts and back: moejax's gathers, or a scatter-add."""

    name: str = "moejax gather"
    scatter: bool = False

    def function(self, case: Case) -> Callable:
        if case.product == "permute" and not self.scatter:
            return lambda x, experts: x.at[sort_slots(experts, case.model.experts).token()].get(
                mode="promise_in_bounds"
            )
        if case.product == "combine" and not self.scatter:
            sizes = jnp.full((1,), case.model.rows, jnp.int32)  # every slot is filled
            return lambda rows, row, token: Slots(token, row, sizes).sum_by_token(rows, rows.dtype)
        if case.product == "combine":
            zero = lambda rows: jnp.zeros((case.model.tokens, case.model.d), jnp.float32)
            return lambda rows, row, token: zero(rows).at[token].add(rows).astype(rows.dtype)
        raise NotAVariant


@dataclasses.dataclass(frozen=True)
class Dot:
    """A library's differentiable `dot(lhs, rhs, sizes, dtype)`, and what autodiff makes of it."""

    name: str
    dot: Callable
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    options: tuple[tuple[str, Any], ...] = ()  # for the compiler

    def function(self, case: Case) -> Callable:
        if case.product in MOVES:
            raise NotAVariant
        if (here := compat.target_platform()) not in self.platforms:
            raise CannotRun(f"it runs on {' and '.join(self.platforms)}, and this is {here}")
        plain = lambda a, b, sizes: self.dot(a, b, sizes, jnp.dtype(case.dtype))
        if case.product in FORWARD:
            return plain
        if case.product in GRAD_LHS:
            return lambda dout, rhs, sizes: _pull_lhs(plain, dout, rhs, sizes)
        if case.product in GRAD_RHS:
            return lambda lhs, dout, sizes: _pull_rhs(plain, lhs, dout, sizes)
        mlp = mlp_of_dot(plain)
        return {
            "forward_backward": with_gradients(plain),
            "glu": glu_of_dot(plain),
            "expert_mlp": mlp,
            "expert_mlp_grad": mlp_with_gradients(mlp),
        }[case.product]


def _pull_lhs(dot, dout, rhs, sizes):
    like = jnp.zeros((dout.shape[0], rhs.shape[1]), dout.dtype)
    return jax.vjp(lambda lhs: dot(lhs, rhs, sizes), like)[1](dout)[0]


def _pull_rhs(dot, lhs, dout, sizes):
    like = jnp.zeros((sizes.size, lhs.shape[1], dout.shape[1]), lhs.dtype)
    return jax.vjp(lambda rhs: dot(lhs, rhs, sizes), like)[1](dout)[0]


def with_gradients(dot: Callable) -> Callable:
    """(lhs, rhs, dout, sizes) -> (out, dlhs, drhs)."""

    def both(lhs, rhs, dout, sizes):
        out, vjp = jax.vjp(lambda a, b: dot(a, b, sizes), lhs, rhs)
        return out, *vjp(dout)

    return both


def mlp_with_gradients(mlp: Callable) -> Callable:
    """(x, gate, up, down, dout, experts, weights) -> out and the gradients of all but experts."""

    def both(x, gate, up, down, dout, experts, weights):
        call = lambda x, g, u, d, s: mlp(x, g, u, d, experts, s)
        out, vjp = jax.vjp(call, x, gate, up, down, weights)
        return out, *vjp(dout)

    return both


def glu_of_dot(dot: Callable) -> Callable:
    """Two products and an activation between them and memory."""

    def glu(rows, gate, up, sizes):
        hidden = [dot(rows, w, sizes) for w in (gate, up)]
        return *hidden, _silu(*(h.astype(jnp.float32) for h in hidden)).astype(rows.dtype)

    return glu


def mlp_of_dot(dot: Callable) -> Callable:
    """What one writes with a library's product and leaves to autodiff."""

    def mlp(x, gate, up, down, experts, weights):
        slots = sort_slots(experts, gate.shape[0])
        _, _, hidden = glu_of_dot(dot)(x[slots.token()], gate, up, slots.group_sizes)
        y = dot(hidden, down, slots.group_sizes)[slots.row].astype(jnp.float32)
        return jnp.sum(y * weights[..., None], 1).astype(x.dtype)

    return mlp


def installed(name: str) -> Any:
    """The module; `CannotRun` where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # tokamax and torch can fail in many ways on a foreign machine
        raise CannotRun(f"{name} cannot be imported: {type(error).__name__}: {error}") from error

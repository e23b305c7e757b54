"""`torch._grouped_mm` as a variant of `bench_kernels.py`, on arrays shared with JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from kernel_bench.cases import FORWARD, GRAD_LHS, GRAD_RHS, Case
from kernel_bench.peers import CannotRun, installed

from moejax.kernels import compat


@dataclasses.dataclass(frozen=True)
class Torch:
    """Gradients in the operands' dtype; the MLP is what one writes and leaves to autograd."""

    name: str = "torch _grouped_mm"

    def function(self, case: Case) -> Callable:
        torch = installed("torch")
        if not hasattr(torch, "_grouped_mm"):
            raise CannotRun(f"torch {torch.__version__} has no _grouped_mm")
        if compat.target_platform() == "gpu" and not torch.cuda.is_available():
            raise CannotRun("this torch sees no GPU")
        if compat.target_platform() == "tpu":
            raise CannotRun("it runs on cpu and gpu, and this is tpu")
        return _product(torch, case)

    @staticmethod
    def arguments(args: tuple[jax.Array, ...]) -> tuple[Any, ...]:
        """The same memory as torch tensors."""
        import torch

        return tuple(torch.from_dlpack(a) for a in jax.block_until_ready(args))

    @staticmethod
    def results(out: Any) -> tuple[jax.Array, ...]:
        """Back to JAX."""
        outputs = out if isinstance(out, tuple) else (out,)
        return tuple(jnp.from_dlpack(t.detach().contiguous()) for t in outputs)

    @staticmethod
    def wait(out: Any) -> None:
        """Until the device is done."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _product(torch: Any, case: Case) -> Callable:
    product = case.product
    if product in FORWARD:
        return lambda lhs, rhs, sizes: _dot(torch, lhs, rhs, sizes)
    if product in GRAD_LHS:
        return lambda dout, rhs, sizes: _dot(torch, dout, rhs.transpose(1, 2), sizes)
    if product in GRAD_RHS:
        return lambda lhs, dout, sizes: _dot(torch, lhs.t(), dout, sizes)
    glu = lambda rows, gate, up, sizes: _glu(torch, rows, gate, up, sizes)
    mlp = lambda *args: _mlp(torch, *args)
    return {
        "forward_backward": _pulled(torch, lambda a, b, sizes: _dot(torch, a, b, sizes), 2),
        "glu": glu,
        "permute": lambda x, experts: x.index_select(0, _sorted(torch, experts)[1]),
        "combine": lambda rows, row, token: _combine(torch, rows, row),
        "expert_mlp": mlp,
        "expert_mlp_grad": _pulled(
            torch, lambda x, g, u, d, w, experts: mlp(x, g, u, d, experts, w), 5
        ),
    }[product]


def _dot(torch, lhs, rhs, sizes):
    return torch._grouped_mm(lhs, rhs, offs=sizes.cumsum(0, dtype=torch.int32))


def _glu(torch, rows, gate, up, sizes):
    left, right = (_dot(torch, rows, w, sizes) for w in (gate, up))
    return left, right, torch.nn.functional.silu(left) * right


def _sorted(torch, experts):
    """Experts of the rows, the rows' tokens, the rows of the slots."""
    ids, order = experts.flatten().sort(stable=True)
    row = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.numel(), device=order.device)
    )
    return ids, order // experts.shape[1], row.view(experts.shape)


def _combine(torch, rows, row):
    return (
        rows[row.flatten().long()].view(*row.shape, -1).sum(1, dtype=torch.float32).to(rows.dtype)
    )


def _mlp(torch, x, gate, up, down, experts, weights):
    ids, token, row = _sorted(torch, experts)
    sizes = torch.bincount(ids.long(), minlength=gate.shape[0])
    hidden = _glu(torch, x.index_select(0, token), gate, up, sizes)[2]
    y = _dot(torch, hidden, down, sizes)[row.flatten()].view(*row.shape, -1)
    return (y.float() * weights[..., None]).sum(1).to(x.dtype)


def _pulled(torch, function: Callable, count: int) -> Callable:
    """`function`'s result and its gradients in the first `count` arguments.

    Arguments arrive as those of the case: operands, the cotangent, routing (its weights last).
    """

    def both(*args):
        if count == 2:
            lhs, rhs, dout, sizes = args
            leaves, rest = (lhs, rhs), (sizes,)
        else:
            x, gate, up, down, dout, experts, weights = args
            leaves, rest = (x, gate, up, down, weights), (experts,)
        leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
        out = function(*leaves, *rest)
        return out, *torch.autograd.grad(out, leaves, dout)

    return both

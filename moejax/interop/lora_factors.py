"""The thin factors that LoRA adds to a model's projections, as our leaves and as torch's tensors.

Ours are A `[in, r]` and B `[r, out]`, of routed experts `[E, in, r]` and `[E, r, out]`, stacked
over layers; torch's are the transposes. Where a kernel's outputs are stored in another order than
ours, so are those of its B, through the same view.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Shaped

from moejax.adapters.lora import LoRA
from moejax.errors import UserError
from moejax.experts.lora_glu import LoRAGLU
from moejax.interop.architecture import Architecture
from moejax.interop.mapping import abstract
from moejax.interop.views import TRANSPOSED, Form, View, copy_into
from moejax.models.adapter import Adapter
from moejax.models.stack import stacked_layers
from moejax.models.transformer import Transformer
from moejax.models.variables import ADAPTERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """A projection of one layer that has factors.

    Attributes:
      layer: global index.
      path: within the layer, ours: attention/query, ffn/experts/gate.
      stack, row: where its layer lies in the stacked leaves.
      num_experts: None where the projection is none of routed experts'.
      d_in, d_out: widths.
      rank: r.
      shared: which factors all experts of the layer share.
      forms: how checkpoints store its kernel.
    """

    layer: int
    path: str
    stack: str
    row: int
    num_experts: int | None
    d_in: int
    d_out: int
    rank: int
    shared: tuple[str, ...]
    forms: tuple[Form, ...]

    @property
    def name(self) -> str:
        """Its whole path as `Adapter.targets` has it: layers.3.attention.query."""
        return f"layers.{self.layer}.{self.path.replace('/', '.')}"

    def leaf(self, factor: str) -> str:
        """The path of the stacked leaf that holds the factor "a" or "b"."""
        joint = "/" if self.num_experts is None else "_"
        return f"{ADAPTERS}/{self.stack}/{self.path}{joint}{factor}"


def everything(model: Transformer) -> Transformer:
    """The model with factors wherever there can be any, of rank 1: its widths and names."""
    experts = LoRAGLU(rank=1)
    adapter = Adapter(targets="all-linear", linear=LoRA(rank=1), experts=experts)
    return dataclasses.replace(model, adapter=adapter)


def projections(model: Transformer, architecture: Architecture) -> list[Projection]:
    """Every adapted projection of a model, layer by layer.

    Raises UserError where the architecture has no tensor for one.
    """
    shapes, stacks = abstract(model), stacked_layers(model.segments)
    found = []
    for leaf, a in shapes.items():
        if not leaf.startswith(f"{ADAPTERS}/") or leaf[-2:] not in ("/a", "_a"):
            continue
        b = shapes[f"{leaf[:-1]}b"]
        path = leaf[:-2].removeprefix(f"{ADAPTERS}/")
        in_experts = leaf.endswith("_a")
        kernel = path if in_experts else f"{path}/kernel"
        stack, within = path.split("/", 1)
        num_experts = shapes[f"params/{path}"].shape[1] if in_experts else None
        counts = {"a": a.shape[1], "b": b.shape[1]} if in_experts else {}
        stored = kernel.split("/", 1)[1]
        if stored not in architecture.tensors:
            raise UserError(f"{architecture.class_name} has no tensor for the leaf params/{kernel}")
        found += [
            Projection(
                layer=layer,
                path=within,
                stack=stack,
                row=row,
                num_experts=num_experts,
                d_in=a.shape[-2],
                d_out=b.shape[-1],
                rank=a.shape[-1],
                shared=tuple(f for f, count in counts.items() if count != num_experts),
                forms=architecture.tensors[stored],
            )
            for row, layer in enumerate(stacks[stack])
        ]
    return sorted(found, key=lambda one: (one.layer, one.path))


def tensor_a(a: Shaped[np.ndarray, "K r"]) -> Shaped[np.ndarray, "r K"]:
    """torch's `lora_A.weight`."""
    return stored(a, TRANSPOSED)


def tensor_b(b: Shaped[np.ndarray, "r N"], view: View) -> Shaped[np.ndarray, "N r"]:
    """torch's `lora_B.weight`, of a kernel that `view` shows."""
    return stored(b, view)


def factor_a(tensor: Shaped[np.ndarray, "r K"]) -> Shaped[np.ndarray, "K r"]:
    """The inverse of `tensor_a`."""
    return seen(tensor, TRANSPOSED)


def factor_b(tensor: Shaped[np.ndarray, "N r"], view: View) -> Shaped[np.ndarray, "r N"]:
    """The inverse of `tensor_b`."""
    return seen(tensor, view)


def stored(values: np.ndarray, view: View) -> np.ndarray:
    """The tensor of which `view` shows `values`, an array of ours."""
    out = np.empty(view.tensor_shape(values.shape), values.dtype)
    copy_into(view(out), values)
    return out


def seen(tensor: np.ndarray, view: View) -> np.ndarray:
    """What `view` shows of a tensor, contiguous."""
    return np.ascontiguousarray(np.asarray(view(tensor)))

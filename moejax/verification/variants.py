"""The variants of an experiment whose results must be the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn

from moejax.errors import UserError
from moejax.experiment import Experiment
from moejax.models.moe import MoE
from moejax.models.transformer import Transformer
from moejax.parallel.mesh import AXES, Mesh
from moejax.transport.all_gather import AllGather
from moejax.transport.all_to_all import AllToAll
from moejax.transport.least_loaded import LeastLoaded
from moejax.transport.local import Local

# Small minimal chunks, so that a small batch has experts move; little room takes several rounds.
TRANSPORTS: dict[str, Any] = {
    "local": Local(),
    "all_gather": AllGather(),
    "all_to_all": AllToAll(),
    "least_loaded": LeastLoaded(min_chunk=1, skip_below=1.0),
    "least_loaded, in rounds": LeastLoaded(min_chunk=1, alpha=1.0, num_slots=1, room=0.7),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute the same step.

    Attributes:
      name: what it is called in the table.
      experiment: with the mesh and the number of microbatches of the variant.
      model: with its transport and rematerialisation.
      padding: positions of padding behind every sequence.
    """

    name: str
    experiment: Experiment
    model: Transformer
    padding: int = 0

    @property
    def replayable(self) -> bool:
        """Whether another run can make the same choices: it has the same tokens, all in one."""
        return not self.padding and self.experiment.num_microbatches == 1


def variants(experiment: Experiment, model: Transformer, num_devices: int) -> Iterator[Variant]:
    """All variants: meshes, transports, kernels, remat, microbatches, padding, unrolled layers.

    What saves memory comes alone, and all of it together where experts are split.
    """
    alone = dataclasses.replace(experiment, mesh=Mesh(data=1), num_microbatches=1)
    for shape in meshes(num_devices):
        yield Variant(name=_stated(shape), experiment=on_mesh(alone, shape), model=model)
    if model.moe is not None and num_devices > 1:
        for shape in _expert_meshes(num_devices, model.moe.num_experts):
            for name, transport in TRANSPORTS.items():
                yield Variant(
                    name=f"{name} on {_stated(shape)}",
                    experiment=on_mesh(alone, shape),
                    model=with_ffn(model, transport=transport),
                )
    if hasattr(getattr(model.moe, "experts", None), "implementation"):
        defined = model.moe.experts.clone(implementation="reference")
        changed = with_ffn(model, experts=defined)
        yield Variant(name="experts by definition", experiment=alone, model=changed)
    if hasattr(model.block.attention, "implementation"):
        kernels = ("implementation", "full_implementation")
        found = [name for name in kernels if hasattr(model.block.attention, name)]
        attention = model.block.attention.clone(**dict.fromkeys(found, "reference"))
        changed = dataclasses.replace(model, block=model.block.clone(attention=attention))
        yield Variant(name="attention by definition", experiment=alone, model=changed)
    for remat in ("full", "none"):
        if remat != model.remat:
            changed = dataclasses.replace(model, remat=remat)
            yield Variant(name=f"remat {remat}", experiment=alone, model=changed)
    unrolled = dataclasses.replace(model, unroll=model.num_layers)
    yield Variant(name="unrolled layers", experiment=alone, model=unrolled)
    yield Variant(name="padding", experiment=alone, model=model, padding=8)
    microbatches = dataclasses.replace(alone, num_microbatches=2)
    yield Variant(name="2 microbatches", experiment=microbatches, model=model)
    if model.moe is not None and num_devices > 1:
        moved = with_ffn(model, transport=TRANSPORTS["least_loaded"])
        for shape in _expert_meshes(num_devices, model.moe.num_experts):
            yield Variant(
                name=f"least_loaded, remat full, 2 microbatches, padding on {_stated(shape)}",
                experiment=on_mesh(microbatches, shape),
                model=dataclasses.replace(moved, remat="full"),
                padding=8,
            )


def meshes(num_devices: int) -> list[dict[str, int]]:
    """Every way to give all devices to the axes, without axes of 1: one axis alone first."""
    ways = _factorisations(num_devices, len(AXES))
    shapes = [{axis: n for axis, n in zip(AXES, sizes, strict=True) if n > 1} for sizes in ways]
    return sorted(shapes, key=len)


def _factorisations(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every tuple of so many factors with this product, the first falling fastest."""
    if count == 1:
        yield (number,)
        return
    for first in range(number, 0, -1):
        if number % first == 0:
            for others in _factorisations(number // first, count - 1):
                yield (first, *others)


def on_mesh(experiment: Experiment, shape: dict[str, int]) -> Experiment:
    """The experiment on a mesh of this shape; axes that are not named are 1."""
    return dataclasses.replace(experiment, mesh=Mesh(**{"data": 1, **shape}))


def with_ffn(model: Transformer, **changes: Any) -> Transformer:
    """The model with fields of its MoE layers changed."""
    if not isinstance(model.block.ffn, MoE):
        raise UserError("the model has no MoE layers")
    ffn: nn.Module = model.block.ffn.clone(**changes)
    return dataclasses.replace(model, block=model.block.clone(ffn=ffn))


def _expert_meshes(num_devices: int, num_experts: int) -> list[dict[str, int]]:
    """The experts over as many devices as can share them; with another axis, if there is room."""
    ways = math.gcd(num_devices, num_experts)
    found = [{"expert": ways, "data": num_devices // ways}]
    if ways > 2 and ways % 2 == 0:
        found.append({"expert": ways // 2, "tensor": 2, "data": num_devices // ways})
    return found


def _stated(shape: dict[str, int]) -> str:
    return " ".join(f"{axis}={n}" for axis, n in shape.items() if n > 1) or "one device"

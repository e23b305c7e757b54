"""Which slice of which leaf lies where in which tensor, for one model and one architecture.

Layers of a kind are stacked in a leaf, so a leaf `[count, ...]` has one part for every layer, or
one for every expert of every layer. A part is small enough to be moved alone.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Container, Iterator

import jax

from moejax.balance.rule import CORRECTION_BIAS
from moejax.errors import UserError
from moejax.interop.architecture import Architecture
from moejax.interop.views import Form, Shape, View
from moejax.models.moe import without_place
from moejax.models.stack import stacked_layers
from moejax.models.transformer import Transformer
from moejax.models.variables import ADAPTERS
from moejax.types import named_leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """`leaf[index]` is what `view` shows of `tensor`, which has `tensor_shape`."""

    leaf: str
    index: tuple[int, ...]
    tensor: str
    tensor_shape: Shape
    view: View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of the variables, and how checkpoints store it.

    `path` begins with the collection: `params/layers_0/ffn/experts/gate`. `layers` are the global
    indices of the stacked layers, None for what is not in a layer.
    """

    path: str
    shape: Shape
    layers: tuple[int, ...] | None
    forms: tuple[Form, ...]

    def parts(self, present: Container[str] | None = None) -> Iterator[Part]:
        """Every part, in the first form of which a tensor is present, layer by layer.

        In the first form where none is, or where nothing is said about what is present.
        """
        for row in range(1 if self.layers is None else len(self.layers)):
            found = (
                parts
                for parts in (list(self._of_row(row, form)) for form in self.forms)
                if present is None or any(part.tensor in present for part in parts)
            )
            yield from next(found, None) or self._of_row(row, self.forms[0])

    def _of_row(self, row: int, form: Form) -> Iterator[Part]:
        stacked = self.layers is not None
        index = (row,) if stacked else ()
        layer = self.layers[row] if stacked else None
        rest = self.shape[len(index) :]
        experts = range(rest[0]) if form.per_expert else [None]
        for expert in experts:
            own = (expert,) if form.per_expert else ()
            yield Part(
                leaf=self.path,
                index=index + own,
                tensor=form.tensor.format(layer=layer, expert=expert),
                tensor_shape=form.view.tensor_shape(rest[len(own) :]),
                view=form.view,
            )


def leaves(model: Transformer, architecture: Architecture) -> list[Leaf]:
    """Every leaf of the model's variables that checkpoints store.

    Router state counts where it takes part in selection (a correction bias). What else balance
    rules remember are statistics of a training run.

    Raises:
      UserError: the architecture has no place for a leaf.
    """
    layers = stacked_layers(model.segments)
    out = []
    for path, leaf in abstract(model).items():
        collection, *names = path.split("/")
        if collection == ADAPTERS:
            continue  # whoever saves merges them
        own = layers.get(names[0])
        within = "/".join(names if own is None else names[1:])
        if collection == "router_state":
            within = without_place(within)
            if not within.endswith(CORRECTION_BIAS):
                continue
        if within not in architecture.tensors:
            raise UserError(f"{architecture.class_name} has no tensor for the leaf {path}")
        forms = architecture.tensors[within]
        out.append(Leaf(path=path, shape=leaf.shape, layers=own, forms=forms))
    return out


@functools.lru_cache(maxsize=8)
def abstract(model: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the model's variables; nothing is computed, but every layer is traced once."""
    return named_leaves(jax.eval_shape(model.init, jax.random.key(0)))


def by_tensor(leaves: list[Leaf]) -> dict[str, list[Part]]:
    """{tensor: the parts that fill it} in the forms that are written, layer by layer."""
    found: dict[str, list[Part]] = {}
    for leaf in leaves:
        for part in leaf.parts():
            found.setdefault(part.tensor, []).append(part)
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 10 behind layer 9."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]

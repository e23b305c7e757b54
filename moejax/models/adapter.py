"""What is added to a model's projections, and to which: the patterns of PEFT."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from moejax.adapters.lora import LoRA
from moejax.errors import UserError
from moejax.experts.dense import DenseGLU
from moejax.experts.glu import GLU
from moejax.experts.lora_glu import PROJECTIONS as EXPERT_PROJECTIONS
from moejax.layers.linear import Linear
from moejax.models.stack import Layer
from moejax.types import Context

ALL = "all-linear"
# What our modules are called in transformers.
_IN_TORCH = {
    "attention": "self_attn",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "query_down": "q_a_proj",
    "query_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_up": "kv_b_proj",
    "ffn": "mlp",
    "shared": "shared_expert",
    "shared_gate": "shared_expert_gate",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """Replaces the projections that `targets` name, or the modules that hold them.

    Attributes:
      targets: as PEFT's `target_modules`. A tuple of names, each a projection's path or an end of
        it that begins at a dot; or a regular expression for whole paths; or "all-linear". A path
        is layers.3.attention.query, or what transformers calls the same:
        model.layers.3.self_attn.q_proj.
      linear: prototype of the adapted projections, a `Linear`.
      mlp: prototype that replaces a dense MLP as a whole where targets reach its projections, a
        `DenseGLU` (`MixLoRA`); with None, its projections are replaced one by one.
      experts: prototype of the adapted routed experts, a `GLU`; needed where targets reach them.
      layers: global indices of the layers to adapt; None for all.
    """

    targets: tuple[str, ...] | str
    linear: Linear = dataclasses.field(default_factory=LoRA)
    mlp: DenseGLU | None = None
    experts: GLU | None = None
    layers: tuple[int, ...] | None = None

    def attach(
        self, layers: Sequence[Layer], x: jax.ShapeDtypeStruct, context: Context
    ) -> list[Layer]:
        """The layers with their projections replaced; those that differ by it differ in kind.

        `x` `[B, S, D]` is abstract; with `context` it is what a layer is called with.

        Raises UserError where a pattern matches no projection.
        """
        found = _projections(layers, x, context)
        self._check(found)
        out, placed = [], []
        for index, layer in enumerate(layers):
            chosen = tuple(name for name in found[index] if self._matches(index, name))
            kind = (*layer.kind, chosen)
            block = self._replaced(layer.block, chosen, "", placed) if chosen else layer.block
            out.append(dataclasses.replace(layer, block=block, kind=kind))
        self._check_placed(placed)
        return out

    @property
    def loss_weights(self) -> dict[str, float]:
        """{loss term that the adapters report: its weight}; UserError where two differ."""
        out: dict[str, float] = {}
        for name in ("linear", "mlp"):
            for term, weight in getattr(getattr(self, name), "loss_weights", {}).items():
                if out.setdefault(term, weight) != weight:
                    raise UserError(
                        f"adapter.linear and adapter.mlp give the loss term {term} the weights "
                        f"{out[term]} and {weight}: give it one"
                    )
        return out

    def _replaced(
        self, module: nn.Module, targets: tuple[str, ...], path: str, placed: list[nn.Module]
    ) -> nn.Module:
        """The module at `path` with the projections in its fields replaced by ours.

        What is put in is added to `placed`.
        """
        changes = {}
        for field in dataclasses.fields(module):
            value = getattr(module, field.name, None)
            if field.name == "parent" or not isinstance(value, nn.Module):
                continue
            where = f"{type(module).__name__}.{field.name}"
            own = f"{path}{field.name}/"
            reached = [name for name in targets if name.startswith(own)]
            if isinstance(value, Linear):
                new = _in_place_of(value, Linear, self.linear, where)
            elif not reached:
                continue
            elif isinstance(value, GLU):
                new = self._experts(value, where, reached[0])
            elif isinstance(value, DenseGLU) and self.mlp is not None:
                self._check_of_mlp(own, reached)
                new = _in_place_of(value, DenseGLU, self.mlp, where)
            else:
                changes[field.name] = self._replaced(value, targets, own, placed)
                continue
            changes[field.name] = new.clone(targets=targets)
            placed.append(new)
        return module.clone(**changes) if changes else module

    def _check_of_mlp(self, path: str, reached: Sequence[str]) -> None:
        """Raises UserError for a projection that is named and that `mlp` leaves as it is."""
        left = [name for name in reached if name.removeprefix(path) not in EXPERT_PROJECTIONS]
        if left and self.targets != ALL:
            raise UserError(
                f"adapter.targets name {left[0]}, and adapter.mlp, which takes the place of its "
                f"MLP, adapts {', '.join(EXPERT_PROJECTIONS)} alone: leave it out"
            )

    def _experts(self, value: GLU, where: str, reached: str) -> GLU:
        if self.experts is None:
            raise UserError(
                f"adapter.targets reaches the routed experts ({reached}): say how they are "
                "adapted, with adapter.experts=LoRAGLU(...), or name other targets"
            )
        return _in_place_of(value, GLU, self.experts, where)

    def _check_placed(self, placed: Sequence[nn.Module]) -> None:
        """Raises UserError where a loss, or a whole MLP, was asked for and put nowhere."""
        for name in ("linear", "mlp"):
            ours = getattr(self, name)
            asked = name == "mlp" or getattr(ours, "loss_weights", {})
            if ours is not None and asked and not any(type(p) is type(ours) for p in placed):
                raise UserError(
                    f"adapter.{name} is a {type(ours).__name__}, and adapter.targets reach no "
                    f"{'dense MLP' if name == 'mlp' else 'projection for it'}: name other targets "
                    "or leave it out"
                )

    def _matches(self, index: int, name: str) -> bool:
        return self._adapts(index) and any(_match(p, index, name) for p in self._patterns)

    def _adapts(self, index: int) -> bool:
        return self.layers is None or index in self.layers

    @property
    def _patterns(self) -> tuple[str | re.Pattern, ...]:
        if not isinstance(self.targets, str):
            return self.targets
        if self.targets == ALL:
            return (re.compile(".*"),)
        try:
            return (re.compile(self.targets),)
        except re.error as error:
            raise UserError(
                f"adapter.targets={self.targets!r} is no regular expression: {error}"
            ) from error

    def _check(self, found: Sequence[Sequence[str]]) -> None:
        if not self._patterns:
            raise UserError("adapter.targets is empty: name projections, such as q_proj")
        if beyond := [i for i in self.layers or () if not 0 <= i < len(found)]:
            raise UserError(f"adapter.layers names layer {beyond[0]} of {len(found)}")
        for pattern in self._patterns:
            adapted = (i for i in range(len(found)) if self._adapts(i))
            if any(_match(pattern, i, name) for i in adapted for name in found[i]):
                continue
            text = pattern if isinstance(pattern, str) else pattern.pattern
            known = sorted({word for names in found for n in names for word in _last_words(n)})
            near = difflib.get_close_matches(text, known, n=3, cutoff=0.3) or known
            raise UserError(
                f"adapter.targets: {text!r} matches no projection of the model; there are "
                f"{', '.join(near)}"
            )


def _match(pattern: str | re.Pattern, index: int, name: str) -> bool:
    for path in _paths(index, name):
        if isinstance(pattern, re.Pattern):
            if pattern.fullmatch(path):
                return True
        elif path == pattern or path.endswith(f".{pattern}"):
            return True
    return False


def _paths(index: int, name: str) -> tuple[str, str]:
    """The whole path of a projection of a layer: ours, and the one in transformers."""
    words = name.split("/")
    in_torch = [_IN_TORCH.get(word, word) for word in words]
    return (
        ".".join(["layers", str(index), *words]),
        ".".join(["model.layers", str(index), *in_torch]),
    )


def _last_words(name: str) -> tuple[str, str]:
    last = name.split("/")[-1]
    return last, _IN_TORCH.get(last, last)


def _projections(
    layers: Sequence[Layer], x: jax.ShapeDtypeStruct, context: Context
) -> list[list[str]]:
    """The paths within its layer of every projection, layer by layer; nothing is computed."""
    known: dict[tuple, list[str]] = {}
    for layer in layers:
        if layer.kind not in known:
            known[layer.kind] = _called(layer.block, x, context)
    return [known[layer.kind] for layer in layers]


def _called(block: nn.Module, x: jax.ShapeDtypeStruct, context: Context) -> list[str]:
    found: list[str] = []

    def note(call, args, kwargs, called):
        path = "/".join(called.module.path)
        if called.method_name == "__call__" and isinstance(called.module, Linear):
            found.append(path)
        elif called.method_name == "__call__" and isinstance(called.module, GLU):
            found.extend(f"{path}/{name}" for name in EXPERT_PROJECTIONS)
        return call(*args, **kwargs)

    def init(key: Array, x: Array) -> Any:
        with nn.intercept_methods(note):
            return block.init(key, x, context)

    jax.eval_shape(init, jax.random.key(0), x)
    return sorted(set(found))


def _in_place_of(old: nn.Module, plain: type, prototype: nn.Module, where: str) -> nn.Module:
    """A copy of `prototype` with the settings of `old`."""
    if type(old) is not plain:
        raise UserError(
            f"{where} is a {type(old).__name__} already: leave out adapter, or make it a "
            f"{plain.__name__}"
        )
    names = {field.name for field in dataclasses.fields(plain)} - {"parent", "name"}
    return prototype.clone(**{name: getattr(old, name) for name in names})

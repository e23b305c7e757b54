"""Which slice of which leaf of a mixture lies in which tensor of MoE-PEFT.

Layer i of MoLA has `mola.layers.i.mlp.up_proj.moe_gate.weight [E, in]` for every adapted module,
and of expert e `mola.layers.i.mlp.up_proj.experts.e.lora_A.weight [r, in]` and `lora_B.weight
[out, r]`; DynMoLE has the same. MixLoRA has such experts in the MLP's modules alone, one
`mixlora.layers.i.mlp.moe_gate.weight` for all of them, and plain
`mixlora.layers.i.self_attn.q_proj.lora_A.weight`. Ours are the transposes, stacked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from moejax.errors import UserError
from moejax.interop.architecture import Architecture
from moejax.interop.mapping import Part, abstract
from moejax.interop.moe_peft_config import ATTENTION_MODULES, MLP_MODULES
from moejax.interop.views import TRANSPOSED, Shape, View
from moejax.models.stack import stacked_layers
from moejax.models.transformer import Transformer
from moejax.models.variables import ADAPTERS

_GATE = "/routing/gate/kernel"
# Factors of a projection, and of one of a MixLoRA's.
_BANK = re.compile(r"(.+?)(?:/adapters|_adapters)/([ab])")
_PLAIN = re.compile(r"(.+)/([ab])")
_ATTENTION = rf"self_attn\.(?:{'|'.join(ATTENTION_MODULES)})"
_MLP = rf"mlp\.(?:{'|'.join(MLP_MODULES)})"
_TENSOR = re.compile(rf"model\.layers\.\{{layer\}}\.({_ATTENTION}|{_MLP})\.weight")


def is_mixture(model: Transformer) -> bool:
    """Whether the model's adapter weighs several for each projection."""
    return any(leaf.endswith(_GATE) for leaf in adapter_leaves(model))


def adapter_leaves(model: Transformer) -> dict[str, Shape]:
    """{path of a leaf that the adapter adds, lora/...: its shape}."""
    found = abstract(model).items()
    return {path: leaf.shape for path, leaf in found if path.startswith(f"{ADAPTERS}/")}


def module_of(path: str, architecture: Architecture) -> str | None:
    """`self_attn.q_proj` for attention/query; None where MoE-PEFT has no name for the module."""
    forms = architecture.tensors.get(f"{path}/kernel", ())
    match = next((_TENSOR.fullmatch(form.tensor) for form in forms), None)
    return match and match[1]


def parts(model: Transformer, architecture: Architecture, prefix: str) -> list[Part]:
    """Every tensor of the model's adapter, in a file whose names begin with `prefix`.

    Raises UserError where MoE-PEFT has no name for a module, or not for it in every layer.
    """
    stacks, shapes, found = stacked_layers(model.segments), adapter_leaves(model), []
    layers: dict[str, set[int]] = {}
    for leaf, shape in shapes.items():
        stack = leaf.split("/")[1]
        for index, name, view in _of_one_layer(leaf, shapes, architecture):
            layers.setdefault(name, set()).update(stacks[stack])
            found += [
                Part(
                    leaf=leaf,
                    index=(row, *index),
                    tensor=f"{prefix}.layers.{layer}.{name}.weight",
                    tensor_shape=view.tensor_shape(shape[1 + len(index) :]),
                    view=view,
                )
                for row, layer in enumerate(stacks[stack])
            ]
    for name, own in layers.items():
        if lost := sorted(set(range(model.num_layers)) - own):
            raise UserError(
                f"layer {lost[0]} has no {name}, and others have: MoE-PEFT adapts the same modules "
                "in every layer, so leave out adapter.layers and name what all layers have"
            )
    return found


def target_modules(model: Transformer, architecture: Architecture) -> tuple[str, ...]:
    """The names q_proj and others of what the model's adapter reaches, sorted."""
    names = {
        _module(_projection(leaf), architecture).split(".")[-1]
        for leaf in adapter_leaves(model)
        if not leaf.endswith(_GATE)
    }
    return tuple(sorted(names))


def _of_one_layer(
    leaf: str, shapes: Mapping[str, Shape], architecture: Architecture
) -> list[tuple[tuple[int, ...], str, View]]:
    """(index within the layer's slice of the leaf, name within the layer, view) of its tensors."""
    if leaf.endswith(_GATE):
        owner = leaf.removesuffix(_GATE)
        own = f"{owner}/adapters/a" in shapes
        inside = owner if own else f"{owner}/gate"  # MixLoRA's is the MLP that holds the gate
        name = _module(inside.split("/", 2)[2], architecture)
        return [((), f"{name if own else name.split('.')[0]}.moe_gate", TRANSPOSED)]
    path, factor = _projection(leaf), leaf[-1]
    name = _module(path, architecture)
    b_view = architecture.tensors[f"{path}/kernel"][0].view
    view = TRANSPOSED if factor == "a" else b_view
    if not _BANK.fullmatch(leaf):
        return [((), f"{name}.lora_{factor.upper()}", view)]
    experts = range(shapes[leaf][1])
    return [((e,), f"{name}.experts.{e}.lora_{factor.upper()}", view) for e in experts]


def _projection(leaf: str) -> str:
    """attention/query of a factor's leaf."""
    match = _BANK.fullmatch(leaf) or _PLAIN.fullmatch(leaf)
    return (match[1] if match else leaf).split("/", 2)[2]


def _module(path: str, architecture: Architecture) -> str:
    name = module_of(path, architecture)
    if name is None:
        raise UserError(
            f"MoE-PEFT has no name for the adapter of {path.replace('/', '.')}: it has "
            f"{', '.join(ATTENTION_MODULES)} of attention and {', '.join(MLP_MODULES)} of dense "
            "MLPs. Name others in adapter.targets"
        )
    return name

"""A model's adapter in the words of PEFT: its config and its tensors."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from moejax.adapters.lora import LoRA, RsLoRA
from moejax.errors import UserError
from moejax.experts.lora_glu import LoRAGLU, RsLoRAGLU
from moejax.interop.architecture import Architecture
from moejax.interop.lora_factors import Projection, everything, projections
from moejax.interop.peft_config import PeftConfig
from moejax.interop.peft_sites import Factors, FusedSite, Site, equal_bits, fused_sites, is_zero
from moejax.models.adapter import Adapter
from moejax.models.transformer import Transformer

_log = logging.getLogger(__name__)

_USES_ROOT = {LoRA: False, RsLoRA: True, LoRAGLU: False, RsLoRAGLU: True}
# In the modules of a mixture-of-experts model PEFT takes these for the routed experts, as which
# they were modules once. A parameter of the same module is taken as it is named.
_TAKEN_FOR_EXPERTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def content(
    model: Transformer, arrays: Mapping[str, np.ndarray], architecture: Architecture
) -> tuple[PeftConfig, dict[str, np.ndarray]]:
    """(what adapter_config.json says, the tensors by name) of a model's adapter.

    Args:
      model: with an adapter.
      arrays: {path of a stacked leaf: values}, all of the adapter's.
      architecture: of the model.

    Raises UserError where PEFT has no words for the adapter.
    """
    own = projections(model, architecture)
    use_rslora = _check_kinds(model.adapter, own)
    sites = fused_sites(own)
    factors = {site: _factors(site, arrays) for site in sites}
    ranks = _stored_ranks(factors)
    config = _config(model.adapter, sites, ranks, use_rslora=use_rslora)
    known = fused_sites(projections(everything(model), architecture))
    config = dataclasses.replace(config, **_targets(sites, known))
    if config.lora_dropout and config.target_parameters:
        _log.warning(
            "lora_dropout is written as 0 and not as %g: PEFT has none where it adapts parameters "
            "(%s). It takes part in training alone",
            config.lora_dropout,
            config.target_parameters[0],
        )
        config = dataclasses.replace(config, lora_dropout=0.0)
    tensors = {}
    for site, own_factors in factors.items():
        tensors |= zip(site.keys, site.pack(own_factors, ranks[site]), strict=True)
    return config, tensors


def _check_kinds(adapter: Adapter, own: Sequence[Projection]) -> bool:
    """Whether scales divide by the root of the rank: in all parts or in none."""
    routed = {one.num_experts is not None for one in own}
    used = [part for part, is_routed in _parts(adapter) if is_routed in routed]
    for part in used:
        if type(part) not in _USES_ROOT:
            raise UserError(
                f"PEFT has no words for a {type(part).__name__} of moejax: it is no plain LoRA"
            )
    for one in own:
        if one.shared:
            raise UserError(
                f"all experts of {one.name} share a factor (adapter.experts), where PEFT has one "
                "for each: merge with `moejax export-hf`"
            )
    uses_root = {_USES_ROOT[type(part)] for part in used}
    if len(uses_root) > 1:
        names = " and ".join(type(part).__name__ for part in used)
        raise UserError(
            f"adapter has {names}, but PEFT has one use_rslora for the whole adapter: take LoRA "
            "with LoRAGLU or RsLoRA with RsLoRAGLU, or merge with `moejax export-hf`"
        )
    return uses_root.pop()


def _parts(adapter: Adapter) -> list[tuple[LoRA | LoRAGLU, bool]]:
    return [(adapter.linear, False), (adapter.experts, True)]


def _factors(site: Site, arrays: Mapping[str, np.ndarray]) -> Factors:
    return {
        one.path: (arrays[one.leaf("a")][one.row], arrays[one.leaf("b")][one.row])
        for one in site.projections
    }


def _stored_ranks(factors: Mapping[Site, Factors]) -> dict[Site, int]:
    """{site: the rank of its pair}, in all layers the same."""
    own = {site: site.projections[0].rank for site in factors}
    fused = [s for s in factors if isinstance(s, FusedSite) and len(s.projections) > 1]
    alone = [s for s in factors if isinstance(s, FusedSite) and len(s.projections) == 1]
    if not all(equal_bits([a for a, _ in factors[site].values()]) for site in fused):
        return own | {site: own[site] * len(site.projections) for site in fused}
    # With one A for gate and up, reading may have filled up the others (`peft_reading`).
    if fused and alone and own[alone[0]] % 2 == 0:
        half = own[alone[0]] // 2
        pairs = [pair for site in alone for pair in factors[site].values()]
        if all(is_zero(a[:, :, half:]) and is_zero(b[:, half:]) for a, b in pairs):
            return own | dict.fromkeys(alone, half)
    return own


def _config(
    adapter: Adapter, sites: Sequence[Site], ranks: Mapping[Site, int], *, use_rslora: bool
) -> PeftConfig:
    """Without targets. What most have is `r` and `lora_alpha`, the experts' are patterns."""
    plain = any(site.projections[0].num_experts is None for site in sites)
    first = adapter.linear if plain else adapter.experts
    rank_pattern, alpha_pattern = {}, {}
    for site in sites:
        if not isinstance(site, FusedSite):
            continue
        times = ranks[site] / adapter.experts.rank
        # So that the scale stays what it is.
        alpha = adapter.experts.alpha * (math.sqrt(times) if use_rslora else times)
        if ranks[site] != first.rank:
            rank_pattern[re.escape(site.within)] = ranks[site]
        if alpha != first.alpha:
            alpha_pattern[re.escape(site.within)] = alpha
    return PeftConfig(
        r=first.rank,
        lora_alpha=float(first.alpha),
        lora_dropout=float(first.dropout) if plain else 0.0,
        use_rslora=use_rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )


def _targets(sites: Sequence[Site], known: Sequence[Site]) -> dict[str, tuple | None]:
    """The fields of `PeftConfig` by which PEFT reaches these sites and no others."""
    has_experts = any(site.projections[0].num_experts is not None for site in known)

    def is_module(site: Site) -> bool:
        taken = has_experts and site.within.endswith(_TAKEN_FOR_EXPERTS)
        return not isinstance(site, FusedSite) and not taken

    modules, layers = _modules(
        [site for site in sites if is_module(site)], [site for site in known if is_module(site)]
    )
    parameters = []
    for name in dict.fromkeys(site.within for site in sites if not is_module(site)):
        chosen, there = ([s for s in some if s.within == name] for some in (sites, known))
        # Layers cannot be chosen for parameters but by whole names.
        everywhere = len(chosen) == len(there)
        parameters += [name] if everywhere else [site.parameter for site in chosen]
    return {
        "target_modules": modules,
        "layers_to_transform": layers,
        "target_parameters": tuple(sorted(parameters)),
    }


def _modules(
    sites: Sequence[Site], known: Sequence[Site]
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """`target_modules` and `layers_to_transform`."""
    names, layers = {site.within for site in sites}, {site.layer for site in sites}
    there = [site for site in known if site.within in names]
    if len(sites) != len([site for site in there if site.layer in layers]):
        return tuple(sorted(site.module for site in sites)), None
    every_name = [name.removesuffix(".weight") for name in {site.within for site in known}]
    short = []
    for name in names:
        words = name.removesuffix(".weight").split(".")
        alike = [other for other in every_name if other.split(".")[-1] == words[-1]]
        short.append(words[-1] if len(alike) == 1 else ".".join(words))
    return tuple(sorted(short)), None if len(sites) == len(there) else tuple(sorted(layers))

"""A PEFT adapter in a folder: the `Adapter` that it is, and its factors."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence

import fiddle as fdl
import jax.numpy as jnp
import numpy as np

from moejax.adapters.lora import LoRA, RsLoRA
from moejax.errors import UserError
from moejax.experts.lora_glu import LoRAGLU, RsLoRAGLU
from moejax.interop import peft_config
from moejax.interop.architecture import Architecture
from moejax.interop.lora_factors import Projection, everything, projections
from moejax.interop.peft_config import PeftConfig
from moejax.interop.peft_sites import Pair, Site, fused_sites, sites_per_expert
from moejax.interop.tensor_files import TensorFiles
from moejax.models.adapter import Adapter
from moejax.models.transformer import Transformer

WEIGHTS = "adapter_model.safetensors"
_CLOSE = 1e-9  # relative; of factors' scales, which only square roots can round

At = tuple[int, str]  # layer and path within it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """An adapter.

    Attributes:
      directory: where it was.
      architecture: of the base model.
      adapter: its config.
      factors: {(layer, path within it): A and B as ours, experts stacked}.
    """

    directory: pathlib.Path
    architecture: Architecture
    adapter: fdl.Config
    factors: dict[At, Pair]


def read(directory: pathlib.Path, model: Transformer, architecture: Architecture) -> Found:
    """The adapter in `directory`, for a base model.

    Raises UserError where it is incomplete, of another model, or beyond what `Adapter` expresses.
    """
    config = peft_config.read(directory / peft_config.FILE)
    files = TensorFiles(directory, single=WEIGHTS)
    known = projections(everything(model), architecture)
    sites = _sites(directory, config, files, known)
    names = {site: config.named(site) or "" for site in sites}
    pairs = {site: _pair(files, site, config.rank(name)) for site, name in names.items()}
    plain = [site for site in sites if _is_plain(site)]
    routed = [site for site in sites if not _is_plain(site)]
    linear = _agreed(directory, config, {names[s]: _numbers(config, names[s]) for s in plain})
    rank = _experts_rank(directory, config, {s: names[s] for s in routed}, pairs)
    of_experts = {names[s]: _numbers(config, names[s], rank) for s in routed}
    experts = _agreed(directory, config, of_experts)
    targets, layers = _targets([one for site in sites for one in site.projections], known)
    adapter = fdl.Config(Adapter, targets=targets)
    if layers is not None:
        adapter.layers = layers
    if linear is not None:
        kind = RsLoRA if config.use_rslora else LoRA
        numbers = {"rank": linear[0], "alpha": linear[1], "dropout": config.lora_dropout}
        adapter.linear = fdl.Config(kind, **numbers)
    if experts is not None:
        kind = RsLoRAGLU if config.use_rslora else LoRAGLU
        adapter.experts = fdl.Config(kind, rank=experts[0], alpha=experts[1])
    factors = _factors(pairs, {s: linear[0] if _is_plain(s) else rank for s in sites})
    return Found(directory=directory, architecture=architecture, adapter=adapter, factors=factors)


def _is_plain(site: Site) -> bool:
    return site.projections[0].num_experts is None


def leaves(found: Found, model: Transformer) -> dict[str, np.ndarray]:
    """{path of a stacked leaf: its values}, for a model with this adapter.

    Raises UserError where the model has another.
    """
    _check_same(found, model)
    rows: dict[str, list[np.ndarray]] = {}
    for one in projections(model, found.architecture):
        for factor, values in zip("ab", found.factors[one.layer, one.path], strict=True):
            rows.setdefault(one.leaf(factor), []).append(values)
    return {path: _stacked(values) for path, values in rows.items()}


def _sites(
    directory: pathlib.Path, config: PeftConfig, files: TensorFiles, known: Sequence[Projection]
) -> list[Site]:
    """What the config targets; the file holds the pairs of these and nothing else."""
    split = [site for site in sites_per_expert(known) if config.named(site)]
    is_split = any(site.expert is not None and site.keys[0] in files for site in split)
    if not is_split:
        fused = [site for site in fused_sites(known) if config.named(site)]
        split = fused_sites([one for site in fused for one in site.projections])
    keys = {key: site for site in split for key in site.keys}
    if unknown := sorted(files.names - keys.keys()):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"{directory / WEIGHTS} holds {unknown[0]}{more}, which is no LoRA of a projection "
            f"that {peft_config.FILE} targets in this base model: it is an adapter of another "
            "model, or of a part that moejax does not adapt"
        )
    if missing := [key for key in keys if key not in files]:
        raise UserError(
            f"{directory / WEIGHTS} lacks {missing[0]}, which {peft_config.FILE} targets in this "
            "base model"
        )
    if not split:
        raise UserError(f"{directory} adapts no projection of this base model")
    return split


def _pair(files: TensorFiles, site: Site, rank: int) -> Pair:
    shapes = site.shapes(rank)
    for key, shape in zip(site.keys, shapes, strict=True):
        if files.shape(key) != shape:
            raise UserError(
                f"{files.file(key)}: {key} has shape {list(files.shape(key))}, but this base model "
                f"and the rank {rank} ask for {list(shape)}"
            )
    first, second = (files.read(key, shape) for key, shape in zip(site.keys, shapes, strict=True))
    return first, second


def _numbers(config: PeftConfig, name: str, rank: int | None = None) -> tuple[int, float]:
    """(rank, alpha) of a target, or those at which `rank` of its stored ranks have its scale."""
    stored, alpha = config.rank(name), config.alpha(name)
    if rank is None or stored == rank:
        return stored, alpha
    if not config.use_rslora:
        return rank, alpha * rank / stored
    # Whoever wrote it multiplied by a square root, which leaves an error in the 16th digit.
    return rank, float(f"{alpha * math.sqrt(rank / stored):.12g}")


def _agreed(
    directory: pathlib.Path, config: PeftConfig, numbers: dict[str, tuple[int, float]]
) -> tuple[int, float] | None:
    """The one (rank, alpha) of all; None where there is none."""
    stated = lambda name: f"{name} rank {config.rank(name)} and scale {config.scale(name):g}"
    for name, (rank, alpha) in numbers.items():
        first, own = next(iter(numbers.items()))
        if rank != own[0] or not math.isclose(alpha, own[1], rel_tol=_CLOSE):
            raise UserError(
                f"{directory / peft_config.FILE} gives {stated(first)}, but {stated(name)}: moejax "
                "has one of each for all routed experts, and one for all other projections"
            )
    return next(iter(numbers.values()), None)


def _experts_rank(
    directory: pathlib.Path, config: PeftConfig, names: dict[Site, str], pairs: dict[Site, Pair]
) -> int:
    """The rank of every projection of the experts; 0 where none is adapted.

    It is that of the parameters that hold one projection, with which `gate_up_proj` has twice as
    much for two, or as much for both together. Where it has twice as much for both together, as
    PEFT trains adapters that name gate_proj, that is the rank, and the others are filled up.
    """
    alone = {config.rank(name) for site, name in names.items() if len(site.projections) == 1}
    fused = {site: config.rank(name) for site, name in names.items() if len(site.projections) > 1}
    apart = all(site.is_separate(pairs[site]) for site in fused)
    own = {rank // (len(site.projections) if apart else 1) for site, rank in fused.items()}
    rank = min(alone or own, default=0)
    if fused and not apart and {rank * len(site.projections) for site in fused} == own:
        return max(own)
    for site, stored in fused.items():
        if stored not in (rank, rank * len(site.projections)):
            raise UserError(
                f"{directory / peft_config.FILE} gives {names[site]} rank {stored} and other "
                f"matrices of the experts {rank}: moejax gives all of them one rank"
            )
    return rank


def _factors(pairs: dict[Site, Pair], ranks: dict[Site, int]) -> dict[At, Pair]:
    found: dict[At, Pair] = {}
    of_experts: dict[At, list[Pair]] = {}
    for site, pair in pairs.items():
        for path, own in site.unpack(pair, ranks[site]).items():
            if site.expert is None:
                found[site.layer, path] = own
            else:
                of_experts.setdefault((site.layer, path), []).append(own)
    for at, own in of_experts.items():
        found[at] = _stacked([a for a, _ in own]), _stacked([b for _, b in own])
    return found


def _targets(
    chosen: Sequence[Projection], known: Sequence[Projection]
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """`targets` and `layers` of the `Adapter` that reaches these projections and no others."""
    wanted = {(one.layer, one.path) for one in chosen}
    paths, layers = ({at[i] for at in wanted} for i in (1, 0))
    there = [(one.layer, one.path) for one in known if one.path in paths]
    if wanted != {at for at in there if at[0] in layers}:
        return tuple(sorted(one.name for one in chosen)), None
    names = tuple(path.replace("/", ".") for path in sorted(paths))
    return names, None if len(wanted) == len(there) else tuple(sorted(layers))


def _check_same(found: Found, model: Transformer) -> None:
    own = {(one.layer, one.path): one for one in projections(model, found.architecture)}
    stated = found.adapter
    theirs = fdl.build(stated)
    if different := sorted(own.keys() ^ found.factors.keys()):
        layer, path = different[0]
        which = "adapter" if different[0] in own else "adapter in the folder"
        raise UserError(
            f"{found.directory} and the model's adapter differ: only the {which} reaches "
            f"layers.{layer}.{path.replace('/', '.')}"
        )
    if shared := [one.name for one in own.values() if one.shared]:
        raise UserError(
            f"all experts of {shared[0]} share a factor (adapter.experts), where PEFT has one for "
            "each: attach the adapter that the folder describes"
        )
    for name in ("linear", "experts"):
        ours, other = getattr(model.adapter, name), getattr(theirs, name)
        if other is None or (name == "linear" and "linear" not in fdl.ordered_arguments(stated)):
            continue
        if type(ours) is not type(other) or not _same_numbers(ours, other):
            raise UserError(
                f"{found.directory} holds a {_numbers_of(other)}, and adapter.{name} is a "
                f"{_numbers_of(ours)}"
            )


def _same_numbers(ours: LoRA | LoRAGLU, other: LoRA | LoRAGLU) -> bool:
    return ours.rank == other.rank and math.isclose(ours.scale, other.scale, rel_tol=_CLOSE)


def _numbers_of(module: LoRA | LoRAGLU) -> str:
    return f"{type(module).__name__} of rank {module.rank} and scale {module.scale:g}"


def _stacked(values: Sequence[np.ndarray]) -> np.ndarray:
    """In a dtype that holds all exactly."""
    dtype = functools.reduce(jnp.promote_types, [x.dtype for x in values])
    return np.stack([x.astype(dtype) for x in values])

"""A mixture in the words of MoE-PEFT and in ours: `MoePeftConfig` and `Adapter`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import fiddle as fdl
import flax.linen as nn
from jax.nn import initializers

from moejax.adapters.dynmole import DynMoLE, EntropySwitch
from moejax.adapters.lora import LoRA, RsLoRA
from moejax.adapters.mixed import MixedLinear
from moejax.errors import UserError
from moejax.experts.dense import DenseGLU
from moejax.experts.mixlora import MixLoRA
from moejax.interop import moe_peft_config
from moejax.interop.architecture import Architecture
from moejax.interop.lora_factors import everything, projections
from moejax.interop.moe_peft_config import (
    DYNMOLE,
    MIXLORA,
    MLP_MODULES,
    MOLA,
    EntropyGate,
    LoraNumbers,
    MoePeftConfig,
    TopKGate,
)
from moejax.interop.moe_peft_parts import adapter_leaves, module_of, target_modules
from moejax.layers.mixing.bank import LoRABank, RsLoRABank
from moejax.layers.mixing.granularity import Token
from moejax.layers.mixing.router import Router, TopK
from moejax.models.adapter import Adapter
from moejax.models.transformer import Transformer

_CLOSE = 1e-9  # relative; of scales, which only square roots can round
_PLAIN = {LoRA: False, RsLoRA: True}
_BANKS = {LoRABank: False, RsLoRABank: True}


def adapter_of(
    config: MoePeftConfig, model: Transformer, architecture: Architecture
) -> fdl.Config[Adapter]:
    """The config of the `Adapter` that `config` is, for a base model.

    Raises UserError where the base has not the modules, or where experts would have another
    activation than its MLPs.
    """
    adapter = fdl.Config(Adapter, targets=_targets(config, model, architecture))
    bank = _factors(config.experts, RsLoRABank if config.experts.use_rslora else LoRABank)
    bank.num_adapters = config.num_experts
    gate = config.gate
    if isinstance(gate, EntropyGate):
        router = fdl.Config(
            EntropySwitch,
            k=gate.keep_top_k,
            top_p=gate.top_p,
            threshold=gate.entropy_threshold,
            q=gate.entropy_index,
            entropy_weight=gate.entropy_weight,
            balance_weight=gate.balance_weight,
        )
        adapter.linear = fdl.Config(DynMoLE, router=router, bank=bank)
        return _with_init(adapter, router, config)
    router = fdl.Config(TopK, k=gate.top_k, balance_weight=gate.balance_weight)
    if config.peft_type == MOLA:
        adapter.linear = fdl.Config(MixedLinear, router=router, bank=bank)
        return _with_init(adapter, router, config)
    _check_activation(config, model)
    adapter.mlp = fdl.Config(MixLoRA, router=router, bank=bank)
    if config.plain is not None:
        adapter.linear = _factors(config.plain, RsLoRA if config.plain.use_rslora else LoRA)
    return _with_init(adapter, router, config)


def config_of(model: Transformer, architecture: Architecture) -> MoePeftConfig:
    """The model's adapter in their words; UserError where they have none for it."""
    adapter = model.adapter
    if adapter.mlp is None:
        mixture, kind = adapter.linear, MOLA
        _check_kind(mixture, (MixedLinear, DynMoLE))
    else:
        mixture, kind = adapter.mlp, MIXLORA
        _check_kind(mixture, (MixLoRA,))
        if any("/adapters/" in leaf for leaf in adapter_leaves(model)):
            raise UserError(
                f"adapter.linear is a {type(adapter.linear).__name__} beside a MixLoRA, where "
                "MoE-PEFT has plain LoRA: take LoRA or RsLoRA"
            )
    router, bank = mixture.router, mixture.bank
    gate = _gate(router)
    if isinstance(gate, EntropyGate):
        kind = DYNMOLE
        if adapter.mlp is not None:
            raise UserError("MoE-PEFT has no MixLoRA with an EntropySwitch: take TopK")
    _check_kind(bank, tuple(_BANKS))
    targets, plain = target_modules(model, architecture), None
    if kind == MIXLORA and set(targets) - set(MLP_MODULES):
        _check_kind(adapter.linear, tuple(_PLAIN))
        plain = _numbers(adapter.linear, use_rslora=_PLAIN[type(adapter.linear)])
    return MoePeftConfig(
        peft_type=kind,
        target_modules=targets,
        plain=plain,
        experts=_numbers(bank, use_rslora=_BANKS[type(bank)]),
        num_experts=bank.num_adapters,
        gate=gate,
    )


def check_same(config: MoePeftConfig, model: Transformer, architecture: Architecture) -> None:
    """Raises UserError where the model's adapter computes another mixture than `config`.

    What takes part in training alone may differ: dropout, and the losses' weights.
    """
    stated, own = _computed(config), _computed(config_of(model, architecture))
    for name, value in stated.items():
        other = own.get(name)
        same = value == other
        if isinstance(value, float) and isinstance(other, float):
            same = math.isclose(value, other, rel_tol=_CLOSE)
        if not same:
            raise UserError(
                f"{moe_peft_config.FILE} states {name} {_shown(value)}, and the model's adapter "
                f"has {_shown(other)}: attach the adapter that the folder describes"
            )


def _computed(config: MoePeftConfig) -> dict:
    gate = dataclasses.asdict(config.gate)
    values = {"peft_type": config.peft_type, "target_modules": config.target_modules}
    values |= {"num_experts": config.num_experts}
    values |= {name: x for name, x in gate.items() if not name.endswith("_weight")}
    for name, numbers in (("r", config.experts), ("r of attention", config.plain)):
        if numbers is not None:
            values |= {name: numbers.r, name.replace("r", "scale", 1): numbers.scale}
    return values


def _shown(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _targets(
    config: MoePeftConfig, model: Transformer, architecture: Architecture
) -> tuple[str, ...]:
    layers: dict[str, set[int]] = {}
    paths: dict[str, str] = {}
    for one in projections(everything(model), architecture):
        module = module_of(one.path, architecture)
        if one.num_experts is None and module is not None:
            name = module.split(".")[-1]
            layers.setdefault(name, set()).add(one.layer)
            paths[name] = one.path.replace("/", ".")
    for name in config.target_modules:
        if len(layers.get(name, ())) != model.num_layers:
            where = "in every layer" if name in layers else "at all"
            raise UserError(
                f"target_modules names {name}, which this base model does not have {where}: it is "
                "an adapter of another model, or of a part that moejax does not adapt"
            )
    return tuple(sorted(paths[name] for name in config.target_modules))


def _check_activation(config: MoePeftConfig, model: Transformer) -> None:
    dense = [x for x in (model.block.ffn, model.dense_ffn) if isinstance(x, DenseGLU)]
    for mlp in dense:
        if config.act_fn not in (None, mlp.activation):
            raise UserError(
                f"act_fn={config.act_fn!r} is not supported where the base model's MLPs have "
                f"{mlp.activation!r}"
            )


def _factors(numbers: LoraNumbers, kind: type) -> fdl.Config:
    return fdl.Config(kind, rank=numbers.r, alpha=numbers.lora_alpha, dropout=numbers.lora_dropout)


def _with_init(
    adapter: fdl.Config[Adapter], router: fdl.Config, config: MoePeftConfig
) -> fdl.Config[Adapter]:
    """With what fresh gates would be drawn from; `router` is a part of `adapter`."""
    if config.peft_type == MIXLORA:
        stddev = 0.02 if config.init_range is None else float(config.init_range)
        router.gate_init = fdl.Config(initializers.normal, stddev=stddev)
    elif config.init_range is not None:  # a square of kaiming_uniform's a
        scale = 2 / (1 + config.init_range)
        router.gate_init = fdl.Config(
            initializers.variance_scaling, scale=scale, mode="fan_in", distribution="uniform"
        )
    return adapter


def _gate(router: Router) -> TopKGate | EntropyGate:
    _check_kind(router, (TopK, EntropySwitch))
    if type(router.granularity) is not Token:
        raise UserError(
            f"MoE-PEFT weighs adapters for every token, and router.granularity is a "
            f"{type(router.granularity).__name__}"
        )
    if isinstance(router, TopK):
        return TopKGate(top_k=router.k, balance_weight=router.balance_weight)
    return EntropyGate(
        keep_top_k=router.k,
        top_p=router.top_p,
        entropy_threshold=router.threshold,
        entropy_index=router.q,
        balance_weight=router.balance_weight,
        entropy_weight=router.entropy_weight,
    )


def _numbers(module: nn.Module, *, use_rslora: bool) -> LoraNumbers:
    return LoraNumbers(
        r=module.rank,
        lora_alpha=float(module.alpha),
        lora_dropout=float(module.dropout),
        use_rslora=use_rslora,
    )


def _check_kind(module: nn.Module, known: Sequence[type]) -> None:
    if type(module) not in known:
        names = " or ".join(kind.__name__ for kind in known)
        raise UserError(
            f"MoE-PEFT has no words for a {type(module).__name__} of moejax, where it has {names}"
        )

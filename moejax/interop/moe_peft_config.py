"""adapter_config.json of MoE-PEFT: which mixture it is, of which adapters, and how weighed.

Known from the sources of TUDB-Labs/MoE-PEFT and, of DynMoLE, of mikecovlee/DynMoLE. They leave out
of the file what is for training alone; what is not there has the value that they give it.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

from moejax.adapters.dynmole import ENTROPY_EPSILON
from moejax.errors import UserError
from moejax.interop.checked_values import (
    REQUIRED,
    CheckedValues,
    not_negative,
    positive,
    share,
    whole,
)
from moejax.interop.fields import Json
from moejax.interop.llama_style import ACTIVATIONS
from moejax.interop.peft_config import FILE
from moejax.interop.tensor_files import read_json

MIXLORA, MOLA, DYNMOLE = "MIXLORA", "MOLA", "DYNMOLE"
PEFT_TYPES = (MIXLORA, MOLA, DYNMOLE)
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")

_NO_EFFECT = {"base_model_name_or_path", "inference_mode", "name", "task_name"}
_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraNumbers:
    """Of one pair of factors; names as theirs."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def json(self, what: str) -> Json:
        """As the file has them; `what` names the module in an error."""
        if self.lora_alpha != int(self.lora_alpha):
            raise UserError(
                f"{what}.alpha={self.lora_alpha:g}, but MoE-PEFT takes whole numbers for "
                "lora_alpha: scale the factors B instead"
            )
        values = dataclasses.asdict(self) | {"lora_alpha": int(self.lora_alpha)}
        return values | {"lora_dropout": float(self.lora_dropout)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKGate:
    """The largest probabilities; `balance_weight` is 0 where `router_loss` is off."""

    top_k: int
    balance_weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyGate:
    """DynMoLE's; its two weights in the loss are 0 where `router_loss` is off."""

    keep_top_k: int
    top_p: float
    entropy_threshold: float
    entropy_index: float
    balance_weight: float
    entropy_weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoePeftConfig:
    """A mixture of adapters.

    Attributes:
      peft_type: one of `PEFT_TYPES`.
      target_modules: q_proj and others, sorted; the same in every layer.
      plain: the adapters of attention in MixLoRA, which are no mixture; None where there are none.
      experts: the adapters that are weighed.
      num_experts: how many there are for each module.
      gate: how they are weighed.
      init_range: what fresh gates were drawn with; None where the file does not say.
      act_fn: the activation of MixLoRA's experts in our words; None for the base model's.
    """

    peft_type: str
    target_modules: tuple[str, ...]
    plain: LoraNumbers | None
    experts: LoraNumbers
    num_experts: int
    gate: TopKGate | EntropyGate
    init_range: float | None = None
    act_fn: str | None = None

    @property
    def prefix(self) -> str:
        """What every tensor's name begins with."""
        return self.peft_type.lower()

    def json(self, *, base_model: str | None) -> Json:
        """The file's content."""
        own = self.experts.json(f"adapter.{'mlp' if self.peft_type == MIXLORA else 'linear'}.bank")
        if self.plain is not None:
            plain = self.plain.json("adapter.linear")
            own = plain if plain == own else plain | {"expert_lora": own}
        return own | {
            "bias": "none",
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "target_modules": list(self.target_modules),
            "routing_strategy": self.prefix,
            "num_experts": self.num_experts,
            **_gate_json(self.gate),
        }


def _gate_json(gate: TopKGate | EntropyGate) -> Json:
    values = dataclasses.asdict(gate)
    weights = {"router_aux_loss_coef": float(values.pop("balance_weight"))}
    if isinstance(gate, EntropyGate):
        weights["router_dyn_loss_coef"] = float(values.pop("entropy_weight"))
        values |= {"entropy_type": "tsallis", "entropy_eps": ENTROPY_EPSILON}
    return values | weights | {"router_loss": any(weights.values())}


def describes(directory: pathlib.Path) -> bool:
    """Whether the folder's adapter_config.json is one of a mixture."""
    path = directory / FILE
    return path.exists() and read_json(path).get("peft_type") in PEFT_TYPES


def read(directory: pathlib.Path) -> MoePeftConfig:
    """The mixture that a folder describes; UserError as `parse`."""
    path = directory / FILE
    return parse(read_json(path), where=str(path))


def parse(values: Json, *, where: str) -> MoePeftConfig:
    """The mixture that the content of a file describes.

    Raises:
      UserError: it states something that moejax does not have or does not know, or a value is of
        the wrong kind; `where` is what the error begins with.
    """
    fields = CheckedValues(values, where)
    kind = fields.take("peft_type", lambda value: value in PEFT_TYPES)
    strategy = REQUIRED if kind == MIXLORA else kind.lower()
    fields.only("routing_strategy", kind.lower(), default=strategy)
    # Its question answering scores tokens, too; classification has a head of its own.
    fields.only("task_type", "CAUSAL_LM", "QUESTION_ANS", None, default=None)
    fields.only("jitter_noise", 0, default=0)
    top = _lora(fields, {})
    experts = top
    is_object = lambda value: isinstance(value, dict)
    if kind == MIXLORA and (stated := fields.take("expert_lora", is_object, default=None)):
        inner = CheckedValues(stated, f"{where}: expert_lora")
        experts = _lora(inner, dataclasses.asdict(top))
        inner.finish()
    targets = _targets(fields)
    if kind == MIXLORA and not set(targets) & set(MLP_MODULES):
        raise UserError(f"{where}: target_modules={list(targets)} leaves all experts alike")
    in_attention = set(targets) - set(MLP_MODULES)
    num_experts = fields.take("num_experts", whole)
    gate = _entropy_gate(fields) if kind == DYNMOLE else _top_k_gate(fields, on=kind == MIXLORA)
    chosen = gate.keep_top_k if isinstance(gate, EntropyGate) else gate.top_k
    if chosen > num_experts:
        raise UserError(f"{where}: {chosen} of num_experts={num_experts} cannot be chosen")
    act_fn = None
    if kind == MIXLORA:
        act_fn = fields.only("act_fn", *ACTIVATIONS, None, default=None)
    config = MoePeftConfig(
        peft_type=kind,
        target_modules=targets,
        plain=top if kind == MIXLORA and in_attention else None,
        experts=experts,
        num_experts=num_experts,
        gate=gate,
        init_range=fields.take("router_init_range", not_negative, default=None),
        act_fn=None if act_fn is None else ACTIVATIONS[act_fn],
    )
    fields.finish(ignored=_NO_EFFECT)
    return config


def _lora(fields: CheckedValues, default: Json) -> LoraNumbers:
    fields.only("use_dora", False, default=False)
    fields.only("bias", "none", default="none")
    fields.only("lora_init", "original", "gaussian", default="original")  # of what is read now
    checks = (whole, positive, share, lambda value: isinstance(value, bool))
    default = {"use_rslora": False} | default
    found = {
        name: fields.take(name, check, default=default.get(name, REQUIRED))
        for name, check in zip(_LORA, checks, strict=True)
    }
    for name in ("lora_alpha", "lora_dropout"):
        found[name] = float(found[name])
    return LoraNumbers(**found)


def _targets(fields: CheckedValues) -> tuple[str, ...]:
    """From {name: whether it is one}, or from a list."""

    def check(value: Any) -> bool:
        if isinstance(value, dict):
            return any(value.values()) and all(isinstance(on, bool) for on in value.values())
        return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)

    found = fields.take("target_modules", check)
    chosen = [name for name, on in found.items() if on] if isinstance(found, dict) else found
    return tuple(sorted(set(chosen)))


def _top_k_gate(fields: CheckedValues, *, on: bool) -> TopKGate:
    """`on` says what a file means that says nothing of the loss."""
    on = fields.take("router_loss", lambda value: isinstance(value, bool), default=on)
    weight = fields.take("router_aux_loss_coef", not_negative, default=1e-3)
    top_k = fields.take("top_k", whole, default=2)
    return TopKGate(top_k=top_k, balance_weight=float(weight) if on else 0.0)


def _entropy_gate(fields: CheckedValues) -> EntropyGate:
    fields.only("entropy_type", "tsallis", default="tsallis")
    fields.only("entropy_eps", ENTROPY_EPSILON, default=ENTROPY_EPSILON)
    on = fields.take("router_loss", lambda value: isinstance(value, bool), default=True)
    balance = fields.take("router_aux_loss_coef", not_negative, default=1e-3)
    entropy = fields.take("router_dyn_loss_coef", not_negative, default=1e-2)
    return EntropyGate(
        keep_top_k=fields.take("keep_top_k", whole, default=2),
        top_p=float(fields.take("top_p", lambda x: positive(x) and x <= 1, default=0.75)),
        entropy_threshold=float(fields.take("entropy_threshold", positive, default=0.9)),
        # Of order 1 it is Shannon's, which ours is not.
        entropy_index=float(
            fields.take("entropy_index", lambda x: positive(x) and x <= 2 and x != 1, default=1.1)
        ),
        balance_weight=float(balance) if on else 0.0,
        entropy_weight=float(entropy) if on else 0.0,
    )

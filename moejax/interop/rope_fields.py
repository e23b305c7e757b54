"""Rotary embeddings in config.json: `rope_theta` and `rope_scaling`, or `rope_parameters`."""

from __future__ import annotations

import dataclasses
from typing import Any

import fiddle as fdl

from moejax.interop.config_json import ConfigJson
from moejax.interop.fields import Json, value_at
from moejax.layers.rope import LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling

_CONTEXT, _FRACTION = "original_max_position_embeddings", "partial_rotary_factor"

# {rope_type: (our class, {the file's name: ours})}
Scalings = dict[str, tuple[type, dict[str, str]]]

_SCALINGS: Scalings = {
    "linear": (LinearScaling, {"factor": "factor"}),
    "llama3": (
        Llama3Scaling,
        {
            "factor": "factor",
            "low_freq_factor": "low_frequency_factor",
            "high_freq_factor": "high_frequency_factor",
            _CONTEXT: "original_context",
        },
    ),
    "yarn": (
        YarnScaling,
        {
            "factor": "factor",
            _CONTEXT: "original_context",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "truncate": "truncate",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
            "attention_factor": "attention_factor",
        },
    ),
}
# As Phi-3.5-MoE has it; other architectures of transformers do not read the two amplitudes.
LONGROPE: Scalings = {
    "longrope": (
        LongRopeScaling,
        {
            "short_factor": "short_factors",
            "long_factor": "long_factors",
            "short_mscale": "short_amplitude",
            "long_mscale": "long_amplitude",
            _CONTEXT: "original_context",
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeField:
    """The base, the rotated fraction of a head, and the scaling rule of long contexts.

    Attributes:
      theta, scaling: what a file without these means, in the file's own terms.
      fraction: likewise; None where transformers rotates whole heads whatever a file says.
      known: the scaling rules that files of this architecture may have.
    """

    theta: float = 10_000.0
    fraction: float | None = None
    scaling: dict[str, Any] = dataclasses.field(default_factory=dict)
    known: Scalings = dataclasses.field(default_factory=lambda: _SCALINGS)

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        stated = rope_parameters(source) or self.scaling
        if any(isinstance(value, dict) for value in stated.values()):
            raise source.refuse("rope_parameters differ between kinds of layers: not supported")
        theta = source.get("rope_theta", self.theta)
        rope = config.block.attention.rope
        rope.theta = float(stated.get("rope_theta", theta))
        rope.fraction = self._fraction(source, stated)
        rope.scaling = _scaling(source, stated, self.known)

    def write(self, model: Any) -> Json:
        rope = value_at(model, ["block", "attention", "rope"])
        if rope is None:
            return {}
        shape: Json = {"rope_theta": rope.theta}
        if self.fraction is not None:
            shape[_FRACTION] = rope.fraction
        rule = _rule(rope.scaling, self.known)
        # Both generations: transformers before 5 reads rope_scaling and the values beside it.
        old = shape | ({"rope_scaling": rule} if rope.scaling else {})
        return old | {"rope_parameters": rule | shape}

    def _fraction(self, source: ConfigJson, stated: Json) -> float:
        fraction = source.get(_FRACTION, 1.0 if self.fraction is None else self.fraction)
        if stated.get(_FRACTION) is not None:
            fraction = stated[_FRACTION]
        if self.fraction is None and fraction != 1:
            raise source.refuse(
                f"{_FRACTION}={fraction} is not supported, only 1: transformers rotates whole "
                "heads of this model_type, so remove the value if its heads were trained whole"
            )
        return float(fraction)


def _scaling(source: ConfigJson, stated: Json, scalings: Scalings) -> fdl.Config | None:
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind == "default":
        return None
    if kind not in scalings:
        known = ", ".join(("default", *scalings))
        raise source.refuse(f"rope_type={kind!r} is not supported, only {known}")
    cls, names = scalings[kind]
    found = {ours: stated.get(theirs) for theirs, ours in names.items()}
    if _CONTEXT in names:
        found["original_context"] = _original_context(source, stated)
    values = {ours: value for ours, value in found.items() if value is not None}
    for theirs, ours in names.items():
        if ours not in values and _is_required(cls, ours):
            raise source.refuse(f"rope_type={kind!r} lacks {theirs}")
    return fdl.Config(cls, **{k: _typed(cls, k, v) for k, v in values.items()})


def _original_context(source: ConfigJson, stated: Json) -> Any:
    """Beside the rule or in it; where neither states it, it is `max_position_embeddings`."""
    within, beside = stated.get(_CONTEXT), source.get(_CONTEXT, None)
    if None not in (within, beside) and within != beside:
        raise source.refuse(f"{_CONTEXT} is {beside} and, in the RoPE parameters, {within}")
    return within or beside or source.get("max_position_embeddings")


def _is_required(cls: type, name: str) -> bool:
    default = next(field.default for field in dataclasses.fields(cls) if field.name == name)
    return default is dataclasses.MISSING


def _typed(cls: type, name: str, value: Any) -> Any:
    """Files write 32 for 32.0, and lists for tuples."""
    kind = next(str(field.type) for field in dataclasses.fields(cls) if field.name == name)
    if kind.startswith("tuple[float"):
        return tuple(float(one) for one in value)
    return float(value) if kind.startswith("float") else value


def rope_parameters(source: ConfigJson) -> Json:
    """`rope_scaling` and `rope_parameters` together; UserError where they disagree."""
    old, new = source.get("rope_scaling", {}), source.get("rope_parameters", {})
    if clash := [key for key in old.keys() & new.keys() if old[key] != new[key]]:
        raise source.refuse(f"rope_scaling and rope_parameters differ in {clash[0]}")
    return old | new


def _rule(scaling: Any, scalings: Scalings) -> Json:
    for kind, (cls, names) in scalings.items():
        if type(scaling) is cls:
            values = {theirs: getattr(scaling, ours) for theirs, ours in names.items()}
            return {"rope_type": kind} | {k: v for k, v in values.items() if v is not None}
    return {"rope_type": "default"}

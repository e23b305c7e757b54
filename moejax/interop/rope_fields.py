"""Rotary embeddings in config.json: `rope_theta` and `rope_scaling`, or `rope_parameters`."""

from __future__ import annotations

import dataclasses
from typing import Any

import fiddle as fdl

from moejax.interop.config_json import ConfigJson
from moejax.interop.fields import Json, value_at
from moejax.layers.rope import LinearScaling, Llama3Scaling, YarnScaling

_CONTEXT = "original_max_position_embeddings"

# {rope_type: (our class, {the file's name: ours})}
_SCALINGS: dict[str, tuple[type, dict[str, str]]] = {
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


@dataclasses.dataclass(frozen=True)
class RopeField:
    """The base, the rotated fraction of a head, and the scaling rule of long contexts.

    Attributes:
      theta, fraction, scaling: what a file without these means, in the file's own terms.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: dict[str, Any] = dataclasses.field(default_factory=dict)

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        stated = _both(source) or self.scaling
        if any(isinstance(value, dict) for value in stated.values()):
            raise source.refuse("rope_parameters differ between kinds of layers: not supported")
        theta = source.get("rope_theta", self.theta)
        fraction = source.get("partial_rotary_factor", self.fraction)
        rope = config.block.attention.rope
        rope.theta = float(stated.get("rope_theta", theta))
        rope.fraction = float(stated.get("partial_rotary_factor", fraction))
        rope.scaling = _scaling(source, stated)

    def write(self, model: Any) -> Json:
        rope = value_at(model, ["block", "attention", "rope"])
        if rope is None:
            return {}
        shape: Json = {"rope_theta": rope.theta}
        if rope.fraction != 1 or self.fraction != 1:
            shape["partial_rotary_factor"] = rope.fraction
        rule = _rule(rope.scaling)
        # Both generations: transformers before 5 reads rope_scaling and the values beside it.
        old = shape | ({"rope_scaling": rule} if rope.scaling else {})
        return old | {"rope_parameters": rule | shape}


def _scaling(source: ConfigJson, stated: Json) -> fdl.Config | None:
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind == "default":
        return None
    if kind not in _SCALINGS:
        known = ", ".join(("default", *_SCALINGS))
        raise source.refuse(f"rope_type={kind!r} is not supported, only {known}")
    cls, names = _SCALINGS[kind]
    found = {ours: stated.get(theirs) for theirs, ours in names.items()}
    values = {ours: value for ours, value in found.items() if value is not None}
    if _CONTEXT in names and "original_context" not in values:
        values["original_context"] = source.get("max_position_embeddings")
    return fdl.Config(cls, **{k: _as_float(cls, k, v) for k, v in values.items()})


def _as_float(cls: type, name: str, value: Any) -> Any:
    """Files write 32 for 32.0: whole numbers become floats where the field is one."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    return float(value) if kinds[name].startswith("float") else value


def _both(source: ConfigJson) -> Json:
    """`rope_scaling` and `rope_parameters` together; UserError where they disagree."""
    old, new = source.get("rope_scaling", {}), source.get("rope_parameters", {})
    if clash := [key for key in old.keys() & new.keys() if old[key] != new[key]]:
        raise source.refuse(f"rope_scaling and rope_parameters differ in {clash[0]}")
    return old | new


def _rule(scaling: Any) -> Json:
    for kind, (cls, names) in _SCALINGS.items():
        if type(scaling) is cls:
            values = {theirs: getattr(scaling, ours) for theirs, ours in names.items()}
            return {"rope_type": kind} | {k: v for k, v in values.items() if v is not None}
    return {"rope_type": "default"}

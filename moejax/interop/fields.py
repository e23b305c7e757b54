"""What values of config.json say about the model, in both directions.

An architecture is a template of the model and a list of these. Reading sets values in the
template; writing collects them from a model. What a model has and no field can say shows when
the written file is read back: `hf.save` does that, and refuses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import fiddle as fdl

from moejax.errors import UserError
from moejax.experts.dense import DenseGLU
from moejax.interop.config_json import REQUIRED, ConfigJson

Json = dict[str, Any]


@runtime_checkable
class FieldLike(Protocol):
    """One value of config.json, or several that belong together."""

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        """Sets in `config` what `source` says."""

    def write(self, model: Any) -> Json:
        """What a config.json says about `model`."""


@dataclasses.dataclass(frozen=True)
class Field:
    """The value of `key` at each of `paths`.

    Attributes:
      key: the name that is written; its synonyms are read too.
      paths: dotted, in the model. A path through a part that the model lacks is skipped.
      default: where the file has no such value; REQUIRED, or a value, or a function of the file.
      decode, encode: from the file's value to the model's, and back.
    """

    key: str
    paths: tuple[str, ...]
    default: Any = REQUIRED
    decode: Callable[[Any], Any] = lambda value: value
    encode: Callable[[Any], Any] = lambda value: value

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        _set(config, self.paths, self.decode(source.get(self.key, self.default)))

    def write(self, model: Any) -> Json:
        value = value_at(model, self.paths[0].split("."))
        return {} if value is None else {self.key: self.encode(value)}


@dataclasses.dataclass(frozen=True)
class Named:
    """A value of config.json that stands for another of ours, such as the name of an activation."""

    key: str
    paths: tuple[str, ...]
    names: dict[Any, Any]  # {the file's: ours}
    default: Any

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        value = source.get(self.key, self.default)
        if value not in self.names:
            raise _unsupported(source, self.key, value, self.names)
        _set(config, self.paths, self.names[value])

    def write(self, model: Any) -> Json:
        value = value_at(model, self.paths[0].split("."))
        theirs = [name for name, ours in self.names.items() if ours == value]
        return {self.key: theirs[0]} if theirs else {}


@dataclasses.dataclass(frozen=True)
class Only:
    """A value that changes the model and of which moejax has one form."""

    key: str
    value: Any

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        value = source.get(self.key, self.value)
        if value != self.value:
            raise _unsupported(source, self.key, value, [self.value])

    def write(self, model: Any) -> Json:
        return {} if self.value is None else {self.key: self.value}


@dataclasses.dataclass(frozen=True)
class Stated:
    """A value about which the model says nothing: any is read, and `value` written unless None."""

    key: str
    value: Any = None

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        source.get(self.key, None)

    def write(self, model: Any) -> Json:
        return {} if self.value is None else {self.key: self.value}


def _set(config: fdl.Config, paths: tuple[str, ...], value: Any) -> None:
    for path in paths:
        *parents, name = path.split(".")
        parent = value_at(config, parents)
        if parent is not None:
            setattr(parent, name, value)


def _unsupported(source: ConfigJson, key: str, value: Any, known: Any) -> UserError:
    return source.refuse(
        f"{key}={value!r} is not supported, only {', '.join(repr(k) for k in known)}"
    )


# For every layer whether it has a window, given the file and the number of layers.
Slides = Callable[[ConfigJson, int], list[bool]]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Sliding windows: which layers have one, and its width in positions.

    Attributes:
      slides: which layers have one.
      default: the width where the file has none.
      states: the keys, beside the width, that this architecture's files state.
    """

    slides: Slides
    default: int | None = None
    states: tuple[str, ...] = ()

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        width = source.get("sliding_window", self.default)
        source.get("use_sliding_window", None)
        layers = self.slides(source, config.num_layers)
        # A null is no absence for transformers, which does not take it for the default.
        if any(layers) and source.values.get("sliding_window", width) is None:
            raise source.refuse("layers have a window, but sliding_window is null: state its width")
        config.windows = _cycle(tuple(width if has_window else None for has_window in layers))

    def write(self, model: Any) -> Json:
        windows = [model.windows[i % len(model.windows)] for i in range(model.num_layers)]
        width = next((window for window in windows if window is not None), None)
        kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
        found = {"layer_types": kinds, "use_sliding_window": width is not None}
        return {"sliding_window": width} | {key: found[key] for key in self.states}


def every_layer(source: ConfigJson, num_layers: int) -> list[bool]:
    """Every layer slides wherever the file gives a width (Mixtral)."""
    return [source.get("sliding_window", None) is not None] * num_layers


def window_used(source: ConfigJson) -> bool:
    """Whether any layer may slide: a width of null is none, and no width is transformers' 4096."""
    width = source.values.get("sliding_window", 4096)
    return bool(source.get("use_sliding_window", False)) and width is not None


def if_used(source: ConfigJson, num_layers: int) -> list[bool]:
    """Every layer slides where `use_sliding_window` says so (Qwen3-MoE)."""
    return [window_used(source)] * num_layers


def by_layer_types_if_used(default: Slides) -> Slides:
    """`by_layer_types`, refused where it names a window that is not used (other Qwen)."""

    def slides(source: ConfigJson, num_layers: int) -> list[bool]:
        layers = by_layer_types(default)(source, num_layers)
        if any(layers) and not window_used(source):
            raise source.refuse(
                "layer_types names sliding_attention, but use_sliding_window and sliding_window "
                "give it no width"
            )
        return layers

    return slides


def by_layer_types(default: Slides) -> Slides:
    """As `layer_types` lists them; older files without it mean `default`."""

    def slides(source: ConfigJson, num_layers: int) -> list[bool]:
        kinds = source.get("layer_types", None)
        if kinds is None:
            return default(source, num_layers)
        if len(kinds) != num_layers or set(kinds) - {"sliding_attention", "full_attention"}:
            raise source.refuse(
                f"layer_types={kinds} must say sliding_attention or full_attention for each of "
                f"the {num_layers} layers"
            )
        return [kind == "sliding_attention" for kind in kinds]

    return slides


def _cycle(windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The shortest beginning that, repeated, gives all of `windows`."""
    for period in range(1, len(windows) + 1):
        if all(window == windows[i % period] for i, window in enumerate(windows)):
            return windows[:period]
    raise AssertionError("a tuple repeats itself after its own length")


@dataclasses.dataclass(frozen=True)
class DenseFirst:
    """The first k layers have a dense feed-forward (GLM-4.5)."""

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        config.first_k_dense = source.get("first_k_dense_replace")
        _set_dense(source, config)

    def write(self, model: Any) -> Json:
        return {"first_k_dense_replace": model.first_k_dense} | _dense_width(model)


@dataclasses.dataclass(frozen=True)
class DenseBetween:
    """All but every n-th layer are dense, or the first k are (Qwen)."""

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        step = source.get("decoder_sparse_step", 1)
        dense = source.get("mlp_only_layers", [])
        if dense and (step != 1 or sorted(dense) != list(range(len(dense)))):
            raise source.refuse(
                f"mlp_only_layers={dense} with decoder_sparse_step={step} is not supported, only "
                "the first layers with a step of 1"
            )
        config.moe_every, config.first_k_dense = step, len(dense)
        _set_dense(source, config)

    def write(self, model: Any) -> Json:
        first = list(range(model.first_k_dense))
        pattern = {"decoder_sparse_step": model.moe_every, "mlp_only_layers": first}
        return pattern | _dense_width(model)


def _set_dense(source: ConfigJson, config: fdl.Config) -> None:
    width = source.get("intermediate_size")
    if config.first_k_dense or config.moe_every > 1:
        config.dense_ffn = fdl.Config(DenseGLU, d_ff=width)


def _dense_width(model: Any) -> Json:
    """A model without dense layers has no width for them; its files state the experts'."""
    width = value_at(model, ["dense_ffn", "d_ff"])
    return {"intermediate_size": width or value_at(model, ["block", "ffn", "experts", "d_ff"])}


@dataclasses.dataclass(frozen=True)
class SharedExperts:
    """Several shared experts are one of their widths' sum."""

    default: Any = REQUIRED

    def read(self, source: ConfigJson, config: fdl.Config) -> None:
        width = source.get("moe_intermediate_size")
        config.block.ffn.shared.d_ff = width * source.get("n_shared_experts", self.default)

    def write(self, model: Any) -> Json:
        experts, shared = (
            value_at(model, ["block", "ffn", part, "d_ff"]) for part in ("experts", "shared")
        )
        return {"n_shared_experts": shared // experts} if experts and shared else {}


def value_at(tree: Any, names: list[str]) -> Any:
    """The value at a path, None where a part on the way is missing."""
    for name in names:
        tree = getattr(tree, name, None)
    return tree

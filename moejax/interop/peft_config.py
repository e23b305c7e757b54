"""adapter_config.json: what PEFT adapted, by which rank, and how strongly."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from moejax.errors import UserError
from moejax.interop.fields import Json
from moejax.interop.peft_sites import Site
from moejax.interop.tensor_files import read_json

FILE = "adapter_config.json"
_ALL_LINEAR = "all-linear"
# What takes part in no result: names, training, defaults of what is off.
_NO_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "parent_library",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
# Others change the base model that the factors are added to.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The fields of a LoRA adapter that have an effect; names as PEFT's, with its defaults."""

    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] | str = ()
    target_parameters: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)

    def named(self, site: Site) -> str | None:
        """The name under which the site is a target; None where it is none."""
        if self._is_module(site.module) and site.module != site.parameter:
            return site.module
        return site.parameter if _ends(site.parameter, self.target_parameters) else None

    def rank(self, name: str) -> int:
        """r of the target `name`."""
        return self.rank_pattern.get(_key(self.rank_pattern, name), self.r)

    def alpha(self, name: str) -> float:
        """lora_alpha of the target `name`."""
        return float(self.alpha_pattern.get(_key(self.alpha_pattern, name), self.lora_alpha))

    def scale(self, name: str) -> float:
        """What the product of the target's factors is multiplied by."""
        rank = self.rank(name)
        return self.alpha(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def json(self, *, base_model: str | None) -> Json:
        """The file's content."""
        values = dataclasses.asdict(self)
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for name in ("exclude_modules", "layers_pattern", "target_parameters"):
            if not values[name]:
                del values[name]  # older versions do not know the last
        values["lora_alpha"] = _short(self.lora_alpha)
        values["alpha_pattern"] = {k: _short(v) for k, v in self.alpha_pattern.items()}
        return values | {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
        }

    def _is_module(self, name: str) -> bool:
        """As PEFT decides it."""
        excluded = self.exclude_modules
        if isinstance(excluded, str):
            if excluded and re.fullmatch(excluded, name):
                return False
        elif _ends(name, excluded):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules == _ALL_LINEAR:
                return True
            return re.fullmatch(self.target_modules, name) is not None
        return _ends(name, self.target_modules) and self._in_layer(name)

    def _in_layer(self, name: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern]
        found = (re.match(p, name) for p in patterns or [r".*?\.[^.]*\.(\d+)\."])
        match = next((match for match in found if match), None)
        return match is not None and int(match[1]) in self.layers_to_transform


def read(path: pathlib.Path) -> PeftConfig:
    """The adapter that a file describes.

    Raises:
      UserError: there is no file, it is no LoRA, states something that moejax does not have or
        does not know, or a value is of the wrong kind.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: give the folder of a PEFT adapter")
    values = read_json(path)
    if (kind := values.pop("peft_type", None)) != "LORA":
        raise UserError(
            f"{path}: peft_type={kind!r} cannot be read, only 'LORA', and of MoE-PEFT 'MIXLORA', "
            "'MOLA' and 'DYNMOLE'"
        )
    if (task := values.pop("task_type", None)) not in (None, "CAUSAL_LM"):
        raise UserError(f"{path}: task_type={task!r} is not supported, only 'CAUSAL_LM'")
    if (bias := values.pop("bias", "none")) != "none":
        raise UserError(f"{path}: bias={bias!r} is not supported, only 'none'")
    if (init := values.pop("init_lora_weights", True)) not in _INITS:
        raise UserError(
            f"{path}: init_lora_weights={init!r} changes the base model, to which the factors "
            "belong: let PEFT convert the adapter to a plain LoRA"
        )
    known = {field.name for field in dataclasses.fields(PeftConfig)}
    for name, value in values.items():
        if name not in known | _NO_EFFECT and value not in (None, False, [], {}, ""):
            raise UserError(
                f"{path}: {name}={value!r} is not supported: merge the adapter with PEFT "
                "(merge_and_unload) and import the merged model"
            )
    given = {k: v for k, v in values.items() if k in known and v is not None}
    return _checked(path, given)


def _checked(path: pathlib.Path, given: Json) -> PeftConfig:
    one_or_more = {"layers_to_transform": int, "layers_pattern": str}
    for name, kind in one_or_more.items():
        if isinstance(given.get(name), kind):
            given[name] = [given[name]]
    lists = {"target_parameters": str, "layers_to_transform": int, "layers_pattern": str}
    texts = ("target_modules", "exclude_modules")
    lists |= {name: str for name in texts if not isinstance(given.get(name), str)}
    checks: dict[str, Any] = {name: _list_of(kind) for name, kind in lists.items()}
    checks |= {"r": _whole, "lora_alpha": _number, "lora_dropout": _number}
    checks |= {"use_rslora": lambda value: isinstance(value, bool)}
    checks |= {"rank_pattern": _patterns(_whole), "alpha_pattern": _patterns(_number)}
    for name, value in given.items():
        if not checks.get(name, lambda value: True)(value):
            raise UserError(f"{path}: {name}={value!r} is not what PEFT writes there")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    for name in ("lora_alpha", "lora_dropout"):
        given |= {name: float(given[name])} if name in given else {}
    alphas = given.get("alpha_pattern", {}).items()
    config = PeftConfig(**given | {"alpha_pattern": {k: float(v) for k, v in alphas}})
    _check_patterns(path, config)
    ranks = [("r", config.r), *(("rank_pattern", rank) for rank in config.rank_pattern.values())]
    for name, rank in ranks:
        if rank < 1:
            raise UserError(f"{path}: {name} states the rank {rank}, which must be at least 1")
    return config


def _check_patterns(path: pathlib.Path, config: PeftConfig) -> None:
    texts = [x for x in (config.target_modules, config.exclude_modules) if isinstance(x, str)]
    for text in (*texts, *config.layers_pattern, *config.rank_pattern, *config.alpha_pattern):
        try:
            re.compile(text)
        except re.error as error:
            raise UserError(f"{path}: {text!r} is no regular expression: {error}") from error


def _list_of(kind: type) -> Any:
    return lambda value: isinstance(value, list) and all(isinstance(x, kind) for x in value)


def _patterns(check: Any) -> Any:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ends(name: str, patterns: Iterable[str]) -> bool:
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _key(patterns: Iterable[str], name: str) -> str:
    """The first pattern that matches the end of `name`, from a dot on; `name` where none does."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), name)


def _short(value: float) -> int | float:
    return int(value) if value == int(value) else value

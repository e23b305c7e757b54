"""A small tree of Linen modules and dataclasses, to configure in tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from fiddle.experimental.auto_config import auto_config

from moejax.errors import UserError


class Router(Protocol):
    def __call__(self, x): ...

    def describe(self) -> str: ...


class Top(nn.Module):
    k: int = 4
    temperature: float = 1.0
    normalise: bool = True

    def __call__(self, x):
        return x

    def describe(self) -> str:
        return f"top {self.k}"


class Expert(nn.Module):
    capacity: float = 1.25
    temperature: float = 3.0

    def __call__(self, x):
        return x

    def describe(self) -> str:
        return f"expert choice {self.capacity}"


class NoRouter(nn.Module):
    def __call__(self, x):
        return x


class Projection(nn.Module):
    width: int = dataclasses.field(default=0, metadata={"set_by_owner": True})
    scale: float = 1.0


class Projects(nn.Module):
    projection: nn.Module = dataclasses.field(default_factory=Projection)


class FFN(nn.Module):
    num_experts: int
    router: Router = dataclasses.field(default_factory=Top)
    activation: Callable[[Any], Any] = jax.nn.silu
    init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    dtype: jax.typing.DTypeLike = jnp.float32


class Block(nn.Module):
    ffn: nn.Module
    remat: Literal["none", "full"] = "none"
    window: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    path: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    sources: tuple[Text, ...]
    mixture: dict[str, float] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    names: tuple[str, ...] = ()
    sizes: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    steps: int
    block: Block
    data: Data
    workdir: str = "runs/toy"
    note: Any = None
    extra: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps={self.steps} must be at least 1")


@auto_config
def config():
    return Run(
        steps=100,
        block=Block(ffn=FFN(num_experts=8, router=Top(k=2))),
        data=Data(
            sources=(Text(path="a"), Text(path="b", weight=0.5)),
            mixture={"en": 0.7, "de.at": 0.3},
        ),
    )

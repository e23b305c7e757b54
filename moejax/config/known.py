"""The names outside moejax that a stored config may hold without `--trust-config`.

Each is a pure function, a schedule, an initialiser or a gradient transformation: called with
any arguments it only computes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import numpy as np

_NAMES = {
    "jax.nn": "silu gelu relu relu6 sigmoid softplus tanh elu selu celu leaky_relu swish mish "
    "hard_sigmoid hard_silu hard_tanh log_sigmoid softmax log_softmax squareplus sparse_plus "
    "identity",
    "jax.nn.initializers": "zeros ones constant normal truncated_normal uniform orthogonal "
    "delta_orthogonal variance_scaling lecun_normal lecun_uniform glorot_normal glorot_uniform "
    "he_normal he_uniform",
    "jax.numpy": "tanh exp square sqrt sin cos abs",
    "optax": "adam adamw adamax adamaxw adafactor adabelief adagrad amsgrad lamb lars lion nadam "
    "nadamw novograd radam rmsprop sgd sm3 yogi chain clip clip_by_global_norm "
    "add_decayed_weights scale scale_by_adam scale_by_lion scale_by_learning_rate "
    "scale_by_schedule identity set_to_zero constant_schedule linear_schedule "
    "cosine_decay_schedule exponential_decay polynomial_schedule warmup_constant_schedule "
    "warmup_cosine_decay_schedule "
    "warmup_exponential_decay_schedule sgdr_schedule join_schedules "
    "piecewise_constant_schedule",
    "optax.contrib": "muon schedule_free_adamw ademamix sophia prodigy",
}

_DTYPES = tuple(
    name
    for kind, sizes in {
        "int": "4 8 16 32 64",
        "uint": "4 8 16 32 64",
        "float": "16 32 64 8_e4m3fn 8_e5m2 8_e4m3b11fnuz 8_e4m3fnuz 8_e5m2fnuz",
        "bfloat": "16",
        "complex": "64 128",
        "bool": "_",
    }.items()
    for name in (kind + size for size in sizes.split())
)


@functools.cache
def _symbols() -> dict[str, Any]:
    found = {}
    for module_name, names in _NAMES.items():
        module = importlib.import_module(module_name)
        for name in names.split():
            if hasattr(module, name):  # versions differ
                found[f"{module_name}:{name}"] = getattr(module, name)
    return found


@functools.cache
def _public_names() -> dict[int, str]:
    names: dict[int, str] = {}
    for name, obj in _symbols().items():  # _symbols keeps them alive: the ids stay theirs
        names.setdefault(id(obj), name)
    return names


def public_name(obj: Any) -> str | None:
    """The `module:name` under which `obj` is allowed, or None."""
    return _public_names().get(id(obj))


def symbol(name: str) -> Any | None:
    """The allowed object called `module:name`, or None."""
    return _symbols().get(name)


def initializer_call(value: Any) -> tuple[Any, dict[str, Any]] | None:
    """The function of `jax.nn.initializers` and the arguments that made an initialiser.

    `normal(0.02)` is a closure without a name of its own, so that its 0.02 could be neither
    stored nor overridden. None for anything else.
    """
    if getattr(value, "__module__", None) != "jax._src.nn.initializers":
        return None
    factory_name, _, inner = value.__qualname__.partition(".<locals>.")
    factory = symbol(f"jax.nn.initializers:{factory_name}")
    if not inner or factory is None:
        return None
    arguments = dict(inspect.getclosurevars(value).nonlocals)
    arguments["dtype"] = inspect.signature(value).parameters["dtype"].default
    wanted = inspect.signature(factory).parameters
    if set(wanted) != set(arguments):
        return None
    changed = {n: v for n, v in arguments.items() if v != wanted[n].default}
    return factory, changed


def dtype_name(value: Any) -> str | None:
    """`jax.numpy:bfloat16`, `numpy:float32` or `numpy.dtype:float32`; None if not a dtype."""
    import jax.numpy as jnp

    if isinstance(value, np.dtype):
        return f"numpy.dtype:{value.name}" if value.name in _DTYPES else None
    if not isinstance(value, type):
        return None
    for name in _DTYPES:
        if value is getattr(jnp, name, None):
            return f"jax.numpy:{name}"
        if value is getattr(np, name, None):
            return f"numpy:{name}"
    return None


def dtype(name: str) -> Any | None:
    """The inverse of `dtype_name`; None where the name is none of a dtype."""
    import jax.numpy as jnp

    kind, _, short = name.partition(":")
    if short not in _DTYPES:
        return None
    if kind == "numpy.dtype":
        return jnp.dtype(short)
    return getattr({"jax.numpy": jnp, "numpy": np}.get(kind), short, None)

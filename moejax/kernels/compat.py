"""What differs between JAX versions, platforms, manual and automatic axes, in one place.

Verified with jax 0.10.2 and 0.12.0.1.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from moejax.errors import UserError

GPU_KERNELS_SINCE = (0, 11, 2)  # the first JAX whose simulator runs Mosaic GPU kernels


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes over which the value of `x` may differ; empty outside `shard_map`."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset() if kind is None else frozenset(kind.varying)


def vary_alike(tree: Any) -> Any:
    """Marks every array as varying over the union of the leaves' manual axes.

    Inside `shard_map` a loop needs carries of one type, and a hand-written gradient that mixes a
    sharded and a replicated operand is a partial sum. The transpose of this cast is the `psum` that
    completes it. Outside `shard_map` it does nothing.
    """
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(tree)))

    return jax.tree.map(lambda x: vary_over(x, tuple(axes)), tree)


def vary_over(x: Array, axes: tuple[str, ...]) -> Array:
    """Marks `x` as varying over the manual axes `axes`, where it is not yet."""
    missing = tuple(sorted(set(axes) - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def zeros(shape: tuple[int, ...], dtype: Any, *, like: Array) -> Array:
    """Zeros that vary over the same manual axes as `like`, fit for a loop's carry."""
    return vary_over(jnp.zeros(shape, dtype), tuple(varying_axes(like)))


_interpretation: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "interpretation", default=None
)


@contextlib.contextmanager
def interpret_tpu(**options: Any) -> Iterator[None]:
    """Within it TPU kernels run on any platform, in Pallas's simulator of a TPU, for tests.

    Args:
      **options: of `pltpu.InterpretParams`, e.g. `detect_races=True`.
    """
    from jax.experimental.pallas import tpu as pltpu  # half a second, for tests alone

    token = _interpretation.set(pltpu.InterpretParams(**options))
    try:
        yield
    finally:
        _interpretation.reset(token)


def interpretation() -> Any:
    """What `pallas_call(interpret=...)` needs here; None outside `interpret_tpu`."""
    return _interpretation.get()


_gpu_interpretation: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "gpu_interpretation", default=None
)


@contextlib.contextmanager
def interpret_gpu(**options: Any) -> Iterator[None]:
    """Within it Mosaic GPU kernels run on any platform, in Pallas's simulator of a GPU, for tests.

    What runs within must also be waited for within: a simulated kernel runs when its result is
    computed. After an exception the simulator is reset, or the next kernel would never end.

    Args:
      **options: of `plgpu.InterpretGPUParams`, e.g. `detect_races=True`. Reads past the end of an
        array, which a GPU's copy engine fills with zeros, give NaN here.

    Raises:
      UserError: this JAX has no such simulator.
    """
    if jax.__version_info__ < GPU_KERNELS_SINCE:
        raise UserError(
            "simulating GPU kernels needs jax 0.11.2 or newer (Python 3.12 or newer), and this is "
            f"jax {jax.__version__}; use a newer jax, or the implementation 'tile_scan'"
        )
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as simulator
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = plgpu.InterpretGPUParams(**{"out_of_bounds_reads": "uninitialized", **options})
    token = _gpu_interpretation.set(params)
    try:
        with plgpu.force_gpu_interpret_mode(params):
            yield
    except BaseException:
        simulator.reset_gpu_interpret_mode_state()
        raise
    finally:
        _gpu_interpretation.reset(token)


def gpu_interpretation() -> Any:
    """The parameters of the enclosing `interpret_gpu`; None outside."""
    return _gpu_interpretation.get()


def compiler_options() -> dict[str, Any]:
    """For `jax.jit` of whole steps: on CPU, vectors of 512 bits where the processor has them.

    XLA prefers 256; training steps of small models ran 1.10 to 1.13 times as fast with 512.
    """
    return {"xla_cpu_prefer_vector_width": 512} if target_platform() == "cpu" else {}


def target_platform() -> str:
    """The platform that code traced here is meant for: "cpu", "gpu", "tpu".

    The abstract mesh knows inside `shard_map` and under `jax.set_mesh`, also when compiling ahead
    of time for another machine. Elsewhere it is the default device's.
    """
    platform = getattr(_abstract_device(), "platform", None)
    if platform is None:
        default = jax.config.jax_default_device
        platform = getattr(default, "platform", default) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def target_device_kind() -> str:
    """The kind of device that code traced here is meant for, as JAX names it: "TPU v5", "cpu"."""
    kind = getattr(_abstract_device(), "device_kind", None)
    if kind is None:
        default = jax.config.jax_default_device
        if not hasattr(default, "device_kind"):
            default = jax.local_devices(backend=default)[0]
        kind = default.device_kind
    return kind


# Where the compiler turns all three of `lax.ragged_dot`'s products into grouped kernels, read from
# what it compiles: for these TPUs, since this libtpu (0.0.42 multiplies every row of the weights'
# gradient by every group; 0.0.50 and 0.0.52 do not). For v5e, v6e and 7x it expands all of them;
# for others nobody has looked.
_RAGGED_DOT_KINDS = ("TPU v5", "TPU v5p")
_RAGGED_DOT_SINCE = (0, 0, 50)


def has_ragged_dot() -> bool:
    """Whether XLA's ragged dot is a grouped kernel here, and not the dense expansion."""
    return (
        target_platform() == "tpu"
        and target_device_kind() in _RAGGED_DOT_KINDS
        and _libtpu_version() >= _RAGGED_DOT_SINCE
    )


@functools.cache
def _libtpu_version() -> tuple[int, ...]:
    """(0,) where libtpu is no installed package, and so of a version that cannot be told."""
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return (0,)
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())


def has_cudnn() -> bool:
    """Whether this JAX comes with cuDNN, which its attention asks for when it is traced."""
    from jax._src.lib import cuda_versions

    return cuda_versions is not None


def _abstract_device() -> Any:
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)

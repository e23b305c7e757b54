"""The device mesh: five named axes, of which every run uses as many as it needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType

from moejax.errors import UserError
from moejax.parallel.placement import placed
from moejax.parallel.sharding import RULES

AXES = ("data", "fsdp", "expert", "tensor", "context")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many ways each thing is split. The product is the number of devices.

    Attributes:
      data: replicas of all parameters, each with its share of the batch; None takes what the other
        axes leave of the devices. The only axis that spans several slices of TPUs.
      fsdp: parameters, gradients and optimiser state are split this many ways and gathered where
        they are used; the batch is split too.
      expert: experts are split this many ways; the batch and all other parameters are too.
      tensor: attention heads, hidden widths and the vocabulary are split this many ways.
      context: sequences are split this many ways.
      max_replicated_bytes: a parameter of more bytes that every device would hold whole is an
        error.
    """

    data: int | None = None
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1
    max_replicated_bytes: int = 2**27

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise UserError(f"mesh.{axis}={size} must be at least 1")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """{axis: size} for so many devices. Raises UserError where they do not suffice."""
        others = math.prod(getattr(self, axis) for axis in AXES if axis != "data")
        data = self.data or max(num_devices // others, 1)
        wanted = data * others
        stated = ", ".join(f"mesh.{axis}={getattr(self, axis)}" for axis in AXES[1:])
        if wanted > num_devices:
            raise UserError(
                f"the mesh needs {wanted} devices and there are {num_devices} (mesh.data={data}, "
                f"{stated}): make an axis smaller, or on CPU simulate devices with "
                "JAX_NUM_CPU_DEVICES"
            )
        if self.data is None and wanted < num_devices:
            raise UserError(
                f"{stated} do not divide the {num_devices} devices: change one of them, or set "
                f"mesh.data to use only some of the devices"
            )
        return {axis: getattr(self, axis) for axis in AXES} | {"data": data}

    def check_batch(self, num_devices: int, *, batch_size: int, sequence_length: int) -> None:
        """Raises UserError where so many sequences, or so long ones, cannot be split."""
        sizes = self.sizes(num_devices)
        for name, size, field in (
            ("batch", batch_size, "batch_size / num_microbatches"),
            ("sequence", sequence_length, "sequence_length"),
        ):
            ways = math.prod(sizes[axis] for axis in RULES[name])
            if size % ways:
                stated = " * ".join(f"mesh.{axis}={sizes[axis]}" for axis in RULES[name])
                raise UserError(
                    f"{field} = {size} cannot be split {ways} ways ({stated}): make it a multiple "
                    f"of {ways}, or make the mesh smaller"
                )

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over `devices` (all by default), or the first of them if it needs fewer.

        Raises UserError where a run of several processes would leave some of them without devices,
        and where an axis other than `data` would span slices of TPUs (`placement.py`).
        """
        devices = jax.devices() if devices is None else list(devices)
        sizes = self.sizes(len(devices))
        needed = math.prod(sizes.values())
        if needed < len(devices) and jax.process_count() > 1:
            raise UserError(
                f"the mesh uses {needed} of {len(devices)} devices, and a run of several processes "
                f"must use all: leave mesh.data unset, or set it to "
                f"{len(devices) * sizes['data'] // needed}"
            )
        arranged = placed(devices[:needed], sizes)
        return jax.sharding.Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))

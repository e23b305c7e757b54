"""A cluster by name, such as `v5p:8x8x8` or `h100:64x8`, and devices that stand for its own.

The compilers of libtpu and of JAX's CUDA plugin need a description of their target and not the
target itself. libtpu accepts shapes that no cloud offers, so what exists is listed here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import pathlib
import re
from typing import Any

import jax

from moejax.errors import UserError
from moejax.planning.chips import CHIPS, Chip

H100_TARGET = pathlib.Path(__file__).with_name("h100_target.txtpb")  # what XLA asks the driver of
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LARGEST = {"v5p": 6144, "tpu7x": 9216}  # chips of a slice, which is made of cubes of 4 x 4 x 4
_MOST_HOSTS = 1024  # of GPUs
_FOR_LIBTPU = {
    # Without these libtpu asks the network which TPU it is on, and refuses a second process.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices and how they are joined.

    Attributes:
      chip: None for this machine's own CPU, as many simulated devices as `shape` says.
      shape: chips along each axis of a TPU slice; hosts and GPUs of each; or the CPU's devices.
      num_slices: of TPUs, each of `shape`.
    """

    chip: Chip | None
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        chip = self.chip.name if self.chip else "cpu"
        slices = f"*{self.num_slices}" if self.num_slices > 1 else ""
        return f"{chip}:{'x'.join(map(str, self.shape))}{slices}"

    @property
    def num_devices(self) -> int:
        per_chip = self.chip.per_chip if self.chip else 1
        return math.prod(self.shape) * self.num_slices * per_chip

    def devices(self) -> list[jax.Device]:
        """What stands for its devices: good for compiling, not for running.

        Raises UserError where the compiler is not installed.
        """
        if self.chip is None:
            return _cpus(self.num_devices)
        return _tpus(self) if self.chip.torus_axes else _gpus(self)


def parse(text: str, *, num_slices: int | None = None) -> Topology:
    """The topology of that name: `v5p:4x4x4`, `v5p:4x4x4*2` for two slices, `h100:64x8`, `cpu:8`.

    `num_slices` says the same as `*2`. Raises UserError, with what exists, for any other.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", text)
    known = [*CHIPS, "cpu"]
    if found is None or found[1] not in known:
        raise UserError(
            f"there is no topology {text!r}: write v5p:8x8x8, v5p:4x4x4*2 for two slices, or "
            f"h100:64x8 for 64 hosts of 8, with one of {', '.join(known)}"
        )
    name, shape = found[1], tuple(map(int, found[2].split("x")))
    stated = int(found[3]) if found[3] else None
    if None not in (stated, num_slices) and stated != num_slices:
        raise UserError(f"{text} has {stated} slices and --slices says {num_slices}: state one")
    slices = stated or num_slices or 1
    chip = CHIPS.get(name)
    if not _exists(chip, shape):
        raise UserError(f"there is no topology {text!r}; {name} has {existing(chip)}")
    if slices > 1 and not (chip and chip.torus_axes):
        raise UserError(f"{name} has no slices: leave *{slices} or --slices out; state more hosts")
    return Topology(chip=chip, shape=shape, num_slices=slices)


def existing(chip: Chip | None) -> str:
    """The shapes that there are, in words."""
    if chip is None:
        return "any number of simulated devices, such as cpu:8"
    if not chip.torus_axes:
        return f"up to {_MOST_HOSTS} hosts of 1, 2, 4 or 8, such as {chip.name}:64x8"
    if chip.torus_axes == 2:
        return ", ".join("x".join(map(str, shape)) for shape in _FLAT)
    listed = ", ".join("x".join(map(str, shape)) for shape in _SMALL)
    return (
        f"{listed}, and sides that are multiples of 4 in rising order, such as 4x4x8, of up to "
        f"{_LARGEST[chip.name]} chips"
    )


def _exists(chip: Chip | None, shape: tuple[int, ...]) -> bool:
    if chip is None:
        return len(shape) == 1 and shape[0] > 0
    if not chip.torus_axes:
        return len(shape) == 2 and 0 < shape[0] <= _MOST_HOSTS and shape[1] in (1, 2, 4, 8)
    if chip.torus_axes == 2:
        return shape in _FLAT
    cubes = len(shape) == 3 and all(n > 0 and n % 4 == 0 for n in shape)
    rising = all(a <= b for a, b in itertools.pairwise(shape))
    return shape in _SMALL or (cubes and rising and math.prod(shape) <= _LARGEST[chip.name])


def _cpus(count: int) -> list[jax.Device]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"cpu:{count} needs {count} simulated devices and there are {len(devices)}: set "
            f"JAX_NUM_CPU_DEVICES={count}"
        )
    return devices[:count]


def _tpus(topology: Topology) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"{topology.name} needs the TPU compiler, which is not installed: pip install "
            "'moejax[tpu]' (Linux on x86-64)"
        )
    for name, value in _FOR_LIBTPU.items():
        os.environ.setdefault(name, value)
    shape = "x".join(map(str, topology.shape))
    options = {"num_slices": topology.num_slices} if topology.num_slices > 1 else {}
    return _described("tpu", f"{topology.chip.name}:{shape}", topology, **options)


def _gpus(topology: Topology) -> list[jax.Device]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(
            f"{topology.name} needs the GPU compiler, which is not installed: pip install "
            "'moejax[cuda]' (Python 3.12 or newer, 4.4 GB)"
        )
    hosts, each = topology.shape
    options = {"target_config": H100_TARGET.read_text(), "topology": f"1x{hosts}x{each}"}
    return _described("cuda", topology.chip.name, topology, **options)


def _described(platform: str, name: str, asked: Topology, **options: Any) -> list[jax.Device]:
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform=platform, topology_name=name, **options)
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"the compiler does not know {asked.name}: {first}") from error
    devices = list(found.devices)
    if len(devices) != asked.num_devices:
        raise ValueError(f"{asked.name} has {len(devices)}, not {asked.num_devices} devices")
    return devices

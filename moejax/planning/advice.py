"""What to change where a step does not fit, from the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping

from moejax.experiment import Experiment
from moejax.parallel.sharding import RULES
from moejax.planning.memory import BATCH, Memory

_GB = 1e9


def advice(
    experiment: Experiment, memory: Memory, sizes: Mapping[str, int], *, num_slices: int = 1
) -> list[str]:
    """Sentences that each name a setting; empty where the step fits.

    Args:
      experiment: that was planned.
      memory: of one device.
      sizes: {axis: size} of the mesh.
      num_slices: over which `data` is split, and no other axis.
    """
    if memory.fits:
        return []
    state = sum(n for kind, n in memory.held.items() if kind != BATCH)
    said = [
        f"too much by {(memory.needed - memory.capacity) / _GB:.1f} GB: the state takes "
        f"{state / _GB:.1f} GB of {memory.capacity / _GB:.1f} GB"
    ]
    # The gradients of what trains are there besides, and so are they where the compiler refuses.
    if state > memory.capacity / 2:
        said += _smaller_state(sizes, state, num_slices)
    else:
        said += _smaller_step(experiment, sizes)
    return said


def _smaller_state(sizes: Mapping[str, int], state: int, num_slices: int) -> list[str]:
    copies = sizes["data"] // num_slices  # within a slice, which fsdp cannot leave
    if copies > 1:
        return [
            f"mesh.data={sizes['data']} holds the state so often: with mesh.fsdp="
            f"{sizes['fsdp'] * copies} and mesh.data={num_slices} a device holds about "
            f"{state / copies / _GB:.1f} GB"
        ]
    if num_slices > 1:
        return [
            f"every slice holds the whole state: slices of twice as many chips with mesh.fsdp="
            f"{2 * sizes['fsdp']} hold about {state / 2 / _GB:.1f} GB on each device"
        ]
    return [
        f"a cluster of twice as many devices with mesh.fsdp={2 * sizes['fsdp']} holds about "
        f"{state / 2 / _GB:.1f} GB on each"
    ]


def _smaller_step(experiment: Experiment, sizes: Mapping[str, int]) -> list[str]:
    said = []
    if experiment.model.remat != "full":
        said.append(
            f'model.remat="full" keeps only each layer\'s input (it is {experiment.model.remat!r})'
        )
    if experiment.model.dtype == "float32":
        said.append('model.dtype="bfloat16" halves activations')
    if parts := _more_microbatches(experiment, sizes):
        said.append(
            f"num_microbatches={parts} (it is {experiment.num_microbatches}) leaves "
            f"{experiment.num_microbatches / parts:.0%} of the activations, and no result changes"
        )
    else:
        said.append(
            "a device has one sequence at a time already: split sequences with mesh.context="
            f"{2 * sizes['context']}, or lower sequence_length={experiment.sequence_length}"
        )
    return said


def _more_microbatches(experiment: Experiment, sizes: Mapping[str, int]) -> int | None:
    """The next number that divides the batch and leaves every device a sequence."""
    ways = math.prod(sizes[axis] for axis in RULES["batch"])
    for parts in range(experiment.num_microbatches + 1, experiment.batch_size // ways + 1):
        if experiment.batch_size % (parts * ways) == 0:
            return parts
    return None

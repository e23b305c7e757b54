"""An estimate of a step's time: what each resource needs alone, and what follows by overlap.

It is no measurement. Compute runs at the peak, memory and networks at their bandwidths, without
latency, and rows are balanced. The least time is that of the slowest resource, if all work at once;
the most, if compute and memory overlap and every collective waits for both and for every other.
"""

from __future__ import annotations

import dataclasses

from moejax.experiment import Experiment
from moejax.models.transformer import Transformer
from moejax.planning import network
from moejax.planning.compile import CompiledStep
from moejax.planning.topology import Topology
from moejax.planning.work import Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """Of one device and step.

    Attributes:
      model: what the mathematics needs (`models/flops.py`).
      executed: with the passes that are done again: by remat, and to know counts and loads before
        the first gradient; or what is counted in the program, where that is more.
      counted: products in the program outside of kernels and of loops of open length.
    """

    model: float
    executed: float
    counted: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of one step, each resource alone, and together.

    Attributes:
      compute: products at the peak.
      memory: traffic of main memory at its bandwidth.
      networks: {axes: seconds} of the collectives along each set of mesh axes.
      least, most: of the whole step; see the file.
      mfu_least, mfu_most: share of the peak that the model's FLOPs take in `most` and in `least`.
    """

    compute: float
    memory: float
    networks: dict[tuple[str, ...], float]
    least: float
    most: float
    mfu_least: float
    mfu_most: float


def flops_of(experiment: Experiment, model: Transformer, work: Work, num_devices: int) -> Flops:
    """Of one device, if all do the same."""
    tokens = experiment.batch_size * experiment.sequence_length / num_devices
    counted = experiment.size(model)
    needed = counted.train_flops_per_token * tokens
    again = extra_passes(experiment, model) * counted.forward_flops_per_token * tokens
    return Flops(model=needed, executed=max(needed + again, work.flops), counted=work.flops)


def extra_passes(experiment: Experiment, model: Transformer) -> int:
    """Forward passes besides the one whose gradient is taken, as `train/step.py` does them."""
    rules = model.moe.balance if model.moe is not None else ()
    needs_loads = any(rule.loads == "two_pass" for rule in rules)
    first = experiment.num_microbatches > 1 and needs_loads
    return int(first) + int(model.remat == "full")


def estimate(step: CompiledStep, topology: Topology, work: Work, flops: Flops) -> Estimate:
    """Raises ValueError for the CPU, whose simulated devices have no peak of their own."""
    chip = topology.chip
    if chip is None:
        raise ValueError("there is no roofline of simulated devices")
    networks = {}
    for axes, calls in network.by_axes(work.exchanges).items():
        if axes:
            joined = network.link(axes, step.mesh, topology)
            networks[axes] = sum(network.seconds(e, joined) * n for e, n in calls.items())
    compute, memory = flops.executed / chip.flops, work.traffic / chip.bandwidth
    least = max(compute, memory, *networks.values(), 0.0)
    most = max(compute, memory) + sum(networks.values())
    return Estimate(
        compute=compute,
        memory=memory,
        networks=networks,
        least=least,
        most=most,
        mfu_least=flops.model / (most * chip.flops),
        mfu_most=flops.model / (least * chip.flops),
    )

"""A plan: one experiment on one cluster, with everything that can be known before it is there."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import jax

from moejax.experiment import Experiment
from moejax.planning import advice, dense, hlo
from moejax.planning.compile import CompiledStep, compile_step, vocabulary
from moejax.planning.memory import Copied, Memory, memory_of, most_copied
from moejax.planning.phase import Phase
from moejax.planning.roofline import Estimate, Flops, estimate, flops_of
from moejax.planning.topology import Topology
from moejax.planning.work import Work, work_of

_NUM_COPIED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What `moejax plan` says.

    Attributes:
      topology: of the cluster. mesh: {axis: size}.
      vocab_size: rows of the embedding.
      tokens: of one step, over all devices.
      memory: of one device.
      copied: the largest leaves of the state that several devices hold alike.
      work: of one device; None where the program was refused.
      flops: of one device; None where it was refused.
      estimate: of a step's time; None where it was refused, and for simulated devices.
      expansions: arrays of every expert on every token, which there should be none of.
      refusal: what the compiler says of a program that does not fit.
      phase: the steps that work, FLOPs and time are of; None where all compute alike.
      advice: what to change, in sentences.
      seconds: that tracing and compiling took.
      versions: of what the program depends on.
    """

    topology: Topology
    mesh: dict[str, int]
    vocab_size: int
    tokens: int
    memory: Memory
    copied: list[Copied]
    work: Work | None
    flops: Flops | None
    estimate: Estimate | None
    expansions: list[str]
    refusal: str | None
    phase: Phase | None
    advice: list[str]
    seconds: float
    versions: dict[str, str]


def plan(experiment: Experiment, topology: Topology, *, vocab_size: int | None = None) -> Plan:
    """Compiles the training step for the cluster and reads what there is to know.

    Raises UserError for a compiler that is not installed, a mesh or batch that the devices cannot
    be split into, and a vocabulary that is not known.
    """
    size = vocabulary(experiment, vocab_size)
    step = compile_step(experiment, topology.devices(), vocab_size=size)
    return plan_of(experiment, topology, step, vocab_size=size)


def plan_of(
    experiment: Experiment, topology: Topology, step: CompiledStep, *, vocab_size: int
) -> Plan:
    """The plan of a step that is compiled, or was refused."""
    memory = memory_of(step, topology.chip.memory if topology.chip else None)
    sizes = dict(step.mesh.shape)
    work = flops = guess = None
    expansions: list[str] = []
    if step.counted is not None:
        module = hlo.read(step.counted.as_text())
        work = work_of(module, sizes, num_slices=topology.num_slices)
        flops = flops_of(experiment, step.model, work, step.mesh.size)
        split = step.mesh.size // sizes["tensor"]
        expansions = dense.expansions(module, experiment, step.model, sizes["expert"], split)
        if topology.chip is not None:
            guess = estimate(step, topology, work, flops)
    return Plan(
        topology=topology,
        mesh=sizes,
        vocab_size=vocab_size,
        tokens=experiment.batch_size * experiment.sequence_length,
        memory=memory,
        copied=most_copied(step, _NUM_COPIED),
        work=work,
        flops=flops,
        estimate=guess,
        expansions=expansions,
        refusal=step.refusal,
        phase=step.phase,
        advice=advice.advice(experiment, memory, sizes, num_slices=topology.num_slices),
        seconds=step.seconds,
        versions=_versions(topology),
    )


def _versions(topology: Topology) -> dict[str, str]:
    found = {"jax": jax.__version__}
    if topology.chip is not None:
        package = "libtpu" if topology.chip.torus_axes else "jax-cuda13-plugin"
        found[package] = importlib.metadata.version(package)
    return found

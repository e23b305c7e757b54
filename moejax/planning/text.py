"""A plan for people to read, and for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from moejax.planning import network
from moejax.planning.plan import Plan

_SMALL = 10**8
_ROWS = 12  # collectives that are shown; the others are added up
_SHOWN_EXPANSIONS = 5
LAUNCHED = 0.92  # of a GPU, in launch/slurm.sh and launch/gke_gpu.yaml
_POOL = 0.75  # of a GPU, which JAX takes unless it is told otherwise


def describe(plan: Plan) -> str:
    """The whole report."""
    return "\n".join(line for part in _PARTS for line in part(plan))


def as_json(plan: Plan, **more: Any) -> dict[str, Any]:
    """Everything that the report says, in bytes, seconds and FLOPs."""
    found: dict[str, Any] = {
        **more,
        "topology": plan.topology.name,
        "devices": plan.topology.num_devices,
        "mesh": plan.mesh,
        "vocab_size": plan.vocab_size,
        "tokens_per_step": plan.tokens,
        "versions": plan.versions,
        "compile_seconds": round(plan.seconds, 1),
        "memory": dataclasses.asdict(plan.memory) | {"fits": plan.memory.fits},
        "copied": [dataclasses.asdict(leaf) for leaf in plan.copied],
        "expansions": plan.expansions,
        "refusal": plan.refusal,
        "phase": None if plan.phase is None else str(plan.phase),
        "advice": plan.advice,
    }
    if plan.work is not None and plan.flops is not None:
        found["flops"] = dataclasses.asdict(plan.flops)
        found["traffic"] = plan.work.traffic
        found["kernels"] = dict(plan.work.kernels)
        found["open_loops"] = plan.work.open_loops
        found["open_exchanges"] = plan.work.open_exchanges
        found["tied_conditionals"] = plan.work.tied
        found["collectives"] = [
            exchange._asdict() | {"count": count}
            for exchange, count in network.largest_first(plan.work.exchanges)
        ]
    if plan.estimate is not None:
        found["estimate"] = dataclasses.asdict(plan.estimate)
        named = {"+".join(axes): seconds for axes, seconds in plan.estimate.networks.items()}
        found["estimate"]["networks"] = named
    return found


def _cluster(plan: Plan) -> Iterator[str]:
    chip = plan.topology.chip
    kind = chip.kind if chip else "simulated on this CPU"
    split = ", ".join(f"{axis}={n}" for axis, n in plan.mesh.items() if n > 1) or "not split"
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    yield f"{plan.topology.name}: {plan.topology.num_devices} devices ({kind}), mesh {split}"
    yield f"{plan.tokens:,} tokens a step, vocabulary {plan.vocab_size:,}"
    yield f"compiled in {plan.seconds:.0f} s with {versions}"
    if plan.phase is not None:
        yield f"the model changes with the step: collectives, FLOPs and time are of {plan.phase},"
        yield "memory is of the whole run"
    yield ""


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    rows = dict(memory.held)
    if memory.temporaries is not None:
        rows |= {"padding of layouts": memory.padding, "results": memory.results}
        rows |= {"activations, gradients and other temporaries": memory.temporaries}
        rows |= {"code": memory.code}
    yield "memory of a device"
    yield from (f"  {kind:46} {_gb(n)}" for kind, n in rows.items() if n)
    if memory.capacity is None:
        yield f"  {'needed':46} {_gb(memory.needed)}"
    else:
        share = f"{memory.needed / memory.capacity:.0%}"
        verdict = f"fits ({share})" if memory.fits else "DOES NOT FIT"
        least = "" if memory.temporaries is not None else "at least "
        yield f"  {'needed':46} {_gb(memory.needed)}  {least}of {_gb(memory.capacity).strip()}"
        yield f"  {verdict}"
        yield from _pool(plan)
    yield ""


def _pool(plan: Plan) -> Iterator[str]:
    """Where JAX's own share of a GPU is not enough."""
    memory, chip = plan.memory, plan.topology.chip
    if chip is None or chip.torus_axes or not memory.fits:
        return
    if memory.needed and memory.needed > _POOL * chip.memory:
        share = math.ceil(100 * memory.needed / chip.memory) / 100
        yield (
            f"  JAX takes {_POOL:.0%} of a GPU: set XLA_CLIENT_MEM_FRACTION to {share:.2f} or more "
            f"(the launchers set {LAUNCHED})"
        )


def _refusal(plan: Plan) -> Iterator[str]:
    if plan.refusal is not None:
        yield f"the compiler says: {plan.refusal.splitlines()[0]}"
        yield ""
    if plan.advice:
        yield "what to change"
        yield from (f"  {sentence}" for sentence in plan.advice)
        yield ""


def _copied(plan: Plan) -> Iterator[str]:
    if plan.copied:
        yield "largest parts of the state that several devices hold alike"
        yield from (
            f"  {leaf.path:60} {_gb(leaf.num_bytes)}  on {leaf.copies} devices"
            for leaf in plan.copied
        )
        yield ""


def _collectives(plan: Plan) -> Iterator[str]:
    if plan.work is None:
        return
    listed = network.largest_first(plan.work.exchanges)
    if listed:
        yield "collectives of a step, rows balanced"
        yield f"  {'kind':20} {'mesh axes (devices)':28} {'calls':>8} {'bytes a call':>14} total"
    for exchange, count in listed[:_ROWS]:
        axes = f"{'+'.join(exchange.axes) or 'none'} ({exchange.size})"
        total = _gb(exchange.num_bytes * count)
        yield f"  {exchange.kind:20} {axes:28} {count:8,} {exchange.num_bytes:14,} {total}"
    if rest := listed[_ROWS:]:
        calls, total = sum(n for _, n in rest), sum(e.num_bytes * n for e, n in rest)
        yield f"  {len(rest)} smaller kinds: {calls:,} calls, {_gb(total).strip()}"
    if plan.work.open_exchanges:
        yield f"  of these {plan.work.open_exchanges:,} in loops of open length count once"
    if plan.expansions:
        shown = "; ".join(plan.expansions[:_SHOWN_EXPANSIONS])
        yield f"  EVERY EXPERT ON EVERY TOKEN in {len(plan.expansions)} arrays: {shown}"
    yield ""


def _time(plan: Plan) -> Iterator[str]:
    flops, guess = plan.flops, plan.estimate
    if flops is None:
        return
    yield f"FLOPs of a device and step: model {flops.model:.3e}, executed {flops.executed:.3e}"
    if plan.work is not None and plan.work.tied:
        tied = f"{plan.work.tied:,} conditionals that no collective decides"
        yield f"  (of {tied}, the branch with most products)"
    if guess is None or plan.topology.chip is None:
        return
    yield ""
    yield "estimate of a step (peak rates and bandwidths, no latency; nothing was measured)"
    yield f"  {'compute':28} {_time_of(guess.compute)}"
    yield f"  {'main memory':28} {_time_of(guess.memory)}"
    if plan.work is not None and plan.work.open_loops:
        yield "    (without what loops of open length repeat: blocks of keys, tiles of rows)"
    for axes, seconds in sorted(guess.networks.items(), key=lambda item: -item[1]):
        yield f"  {'network, ' + '+'.join(axes):28} {_time_of(seconds)}"
    yield f"  step, if all of it overlaps       {_time_of(guess.least)}, MFU {guess.mfu_most:.1%}"
    yield f"  step, if no collective overlaps   {_time_of(guess.most)}, MFU {guess.mfu_least:.1%}"


def _gb(num_bytes: int | None) -> str:
    """In GB, or in MB where that would be nothing."""
    found = num_bytes or 0
    return f"{found / 1e9:10.3f} GB" if found >= _SMALL else f"{found / 1e6:10.3f} MB"


def _time_of(seconds: float) -> str:
    return f"{seconds:9.3f} s" if seconds >= 1 else f"{seconds * 1e3:9.3f} ms"


_PARTS = (_cluster, _memory, _refusal, _copied, _collectives, _time)

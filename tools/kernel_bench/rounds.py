"""Compiles, checks and times the variants of one case."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from kernel_bench.cases import Case, group_sizes
from kernel_bench.checks import Reference, tolerance
from kernel_bench.libraries import Variant
from kernel_bench.peers import CannotRun, NotAVariant
from kernel_bench.timing import CACHE_BYTES, Ceilings, compiled, spread, time_calls

from moejax.kernels import compat

COMPILE_LIMIT = 90.0  # seconds; a kernel that unrolls its groups can take minutes
SLICE = 0.03  # seconds of calls in a row per round, so that launches and clocks weigh little


@dataclasses.dataclass
class Effort:
    """How much to measure, and what is left of the time."""

    rounds: int
    seconds: float | None
    started: float
    abandoned: bool = False

    def left(self) -> float:
        """Seconds; infinite without a budget."""
        if self.seconds is None:
            return float("inf")
        return self.seconds - (time.monotonic() - self.started)


@dataclasses.dataclass
class Prepared:
    """A variant ready to be called. `arguments` and `results` convert from and to JAX arrays."""

    call: Callable
    arguments: Callable = lambda args: args
    results: Callable = lambda out: out
    wait: Callable = jax.block_until_ready
    temp_bytes: int | None = None
    compile_seconds: float | None = None
    blocks: dict[str, Any] | None = None


def bench_case(
    case: Case,
    distributions: Sequence[str],
    chosen: Sequence[Variant],
    ceilings: Ceilings,
    effort: Effort,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of the report of each distribution, one for every variant."""
    if effort.left() <= 0:
        yield from (
            [_row(case, d, "all", status="not measured", reason="out of time")]
            for d in distributions
        )
        return
    sets = [case.operands(seed) for seed in range(_num_sets(case))]
    example = (*sets[0], *case.routing(group_sizes("balanced", case.model), 0))
    ready = _prepare_all(case, chosen, example, effort)
    for distribution in distributions:
        sizes = group_sizes(distribution, case.model)
        args = [(*operands, *case.routing(sizes, i)) for i, operands in enumerate(sets)]
        yield _measure(case, distribution, sizes, args, ready, ceilings, effort)


def _num_sets(case: Case) -> int:
    """Enough sets of operands that together they are larger than the caches."""
    item = 2 if case.dtype == "bfloat16" else 4
    each = item * sum(int(np.prod(shape)) for shape, _ in case.shapes().values())
    return int(np.clip(np.ceil(CACHE_BYTES / each), 1, 16))


def _prepare_all(
    case: Case, chosen: Sequence[Variant], args: tuple, effort: Effort
) -> dict[str, Prepared | str]:
    """Each variant ready, or the reason why not. On accelerators several compile at once.

    The first, the ceiling, compiles alone: XLA picks its matmul by timing candidates.
    """
    workers = 1 if jax.default_backend() == "cpu" else min(8, os.cpu_count() or 1)
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    ready: dict[str, Prepared | str] = {}
    for batch in (chosen[:1], chosen[1:]):
        futures = {v.name: pool.submit(_prepare, v, case, args) for v in batch}
        until = time.monotonic() + min(COMPILE_LIMIT if workers > 1 else 1e6, max(effort.left(), 1))
        for name, future in futures.items():
            try:
                made = future.result(max(0.1, until - time.monotonic()))
            except concurrent.futures.TimeoutError:
                made, effort.abandoned = "it did not compile in time", True
            if made is not None:
                ready[name] = made
    pool.shutdown(wait=False, cancel_futures=True)
    return ready


def _prepare(variant: Variant, case: Case, args: tuple) -> Prepared | str | None:
    try:
        function = variant.function(case)
        if hasattr(variant, "arguments"):
            return Prepared(function, variant.arguments, variant.results, variant.wait)
        start = time.perf_counter()
        options = {**compat.compiler_options(), **dict(getattr(variant, "options", ()))}
        call = compiled(function, args, options)
    except NotAVariant:
        return None
    except CannotRun as reason:
        return str(reason)
    except Exception as error:  # whatever a library raises is the reason
        return _reason(error)
    temp = call.memory_analysis().temp_size_in_bytes
    if (room := _free_bytes()) is not None and temp > room:
        return f"it needs {temp / 2**30:.1f} GiB of temporaries and {room / 2**30:.1f} are free"
    return Prepared(
        call,
        temp_bytes=temp,
        compile_seconds=time.perf_counter() - start,
        blocks=variant.blocks(case) if hasattr(variant, "blocks") else None,
    )


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:240]


def _free_bytes() -> float | None:
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _measure(case, distribution, sizes, args, ready, ceilings, effort) -> list[dict[str, Any]]:
    """One row a variant: checked first, then timed in turns."""
    rows, alive = {}, {}
    reference = Reference(case, args[0], sizes) if effort.left() > 0 else None
    for name, prepared in ready.items():
        row = rows[name] = _row(case, distribution, name)
        if isinstance(prepared, str):
            row |= {"status": "cannot run", "reason": prepared}
        elif effort.left() <= 0:
            row |= {"status": "not measured", "reason": "out of time"}
        elif (entry := _try(row, case, prepared, args, reference)) is not None:
            alive[name] = entry
    _take_turns(rows, alive, effort)
    dense = rows["dense"]["seconds"]
    for row in rows.values():
        _finish(row, case, sizes, ceilings, dense)
    return list(rows.values())


def _try(row: dict, case: Case, prepared: Prepared, args, reference: Reference):
    """Runs once, checks, and finds how many calls fill a slice; None where that failed."""
    try:
        converted = [prepared.arguments(a) for a in args]
        start = time.perf_counter()
        out = prepared.call(*converted[0])
        prepared.wait(out)
        once = time.perf_counter() - start
        for field in ("temp_bytes", "compile_seconds", "blocks"):
            row[field] = getattr(prepared, field)
        if row["variant"] != "dense":
            row["error"] = reference.error(prepared.results(out))
            row["status"] = "ok" if row["error"] <= tolerance(case) else "WRONG"
        del out
        if once < 1:  # the first call may have loaded something
            once = time_calls(prepared.call, converted, 1, prepared.wait)
    except Exception as error:  # out of memory, or what only shows at run time
        row |= {"status": "cannot run", "reason": _reason(error)}
        return None
    row["repeats"] = int(np.clip(round(SLICE / once), 1, 200))
    return prepared, converted, once


def _take_turns(rows: dict, alive: dict, effort: Effort) -> None:
    """Fills `seconds` round by round. A slow variant gets fewer rounds, and at least two."""
    allowance = 2.0 if jax.default_backend() != "cpu" else 6.0
    for turn in range(effort.rounds):
        for name, (prepared, converted, once) in alive.items():
            row = rows[name]
            slow = turn >= 2 and turn * once * (row["repeats"] + 1) > allowance
            if slow or effort.left() <= 0:
                continue
            row["seconds"].append(
                time_calls(prepared.call, converted, row["repeats"], prepared.wait)
            )


def _row(case: Case, distribution: str, variant: str, **more: Any) -> dict[str, Any]:
    model = case.model
    return {
        "product": case.product,
        "model": model.name,
        "distribution": distribution,
        "variant": variant,
        "status": "ok",
        "reason": None,
        "dtype": case.dtype,
        "R": model.rows,
        "K": case.widths[0],
        "N": case.widths[1],
        "G": model.experts,
        "seconds": [],
        **more,
    }


def _finish(row: dict, case: Case, sizes: np.ndarray, ceilings: Ceilings, dense: list) -> None:
    """Adds what follows from the seconds."""
    row |= {"flops": case.flops, "bytes": case.moved(sizes), "largest_group": int(sizes.max())}
    row["roofline_seconds"] = ceilings.seconds(row["flops"], row["bytes"])
    if not row["seconds"]:
        if row["status"] == "ok":
            row |= {"status": "not measured", "reason": "out of time"}
        return
    found = spread(row["seconds"])
    row |= {
        "median": found.median,
        "least": found.least,
        "quartiles": found.quartiles,
        "flops_per_second": row["flops"] / found.median,
        "share_of_peak": row["flops"] / found.median / ceilings.flops,
        "share_of_roofline": row["roofline_seconds"] / found.median,
        "times_dense": found.median / spread(dense).median if dense else None,
    }

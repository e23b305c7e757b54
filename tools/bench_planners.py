"""Planners of expert parallelism compared: balance, weights that move, time of a plan.

    python tools/bench_planners.py [--paper] [--zipf] [--trace RUN --num-devices 4 8 16 --phases 4]

Without a choice of loads: the paper's scenarios (30, 50, 80 or 95% of the rows into 16, 4 or 1
consecutive experts on 8 devices; arXiv 2601.17111, figure 4) and Zipf's law with random placement
on 8, 32 and 64 devices. A trace is the folder of a training run, whose log holds every layer's
loads (train with log_every=1 to have those of every step), or an .npz file with one array:

    loads   integers [steps, layers, experts]: rows (token copies) that the router gave to each
            expert in each layer at each step, over all devices

Planners: native (plain expert parallelism); least-loaded with capacities of 1, 1.05 and 1.25 times
the mean; one owner and wrapping around, both at the mean; `rebalance` with its defaults and 4
slots; and replication in the manner of EPLB, with spare slots, from the loads of the step itself
(oracle), of the step before (old), or a moving average of all before. EPLB has no owners, so its
foreign experts are weights that would lie elsewhere without it, mostly moved long before.

Each cell of a table is largest over mean load of the devices (averaged over steps), then the most
foreign experts on a device, then copies of experts in all. Times are medians of single calls of
the compiled function on this machine, calling included; EPLB's is numpy on the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import sys
from collections.abc import Sequence

import jax
import numpy as np
from planner_bench import workloads
from planner_bench.measure import Result, Settings, measure


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--paper", action="store_true", help="the paper's scenarios")
    parser.add_argument("--zipf", action="store_true", help="Zipf's law")
    parser.add_argument("--trace", type=pathlib.Path, action="append", default=[], metavar="PATH")
    parser.add_argument(
        "--num-devices", type=int, nargs="+", default=[8], help="for traces (default 8)"
    )
    parser.add_argument(
        "--phases", type=int, default=1, help="of a trace, reported one by one (default 1)"
    )
    parser.add_argument("--steps", type=int, default=6, help="of synthetic loads (default 6)")
    parser.add_argument(
        "--min-chunk",
        type=int,
        default=1024,
        help="rows for which an expert is moved (default 1024;\n"
        "at most an eighth of a device's rows)",
    )
    parser.add_argument("--spare-slots", type=int, default=2, help="EPLB's, per device (default 2)")
    parser.add_argument("--decay", type=float, default=0.9, help="of the moving average")
    parser.add_argument("--calls", type=int, default=30, help="that are timed (default 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    args = parser.parse_args(words)
    try:
        chosen = _workloads(args)
    except ValueError as error:
        parser.error(str(error))
    settings = Settings(args.min_chunk, args.spare_slots, args.decay, args.calls)
    machine = (
        f"{jax.devices()[0].device_kind} ({platform.machine()}), {os.cpu_count()} cores, jax "
        f"{jax.__version__}"
    )
    print(f"{machine}, load {os.getloadavg()[0]:.1f}")
    results = []
    for group, members in itertools.groupby(chosen, key=lambda w: w.group):
        found = [result for workload in members for result in measure(workload, settings)]
        print("\n" + table(group, found), flush=True)
        results += found
    print("\n" + times(results))
    if args.json:
        report = {"machine": machine, "settings": vars(settings)}
        report["results"] = [dataclasses.asdict(r) for r in results]
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _workloads(args: argparse.Namespace) -> list[workloads.Workload]:
    everything = not (args.paper or args.zipf or args.trace)
    chosen = []
    if args.paper or everything:
        chosen += workloads.paper_scenarios(args.steps, args.seed)
    if args.zipf or everything:
        chosen += workloads.zipf(args.steps, args.seed)
    for path, num_devices in itertools.product(args.trace, args.num_devices):
        chosen += workloads.recorded(path, num_devices, args.phases)
    return chosen


def table(group: str, results: list[Result]) -> str:
    """A line per workload, a column per planner: load, most foreign experts, copies."""
    planners = list(dict.fromkeys(r.planner for r in results))
    lines = [f"{group:22}" + "".join(f"{p:>15}" for p in planners)]
    for name, members in itertools.groupby(results, key=lambda r: r.workload):
        cells = (f"{r.after:.2f} {r.most_foreign:3} {r.copies:4.0f}" for r in members)
        lines.append(f"{name:22}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def times(results: list[Result]) -> str:
    """Microseconds per plan: the median workload of each shape, and the slowest."""
    planners = list(dict.fromkeys(r.planner for r in results))
    lines = [f"{'microseconds per plan':22}" + "".join(f"{p:>15}" for p in planners)]
    shape = lambda r: (r.num_experts, r.num_devices)
    for (experts, devices), members in itertools.groupby(sorted(results, key=shape), key=shape):
        of_shape, cells = list(members), []
        for planner in planners:
            took = [r.microseconds for r in of_shape if r.planner == planner]
            cells.append(f"{np.median(took):.0f} to {max(took):.0f}" if took else "")
        lines.append(f"N={experts}, P={devices}".ljust(22) + "".join(f"{c:>15}" for c in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

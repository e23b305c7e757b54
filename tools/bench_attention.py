"""Block attention against full causal attention: seconds a call, and memory, by length.

    python tools/bench_attention.py [--lengths 2048 4096 ...] [--json FILE]

Contenders, all on the same arrays, batch 1, queries and keys drawn from a normal distribution (so
that choices are scattered over all blocks, the worst for locality):

    packed     moba_attention(implementation="packed"), choosing and packing included
    scan       moba_attention(implementation="scan"): every pair is computed, and masked; up to
               --dense-limit keys, as the next but one
    blockwise  full causal attention, memory linear in the length: "scan" with all blocks attended,
               in blocks of 256, which skips what lies behind a query
    jax.nn     full causal attention: jax.nn.dot_product_attention, with scores over all pairs

`forward` is one call, `both` the value and the gradients of q, k and v. Contenders take turns, and
medians are printed with the ratio to the faster full attention, by the clock and by the seconds of
processor that the process used, which other work on the machine disturbs less; the load is printed.
Memory is what the compiler says of the temporaries (`memory_analysis`).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from kernel_bench.timing import machine

from moejax.kernels.block_attention import moba_attention

FULL = ("blockwise", "jax.nn")
PASSES = ("forward", "both")
FULL_BLOCK = 256


def contenders(length: int, args: argparse.Namespace) -> dict[str, Callable]:
    """Name -> attention of q, k and v."""
    sparse = {"block_size": args.block_size, "top_k": args.top_k}
    found = {
        "packed": functools.partial(moba_attention, implementation="packed", **sparse),
        "scan": functools.partial(moba_attention, implementation="scan", **sparse),
        "blockwise": functools.partial(
            moba_attention, implementation="scan", block_size=FULL_BLOCK, top_k=length
        ),
        "jax.nn": functools.partial(jax.nn.dot_product_attention, is_causal=True),
    }
    if length > args.dense_limit:
        del found["jax.nn"], found["scan"]
    if length > args.full_limit:
        del found["blockwise"]
    return {name: f for name, f in found.items() if name in args.contenders}


def compiled(attend: Callable, which: str, arrays: Sequence[Any]) -> jax.stages.Compiled:
    """The forward pass, or the value and all gradients."""

    def both(q, k, v, d_out):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(d_out)

    run = both if which == "both" else lambda q, k, v, d_out: attend(q, k, v)
    return jax.jit(run).lower(*arrays).compile()


def measure(length: int, which: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender."""
    shapes = [(1, length, n, args.width) for n in (args.heads, *[args.kv_heads] * 2, args.heads)]
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(k, s, args.dtype) for k, s in zip(keys, shapes, strict=True)]
    runs = {n: compiled(f, which, arrays) for n, f in contenders(length, args).items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(args.rounds + 1):
        for name, run in runs.items():
            start, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(run(*arrays))
            if round_:  # the first touches the memory
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - used)
    return [
        {
            "length": length,
            "pass": which,
            "contender": name,
            "median": statistics.median(seconds[name]),
            "median_processor": statistics.median(processor[name]),
            "seconds": seconds[name],
            "processor_seconds": processor[name],
            "temporary_bytes": runs[name].memory_analysis().temp_size_in_bytes,
            "load": os.getloadavg()[0],
        }
        for name in runs
    ]


def memory(length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Temporary bytes of the forward pass of `packed`, compiled and not run."""
    shapes = [(1, length, n, args.width) for n in (args.heads, *[args.kv_heads] * 2, args.heads)]
    specs = [jax.ShapeDtypeStruct(s, args.dtype) for s in shapes]
    run = compiled(contenders(length, args)["packed"], "forward", specs)
    return {"length": length, "temporary_bytes": run.memory_analysis().temp_size_in_bytes}


def show(rows: list[dict[str, Any]]) -> None:
    """One line for a length and pass."""
    cells = []
    for r in rows:
        cell = f"{r['contender']} {1e3 * r['median']:.0f}"
        full = [f for f in rows if f["contender"] in FULL]
        if full and r["contender"] not in FULL:
            ratios = (min(f[m] for f in full) / r[m] for m in ("median", "median_processor"))
            cell += " ({:.2f}, {:.2f})".format(*ratios)
        cells.append(cell)
    print(f"{rows[0]['length']:7} {rows[0]['pass']:8} " + "   ".join(cells), flush=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=[2**n for n in range(11, 16)])
    parser.add_argument("--memory", type=int, nargs="*", default=[2**n for n in range(13, 18)])
    parser.add_argument("--contenders", nargs="+", default=["packed", "scan", *FULL])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dense-limit", type=int, default=8192, help="keys for jax.nn and scan")
    parser.add_argument("--full-limit", type=int, default=32768, help="keys for blockwise")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    args = parser.parse_args(words)
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    report: dict[str, Any] = {"machine": machine(), "settings": settings, "rows": [], "memory": []}
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, ", end=""
    )
    print(f"load {os.getloadavg()[0]:.1f}")
    print("ms (times as fast as the faster full attention: by the clock, by processor seconds)")
    for length in args.lengths:
        for which in PASSES:
            rows = measure(length, which, args)
            show(rows)
            report["rows"] += rows
            _save(report, args.json)
    for length in args.memory:
        report["memory"].append(memory(length, args))
        print(f"{length:7} forward, temporaries {report['memory'][-1]['temporary_bytes']:,} bytes")
        _save(report, args.json)
    return 0


def _save(report: dict[str, Any], path: pathlib.Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

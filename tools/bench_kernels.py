"""Times moejax's grouped matmuls and expert MLP, and every library's, on this machine.

    python tools/bench_kernels.py --json a.json            the whole table
    python tools/bench_kernels.py --products gate_up,drhs --models qwen3 --distributions balanced
    python tools/bench_kernels.py --everything --json a.json     conformance, then the table, within
                                                                  nine minutes
    python tools/kernel_bench/plot.py a.json --out a.png

Shapes, distributions and products are those of `kernel_bench/cases.py`; bfloat16 on accelerators.
On a CPU the models are a scale of 8 smaller, in float32, with shapes of 64 groups added. Every
result is checked before it is timed (`kernel_bench/checks.py`); one that is wrong says so and takes
part in no comparison. Variants alternate within every round, over several sets of fresh random
operands, so that neither a slow moment nor a cache favours one. `dense` is a matmul of the same
FLOPs with one matrix: the ceiling. What cannot run is listed with its reason.

On CPU, glibc settings that keep memory between calls change the times; the JSON records them:
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_ARENA_MAX=1
MALLOC_TOP_PAD_=268435456 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
torch's threads there wait by spinning and lose tens of milliseconds wherever another process runs:
measure on a quiet machine, or with OMP_WAIT_POLICY=passive, which costs it up to twofold.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
from kernel_bench.cases import CPU_MODELS, DISTRIBUTIONS, MODELS, PRODUCTS, Case, Model
from kernel_bench.libraries import Variant, variants
from kernel_bench.report import print_case, print_summary
from kernel_bench.rounds import Effort, bench_case
from kernel_bench.timing import ROOT, machine, measure_ceilings

NINE_MINUTES = 540.0


def main(words: Sequence[str] | None = None) -> int:
    args = _parse(words)
    effort = Effort(args.rounds, args.seconds, time.monotonic())
    conformance = _verify(0.4 * args.seconds) if args.everything else None
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    ceilings = measure_ceilings(dtype)
    report: dict[str, Any] = {
        "machine": machine(),
        "dtype": dtype,
        "conformance": conformance,
        "ceilings": {"flops": ceilings.flops, "bandwidth": ceilings.bandwidth},
        "rows": [],
    }
    _print_head(report)
    told: set[tuple[str, str]] = set()
    for case in _cases(args, dtype):
        for rows in bench_case(case, args.distributions, _chosen(args), ceilings, effort):
            print_case(rows, told)
            report["rows"] += rows
            _save(report, args.json)
    if effort.left() > 0:  # a machine that others use drifts
        report["ceilings_at_the_end"] = vars(measure_ceilings(dtype))
    _save(report, args.json)
    print_summary(report)
    if conformance and conformance["status"]:
        print(
            f"\nCONFORMANCE FAILED, status {conformance['status']}: {conformance['output'][-2000:]}"
        )
    sys.stdout.flush()
    if effort.abandoned:
        os._exit(0)  # a compilation that was given up would be waited for
    return 0


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = {"models": (*MODELS, *CPU_MODELS), "distributions": DISTRIBUTIONS, "products": PRODUCTS}
    for name, values in known.items():
        parser.add_argument(
            f"--{name}",
            type=lambda text, name=name, values=values: _listed(text, name, values),
            help=f"of {', '.join(values)}, with commas between; default: all that suit the device",
        )
    parser.add_argument(
        "--variants", help="only variants whose name contains one of these words; dense always"
    )
    parser.add_argument("--scale", type=int, help="divide tokens and widths; default 1, CPU 8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="stop then, and say what was not measured")
    parser.add_argument("--json", type=pathlib.Path, help="write everything measured to this file")
    parser.add_argument(
        "--everything", action="store_true", help="run `moejax verify-kernels` first"
    )
    args = parser.parse_args(words)
    args.distributions = args.distributions or list(DISTRIBUTIONS)
    args.products = args.products or list(PRODUCTS)
    if args.everything and args.seconds is None:
        args.seconds = NINE_MINUTES
    return args


def _listed(text: str, name: str, known: tuple[str, ...]) -> list[str]:
    words = [word for word in text.split(",") if word]
    if unknown := [word for word in words if word not in known]:
        raise argparse.ArgumentTypeError(
            f"there is no {unknown[0]!r} among {name}; use {', '.join(known)}"
        )
    return words


def _cases(args: argparse.Namespace, dtype: str) -> list[Case]:
    """Product by product, so that a time budget leaves every model something."""
    on_cpu = jax.default_backend() == "cpu"
    scale = args.scale or (8 if on_cpu else 1)
    names = args.models or [*(CPU_MODELS if on_cpu else ()), *MODELS]
    models: list[Model] = [
        CPU_MODELS[name] if name in CPU_MODELS else MODELS[name].scaled(scale) for name in names
    ]
    return [Case(model, product, dtype) for product in args.products for model in models]


def _chosen(args: argparse.Namespace) -> list[Variant]:
    words = args.variants.split(",") if args.variants else [""]
    return [v for v in variants() if v.name == "dense" or any(word in v.name for word in words)]


def _verify(limit: float) -> dict[str, Any]:
    """Runs `moejax verify-kernels` in a process of its own, which gives the device back."""
    command = [sys.executable, "-m", "moejax", "verify-kernels"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        run = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=limit,
        )
        status, output = run.returncode, run.stdout + run.stderr
    except subprocess.TimeoutExpired as error:
        status, output = "took too long", (error.stdout or b"").decode()
    print(output)
    return {"command": command[1:], "status": status, "output": output}


def _print_head(report: dict[str, Any]) -> None:
    where, ceilings = report["machine"], report["ceilings"]
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items() if v)
    print(f"{where['device_kind']} ({where['processor']}), {versions}, commit {where['commit']}")
    print(f"allocator and flags: {where['environment'] or 'none set'}")
    print(
        f"measured ceilings: {ceilings['flops'] / 1e12:.3g} TFLOP/s in {report['dtype']}, "
        f"{ceilings['bandwidth'] / 1e9:.4g} GB/s read and written"
    )


def _save(report: dict[str, Any], path: pathlib.Path | None) -> None:
    if path is not None:
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(report, indent=1))
        partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())

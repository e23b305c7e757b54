"""Transports compared: memory, collectives and FLOPs of compiled programs, and time on this CPU.

    python tools/bench_transports.py memory --shape small                       on 8 simulated CPUs
    python tools/bench_transports.py memory --shape gpt-oss-120b --tokens 32768 --tpu
    python tools/bench_transports.py model --tpu --transports least_loaded      a cut Mixtral-8x7B
    python tools/bench_transports.py time --shape small --tokens 512

`memory` and `time` take one layer of experts, forward and backward, with the gradients of tokens,
gates and all weights; `model` the production training step. `--tpu` compiles for eight v5p chips
that need not be here (pip install libtpu). Temporaries, arguments and results are XLA's own
`memory_analysis()`, in bytes on each device. Collectives, their bytes and the FLOPs of `dot`s are
those on the path of a balanced routing: no foreign experts, one round.

A program that does not fit the chip is reported with what the compiler says that it needs. Times on
simulated devices, which share this machine's cores, mean something only in relation to each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import platform
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jaxlib
from transport_bench import layer, machines, timing
from transport_bench.program import balanced

from moejax.planning.compile import compile_step
from moejax.transport.all_gather import AllGather
from moejax.transport.all_to_all import AllToAll
from moejax.transport.least_loaded import LeastLoaded
from moejax.transport.local import Local

TRANSPORTS = {
    "all_to_all": AllToAll(),
    "all_gather": AllGather(),
    "local": Local(),
    "least_loaded": LeastLoaded(),
    "least_loaded, 1 slot": LeastLoaded(num_slots=1),
    "least_loaded, 2 slots": LeastLoaded(num_slots=2),
    "least_loaded, 16 slots": LeastLoaded(num_slots=16),
}
ROUTINGS = ("balanced", "one hot device")


def main(words: Sequence[str] | None = None) -> int:
    args = _parse(words)
    devices = machines.described() if args.tpu else machines.simulated()
    shape = layer.SHAPES[args.shape]
    if args.tokens:
        shape = dataclasses.replace(shape, tokens=args.tokens)
    for name in args.transports:
        row = {"what": args.what, "transport": name, "device": devices[0].device_kind}
        row |= {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "host": platform.machine()}
        row |= {"implementation": args.implementation or "default"}
        if args.what == "model":
            row |= {"shape": "Mixtral-8x7B, 4 layers"}
        else:
            row |= {"shape": args.shape} | dataclasses.asdict(shape)
        if args.what == "time":
            row |= {"seconds": {k: _seconds(name, shape, k, args.calls) for k in ROUTINGS}}
        else:
            row |= _compiled(args, name, shape, devices)
        print(json.dumps(row), flush=True)
        if args.json:
            _append(args.json, row)
    return 0


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("memory", "model", "time"))
    parser.add_argument("--shape", choices=layer.SHAPES, default="small")
    parser.add_argument("--tokens", type=int, help="on each device; default: the shape's")
    parser.add_argument(
        "--transports",
        nargs="+",
        choices=TRANSPORTS,
        metavar="NAME",
        default=["all_to_all", "least_loaded"],
        help="; ".join(TRANSPORTS),
    )
    parser.add_argument("--implementation", help="of grouped matmuls; default: the platform's")
    parser.add_argument("--tpu", action="store_true", help=f"compile for TPU {machines.TPU}")
    parser.add_argument("--calls", type=int, default=5, help="that are timed (default 5)")
    parser.add_argument("--json", type=pathlib.Path, help="a list of rows to add to")
    args = parser.parse_args(words)
    if args.what == "time" and args.tpu:
        parser.error("a described TPU runs nothing: leave out --tpu")
    return args


def _compiled(args: argparse.Namespace, name: str, shape: layer.Shape, devices) -> dict[str, Any]:
    transport, start = TRANSPORTS[name], time.perf_counter()
    try:
        if args.what == "model":
            from transport_bench import model

            experiment = model.mixtral(
                transport, num_devices=len(devices), implementation=args.implementation
            )
            step = compile_step(experiment, devices, vocab_size=model.VOCABULARY)
            if step.program is None:
                return {"does not fit": _needed(step.refusal)}
            program = step.program
        else:
            program = layer.compiled(transport, shape, devices, implementation=args.implementation)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"does not fit": _needed(str(error))}
    memory, work = program.memory_analysis(), balanced(program.as_text(), len(devices))
    return {
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "collectives": dict(work.collectives),
        "collective_bytes": dict(work.num_bytes),
        "dot_flops": work.flops,
        "compile_seconds": round(time.perf_counter() - start),
    }


def _needed(refusal: str) -> str:
    return " ".join(re.findall(r"Used .*?hbm[^.]*\.", refusal)[:1])


def _seconds(name: str, shape: layer.Shape, kind: str, calls: int) -> float:
    return timing.seconds(TRANSPORTS[name], shape, kind, calls=calls)


def _append(path: pathlib.Path, row: dict[str, Any]) -> None:
    rows = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""Times grouped_matmul and expert_mlp against dense matmuls of equal FLOPs, on this machine.

Variants alternate within every round, so that a slow moment hits all of them; the table gives
medians and minima. `ratio` is the median time over that of the dense matmuls of equal FLOPs.

    python tools/bench_kernels.py --tokens 2048 --width 256 --experts 16 --top-k 4

On CPU, glibc settings that keep memory between calls change the times; set the same for everything
you compare: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_ARENA_MAX=1
MALLOC_TOP_PAD_=268435456 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from moejax.kernels import expert_mlp as mlp_kernels
from moejax.kernels import grouped_matmul as matmul_kernels

Case = tuple[Callable, tuple, float]  # compiled function, arguments, useful FLOPs


def main() -> None:
    args = parse()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.dtype}")
    data = Data(args)
    print("rows per expert:", *data.group_sizes)
    tables = {
        f"{kernel} {what}": cases
        for kernel, make in (("grouped_matmul", matmul_cases), ("expert_mlp", mlp_cases))
        for what, cases in make(data, args).items()
    }
    rows = [row for name, cases in tables.items() for row in measure(name, cases, args.rounds)]
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("tokens", 2048),
        ("width", 256),
        ("expert-width", 256),
        ("experts", 16),
        ("top-k", 4),
        ("rounds", 15),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--skew", type=float, default=0.5, help="deviation of the experts' logits; 0 is balanced"
    )
    parser.add_argument(
        "--ragged-dot", action="store_true", help="also time XLA's ragged dot (slow on CPU)"
    )
    parser.add_argument("--json", help="also write the rows to this file")
    return parser.parse_args()


class Data:
    """Random tokens, experts and routes."""

    def __init__(self, args: argparse.Namespace):
        rng = np.random.default_rng(0)
        t, d, f, e, k = args.tokens, args.width, args.expert_width, args.experts, args.top_k
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 16, args.dtype)
        self.x, self.dout = draw(t, d), draw(t, d)
        self.gate, self.up, self.down = draw(e, d, f), draw(e, d, f), draw(e, f, d)
        self.weights = jnp.asarray(rng.random((t, k)), jnp.float32)
        logits = rng.standard_normal((t, e)) + args.skew * rng.standard_normal(e)
        self.experts = jnp.asarray(np.argsort(-logits, 1)[:, :k], jnp.int32)
        self.group_sizes = np.bincount(np.asarray(self.experts).ravel(), minlength=e)
        self.rows, self.drows = draw(t * k, d), draw(t * k, f)


def implementations(known: Iterable[str], args: argparse.Namespace) -> list[str]:
    return [name for name in known if name != "xla" or args.ragged_dot]


def can_serve(name: str, args: argparse.Namespace) -> bool:
    reason = matmul_kernels.obstacle(name, args.dtype)
    if reason is not None:
        print(f"grouped_matmul {name} is left out: {reason}")
    return reason is None


def matmul_cases(data: Data, args: argparse.Namespace) -> dict[str, dict[str, Case]]:
    sizes = jnp.asarray(data.group_sizes, jnp.int32)
    flops = 2 * data.rows.size * data.gate.shape[2]

    def cases(product: Callable) -> tuple[Case, Case]:
        both = lambda a, b, dout: (lambda out, vjp: (out, vjp(dout)))(*jax.vjp(product, a, b))
        operands = (data.rows, data.gate if product is not jnp.dot else data.gate[0])
        return (
            (jax.jit(product), operands, flops),
            (jax.jit(both), (*operands, data.drows), 3 * flops),
        )

    made = {"dense": cases(jnp.dot)}
    for name in implementations(matmul_kernels.IMPLEMENTATIONS, args):
        if not can_serve(name, args):
            continue
        call = lambda a, b, name=name: matmul_kernels.grouped_matmul(
            a, b, sizes, implementation=name
        )
        made[name] = cases(call)
    return _by_direction(made)


def mlp_cases(data: Data, args: argparse.Namespace) -> dict[str, dict[str, Case]]:
    flops = 3 * 2 * data.rows.size * data.gate.shape[2]
    made = {"dense": _dense_mlp(data, flops)}
    for name in implementations(mlp_kernels.IMPLEMENTATIONS, args):

        def call(x, gate, up, down, weights, name=name):
            return mlp_kernels.expert_mlp(
                x, gate, up, down, data.experts, weights, implementation=name
            )

        def both(x, gate, up, down, weights, dout, call=call):
            out, vjp = jax.vjp(call, x, gate, up, down, weights)
            return out, vjp(dout)

        operands = (data.x, data.gate, data.up, data.down, data.weights)
        made[name] = (
            (jax.jit(call), operands, flops),
            (jax.jit(both), (*operands, data.dout), 3 * flops),
        )
    return _by_direction(made)


def _dense_mlp(data: Data, flops: float) -> tuple[Case, Case]:
    """The bare matmuls of one dense MLP on all rows: no routing, no activation."""

    def forward(x, gate, up, down):
        return x @ gate, (x @ up) @ down

    def both(x, gate, up, down, dh):
        dx = dh @ gate.T, dh @ up.T, x @ down.T
        return forward(x, gate, up, down), dx, (x.T @ dh, x.T @ (2 * dh), dh.T @ x)

    operands = (data.rows, data.gate[0], data.up[0], data.down[0])
    return (jax.jit(forward), operands, flops), (jax.jit(both), (*operands, data.drows), 3 * flops)


def _by_direction(made: dict[str, tuple[Case, Case]]) -> dict[str, dict[str, Case]]:
    return {
        "forward": {name: pair[0] for name, pair in made.items()},
        "forward+backward": {name: pair[1] for name, pair in made.items()},
    }


def measure(title: str, cases: dict[str, Case], rounds: int) -> list[dict]:
    for function, args, _ in cases.values():
        jax.block_until_ready(function(*args))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (function, args, _) in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            seconds[name].append(time.perf_counter() - start)
    print(
        f"\n{title}\n{'':12}{'median ms':>10}{'min ms':>10}{'GFLOP/s':>10}{'best':>8}{'ratio':>8}"
    )
    rows = []
    for name, (_, _, flops) in cases.items():
        median, least = np.median(seconds[name]), min(seconds[name])
        ratio = median / np.median(seconds["dense"])
        print(
            f"{name:12}{1e3 * median:10.2f}{1e3 * least:10.2f}{flops / median / 1e9:10.0f}"
            f"{flops / least / 1e9:8.0f}{ratio:8.2f}"
        )
        rows.append({"table": title, "name": name, "seconds": seconds[name], "flops": flops})
    return rows


if __name__ == "__main__":
    main()

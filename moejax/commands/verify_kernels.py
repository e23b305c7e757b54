"""Check every kernel on this device against its definition, time it, and accept the fastest.

Each implementation of each product (forward, both gradients, the gated projection) runs the
conformance kit: empty groups, one group with everything, sizes around the edges of tiles, NaN in
unused rows, errors per group. With --accept, `implementation=None` takes the fastest that passed,
on this kind of device and for these versions.
"""

from __future__ import annotations

import argparse

EXAMPLE = "moejax verify-kernels --accept"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--accept", action="store_true", help="make what passed the default here")
    parser.add_argument(
        "--implementation",
        action="append",
        metavar="NAME",
        help="look only at this one; may be given several times (default: all)",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=("bfloat16", "float32"),
        help="of the operands; may be given twice (default: both)",
    )


def run(args: argparse.Namespace) -> int:
    import jax

    from moejax.errors import UserError
    from moejax.kernels import accepted, compat, verification
    from moejax.kernels.grouped_matmul import IMPLEMENTATIONS

    names = tuple(args.implementation or IMPLEMENTATIONS)
    if unknown := set(names) - set(IMPLEMENTATIONS):
        raise UserError(
            f"there is no implementation {min(unknown)!r}; use one of {', '.join(IMPLEMENTATIONS)}"
        )
    device_kind = compat.target_device_kind()
    sizes = verification.CPU if jax.default_backend() == "cpu" else verification.ACCELERATOR
    print(f"{device_kind}, jax {jax.__version__}, kernels {accepted.sources_hash()}")
    print(
        f"times in ms: {sizes.rows} rows, {sizes.inner} to {sizes.outer} wide, {sizes.groups} "
        "groups, balanced plus skewed"
    )
    choices, figures, failed = {}, {}, False
    for dtype in args.dtype or ("bfloat16", "float32"):
        results = [verification.verify(name, dtype) for name in names]
        verification.time_products(results, sizes)
        choices[dtype] = verification.fastest(results)
        figures[dtype] = {r.implementation: r.seconds for r in results if r.seconds}
        failed |= any(r.failures for r in results)
        print("\n" + table(dtype, results, choices[dtype]))
    choices = {dtype: chosen for dtype, chosen in choices.items() if chosen}
    if args.accept and choices:
        path = accepted.store(device_kind, {"grouped_matmul": choices}, figures)
        print(f"\naccepted for {device_kind}: stored in {path}")
    elif choices:
        print("\nnothing was stored; moejax verify-kernels --accept makes the fastest the default")
    return 1 if failed else 0


def table(dtype: str, results: list, chosen: dict[str, str]) -> str:
    """One line per implementation, its failures below it, and the fastest of each product."""
    from moejax.kernels.grouped_matmul.implementations import Choice

    products = Choice._fields
    lines = [f"{dtype:12}{'checks':>14}" + "".join(f"{p:>12}" for p in products)]
    for r in results:
        if r.obstacle is not None:
            lines.append(f"{r.implementation:12}  cannot serve: {r.obstacle}")
            continue
        state = f"{len(r.failures)} FAILED" if r.failures else f"{r.num_checks} passed"
        times = "".join(f"{1e3 * r.seconds[p]:12.3f}" for p in products if p in r.seconds)
        note = "  computes every group for every row here: never chosen" if r.is_dense else ""
        lines.append(f"{r.implementation:12}{state:>14}{times}{note}")
        lines += [f"    {failure}" for failure in r.failures[:5]]
        if len(r.failures) > 5:
            lines.append(f"    and {len(r.failures) - 5} more")
    if chosen:
        lines.append(f"{'fastest':26}" + "".join(f"{chosen[p]:>12}" for p in products))
    return "\n".join(lines)

"""Check every kernel on this device against its definition, time it, and accept the fastest.

Each implementation of each product of the grouped matmul (forward, both gradients, the gated
projection) runs its conformance kit: empty groups, one group with everything, sizes around the
edges of tiles, NaN in unused rows, errors per group. Those of the least-loaded plan must equal its
definition bit for bit, those of full attention in value and gradients in every case that they can
serve. With --accept, `implementation=None` takes the fastest that passed, on this kind of device
and for these versions.
"""

from __future__ import annotations

import argparse
from types import ModuleType

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
        choices=("bfloat16", "float32", "float16", "int32"),
        help="of the operands, int32 for plans; may be given several times (default: all)",
    )


def run(args: argparse.Namespace) -> int:
    import jax

    from moejax.kernels import accepted, compat, verification

    chosen = _selected(args)
    device_kind = compat.target_device_kind()
    print(f"{device_kind}, jax {jax.__version__}, kernels {accepted.sources_hash()}")
    print("times in ms: balanced plus skewed")
    choices, figures, failed = {}, {}, False
    for kernel, dtype, names in chosen:
        results = [verification.verify(kernel, name, dtype) for name in names]
        verification.time_products(kernel, results)
        fastest = verification.fastest(results)
        print("\n" + table(kernel, dtype, results, fastest))
        failed |= any(r.failures for r in results)
        if fastest:
            choices.setdefault(kernel.NAME, {})[dtype] = fastest
            seconds = {r.implementation: r.seconds for r in results if r.seconds}
            figures.setdefault(kernel.NAME, {})[dtype] = seconds
    if args.accept and choices:
        path = accepted.store(device_kind, choices, figures)
        print(f"\naccepted for {device_kind}: stored in {path}")
    elif choices:
        print("\nnothing was stored; moejax verify-kernels --accept makes the fastest the default")
    return 1 if failed else 0


def _selected(args: argparse.Namespace) -> list[tuple[ModuleType, str, tuple[str, ...]]]:
    """(kernel, dtype, implementations) that the arguments ask for."""
    from moejax.errors import UserError
    from moejax.kernels.verification import KERNELS

    known = [name for kernel in KERNELS for name in kernel.IMPLEMENTATIONS]
    wanted = args.implementation or known
    if unknown := set(wanted) - set(known):
        raise UserError(
            f"there is no implementation {min(unknown)!r}; use one of {', '.join(known)}"
        )
    found = []
    for kernel in KERNELS:
        names = tuple(name for name in kernel.IMPLEMENTATIONS if name in wanted)
        dtypes = [dtype for dtype in kernel.DTYPES if dtype in (args.dtype or kernel.DTYPES)]
        found += [(kernel, dtype, names) for dtype in dtypes if names]
    if not found:
        raise UserError(
            f"{', '.join(wanted)} has no operands of {', '.join(args.dtype)}; leave out --dtype"
        )
    return found


def table(kernel: ModuleType, dtype: str, results: list, chosen: dict[str, str]) -> str:
    """One line per implementation, its failures below it, and the fastest of each product."""
    products = kernel.PRODUCTS
    lines = [
        f"{kernel.NAME}, {dtype}: {kernel.sizes()}",
        f"{'':12}{'checks':>14}" + "".join(f"{p:>12}" for p in products),
    ]
    for r in results:
        if r.obstacle is not None:
            lines.append(f"{r.implementation:12}  cannot serve: {r.obstacle}")
            continue
        state = f"{len(r.failures)} FAILED" if r.failures else f"{r.num_checks} passed"
        times = "".join(f"{1e3 * r.seconds[p]:12.3f}" for p in products if p in r.seconds)
        note = "  dense here: never chosen" if r.is_dense else ""
        lines.append(f"{r.implementation:12}{state:>14}{times}{note}")
        lines += [f"    {failure}" for failure in r.failures[:5]]
        if len(r.failures) > 5:
            lines.append(f"    and {len(r.failures) - 5} more")
    if chosen:
        lines.append(f"{'fastest':26}" + "".join(f"{chosen[p]:>12}" for p in products))
    return "\n".join(lines)

"""Prove that no mesh, transport or saving of memory changes what a step computes.

One training step of the config's model, on small random data, is compared with one device: loss,
every term, every gradient expert by expert, the gradient norm, counts, an SGD update and the
initial parameters. First in float64, to 1e-9; then in the config's dtype, where the one device
replays the choices of the many. Exits with 1 and names the first wrong tensor where one differs.
Use the config's small function: the model runs whole on every device.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from moejax.commands import agreement, arguments
from moejax.errors import UserError

if TYPE_CHECKING:
    import fiddle as fdl

EXAMPLE = "moejax verify configs/tiny.py:smoke --devices 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config_arguments(parser, required=False)
    parser.add_argument(
        "--module",
        metavar="FILE.py:NAME",
        help="check a router, balance rule, transport, expert form, attention or adapter of your "
        "own against its family's contract instead (built by its defaults, or by example())",
    )
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="simulate N devices on CPU; default: the devices that there are",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="only variants whose name contains TEXT, such as 'expert=8' or 'remat'; repeatable. "
        "Many devices have many meshes (8 have 35, 64 have 210), and all are compared without it",
    )


def run(args: argparse.Namespace) -> int:
    if (args.module is None) == (args.config is None):
        raise UserError("give a CONFIG or --module FILE.py:NAME, one of them")
    if args.module is not None:
        return _verify_module(args.module)
    _prepare_jax(args.devices)
    config = arguments.config_from(args)

    from moejax.train import processes

    with processes.joined():
        agreement.check_same_run(config, only=args.only)
        show = print if processes.is_first() else _show_nothing
        return _verify(args, config, show)


def _verify_module(symbol: str) -> int:
    """The contract of one method's family, check by check."""
    import inspect

    from moejax.config import symbols
    from moejax.verification.contracts import broken_promises, family_of

    found = symbols.find(symbol)
    method = _instance(found, symbol) if inspect.isclass(found) else found
    print(f"{symbol} among {family_of(method)}")
    promises = list(broken_promises(method))
    for promise, how in promises:
        print(f"  {'ok     ' if how is None else 'BROKEN '} {promise}")
    broken = [(promise, how) for promise, how in promises if how is not None]
    if broken:
        print(f"FAILED: {broken[0][0]}: {broken[0][1]}")
        return 1
    print(f"all {len(promises)} promises are kept")
    return 0


def _instance(cls: type, symbol: str) -> object:
    """What `example()` beside the class makes of it, or else the class with its defaults.

    Raises UserError where there is neither.
    """
    import inspect
    import sys

    example = getattr(sys.modules.get(cls.__module__), "example", None)
    given = example() if example is not None else ()
    for method in given if isinstance(given, tuple) else (given,):
        if type(method) is cls:
            return method
    try:
        inspect.signature(cls).bind()
    except TypeError as error:
        raise UserError(
            f"{symbol} cannot be built by its defaults ({error}): give its file a function "
            f"example() that returns {cls.__name__}(...) with small sizes"
        ) from error
    return cls()


def _show_nothing(*unused: object, **unused_options: object) -> None:
    """What `print` is in the processes that are not the first."""


def _verify(args: argparse.Namespace, config: fdl.Config, show: Callable[..., None]) -> int:
    from moejax.config.build import build_config
    from moejax.verification.verify import mesh_dependent, verify

    arguments.use_compilation_cache()
    experiment = build_config(config)
    for name in mesh_dependent(experiment):
        show(f"left out: the balance rule {name!r}, which depends on the mesh by its definition")
    chosen = lambda name: not args.only or any(text in name for text in args.only)
    first_wrong, count = None, 0
    show(f"{'variant':42} {'dtype':9} {'largest error':>13}  where")
    for checked in verify(experiment, chosen=chosen):
        show(_line(checked), flush=True)
        count += checked.refused is None
        if checked.wrong and first_wrong is None:
            first_wrong = checked
    if first_wrong is not None:
        show(
            f"FAILED: {first_wrong.name} in {first_wrong.dtype}: first wrong tensor: "
            f"{_named(first_wrong.wrong[0])}, of {len(first_wrong.wrong)} wrong ones"
        )
        return 1
    show(f"all {count} comparisons agree" if count else "nothing was compared")
    return 0 if count else 1


def _prepare_jax(num_devices: int | None) -> None:
    """Before JAX starts: float64, simulated devices, and quick compilation on CPU."""
    if num_devices:
        if os.environ.get("MOEJAX_COORDINATOR"):
            raise UserError("leave --devices out: the launcher says how many each process has")
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_NUM_CPU_DEVICES"] = str(num_devices)
        # A device that waits in a collective holds a thread of XLA's pool, which has as many as
        # there are processors or devices: two devices in two collectives could wait for ever.
        os.environ.setdefault("NPROC", str(4 * num_devices))
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        # Without optimisations, jaxlib 0.12 can pair collectives of simulated devices wrongly on a
        # busy machine, unless their order is that of the plain scheduler.
        flags = (
            "--xla_backend_optimization_level=0",
            "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        )
        os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *flags)).strip()
    import jax

    jax.config.update("jax_enable_x64", True)


def _line(checked) -> str:
    if checked.refused is not None:
        return f"{checked.name:42} {checked.dtype:9} {'-':>13}  not possible: {checked.refused}"
    verdict = "WRONG " if checked.wrong else ""
    flips = ""
    if checked.flipped:
        flips = f"; {checked.flipped:.2%} of choices replayed, margin {checked.margin:.1e}"
    return (
        f"{checked.name:42} {checked.dtype:9} {checked.worst.error:13.1e}  "
        f"{verdict}{_named(checked.worst)}{flips}"
    )


def _named(difference) -> str:
    expert = "" if difference.expert is None else f", expert {difference.expert}"
    return f"{difference.name}{expert} ({difference.error:.1e})"

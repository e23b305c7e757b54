"""Train an experiment, or resume it from its own folder.

SIGTERM and Ctrl-C write a checkpoint at the next step and exit with status 0, or exit at once where
there is nothing to save; the same command, or `moejax train WORKDIR`, resumes exactly there.
Several processes, and MOEJAX_WATCHDOG=on, which ends a run that is stuck: see launch/README.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import shlex
import sys
import time
import uuid
from typing import TYPE_CHECKING

from moejax.commands import agreement, arguments
from moejax.errors import UserError
from moejax.train.stop_signal import GRACE_SECONDS, StopSignal

if TYPE_CHECKING:
    import fiddle as fdl

_LAST_SECONDS = 1.0  # the others get the same signal, and end in them
EXAMPLE = "moejax train configs/tiny.py steps=50 model.block.ffn.router.k=2 workdir=runs/a"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config_arguments(parser)
    parser.add_argument(
        "--until",
        type=int,
        metavar="STEP",
        help="stop after this step with a checkpoint, to be resumed later; does nothing where an "
        "earlier session came so far",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=os.environ.get("MOEJAX_GRACE", GRACE_SECONDS),
        metavar="SECONDS",
        help="how long whoever sends SIGTERM waits before it kills (default: MOEJAX_GRACE, or "
        f"{GRACE_SECONDS:g}); a run that comes to no checkpoint in nine tenths of that ends "
        "without one",
    )
    parser.add_argument(
        "--profile",
        metavar="STEP:COUNT",
        help="profile so many steps after that one, into WORKDIR/profile; SIGUSR2 profiles the "
        "next three",
    )
    parser.add_argument(
        "--dump-hlo",
        action="store_true",
        help="write the program of the training step, lowered and compiled, into WORKDIR/hlo",
    )


def run(args: argparse.Namespace) -> int:
    if not args.grace > 0:
        raise UserError(f"--grace {args.grace:g}: give the seconds between SIGTERM and the kill")
    from moejax.train import phases
    from moejax.watchdog import parent

    if parent.wanted(os.environ):
        return parent.watch([sys.executable, *sys.orig_argv[1:]])
    phases.begin()
    with StopSignal(leave=_leave, grace=args.grace) as stop:  # before the imports, which take long
        config = arguments.config_from(args)

        from moejax.train import processes

        with processes.joined():
            return _train(args, config, stop)


def _leave(what: str) -> None:
    """Ends this process in good order, whatever its main thread does."""
    os.write(1, f"{what}; the same command goes on from the newest checkpoint\n".encode())
    processes = sys.modules.get("moejax.train.processes")
    if processes is not None and processes.others_depend_on_this():
        time.sleep(_LAST_SECONDS)
    os._exit(0)


def _train(args: argparse.Namespace, config: fdl.Config, stop: StopSignal) -> int:
    from moejax.analysis.goodput import goodput, read_sessions
    from moejax.analysis.report import write_report
    from moejax.commands.given_model import compare_with_source
    from moejax.config.build import build_config
    from moejax.config.load import load_config
    from moejax.config.run_directory import CONFIG_JSON, check_workdir, claim
    from moejax.train import phases, processes
    from moejax.train.loop import train
    from moejax.train.manifest import versions
    from moejax.train.profiler import Window
    from moejax.train.run_step import Inspection

    window = None if args.profile is None else Window.parse(args.profile)
    if args.until is not None and args.until < 1:
        raise UserError(f"--until {args.until}: name a step, 1 or later")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("moejax").setLevel(logging.INFO)  # tokenising, kernel choices
    agreement.check_same_run(config, until=args.until)
    arguments.use_compilation_cache()
    experiment = build_config(config)
    workdir = pathlib.Path(experiment.workdir)

    def stored() -> fdl.Config:
        return load_config(workdir, trusted=args.trust_config)

    def check() -> None:
        exists = (workdir / CONFIG_JSON).exists()
        check_workdir(workdir, config, stored() if exists else None)
        if not exists:
            compare_with_source(experiment, trusted=args.trust_config)

    processes.by_first(check)
    experiment.check()
    # Last: a refused experiment must not own the folder.
    processes.by_first(lambda: claim(workdir, config, versions(), read=stored))
    agreement.check_visible(workdir / CONFIG_JSON)
    phases.announce(workdir, session=processes.exchange(uuid.uuid4().hex, lambda all_: all_[0]))

    inspection = Inspection(profile=window, dump_hlo=args.dump_hlo)
    finished = train(
        experiment, name=args.config, until=args.until, stop=stop, inspection=inspection
    )
    phases.enter("exit")
    if not processes.is_first():
        return 0
    print(goodput(read_sessions(workdir)).line())
    if finished.paused_by is not None:
        print(f"{finished.paused_by}: stopped at step {finished.step} with a checkpoint; resume:")
        print(f"  moejax train {shlex.quote(str(workdir))}")
        return 0
    _print_results(finished.results)
    print(f"report: {write_report(workdir)}")
    return 0


def _print_results(results: dict) -> None:
    if "sample" in results:
        print(f"\n--- sample ---\n{results['sample']}\n--------------\n")
    print("held-out bits per byte")
    rows = {
        "this model": "eval/bits_per_byte",
        "xz -9": "xz_bits_per_byte",
        "gzip -9": "gzip_bits_per_byte",
    }
    for label, name in rows.items():
        if name in results:
            print(f"  {label:12} {results[name]:.3f}")

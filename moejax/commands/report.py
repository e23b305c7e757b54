"""Write a report of a run or of routing traces: pictures as PNG and one self-contained HTML page.

Works while the run is still going. Traces in a run's folder `traces` become part of its report; of
several traces that are named themselves, the first is compared with each other one. Prints the
path of the page.
"""

from __future__ import annotations

import argparse
import pathlib

EXAMPLE = "moejax report runs/tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        metavar="RUN or TRACE.npz",
        type=pathlib.Path,
        nargs="+",
        help="workdir of a training run, or files that `moejax trace` wrote",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=pathlib.Path,
        default=None,
        help="folder for index.html and the PNG files (default: RUN/report, or TRACE)",
    )
    parser.add_argument(
        "--paired",
        action="store_true",
        help="document n of every trace is the same sentence: compare sentence by sentence",
    )


def run(args: argparse.Namespace) -> int:
    # matplotlib would slow down every --help
    from moejax.analysis.report import write_report, write_trace_report
    from moejax.errors import UserError

    if args.paths[0].is_dir():
        if len(args.paths) > 1 or args.paired:
            raise UserError("of runs, one can be reported on at a time; --paired is about traces")
        print(write_report(args.paths[0], args.out))
    elif args.paths[0].suffix == ".npz":
        if args.paired and len(args.paths) < 2:
            raise UserError("--paired compares traces: name two or more")
        print(write_trace_report(args.paths, args.out, paired=args.paired))
    else:
        raise UserError(f"{args.paths[0]} is neither a run's folder nor a trace (TRACE.npz)")
    return 0

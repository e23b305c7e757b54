"""Write a report of a run: pictures as PNG and one self-contained HTML page.

Works while the run is still going. Prints the path of the page.
"""

from __future__ import annotations

import argparse
import pathlib

EXAMPLE = "moejax report runs/tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=pathlib.Path, help="workdir of a training run")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=pathlib.Path,
        default=None,
        help="folder for index.html and the PNG files (default: RUN/report)",
    )


def run(args: argparse.Namespace) -> int:
    from moejax.analysis.report import write_report  # matplotlib would slow down every --help

    print(write_report(args.run, args.out))
    return 0

"""Record which experts a model chooses for every token of some text.

Without --text, of the held-out rows of a run. `moejax report` draws what was recorded;
docs/analysis.md says what it means.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moejax.commands import arguments

if TYPE_CHECKING:
    from moejax.analysis.trace import TraceInfo
    from moejax.data.pipeline import Data
    from moejax.evaluation.open_model import Opened
    from moejax.train.text_rows import TextRows

_BATCH_SIZE = 4  # of a model that is no run
EXAMPLE = "moejax trace runs/tiny --text moejax/*.py --output runs/tiny/traces/python.npz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model_arguments(parser)
    parser.add_argument(
        "--text", metavar="FILE", nargs="+", type=pathlib.Path, help="UTF-8 files, a document each"
    )
    parser.add_argument(
        "--lines", action="store_true", help="every line of the files is a document"
    )
    parser.add_argument(
        "--output",
        metavar="FILE.npz",
        type=pathlib.Path,
        help="default: traces/NAME.npz in the folder, NAME after the first text file",
    )
    parser.add_argument(
        "--probs", action="store_true", help="store all router probabilities: E / K times as large"
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="stop after the batch that reaches N"
    )
    parser.add_argument(
        "--sequence-length", type=int, metavar="S", help="of --text: tokens the model sees at once"
    )


def run(args: argparse.Namespace) -> int:
    _check(args)
    from moejax.errors import UserError
    from moejax.train import processes

    with processes.joined():
        if processes.num_processes() > 1:
            raise UserError("a trace is recorded by one process: start only one")
        return _trace(args)


def _check(args: argparse.Namespace) -> None:
    """What is wrong before anything is loaded."""
    from moejax.errors import UserError

    for name in ("max_tokens", "sequence_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.text is None and (args.lines or args.sequence_length):
        raise UserError("--lines and --sequence-length are about the files of --text: name some")
    if args.output is not None and args.output.suffix != ".npz":
        raise UserError(f"--output {args.output} must end in .npz")
    for path in args.text or ():
        if not path.is_file():
            raise UserError(f"--text {path} is no file: name text files")


def _trace(args: argparse.Namespace) -> int:
    import jax

    from moejax.analysis.trace_names import HELD_OUT, SUFFIX, TRACES
    from moejax.errors import UserError
    from moejax.train.routing_trace import record

    found = arguments.opened(args)
    if found.model.moe is None:
        raise UserError(f"the model of {args.model} has no MoE layer, so there is no routing")
    rows = _rows(args, found)
    name = args.text[0].stem if args.text else HELD_OUT
    output = args.output or pathlib.Path(args.model) / TRACES / f"{name}{SUFFIX}"
    info = _info(args, found)
    with jax.set_mesh(found.mesh):
        written = record(
            output,
            info,
            found.model,
            found.variables,
            rows,
            found.mesh,
            keep_probs=args.probs,
            max_tokens=args.max_tokens,
        )
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB")
    print(f"  {written.num_tokens:,} tokens in {written.num_sequences:,} sequences")
    print(f"  {len(info.layers)} MoE layers of {info.num_experts} experts, top-{info.k}")
    print(f"draw it:\n  moejax report {output}")
    return 0


def _rows(args: argparse.Namespace, found: Opened) -> Iterator[TextRows]:
    from moejax.train.routing_trace import held_out_rows
    from moejax.train.text_rows import read_files, read_lines, rows_of_texts

    if args.text:
        texts = (read_lines if args.lines else read_files)(args.text)
        return rows_of_texts(
            texts,
            found.reading.tokenizer,
            beginning=found.reading.beginning,
            batch_size=found.experiment.batch_size if found.experiment else _BATCH_SIZE,
            sequence_length=args.sequence_length or found.length,
        )
    return held_out_rows(found.data())


def _info(args: argparse.Namespace, found: Opened) -> TraceInfo:
    from moejax.analysis.trace import TraceInfo
    from moejax.config.text import config_text
    from moejax.data.fingerprint import fingerprint
    from moejax.train.fingerprint import fingerprints
    from moejax.train.manifest import versions
    from moejax.train.routing_trace import choices_per_token

    weights = fingerprints(found.variables)
    return TraceInfo(
        num_experts=found.model.moe.num_experts,
        k=choices_per_token(found.model),
        layers=tuple(found.model.moe_layers),
        sequence_length=args.sequence_length or found.length,
        tokenizer=found.tokenizer.fingerprint(),
        sources=tuple(map(str, args.text or _source_names(found.experiment.data))),
        documents="texts" if args.text else "pieces",
        weights={
            "folder": str(args.model),
            "step": found.step or 0,
            "fingerprint": fingerprint(sorted(weights.items())),
        },
        config=config_text(found.config),
        versions=versions(),
    )


def _source_names(data: Data) -> list[str]:
    """In the order in which batches number them."""
    sources = getattr(data.train, "sources", (data.train,))
    return [str(getattr(source, "path", type(source).__name__)) for source in sources]

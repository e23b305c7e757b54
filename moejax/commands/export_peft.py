"""Write the LoRA adapter of a run as a folder that PEFT loads on top of the base model.

A mixture of adapters (MixLoRA, MoLA, DynMoLE) is written in the layout of MoE-PEFT instead.

RUN is a training run with an adapter, or what `moejax import-hf --adapter` wrote. OUT appears whole
or not at all, and only if every factor that was read is what the run had saved. A run that trained
more than its adapter is refused: what else it learnt would be lost (see `moejax export-hf`).
"""

from __future__ import annotations

import argparse
import pathlib
from typing import TYPE_CHECKING

from moejax.errors import UserError

if TYPE_CHECKING:
    from moejax.train.slices import StoredSlices

EXAMPLE = "moejax export-peft runs/olmoe_lora adapter --base allenai/OLMoE-1B-7B-0924"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="workdir of a training run, or an import")
    parser.add_argument("out", metavar="OUT", help="folder to be made")
    parser.add_argument(
        "--base", metavar="NAME", help="the base model's name, for those who load OUT alone"
    )
    parser.add_argument("--step", type=int, metavar="N", help="use this checkpoint, not the newest")
    parser.add_argument("--trust-config", action="store_true", help="see `moejax train --help`")


def run(args: argparse.Namespace) -> int:
    from moejax.config.build import build_config
    from moejax.config.load import load_config
    from moejax.interop import peft
    from moejax.interop.tensor_writer import appearing_whole
    from moejax.models.variables import ADAPTERS
    from moejax.train.init_from import HF
    from moejax.train.restore import model_of, open_slices
    from moejax.types import tree_of

    run, out = pathlib.Path(args.run), pathlib.Path(args.out)
    described = build_config(load_config(run, trusted=args.trust_config))
    model = model_of(described, run)
    if model.adapter is None:
        raise UserError(f"{run} has no adapter: write its weights with `moejax export-hf`")
    step, leaves = open_slices(run, args.step)
    if model is not described:
        _check_base(run, leaves)
    factors = [leaf for leaf in leaves if leaf.path.startswith(f"params/{ADAPTERS}/")]
    variables = tree_of({leaf.path.removeprefix("params/"): leaf for leaf in factors})
    carried = run / HF
    with appearing_whole(out) as folder:
        source = carried if carried.exists() else None
        peft.save(model, variables, folder, base_model=args.base, source=source)
        for leaf in factors:
            leaf.check()
    print(f"the adapter of step {step} of {run} is now {out}")
    if args.base is None:
        print("it names no base model: say which one with --base NAME, or load it by hand")
    return 0


def _check_base(run: pathlib.Path, leaves: list[StoredSlices]) -> None:
    """Raises UserError where a run changed more of its model than the adapter holds.

    `leaves` are those of a checkpoint of the folder `run`, and what the run froze. A correction
    bias is frozen with its router.
    """
    from moejax.models.variables import ADAPTERS
    from moejax.train import frozen

    kept = frozen.stored(run)
    base = [leaf.path for leaf in leaves if leaf.path.startswith("params/")]
    trained = [p for p in base if p not in kept and not p.startswith(f"params/{ADAPTERS}/")]
    if trained:
        raise UserError(
            f"{run} trained {trained[0]} too, which an adapter does not hold: merge everything "
            "with `moejax export-hf`"
        )

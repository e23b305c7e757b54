"""Write the weights of a run as a Hugging Face checkpoint that transformers loads.

RUN is a training run or what `moejax import-hf` wrote. OUT appears whole or not at all, and only if
every weight that was read is what the run had saved. What a run added with LoRA is merged.
"""

from __future__ import annotations

import argparse
import pathlib

EXAMPLE = "moejax export-hf runs/tuned OLMoE-1B-7B-tuned --dtype bfloat16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="workdir of a training run, or an import")
    parser.add_argument("out", metavar="OUT", help="folder to be made")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights (default: each as it is held)",
    )
    parser.add_argument("--step", type=int, metavar="N", help="use this checkpoint, not the newest")
    parser.add_argument("--trust-config", action="store_true", help="see `moejax train --help`")


def run(args: argparse.Namespace) -> int:
    from moejax.config.build import build_config
    from moejax.config.load import load_config
    from moejax.interop import hf
    from moejax.interop.tensor_writer import appearing_whole
    from moejax.models.merge import merged_in_checkpoint
    from moejax.train.init_from import HF
    from moejax.train.restore import model_of, open_slices
    from moejax.types import tree_of

    run, out = pathlib.Path(args.run), pathlib.Path(args.out)
    model = model_of(build_config(load_config(run, trusted=args.trust_config)), run)
    step, leaves = open_slices(run, args.step)
    carried = run / HF
    with appearing_whole(out) as folder:
        stored = {leaf.path: leaf for leaf in leaves}
        if model.adapter is not None:
            stored = merged_in_checkpoint(model, stored, dtype=args.dtype)
        variables = tree_of(stored)
        source = carried if carried.exists() else None
        hf.save(model, variables, folder, dtype=args.dtype, source=source)
        for leaf in leaves:
            leaf.check()
    print(f"step {step} of {run} is now {out}")
    return 0

"""Turn a Hugging Face checkpoint into a folder that runs start from.

SOURCE is a folder of safetensors with its config.json; nothing is downloaded. OUT gets the weights
in moejax's format with a fingerprint of each, the model's config, and the tokenizer files. A few
slices are in memory at a time, whatever the size of the model.
"""

from __future__ import annotations

import argparse
import pathlib
import time

EXAMPLE = "moejax import-hf OLMoE-1B-7B-0924 runs/olmoe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder of a Hugging Face checkpoint")
    parser.add_argument("out", metavar="OUT", help="folder to be made")


def run(args: argparse.Namespace) -> int:
    from moejax.config.run_directory import claim
    from moejax.data.errors import DataError
    from moejax.data.subword import HFTokenizer
    from moejax.interop import hf
    from moejax.interop.tensor_writer import appearing_whole
    from moejax.models.stack import stacked_layers
    from moejax.train.init_from import CHECKPOINTS, HF, LAYERS
    from moejax.train.manifest import versions
    from moejax.train.restore import TOKENIZER
    from moejax.train.slices import write_checkpoint

    started = time.monotonic()
    source, out = pathlib.Path(args.source), pathlib.Path(args.out)
    config = hf.model_config(source)
    model, leaves = hf.stored(source)
    with appearing_whole(out) as folder:
        num_bytes = write_checkpoint(
            folder / CHECKPOINTS / "step_00000000",
            leaves,
            step=0,
            extra={LAYERS: stacked_layers(model.segments)},
        )
        hf.carry(source, folder / HF)
        try:
            tokenizer = HFTokenizer(path=str(source), vocab_size=model.vocab_size).prepare(None, "")
            tokenizer.save(folder / TOKENIZER)
        except DataError as error:
            print(f"no tokenizer was imported: {error}")
        claim(folder, config, versions())
    seconds = time.monotonic() - started
    print(f"{num_bytes / 1e9:.2f} GB of weights in {seconds:.1f} s: {out}\n")
    print("train its routers on your own text:")
    print(f"  moejax train configs/router_tuning.py init_from={out}")
    return 0

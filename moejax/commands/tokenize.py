"""Train a config's tokenizer and tokenise its data, so that later runs start at once."""

from __future__ import annotations

import argparse

from moejax.commands import arguments

EXAMPLE = "moejax tokenize configs/tiny.py data.tokenizer.vocab_size=8192 --out tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="also write the tokenizer into this folder")


def run(args: argparse.Namespace) -> int:
    config = arguments.config_from(args)

    from moejax.config.build import build_config

    data = build_config(config).prepare_data()
    print(f"vocabulary         {data.tokenizer.vocab_size:,}")
    print(f"training tokens    {data.num_train_tokens:,} ({data.efficiency:.1%} of positions)")
    if data.num_scored_tokens != data.num_train_tokens:
        print(f"scored tokens      {data.num_scored_tokens:,} (of responses)")
    print(f"held-out tokens    {data.num_held_out_tokens:,}")
    print(f"held-out bytes     {data.held_out_bytes:,}")
    bytes_per_token = data.held_out_bytes / data.num_held_out_tokens
    print(f"bytes per token    {bytes_per_token:.3f} (held out, the end of a document is one)")
    if args.out:
        print(f"tokenizer          {data.tokenizer.save(args.out)}")
    return 0

"""What a config needs on a cluster, found by compiling its training step for it here.

Prints the memory of a device by kind, FLOPs, every collective with its mesh axes, bytes and number
of calls, an estimate of the step's time, and what to change where it does not fit. Needs no data
and no accelerator; TPUs need libtpu (the extra `tpu`), H100s JAX's CUDA plugin (the extra `cuda`).
Exits with 1 where the step does not fit or breaks its contract.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pathlib

from moejax.commands import arguments
from moejax.errors import UserError

EXAMPLE = "moejax plan configs/olmoe_1b_7b.py:v5p_128 --topology v5p:4x4x4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config_arguments(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="such as v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, v5e:4x4, h100:64x8 (64 hosts of 8), cpu:8 "
        "(simulated)",
    )
    parser.add_argument("--slices", type=int, metavar="N", help="TPU slices of that shape")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="rows of the embedding, where the config's tokenizer does not say",
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="all figures")
    parser.add_argument(
        "--contract", type=pathlib.Path, metavar="FILE", help="facts that must not have changed"
    )
    parser.add_argument(
        "--update-contract", action="store_true", help="write them to the file instead"
    )


def run(args: argparse.Namespace) -> int:
    if args.update_contract and args.contract is None:
        raise UserError("--update-contract needs --contract FILE")
    _prepare_jax(args.topology)
    config = arguments.config_from(args)

    from moejax.config.build import build_config
    from moejax.planning import contract, text
    from moejax.planning.plan import plan
    from moejax.planning.topology import parse

    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    topology = parse(args.topology, num_slices=args.slices)
    stated = None
    if args.contract is not None and not args.update_contract:
        stated = contract.read(args.contract)  # before minutes of compiling
    found = plan(build_config(config), topology, vocab_size=args.vocab_size)
    print(text.describe(found))
    if args.json is not None:
        named = text.as_json(found, config=args.config, overrides=args.overrides)
        args.json.write_text(json.dumps(named, indent=1) + "\n", encoding="utf-8")
    if not found.memory.fits:
        return 1
    if args.update_contract:
        contract.write(args.contract, found, command=_command(args, topology.name))
    return 0 if stated is None else _kept(contract.differences(stated, found))


def _kept(differences: list[str]) -> int:
    print("\nthe contract is kept" if not differences else "\nBREAKS ITS CONTRACT")
    for line in differences:
        print(f"  {line}")
    return 1 if differences else 0


def _command(args: argparse.Namespace, topology: str) -> str:
    words = ["moejax plan", args.config, *args.overrides, "--topology", topology]
    if args.vocab_size is not None:
        words += ["--vocab-size", str(args.vocab_size)]
    return " ".join([*words, "--contract", str(args.contract)])


def _prepare_jax(topology: str) -> None:
    """Before JAX starts: what compiles here runs nowhere here, so no accelerator is taken."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    chip, _, count = topology.partition(":")
    if chip == "cpu" and count.isdecimal():
        os.environ["JAX_NUM_CPU_DEVICES"] = count

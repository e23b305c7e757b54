"""Turn a Hugging Face checkpoint into a folder that runs start from.

SOURCE is a folder of safetensors with its config.json; nothing is downloaded. OUT gets the weights
in moejax's format with a fingerprint of each, the model's config, and the tokenizer files. A few
slices are in memory at a time, whatever the size of the model.

With --adapter OUT holds the model with a LoRA adapter of PEFT or a mixture of MoE-PEFT, not merged:
it can be evaluated, and a run that starts from it goes on training the adapter's factors.

With --check, transformers (extra `hf`) reads SOURCE too, and the logits of four built-in rows of
tokens, two of them padded, are compared with those of what was imported. Where they disagree OUT is
not made and the exit status is 1. Both models are then in memory, one after the other, in float32.
PEFT knows no mixtures, so that those cannot be checked.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import pathlib
import time
from typing import TYPE_CHECKING

from moejax.errors import UserError

if TYPE_CHECKING:
    from moejax.interop.logit_check import Comparison
    from moejax.models.transformer import Transformer

EXAMPLE = "moejax import-hf OLMoE-1B-7B-0924 runs/olmoe"

# Parameters of glibc's mallopt, from malloc.h, with values that keep what was freed for the next
# slice: three quarters of the page faults of an import fall away.
_KEEP_FREED = {-1: 2**31 - 1, -3: 2**30, -8: 1}  # trim and mmap thresholds in bytes, arenas


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder of a Hugging Face checkpoint")
    parser.add_argument("out", metavar="OUT", help="folder to be made")
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="folder of an adapter of SOURCE, of PEFT or MoE-PEFT, imported with it",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the logits with those of transformers, with --adapter of PEFT",
    )


class _DisagreementError(Exception):
    """What was imported computes other logits; raised so that OUT is not made."""


def run(args: argparse.Namespace) -> int:
    import fiddle as fdl

    from moejax.config.run_directory import store
    from moejax.data.errors import DataError
    from moejax.data.subword import HFTokenizer
    from moejax.interop import hf, logit_check, peft
    from moejax.interop.tensor_writer import appearing_whole
    from moejax.models.stack import stacked_layers
    from moejax.train.init_from import CHECKPOINTS, HF, LAYERS
    from moejax.train.manifest import versions
    from moejax.train.restore import TOKENIZER
    from moejax.train.slices import write_checkpoint

    if args.check and args.adapter and peft.holds_mixture(args.adapter):
        raise UserError(
            f"{args.adapter} is a mixture of MoE-PEFT, which PEFT does not know: leave --check out"
        )
    if args.check:
        logit_check.require_transformers(*(["peft"] if args.adapter else []))
    started = time.monotonic()
    _keep_freed_memory()
    source, out = pathlib.Path(args.source), pathlib.Path(args.out)
    config = hf.model_config(source)
    model, leaves = hf.stored(source)
    if args.adapter:
        config.adapter = peft.adapter_config(args.adapter, model, source=source)
        model, leaves = hf.stored(source, adapter=fdl.build(config.adapter))
        leaves = itertools.chain(leaves, peft.stored(args.adapter, model, source=source))
    try:
        with appearing_whole(out) as folder:
            num_bytes = write_checkpoint(
                folder / CHECKPOINTS / "step_00000000",
                leaves,
                step=0,
                extra={LAYERS: stacked_layers(model.segments)},
            )
            hf.carry(source, folder / HF)
            try:
                found = HFTokenizer(path=str(source), vocab_size=model.vocab_size)
                found.prepare(None, "").save(folder / TOKENIZER)
            except DataError as error:
                print(f"no tokenizer was imported: {error}")
            store(folder, config, versions())
            seconds = time.monotonic() - started
            if args.check:
                _check(source, folder, model, args.adapter)
    except _DisagreementError:
        print(f"{out} was not made")
        return 1
    print(f"{num_bytes / 1e9:.2f} GB of weights in {seconds:.1f} s: {out}\n")
    what, trainable = _next(model)
    print(f"train {what} on your own text:")
    print(f"  moejax train configs/router_tuning.py init_from={out}{trainable}")
    return 0


def _keep_freed_memory() -> None:
    set_parameter = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_parameter is not None:
        for parameter, value in _KEEP_FREED.items():
            set_parameter(parameter, value)


def _next(model: Transformer) -> tuple[str, str]:
    """What can be trained of an import, and the override that says so."""
    if model.adapter is not None:
        return "its adapter", " 'trainable=[\"lora/*\"]'"
    return ("its routers", "") if model.moe else ("it", " 'trainable=[\"*\"]'")


def _check(
    source: pathlib.Path, imported: pathlib.Path, model: Transformer, adapter: str | None
) -> None:
    """Prints the comparison; raises _DisagreementError where it is one."""
    found = _compared(source, imported, model, adapter)
    print(f"logits of {source} here and in transformers, in float32:\n{found}\n")
    if not found.agrees:
        raise _DisagreementError


def _compared(
    source: pathlib.Path, imported: pathlib.Path, model: Transformer, adapter: str | None
) -> Comparison:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from moejax.interop import logit_check
    from moejax.parallel.mesh import Mesh
    from moejax.train.init_from import read_weights

    tokens, mask = logit_check.rows(model)
    with_adapter = {} if adapter is None else {"adapter": adapter}
    theirs = logit_check.their_logits(source, tokens, mask, **with_adapter)
    here = NamedSharding(Mesh(data=1).build(), PartitionSpec())
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    variables = read_weights(imported, model, jax.tree.map(lambda _: here, shapes))
    variables = jax.tree.map(lambda x: x.astype("float32"), variables)
    return logit_check.compare(logit_check.our_logits(model, variables, tokens, mask), theirs)

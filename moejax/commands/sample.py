"""Continue prompts with a run's newest valid checkpoint, or with a published model."""

from __future__ import annotations

import argparse
import dataclasses

from moejax.commands import arguments

EXAMPLE = "moejax sample runs/tiny --prompt 'def main():' --temperature 0.5 --seed 1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model_arguments(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; may be given several times (default: the config's prompts)",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="per prompt")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy")
    parser.add_argument("--top-p", type=float, metavar="P", help="nucleus of this probability")
    parser.add_argument("--seed", type=int, default=0, metavar="N")


def run(args: argparse.Namespace) -> int:
    model = arguments.opened(args)

    from moejax.errors import UserError
    from moejax.models.generate import Sampling
    from moejax.train.finish import continue_texts

    names = ("max_new_tokens", "temperature", "top_p")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given = model.experiment.sampling if model.experiment else Sampling()
    prompts = args.prompt or (model.experiment.prompts if model.experiment else ())
    if not prompts:
        raise UserError("no prompts are given: give at least one --prompt TEXT")
    texts = continue_texts(
        model.model,
        model.variables,
        model.tokenizer,
        prompts,
        dataclasses.replace(given, **changes),
        seed=args.seed,
        beginning=model.reading.first,
    )
    print("\n\n--------\n\n".join(texts))
    return 0

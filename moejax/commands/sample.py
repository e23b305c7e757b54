"""Continue prompts with a run's newest valid checkpoint."""

from __future__ import annotations

import argparse
import dataclasses

from moejax.commands import arguments

EXAMPLE = "moejax sample runs/tiny --prompt 'def main():' --temperature 0.5 --seed 1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_run_arguments(parser)
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
    loaded = arguments.load_run(args)

    from moejax.errors import UserError
    from moejax.train.finish import continue_texts

    names = ("max_new_tokens", "temperature", "top_p")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    sampling = dataclasses.replace(loaded.experiment.sampling, **changes)
    prompts = args.prompt or loaded.experiment.prompts
    if not prompts:
        raise UserError("the config has no prompts: give at least one --prompt TEXT")
    texts = continue_texts(
        loaded.model, loaded.variables, loaded.tokenizer, prompts, sampling, seed=args.seed
    )
    print("\n\n--------\n\n".join(texts))
    return 0

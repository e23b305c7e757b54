"""Held-out loss of a run, or any model's perplexity of text files and answers to multiple choice.

Without options: loss and bits per byte of the run's own held-out data, by its own config. With
--text: each file is a document; every token is scored once, the first included. With
--multiple-choice: lines {"question": ..., "choices": [...], "answer": index}, counted as
lm-evaluation-harness does. docs/evaluation.md has the conventions.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from moejax.commands import arguments
from moejax.errors import UserError

if TYPE_CHECKING:
    from moejax.evaluation.likelihood import Scorer
    from moejax.evaluation.open_model import Opened

EXAMPLE = "moejax evaluate runs/tiny --text README.md docs/verify.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model_arguments(parser)
    parser.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 files to score")
    parser.add_argument("--multiple-choice", metavar="FILE.jsonl", help="questions to answer")
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens that the model sees at a time (default: a run's sequence length, or what a "
        "published model accepts, at most 4096)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="of --text: tokens scored per window after the first (default: the length)",
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="positions computed at a time (default: 4096)",
    )
    parser.add_argument("--json", metavar="OUT", help="also write all figures into this file")


def run(args: argparse.Namespace) -> int:
    from moejax.train import processes

    inputs = _inputs(args)  # before a large model is read
    with processes.joined():
        model = arguments.opened(args)
        found: dict[str, Any] = {} if any(inputs) else {"held_out": _held_out(model)}
        if any(inputs):
            from moejax.evaluation.likelihood import Scorer

            scorer = Scorer(
                model.model,
                model.variables,
                model.mesh,
                max_length=args.length or model.length,
                batch_tokens=args.batch_tokens,
            )
            found |= _texts(model, scorer, inputs[0], args.stride)
            found |= _choices(model, scorer, inputs[1])
        if processes.is_first():
            _print(model, found)
            if args.json:
                _write(args.json, {"model": args.model, "step": model.step} | found)
    return 0


def _inputs(args: argparse.Namespace) -> tuple[dict[str, str], list]:
    """({path: text}, questions) of the files that the arguments name."""
    from moejax.evaluation.multiple_choice import read_questions
    from moejax.evaluation.perplexity import read_text

    for name in ("length", "stride", "batch_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.stride is not None and not args.text:
        raise UserError("--stride is for --text FILE")
    if args.length is not None and not (args.text or args.multiple_choice):
        raise UserError(
            "--length is for --text and --multiple-choice: a run's own data have theirs"
        )
    texts = {path: read_text(path) for path in args.text or ()}
    return texts, read_questions(args.multiple_choice) if args.multiple_choice else []


def _held_out(model: Opened) -> dict[str, float]:
    import jax

    from moejax.parallel.mesh import Mesh
    from moejax.train.evaluate import Evaluator

    data = model.data()
    Mesh(**model.mesh.shape).check_batch(
        model.mesh.size,
        batch_size=data.eval.batch_size,
        sequence_length=model.experiment.sequence_length,
    )
    with jax.set_mesh(model.mesh):
        evaluator = Evaluator(model.model, model.experiment.objective, data, model.mesh)
        values = evaluator.run(model.variables, model.step)
    return {name.removeprefix("eval/"): value for name, value in values.items()}


def _texts(model: Opened, scorer: Scorer, texts: dict[str, str], stride: int | None) -> dict:
    from moejax.evaluation.perplexity import score_texts

    if not texts:
        return {}
    scores = score_texts(scorer, model.reading, list(texts.values()), stride=stride)
    named = dict(zip(texts, scores, strict=True))
    if len(texts) > 1:
        total = scores[0]
        for score in scores[1:]:
            total += score
        named["all" if "all" not in named else "all together"] = total
    sizes = lambda score: {"tokens": score.num_tokens, "bytes": score.num_bytes}
    return {"text": {name: sizes(score) | score.figures() for name, score in named.items()}}


def _choices(model: Opened, scorer: Scorer, questions: list) -> dict:
    from moejax.evaluation.multiple_choice import accuracies, answer

    if not questions:
        return {}
    answered = answer(scorer, model.reading, questions)
    figures = {
        name: {"value": value, "stderr": None if math.isnan(error) else error}
        for name, (value, error) in accuracies(answered).items()
    }
    return {
        "multiple_choice": {
            "questions": len(questions),
            "cut": sum(one.num_cut > 0 for one in answered),
            **figures,
            "log_probs": [one.log_probs for one in answered],
        }
    }


def _print(model: Opened, found: dict[str, Any]) -> None:
    if model.step is not None:
        print(f"step {model.step}")
    for name, value in found.get("held_out", {}).items():
        print(f"  {name:20} {value:.5f}")
    for path, figures in found.get("text", {}).items():
        print(f"{path}: {figures['tokens']:,} tokens, {figures['bytes']:,} bytes")
        for name, value in list(figures.items())[2:]:
            print(f"  {name:20} {value:.5f}")
    choice = found.get("multiple_choice")
    if choice:
        cut = f", {choice['cut']} cut on the left" if choice["cut"] else ""
        print(f"{choice['questions']:,} questions{cut}")
        for name in ("acc", "acc_norm", "acc_bytes"):
            error = choice[name]["stderr"]
            stated = "" if error is None else f" +- {error:.4f}"
            print(f"  {name:20} {choice[name]['value']:.4f}{stated}")


def _write(path: str, found: dict[str, Any]) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error

"""Write the file that the objective RoMA needs: which samples are alike, and how they are routed.

The config names the untuned model (`init_from`) and the training data, prompts with responses. Each
of its training documents needs an embedding of its prompt, by any text embedder: `--texts` writes
the prompts in order, `--embeddings` reads a .npy file [documents, d] in the same order.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from moejax.commands import arguments
from moejax.errors import UserError

EXAMPLE = (
    "moejax neighbours configs/router_tuning.py:roma init_from=runs/olmoe "
    "data.train.path=answers.jsonl --embeddings prompts.npy --out runs/neighbours.npz"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config_arguments(parser)
    parser.add_argument("--texts", metavar="FILE", help="only write the prompts, one JSON per line")
    parser.add_argument("--embeddings", metavar="FILE", help=".npy file, a row per prompt")
    parser.add_argument("--out", metavar="FILE", help="the .npz file to write")
    parser.add_argument("--k", type=int, default=3, metavar="N", help="neighbours (default 3)")
    parser.add_argument(
        "--sigma", type=float, metavar="X", help="of the similarity (default: median distance)"
    )
    parser.add_argument(
        "--layers", type=int, default=5, metavar="N", help="the last N MoE layers (default 5)"
    )


def run(args: argparse.Namespace) -> int:
    from moejax.config.build import build_config
    from moejax.train.loop import prepare_data

    _check(args)
    experiment = build_config(arguments.config_from(args))
    arguments.use_compilation_cache()
    data = prepare_data(experiment)
    if args.texts:
        count = _write_texts(data, pathlib.Path(args.texts))
        print(f"{args.texts}: {count} prompts")
        return 0
    return _write_neighbours(args, experiment, data)


def _check(args: argparse.Namespace) -> None:
    if not args.texts and not (args.embeddings and args.out):
        raise UserError("give --texts FILE, or --embeddings FILE with --out FILE")
    for name in ("k", "layers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.sigma is not None and not args.sigma > 0:
        raise UserError(f"--sigma {args.sigma} must be above 0")


def _write_texts(data, path: pathlib.Path) -> int:
    import numpy as np

    from moejax.objectives.samples import before_responses

    count = 0
    with path.open("w", encoding="utf-8") as file:
        for batch in data.train.apart():
            ends = np.asarray(before_responses(batch)).argmax(axis=1)
            for tokens, segments, end in zip(batch.tokens, batch.segment_ids, ends, strict=True):
                if segments[0]:
                    text = data.tokenizer.decode(tokens[1 : end + 1])  # behind the document's mark
                    file.write(json.dumps({"prompt": text}, ensure_ascii=False) + "\n")
                    count += 1
    return count


def _write_neighbours(args: argparse.Namespace, experiment, data) -> int:
    import jax
    import numpy as np

    from moejax.objectives import neighbours
    from moejax.objectives.sample_routing import sample_routing
    from moejax.parallel.mesh import Mesh
    from moejax.train.init_from import read_weights

    if experiment.init_from is None:
        raise UserError("name the untuned model: init_from=FOLDER")
    embeddings = _embeddings(args.embeddings)
    model = experiment.build_model(data.tokenizer.vocab_size)
    layers = tuple(model.moe_layers)[-args.layers :]
    mesh = Mesh(data=1).build()
    with jax.set_mesh(mesh):
        shardings = experiment.variable_shardings(model, mesh)
        variables = read_weights(pathlib.Path(experiment.init_from), model, shardings)
        found = sample_routing(model, variables, data.train.apart, layers=layers)
    if len(embeddings) != len(found.routing):
        raise UserError(
            f"{args.embeddings!r} has {len(embeddings)} rows and the training data "
            f"{len(found.routing)} documents that fit in sequence_length="
            f"{experiment.sequence_length}: embed what --texts writes"
        )
    if not found.has_prompt.any():
        raise UserError(
            "no document has a prompt before what is scored: RoMA needs prompts with responses"
        )
    nearest, weights = neighbours.nearest(
        embeddings, found.successful & found.has_prompt, k=args.k, sigma=args.sigma
    )
    means, spreads = neighbours.averaged(found.routing, nearest, weights)
    _, first = np.unique(found.keys, axis=1, return_index=True)  # sorted; of equal ones the first
    first = first[found.has_prompt[first]]
    neighbours.Neighbours(
        keys=found.keys[:, first],
        salt=found.salt,
        means=means[first],
        spreads=spreads[first],
        layers=layers,
    ).save(args.out)
    right, count = int(found.successful.sum()), len(found.successful)
    print(f"{args.out}: {len(first)} samples; the untuned model answers {right} of {count} rightly")
    print(f"layers {', '.join(map(str, layers))}, {args.k} neighbours each")
    return 0


def _embeddings(path: str):
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path!r} is no .npy file of embeddings: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f":
        raise UserError(f"{path!r} must hold one array [documents, d] of floats")
    if not np.isfinite(found).all():
        raise UserError(f"{path!r} holds numbers that are not finite")
    return found

"""The model, the weights and the tokenizer that `moejax trace` looks at, whatever holds them.

A run, a config with `init_from`, what `moejax import-hf` wrote, or a Hugging Face checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from moejax.commands import arguments
from moejax.errors import UserError

if TYPE_CHECKING:
    import fiddle as fdl
    import jax

    from moejax.data.pipeline import Data, Loaders
    from moejax.data.tokenizer import Tokenizer
    from moejax.models.output import Variables
    from moejax.models.transformer import Transformer

_SEQUENCE_LENGTH, _BATCH_SIZE = 512, 4  # of a folder that says nothing of rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedModel:
    """Ready to run on `mesh`. `folder` and `step` say where the weights came from.

    `data` is None where the folder is a model without a run, and `sources` names what they are read
    from; `config` is the model's, as text.
    """

    model: Transformer
    variables: Variables
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    data: Loaders | None
    sources: tuple[str, ...]
    sequence_length: int
    batch_size: int
    folder: pathlib.Path
    step: int
    config: str


def load(args: argparse.Namespace) -> TracedModel:
    """What the arguments of `moejax trace` name.

    Raises:
      UserError: there is no such folder or file, it has no weights, or no MoE layer.
    """
    from moejax.experiment import Experiment
    from moejax.interop import hf

    arguments.use_compilation_cache()
    folder = pathlib.Path(args.config)
    if folder.is_dir() and hf.is_checkpoint(folder):
        return _of_folder(args, _overridden(hf.model_config(folder), args))
    config = arguments.config_from(args)
    if _callable(config) is Experiment:
        return _of_experiment(args, config)
    return _of_folder(args, config)


def _of_experiment(args: argparse.Namespace, config: fdl.Config) -> TracedModel:
    from moejax.config.build import build_config
    from moejax.train.init_from import read_weights
    from moejax.train.loop import prepare_data
    from moejax.train.restore import load_variables

    experiment = build_config(config)
    is_run, start = pathlib.Path(args.config).is_dir(), experiment.init_from
    if not is_run and start is None:
        raise UserError(
            f"{args.config} starts from random weights: name the folder of a run, or give "
            "init_from=FOLDER"
        )
    if not is_run and args.step is not None:
        raise UserError("--step chooses among the checkpoints of a run: name its folder")
    data = None
    if is_run:
        run = load_variables(experiment, args.config, step=args.step)
        model, variables, mesh, step = run.model, run.variables, run.mesh, run.step
        tokenizer = run.tokenizer
        if not args.text:  # a run's own data may be gone
            data = _same_tokenizer(prepare_data(experiment), tokenizer, args)
    else:
        experiment.check()
        data = prepare_data(experiment)
        tokenizer, step = data.tokenizer, 0
        model, mesh = experiment.build_model(tokenizer.vocab_size), experiment.mesh.build()
        shardings = experiment.variable_shardings(model, mesh)
        variables = read_weights(pathlib.Path(str(start)), model, shardings)
    return TracedModel(
        model=_with_experts(model, args),
        variables=variables,
        mesh=mesh,
        tokenizer=tokenizer,
        data=data,
        sources=_source_names(experiment.data),
        sequence_length=args.sequence_length or experiment.sequence_length,
        batch_size=experiment.batch_size,
        folder=pathlib.Path(args.config if is_run else str(start)),
        step=step,
        config=_text(config.model),
    )


def _source_names(data: Data) -> tuple[str, ...]:
    """In the order in which batches number them."""
    sources = getattr(data.train, "sources", (data.train,))
    return tuple(str(getattr(source, "path", type(source).__name__)) for source in sources)


def _same_tokenizer(data: Loaders, own: Tokenizer, args: argparse.Namespace) -> Loaders:
    if data.tokenizer.fingerprint() != own.fingerprint():
        raise UserError(
            f"the data of {args.config} now give another tokenizer than the one it was trained "
            "with: restore the data, or name text files with --text"
        )
    return data


def _of_folder(args: argparse.Namespace, config: fdl.Config) -> TracedModel:
    """A model on the first device, with its folder's tokenizer."""
    import jax

    from moejax.config.build import build_config
    from moejax.data.subword import HFTokenizer
    from moejax.interop import hf
    from moejax.parallel.mesh import Mesh
    from moejax.parallel.sharding import parameter_shardings
    from moejax.train.init_from import read_weights
    from moejax.train.restore import TOKENIZER

    if args.step is not None:
        raise UserError(f"--step chooses among the checkpoints of a run, and {args.config} is none")
    folder, model, mesh = pathlib.Path(args.config), build_config(config), Mesh(data=1).build()
    own = folder if hf.is_checkpoint(folder) else folder / TOKENIZER
    tokenizer = HFTokenizer(path=str(own), vocab_size=model.vocab_size).prepare(None, "")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = parameter_shardings(mesh, shapes, model.logical_axes(), max_replicated=2**62)
    default = min(_SEQUENCE_LENGTH, model.max_length or _SEQUENCE_LENGTH)
    return TracedModel(
        model=_with_experts(model, args),
        variables=read_weights(folder, model, shardings),
        mesh=mesh,
        tokenizer=tokenizer,
        data=None,
        sources=(),
        sequence_length=args.sequence_length or default,
        batch_size=_BATCH_SIZE,
        folder=folder,
        step=0,
        config=_text(config),
    )


def _with_experts(model: Transformer, args: argparse.Namespace) -> Transformer:
    if model.moe is None:
        raise UserError(f"the model of {args.config} has no MoE layer, so there is no routing")
    return model


def _overridden(config: fdl.Config, args: argparse.Namespace) -> fdl.Config:
    from moejax.config.check import check_config
    from moejax.config.overrides import apply_overrides

    return check_config(apply_overrides(config, args.overrides))


def _callable(config: fdl.Config) -> Any:
    import fiddle as fdl

    return fdl.get_callable(config)


def _text(config: fdl.Config) -> str:
    from moejax.config.text import config_text

    return config_text(config)

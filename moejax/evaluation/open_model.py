"""Opens what a folder holds for use: a run of moejax, an import, or a Hugging Face checkpoint."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import fiddle as fdl
import jax

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.data.pipeline import Loaders
from moejax.data.subword import HFTokenizer
from moejax.data.tokenizer import Tokenizer, load
from moejax.errors import UserError
from moejax.evaluation.reading import Reading
from moejax.experiment import Experiment
from moejax.interop import hf
from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.parallel.mesh import Mesh
from moejax.parallel.sharding import parameter_shardings
from moejax.train.init_from import read_weights
from moejax.train.loop import prepare_data
from moejax.train.restore import TOKENIZER, load_variables, same_held_out

LONGEST = 4096  # inputs at a time, of a published model that accepts more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A model ready to use.

    Attributes:
      model, variables: the model and its parameters and router state, on `mesh`.
      tokenizer: the model's.
      reading: how text becomes tokens for it.
      length: inputs at a time: the run's sequence length, or the most that the published model
        accepts, but no more than `LONGEST`.
      config: the model's.
      experiment, step, extra: of a run and its checkpoint; None and empty for the others.
    """

    model: Transformer
    variables: Variables
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    reading: Reading
    length: int
    config: fdl.Config
    experiment: Experiment | None = None
    step: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def data(self) -> Loaders:
        """The data of the run.

        Raises UserError where there is no run, its data now give another tokenizer, as the
        standard library of another Python would (the same ids would stand for other text), or
        other held-out rows.
        """
        if self.experiment is None:
            raise UserError("only a run has data of its own: name text files with --text")
        data = prepare_data(self.experiment)
        if data.tokenizer.fingerprint() != self.tokenizer.fingerprint():
            raise UserError(
                "the run's data now give another tokenizer than the one it was trained with: "
                "restore the data, or name text files with --text"
            )
        if not same_held_out(self.extra, data):
            raise UserError(
                "the run's held-out data are not what they were: figures would not go with its "
                "others; restore the data, or name text files with --text"
            )
        return data


def open_model(
    folder: str | pathlib.Path,
    *,
    step: int | None = None,
    mesh: Mesh | None = None,
    trusted: bool = False,
) -> Opened:
    """What `folder` holds.

    Args:
      folder: a run's workdir, what `moejax import-hf` wrote, or a Hugging Face checkpoint.
      step: of a run, the checkpoint to use; None is the newest valid one.
      mesh: where the variables lie; None is one device (a run of several processes: its own).
      trusted: let a run's config.json name any code.

    Raises:
      UserError: the folder holds none of these, no tokenizer, or is damaged.
    """
    folder = pathlib.Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file: name the folder of a run, an import or a checkpoint")
    published = folder.is_dir() and hf.is_checkpoint(folder)
    config = hf.model_config(folder) if published else load_config(folder, trusted=trusted)
    if fdl.get_callable(config) is Experiment:
        return _run(config, folder, step, mesh)
    if fdl.get_callable(config) is not Transformer:
        raise UserError(f"{folder} holds no model: name a run, an import or a checkpoint")
    if step is not None:
        raise UserError(f"{folder} is no run and has no step {step}: leave out --step")
    model = build_config(config)
    if published:
        tokenizer = HFTokenizer(path=str(folder), vocab_size=model.vocab_size).prepare(None, "")
    else:
        tokenizer = load(folder / TOKENIZER)
    eos = tokenizer.eos_id
    return Opened(
        model=model,
        **_weights(folder, model, mesh or Mesh(data=1)),
        tokenizer=tokenizer,
        reading=Reading(
            tokenizer=tokenizer,
            beginning=tuple(map(int, tokenizer.beginning())),
            start=eos if tokenizer.bos_id is None else tokenizer.bos_id,
        ),
        length=min(model.max_length or LONGEST, LONGEST),
        config=config,
    )


def _run(config: fdl.Config, folder: pathlib.Path, step: int | None, mesh: Mesh | None) -> Opened:
    experiment = build_config(config)
    loaded = load_variables(experiment, folder, step=step, mesh=mesh)
    eos = loaded.tokenizer.eos_id
    return Opened(
        model=loaded.model.at_step(loaded.step),
        variables=loaded.variables,
        mesh=loaded.mesh,
        tokenizer=loaded.tokenizer,
        reading=Reading(tokenizer=loaded.tokenizer, beginning=(eos,), start=eos),
        length=experiment.sequence_length,
        config=config.model,
        experiment=experiment,
        step=loaded.step,
        extra=loaded.extra,
    )


def _weights(folder: pathlib.Path, model: Transformer, where: Mesh) -> dict:
    """`variables` and `mesh` of a model that was not trained here."""
    mesh = where.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = parameter_shardings(
        mesh, shapes, model.logical_axes(), max_replicated=where.max_replicated_bytes
    )
    with jax.set_mesh(mesh):
        return {"variables": read_weights(folder, model, shardings), "mesh": mesh}

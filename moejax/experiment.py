"""Experiment: the root of every config. Builds the parts that depend on each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moejax.data.mixture import Mixture
from moejax.data.pipeline import Data, Loaders
from moejax.errors import UserError
from moejax.kernels import dispatch
from moejax.models.adapter import Adapter
from moejax.models.expert_axes import expert_axes
from moejax.models.flops import Size, size
from moejax.models.generate import Sampling
from moejax.models.settings import check_trained_routers
from moejax.models.transformer import Transformer
from moejax.models.variables import parameters
from moejax.objectives.objective import Objective, check_trained, passes
from moejax.optim import freeze
from moejax.optim.guard import Guard
from moejax.optim.optimizer import AdamW
from moejax.parallel.mesh import Mesh
from moejax.parallel.sharding import parameter_shardings
from moejax.types import Batch, named_leaves

_ANY_VOCABULARY = 512  # only two shapes depend on the vocabulary, and no mistake does


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run. Every number lives at exactly one path below this object.

    Attributes:
      model: its vocabulary size is left out and taken from the data's tokenizer.
      data: sources, tokenizer and packing.
      optimizer: its schedule receives `steps`.
      objective: what is minimised.
      init_from: a folder whose weights the run starts from: a run of moejax, what `moejax
        import-hf` wrote, or a Hugging Face checkpoint. None starts from random ones.
      trainable: patterns of the parameters that train, over their paths (`optim/paths.py`). The
        others are frozen: no gradient, no optimiser state, and the same bits at the end.
      adapter: what is added to the model's projections; its leaves have paths lora/... for
        `trainable`.
      guard: refuses steps that are not finite or that spike.
      mesh: how the devices share the work; changes no result.
      steps: optimiser steps of the whole run.
      batch_size: sequences per step, over all devices. sequence_length: tokens per sequence.
      num_microbatches: the batch is split into this many parts to save memory; no sum, count or
        gradient changes by it.
      seed: of initialisation, data order and sampling layers.
      workdir: the run's directory: config, metrics, checkpoints, report.
      log_every, eval_every, checkpoint_every: in steps; 0 never (eval and checkpoint still
        happen at the end).
      keep_last: checkpoints kept, newest first. keep_every: besides, every n-th step, 0 none.
      prompts: texts that are continued at the end of the run, as `sampling` says.
    """

    model: Transformer
    data: Data
    optimizer: AdamW
    objective: Objective
    steps: int
    batch_size: int
    sequence_length: int
    workdir: str
    init_from: str | None = None
    trainable: tuple[str, ...] = freeze.TRAIN_ALL
    adapter: Adapter | None = None
    guard: Guard = dataclasses.field(default_factory=Guard)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    num_microbatches: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 100
    keep_last: int = 2
    keep_every: int = 0
    prompts: tuple[str, ...] = ()
    sampling: Sampling = dataclasses.field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length", "num_microbatches", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.num_microbatches:
            raise UserError(
                f"num_microbatches={self.num_microbatches} does not divide "
                f"batch_size={self.batch_size}"
            )
        if "://" in self.workdir:
            raise UserError(
                f"workdir={self.workdir} is the address of a bucket, and a run's folder must be in "
                "a file system: mount the bucket (with Cloud Storage FUSE, say) and name the "
                "folder there"
            )
        if self.workdir.startswith("~"):
            raise UserError(
                f"workdir={self.workdir}: no shell has put your home folder in place of ~; write "
                "it out"
            )
        longest = self.model.max_length
        if longest is not None and self.sequence_length > longest:
            raise UserError(
                f"sequence_length={self.sequence_length} is longer than "
                f"model.max_length={longest}; lower the one or raise the other"
            )
        if longest is not None and self.prompts and self.sampling.max_new_tokens >= longest:
            raise UserError(
                f"sampling.max_new_tokens={self.sampling.max_new_tokens} leaves no room for "
                f"prompts in model.max_length={longest}; lower the one or raise the other"
            )
        if self.model.vocab_size is not None:
            raise UserError("leave model.vocab_size unset: it is taken from data.tokenizer")
        if self.model.adapter is not None:
            raise UserError("set adapter instead of model.adapter, which is taken from it")

    def check(self) -> None:
        """Raises UserError for every mistake that shows without data; takes about a second.

        Tokenising can take hours, so call this before `prepare_data`. The model and the optimiser
        are put together as in training and one microbatch goes through the objective, all of it
        with abstract arrays.
        """
        self.mesh.check_batch(
            jax.device_count(),
            batch_size=self.batch_size // self.num_microbatches,
            sequence_length=self.sequence_length,
        )
        self.data.check(seq_len=self.sequence_length, batch_size=self.batch_size, seed=self.seed)
        mesh = self.mesh.build()
        with dispatch.unannounced(), jax.set_mesh(mesh):
            self._trace(mesh)

    def variable_shardings(self, model: Transformer, mesh: jax.sharding.Mesh) -> Any:
        """Where the variables of `model.init` lie. Raises UserError where they cannot."""
        return parameter_shardings(
            mesh,
            jax.eval_shape(model.init, jax.random.key(0)),
            model.logical_axes(),
            max_replicated=self.mesh.max_replicated_bytes,
        )

    def _trace(self, mesh: jax.sharding.Mesh) -> None:
        model = self.build_model(_ANY_VOCABULARY)
        key = jax.random.key(0)
        variables = jax.eval_shape(model.init, key)
        self.variable_shardings(model, mesh)
        self.build_optimizer(parameters(variables))
        chosen = self.chosen_experts(model)
        batch = self.abstract_batch(self.batch_size // self.num_microbatches)
        jax.eval_shape(
            lambda variables, batch, token_bytes: (
                self.objective(model, variables, batch, token_bytes=token_bytes, key=key).terms
            ),
            variables,
            batch,
            jax.ShapeDtypeStruct((_ANY_VOCABULARY,), jnp.int32),
        )
        if self.prompts:  # they are continued when all is done, as rows of no task
            jax.eval_shape(lambda v, tokens: model.apply(v, tokens).logits, variables, batch.tokens)
        trained, _ = freeze.split(parameters(variables), self.trainable)
        some = {path: own.chosen for path, own in chosen.items()}
        check_trained(self.objective, model, dict.fromkeys(named_leaves(trained)) | some)
        check_trained_routers(model, named_leaves(trained))

    def prepare_data(self) -> Loaders:
        """Tokenises and packs (or finds it cached), for this batch and sequence length.

        Held-out batches are as large as a microbatch: they have to fit where a microbatch does.
        """
        return self.data.prepare(
            seq_len=self.sequence_length,
            batch_size=self.batch_size,
            seed=self.seed,
            eval_batch_size=self.batch_size // self.num_microbatches,
        )

    def build_optimizer(self, params: Any) -> optax.GradientTransformationExtraArgs:
        """The optimiser of those of `params` that train; UserError where that is none."""
        trained, _ = freeze.split(params, self.trainable)
        return self.optimizer.build(trained, self.steps)

    def chosen_experts(self, model: Transformer) -> dict[str, freeze.Experts]:
        """Of which parameters only some experts train; UserError for a wrong pattern."""
        if not freeze.name_experts(self.trainable):
            return {}  # without tracing the model
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        return freeze.chosen_experts(parameters(shapes), self.trainable, expert_axes(model))

    def build_model(self, vocab_size: int) -> Transformer:
        """The model with the tokenizer's vocabulary, adapted."""
        return dataclasses.replace(self.model, vocab_size=vocab_size, adapter=self.adapter)

    def size(self, model: Transformer) -> Size:
        """Parameters, and FLOPs per token in all passes over it; of what trains and is frozen."""
        shapes = parameters(jax.eval_shape(model.init, jax.random.key(0)))
        _, frozen = freeze.split(shapes, self.trainable)
        counted = size(model, self.sequence_length, frozen=named_leaves(frozen))
        times = passes(self.objective)
        return dataclasses.replace(
            counted,
            train_flops_per_token=times * counted.train_flops_per_token,
            forward_flops_per_token=times * counted.forward_flops_per_token,
        )

    def abstract_batch(self, batch_size: int) -> Batch:
        """Shapes and dtypes of a batch of the data."""
        shape = (batch_size, self.sequence_length)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32)
        mixed = isinstance(self.data.train, Mixture)
        return Batch(
            tokens=ids,
            targets=ids,
            loss_mask=jax.ShapeDtypeStruct(shape, jnp.bool_),
            segment_ids=ids,
            positions=ids,
            sources=ids if mixed else None,
        )

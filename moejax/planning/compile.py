"""The training step of `moejax train`, compiled for devices that need not be here."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from moejax.errors import UserError
from moejax.experiment import Experiment
from moejax.models.transformer import Transformer
from moejax.models.variables import parameters
from moejax.parallel.sharding import partition_spec
from moejax.train import layout
from moejax.train.assemble import assemble
from moejax.train.state import TrainState
from moejax.train.step import jit_step
from moejax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """A step and its abstract arguments, which say where they lie.

    Attributes:
      model: with its vocabulary.
      mesh: over the devices that it is compiled for.
      state, batch: `jax.ShapeDtypeStruct`s with shardings.
      program: None where it does not fit into the devices' memory.
      refusal: what the compiler then says.
      seconds: that tracing and compiling took.
    """

    model: Transformer
    mesh: jax.sharding.Mesh
    state: TrainState
    batch: Batch
    program: jax.stages.Compiled | None
    refusal: str | None
    seconds: float


def compile_step(
    experiment: Experiment, devices: Sequence[jax.Device], *, vocab_size: int
) -> CompiledStep:
    """Compiles the step that `moejax train` would run on `devices`, with the kernels of their kind.

    Kernels are chosen by the mesh's devices (`kernels.compat`), so it is traced under the mesh.
    What is computed at once is computed outside, because its devices may not be there.

    Raises UserError for a mesh or batch that the devices cannot be split into.
    """
    experiment.mesh.check_batch(
        len(devices),
        batch_size=experiment.batch_size // experiment.num_microbatches,
        sequence_length=experiment.sequence_length,
    )
    started = time.perf_counter()
    mesh = experiment.mesh.build(devices)
    model = experiment.build_model(vocab_size)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = experiment.build_optimizer(parameters(shapes))
    run = assemble(experiment, model, optimizer, mesh, token_bytes=np.ones((vocab_size,), np.int32))
    state = layout.with_sharding(jax.eval_shape(run.fresh), run.shardings)
    batch = _batch(experiment, mesh)
    program, refusal = None, None
    with _no_cache(), jax.set_mesh(mesh):
        # Once more, with the compiler's options for the platform of this mesh.
        shardings = (run.shardings, layout.replicated(mesh))
        step = jit_step(run.train_step.__wrapped__, shardings=shardings)
        try:
            program = step.lower(state, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = str(error)
    return CompiledStep(
        model=model,
        mesh=mesh,
        state=state,
        batch=batch,
        program=program,
        refusal=refusal,
        seconds=time.perf_counter() - started,
    )


def vocabulary(experiment: Experiment, stated: int | None = None) -> int:
    """Rows of the embedding: as `stated`, as the tokenizer's config says, or as its file says.

    Raises UserError where none of them does.
    """
    tokenizer: Any = experiment.data.tokenizer
    if found := stated or getattr(tokenizer, "vocab_size", None):
        return found
    try:
        return tokenizer.prepare(None, experiment.data.cache_dir or "").vocab_size
    except (UserError, AttributeError, TypeError) as error:
        raise UserError(
            f"the size of the vocabulary is not known without the tokenizer ({error}): set "
            "data.tokenizer.vocab_size, or give --vocab-size N"
        ) from error


def _batch(experiment: Experiment, mesh: jax.sharding.Mesh) -> Batch:
    """As `layout.global_batch` lays it out."""
    where = NamedSharding(mesh, partition_spec(("batch", "sequence")))
    shapes = experiment.abstract_batch(experiment.batch_size)
    return layout.with_sharding(shapes, jax.tree.map(lambda _: where, shapes))


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Programs for devices without a client cannot be read back from the cache."""
    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, before)

"""The training step of `moejax train`, compiled for devices that need not be here."""

from __future__ import annotations

import contextlib
import dataclasses
import math
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
from moejax.planning.phase import Phase, longest
from moejax.train import layout
from moejax.train.assemble import assemble
from moejax.train.state import TrainState
from moejax.train.step import jit_step
from moejax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """A step and its abstract arguments, which say where they lie.

    Attributes:
      model: with its vocabulary, as it computes in `phase`.
      mesh: over the devices that it is compiled for.
      state, batch: `jax.ShapeDtypeStruct`s with shardings.
      program: None where it does not fit into the devices' memory.
      refusal: what the compiler then says.
      phase: that `counted` is of; None where all steps compute alike.
      counted: the program whose work counts: `program`, or that of the phase alone, since a
        run's own program holds every phase.
      seconds: that tracing and compiling took.
    """

    model: Transformer
    mesh: jax.sharding.Mesh
    state: TrainState
    batch: Batch
    program: jax.stages.Compiled | None
    refusal: str | None
    seconds: float
    phase: Phase | None = None
    counted: jax.stages.Compiled | None = None


def compile_step(
    experiment: Experiment, devices: Sequence[jax.Device], *, vocab_size: int
) -> CompiledStep:
    """Compiles the step that `moejax train` would run on `devices`, with the kernels of their kind.

    Kernels are chosen by the mesh's devices (`kernels.compat`), so it is traced under the mesh.
    What is computed at once is computed outside, because its devices may not be there.

    Raises UserError for a mesh or batch that the devices cannot be split into, and for a mesh that
    leaves some of them out.
    """
    _check_all_used(experiment, len(devices))
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
    token_bytes = np.ones((vocab_size,), np.int32)
    run = assemble(experiment, model, optimizer, mesh, token_bytes=token_bytes)
    state = layout.with_sharding(jax.eval_shape(run.fresh), run.shardings)
    batch = _batch(experiment, mesh)

    def compiled(run: Any) -> jax.stages.Compiled:
        # Once more, with the compiler's options for the platform of this mesh.
        shardings = (run.shardings, layout.replicated(mesh))
        step = jit_step(run.train_step.__wrapped__, shardings=shardings)
        return step.lower(state, batch).compile()

    phase = longest(model, experiment.steps)
    program = counted = refusal = None
    with _no_cache(), jax.set_mesh(mesh):
        try:
            program = counted = compiled(run)
            if phase is not None:
                alone = assemble(experiment, phase.model, optimizer, mesh, token_bytes=token_bytes)
                counted = compiled(alone)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = str(error)
    return CompiledStep(
        model=model if phase is None else phase.model,
        mesh=mesh,
        state=state,
        batch=batch,
        program=program,
        refusal=refusal,
        phase=phase,
        counted=counted,
        seconds=time.perf_counter() - started,
    )


def _check_all_used(experiment: Experiment, num_devices: int) -> None:
    sizes = experiment.mesh.sizes(num_devices)
    used = math.prod(sizes.values())
    if used < num_devices:
        raise UserError(
            f"the mesh uses {used} of {num_devices} devices, which a run of several processes "
            f"refuses: leave mesh.data unset, set it to {num_devices * sizes['data'] // used}, or "
            f"plan for {used} devices"
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

"""Records the routing of rows of text into a trace file, batch by batch."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.analysis.trace import TraceInfo, batch_of_rows, sequence_starts
from moejax.analysis.trace_file import TraceWriter
from moejax.data.pipeline import Loaders
from moejax.errors import UserError
from moejax.kernels import compat
from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.objectives.traced import layer_trace
from moejax.train import layout
from moejax.train.text_rows import TextRows
from moejax.types import Batch

_FIELDS = ("experts", "weights", "probs")  # of the model's trace


def record(
    path: pathlib.Path,
    info: TraceInfo,
    model: Transformer,
    variables: Variables,
    rows: Iterable[TextRows],
    mesh: jax.sharding.Mesh,
    *,
    keep_probs: bool = False,
    max_tokens: int | None = None,
) -> TraceWriter:
    """Writes the trace of `rows`; one batch is in memory at a time. Use under `jax.set_mesh(mesh)`.

    Args:
      path: of the file, which appears whole at the end.
      info: what the trace says of itself.
      model, variables: what routes.
      rows: all of one shape.
      mesh: of the variables.
      keep_probs: store the router's probabilities of every token.
      max_tokens: stop after the batch that reaches so many, None for no limit.

    Returns:
      the closed writer, for its totals.

    Raises:
      UserError: the file cannot be written, there is no text, or the routing is not finite.
    """
    routing = _compiled(model, mesh)
    with TraceWriter(path, info) as writer:
        for part in rows:
            found = jax.device_get(routing(variables, layout.global_batch(_batch(part), mesh)))
            try:
                batch = batch_of_rows(
                    info,
                    part.tokens,
                    part.segment_ids,
                    documents=part.documents,
                    sources=part.sources,
                    keep_probs=keep_probs,
                    **found,
                )
            except ValueError as error:
                raise UserError(f"this model cannot be traced: {error}") from error
            writer.add(batch)
            if max_tokens is not None and writer.num_tokens >= max_tokens:
                break
        if not writer.num_tokens:
            raise UserError("there is no text to trace: name files with --text")
    return writer


def choices_per_token(model: Transformer) -> int:
    """K of the model's routers, from shapes alone."""
    variables = jax.eval_shape(model.init, jax.random.key(0))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    stats = jax.eval_shape(lambda v, t: model.apply(v, t, record=True).stats, variables, token)
    name, _ = next(iter(model.moe_layers.values()))
    return stats[name]["trace"]["experts"].shape[-1]


def held_out_rows(data: Loaders) -> Iterator[TextRows]:
    """The evaluation rows of a run. Every piece of a document is a document of its own."""
    count = 0
    for batch in data.eval:
        segment_ids = np.asarray(batch.segment_ids)
        starts = sequence_starts(segment_ids)
        size, sources = len(starts), np.zeros(len(starts), np.int32)
        if batch.sources is not None:
            sources = np.asarray(batch.sources)[segment_ids > 0][starts]
        yield TextRows(
            tokens=np.asarray(batch.tokens),
            segment_ids=segment_ids,
            positions=np.asarray(batch.positions),
            documents=np.arange(count, count + size, dtype=np.int32),
            sources=sources,
        )
        count += size


@functools.lru_cache(maxsize=2)
def _compiled(model: Transformer, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """(variables, batch) -> the routing of all MoE layers in order, `[L, T, ...]`."""

    def routing(variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        out = model.apply(
            variables,
            batch.tokens,
            segment_ids=batch.segment_ids,
            positions=batch.positions,
            record=True,
        )
        traces = [layer_trace(model, out.stats, layer) for layer in model.moe_layers]
        return {field: jnp.stack([own[field] for own in traces]) for field in _FIELDS}

    return jax.jit(
        routing,
        out_shardings=layout.replicated(mesh),
        compiler_options=compat.compiler_options(),
    )


def _batch(rows: TextRows) -> Batch:
    """For a forward pass: the targets are not looked at."""
    return Batch(
        tokens=rows.tokens,
        targets=rows.tokens,
        loss_mask=rows.segment_ids > 0,
        segment_ids=rows.segment_ids,
        positions=rows.positions,
    )

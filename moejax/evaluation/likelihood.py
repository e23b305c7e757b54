"""Log-likelihoods of targets given contexts, for many requests, with few compilations."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int

from moejax.errors import UserError
from moejax.kernels import compat
from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.parallel.sharding import RULES
from moejax.train import layout
from moejax.types import Batch

_SHORTEST = 32  # no batch has shorter rows; longer ones have a power of two


@dataclasses.dataclass(frozen=True)
class Request:
    """Token ids: the target is scored, given the context; both hold at least one."""

    context: Int[ArrayLike, " n"]
    target: Int[ArrayLike, " m"]


@dataclasses.dataclass(frozen=True)
class Score:
    """log_prob: of the whole target, in nats. greedy: whether each of its tokens is the likeliest.

    `num_cut` context tokens were left out on the left, because the model sees only so many.
    """

    log_prob: float
    greedy: bool
    num_cut: int


class Scorer:
    """Scores requests on the mesh on which the variables lie.

    A row of a batch holds one request. Rows are as long as a power of two (or `max_length`), so
    at most log2(max_length) programs are compiled.

    Args:
      model, variables, mesh: as opened; any number of devices.
      max_length: of the model's input. A longer request loses the beginning of its context.
      batch_tokens: positions of a batch; the logits of all are in memory at once.
    """

    def __init__(
        self,
        model: Transformer,
        variables: Variables,
        mesh: jax.sharding.Mesh,
        *,
        max_length: int,
        batch_tokens: int = 4096,
    ):
        longest = model.max_length
        if max_length < 1 or (longest is not None and max_length > longest):
            raise UserError(
                f"a length of {max_length} tokens is not between 1 and what the model accepts"
                f"{'' if longest is None else f', {longest}'}: choose another"
            )
        self.max_length, self._batch_tokens = max_length, batch_tokens
        self._variables, self._mesh = variables, mesh
        self._rows_step = math.prod(mesh.shape[axis] for axis in RULES["batch"])
        self._length_step = math.prod(mesh.shape[axis] for axis in RULES["sequence"])
        self._step = jax.jit(
            functools.partial(_log_probs, model),
            out_shardings=layout.replicated(mesh),
            compiler_options=compat.compiler_options(),
        )

    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        """One score per request, in their order.

        Raises UserError for a target that is longer than `max_length`, an empty part, or a
        probability that is NaN: compared with others it would pass for an answer.
        """
        rows = [self._row(request) for request in requests]
        by_length: dict[int, list[int]] = {}
        for number, (tokens, _) in enumerate(rows):
            by_length.setdefault(self._length(len(tokens) - 1), []).append(number)
        scores: dict[int, Score] = {}
        for length in sorted(by_length, reverse=True):  # what may not fit in memory comes first
            numbers = by_length[length]
            count = self._num_rows(length)
            for start in range(0, len(numbers), count):
                some = numbers[start : start + count]
                found = self._score([rows[n] for n in some], count, length)
                for n, (log_prob, greedy) in zip(some, found, strict=True):
                    full = len(requests[n].context) + len(requests[n].target)
                    scores[n] = Score(log_prob, greedy, num_cut=full - len(rows[n][0]))
        return [scores[n] for n in range(len(rows))]

    def _row(self, request: Request) -> tuple[np.ndarray, int]:
        """(ids of context and target that the model sees, how many of them are the target)."""
        context, target = (np.asarray(x, np.int32) for x in (request.context, request.target))
        if not (len(context) and len(target)):
            raise UserError("a request needs at least one token of context and one to score")
        if len(target) > self.max_length:
            raise UserError(
                f"{len(target)} tokens are to be scored at once and the model sees "
                f"{self.max_length}: raise the length, or score shorter texts"
            )
        return np.concatenate([context, target])[-(self.max_length + 1) :], len(target)

    def _length(self, num_inputs: int) -> int:
        """Of the rows that hold so many inputs."""
        power = max(_SHORTEST, 1 << (num_inputs - 1).bit_length())
        return -(-min(power, self.max_length) // self._length_step) * self._length_step

    def _num_rows(self, length: int) -> int:
        """Of a batch: as many as `batch_tokens` allow, in a multiple that the mesh can split.

        However few are used: the same program serves every call.
        """
        wanted = max(1, self._batch_tokens // length)
        return -(-wanted // self._rows_step) * self._rows_step

    def _score(
        self, rows: Sequence[tuple[np.ndarray, int]], count: int, length: int
    ) -> list[tuple[float, bool]]:
        batch = _batch(rows, count, length)
        with jax.set_mesh(self._mesh):
            found = self._step(self._variables, layout.global_batch(batch, self._mesh))
        log_probs, greedy = jax.device_get(found)
        if np.isnan(log_probs[batch.loss_mask]).any():
            raise UserError(
                "the model gives a token the probability NaN: look for NaN in the weights, or "
                "compute in another model.dtype"
            )
        # Added on the host in float64: a long target's sum would lose digits in float32.
        return [
            (float(p[m].sum(dtype=np.float64)), bool(g[m].all()))
            for p, g, m, _ in zip(log_probs, greedy, batch.loss_mask, rows, strict=False)
        ]


def _batch(rows: Sequence[tuple[np.ndarray, int]], count: int, length: int) -> Batch:
    """Row b holds request b from position 0 on; the rest, and whole rows at the end, is padding."""
    shape = (count, length)
    tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
    mask = np.zeros(shape, bool)
    for b, (ids, num_targets) in enumerate(rows):
        end = len(ids) - 1
        tokens[b, :end], targets[b, :end], segments[b, :end] = ids[:-1], ids[1:], 1
        mask[b, end - num_targets : end] = True
    positions = np.arange(length, dtype=np.int32) * segments
    return Batch(
        tokens=tokens, targets=targets, loss_mask=mask, segment_ids=segments, positions=positions
    )


def _log_probs(model: Transformer, variables: Variables, batch: Batch) -> tuple[Array, Array]:
    """(log-probability of every target [B, S], whether it is the likeliest [B, S])."""
    logits = model.apply(
        variables, batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions
    ).logits
    found = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    return found - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == batch.targets

"""Held-out loss and bits per byte, over every held-out token exactly once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.data.pipeline import Loaders
from moejax.kernels import compat
from moejax.models.transformer import Transformer
from moejax.objectives.objective import Objective
from moejax.train import layout, phases
from moejax.train.metrics import means


class Evaluator:
    """Runs the held-out batches on a mesh; the step is compiled once."""

    def __init__(
        self, model: Transformer, objective: Objective, data: Loaders, mesh: jax.sharding.Mesh
    ):
        token_bytes = jnp.asarray(data.tokenizer.token_bytes())

        def eval_step(variables: Any, batch: Any, step: Any):
            result = objective(model, variables, batch, token_bytes=token_bytes, step=step)
            return result.terms, result.measures

        self._step = jax.jit(
            eval_step,
            out_shardings=layout.replicated(mesh),
            compiler_options=compat.compiler_options(),
        )
        self._data, self._mesh = data, mesh

    def run(self, variables: Any, step: int) -> dict[str, float]:
        """{"eval/loss": nats per token, "eval/bits_per_byte": ..., other terms by name}.

        `step` is that of training from which the variables are, for layers that switch at one.
        """
        return self.run_until(lambda: None, variables, step)

    @phases.phase("evaluate")
    def run_until(
        self, stop: Callable[[], str | None], variables: Any, step: int
    ) -> dict[str, float] | None:
        """`run`, or None where `stop`, which is asked between two batches, named a reason."""
        total = None
        for batch in self._data.eval:
            if total is not None and stop():
                return None
            sums = self._step(variables, layout.global_batch(batch, self._mesh), np.int32(step))
            phases.enter("evaluate")  # news for the watchdog
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
        terms, measures = jax.device_get(total)
        # Of the text, as compressors count it: a tokenizer need not keep every byte of it.
        bits, _ = measures["bits_per_byte"]
        measures = measures | {"bits_per_byte": (bits, self._data.held_out_bytes)}
        values = means(terms, prefix="eval/") | means(measures, prefix="eval/")
        values["eval/loss"] = values.pop("eval/lm")
        return values

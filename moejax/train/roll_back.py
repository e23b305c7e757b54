"""Back to the parameters from before a run of refused steps; the data go on."""

from __future__ import annotations

import logging

import jax

from moejax.errors import UserError
from moejax.train import layout
from moejax.train.checkpoint import Checkpointer
from moejax.train.state import TrainState, changing, with_leaves

_log = logging.getLogger(__name__)

# Not rolled back: the position in the data, and how many steps were refused so far.
_KEPT = ("step", "guard/num_nonfinite", "guard/num_spikes")


class RollBack:
    """Restores the newest checkpoint that validates from before `limit + 1` refusals in a row.

    Never the same one twice, for the run would come to the same refusals again.
    """

    def __init__(self, checkpointer: Checkpointer, *, limit: int):
        self._checkpointer, self._limit = checkpointer, limit
        self._to: int | None = None  # the step of the last one

    def __call__(self, state: TrainState, done: int) -> tuple[TrainState, str]:
        """The state to go on with after the refusal of step `done`, and what happened, in words.

        Raises UserError where no checkpoint is left to go back to.
        """
        refused = f"{self._limit + 1} steps up to step {done} were refused"
        advice = "lower optimizer.schedule.peak, or look at the data of these steps"
        first = done - self._limit  # the step that was refused first
        self._checkpointer.wait()
        if not any(step < first for step in self._checkpointer.steps()):
            raise UserError(f"{refused}, and no checkpoint is from before them: {advice}")
        try:
            leaves = changing(state)
            shardings = jax.tree.map(lambda x: x.sharding, leaves)
            wanted = layout.with_sharding(leaves, shardings)
            restored = self._checkpointer.restore(wanted, before=first)
        except UserError as error:
            raise UserError(f"{refused}, and {error}") from error
        if restored.step == self._to:
            raise UserError(f"{refused}, again after a roll-back: {advice}")
        self._to = restored.step
        data = int(state.step)  # behind `done` where a further step was on its way
        text = f"rolled back to the parameters of step {restored.step}; data go on at {data}"
        if self._checkpointer.problems:
            text += f"; corrupt and not used: {'; '.join(self._checkpointer.problems)}"
        _log.warning(text)
        return with_leaves(state, restored.state | {name: leaves[name] for name in _KEPT}), text

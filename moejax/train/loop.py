"""The training loop, top to bottom: prepare, restore, step, watch, save, evaluate, finish."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax

from moejax.analysis.health import RouterHealth
from moejax.data.pipeline import Loaders
from moejax.experiment import Experiment
from moejax.models.stack import stacked_layers
from moejax.models.transformer import Transformer
from moejax.models.variables import parameters
from moejax.parallel.canary import check_exchange
from moejax.train import finish, frozen, layout, phases, processes, sameness
from moejax.train.assemble import assemble
from moejax.train.checkpoint import Checkpointer
from moejax.train.description import describe
from moejax.train.evaluate import Evaluator
from moejax.train.init_from import CHECKPOINTS, LAYERS
from moejax.train.ledger import Ledger
from moejax.train.metrics import Accumulator
from moejax.train.pace import Pace
from moejax.train.progress import Progress, Silent
from moejax.train.records import Records, open_records
from moejax.train.restore import TOKENIZER, fingerprints_of, restore_or_init
from moejax.train.retention import Keep
from moejax.train.roll_back import RollBack
from moejax.train.run_step import Inspection, RunStep
from moejax.train.signals import AgreedStop
from moejax.train.state import TrainState, changing
from moejax.train.stop_signal import StopSignal
from moejax.train.writers import METRICS, recorded

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """How a run ended. `paused_by` says what ended it early (a signal, `--until`), or is None."""

    step: int
    paused_by: str | None
    results: dict[str, Any]


def train(
    experiment: Experiment,
    *,
    name: str,
    until: int | None = None,
    stop: StopSignal | None = None,
    inspection: Inspection = Inspection(),  # noqa: B008
) -> Finished:
    """Trains until `experiment.steps`, from the newest valid checkpoint in its workdir if any.

    `name` describes the run in its records; `until` pauses it after that step, and so does a
    signal, which `stop` hears where it is given, active; `inspection` says what else to write
    down. Raises UserError for everything the user can put right; what was saved before stays.
    `experiment.check()` finds most of it without the data: call it first.
    """
    mesh = experiment.mesh.build()
    _check_exchange(experiment, mesh)
    with jax.set_mesh(mesh), contextlib.nullcontext(stop) if stop else StopSignal() as heard:
        return _train(experiment, mesh, heard, inspection, name=name, until=until)


def _check_exchange(experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError where rows would not arrive, before this mesh is trusted with tokens."""
    transport = experiment.model.moe and experiment.model.moe.transport
    if hasattr(transport, "exchange") and mesh.shape["expert"] > 1:
        check_exchange(mesh, backend=transport.exchange)


def _train(
    experiment: Experiment,
    mesh: Any,
    stop: StopSignal,
    inspection: Inspection,
    *,
    name: str,
    until: int | None,
) -> Finished:
    workdir = Path(experiment.workdir)
    data = prepare_data(experiment)
    model = experiment.build_model(data.tokenizer.vocab_size)
    optimizer = _optimizer(experiment, model)
    token_bytes = data.tokenizer.token_bytes()
    assembled = assemble(experiment, model, optimizer, mesh, token_bytes=token_bytes)
    evaluator = Evaluator(model, experiment.objective, data, mesh)
    keep = Keep(last=experiment.keep_last, every=experiment.keep_every or None)

    with Checkpointer(str(workdir / CHECKPOINTS), keep) as checkpointer:
        checkpointer.start_writing()
        state, start = restore_or_init(experiment, model, assembled, checkpointer, data)
        # Only now: other data may come with another tokenizer, and the checkpoints keep theirs.
        processes.by_first(lambda: data.tokenizer.save(workdir / TOKENIZER))
        checkpointer.prepare(changing(state))
        agreed = AgreedStop(stop, mesh)
        with open_records(experiment, start) as records:
            run = _Run(
                experiment, model, data, mesh, checkpointer, records, agreed, name=name, start=start
            )
            with RunStep(assembled.train_step, inspection, workdir, start=start) as train_step:
                state = run.steps(train_step, state, evaluator, until=until)
            results = {}
            if run.paused_by is None:
                if count := frozen.check_unchanged(workdir, state.frozen):
                    _log.info("all %d frozen leaves are bit for bit as the run found them", count)
                results = finish.finish(
                    experiment, model, data, state.variables, evaluator, records
                )
            run.ledger.update(int(state.step), ended=run.paused_by or "finished")
    return Finished(step=int(state.step), paused_by=run.paused_by, results=results)


@phases.phase("prepare")
def prepare_data(experiment: Experiment) -> Loaders:
    """The experiment's data, the same in every process: the first fills the cache for the others.

    Raises UserError where the processes found different data.
    """
    data = processes.first_then_others(experiment.prepare_data)
    sameness.check_same("the data", str(fingerprints_of(data)))
    return data


def _optimizer(experiment: Experiment, model: Transformer):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return experiment.build_optimizer(parameters(shapes))


class _Run:
    """The steps and what surrounds them. Metrics are read one step late: the device never waits."""

    def __init__(
        self,
        experiment: Experiment,
        model: Transformer,
        data: Loaders,
        mesh: jax.sharding.Mesh,
        checkpointer: Checkpointer,
        records: Records,
        stop: AgreedStop,
        *,
        name: str,
        start: int,
    ):
        self._experiment, self._data, self._mesh, self._stop = experiment, data, mesh, stop
        self._checkpointer, self._records = checkpointer, records
        self._roll_back = RollBack(checkpointer, limit=experiment.guard.max_consecutive_skips)
        self._learning_rate = experiment.optimizer.schedule.build(experiment.steps)
        self._start, self._saved, self._abandoned = start, start, 0
        self._layers = {LAYERS: stacked_layers(model.segments)}
        self._pace, self.ledger = Pace(), Ledger(Path(experiment.workdir), start)
        self.paused_by: str | None = None

        description = describe(experiment, model) | {"name": name}
        tokens_per_step = description["tokens_per_step"]
        self._records.write("run", start, description)
        if start:
            self._records.write("event", start, {"event": "resumed"})
        self._accumulator = Accumulator(
            model,
            experiment.size(model),
            weights=experiment.objective.weights(model),
            tokens_per_step=tokens_per_step,
            peak_flops=description["peak_flops"],
        )
        self._health = RouterHealth(
            moe_layers=description["moe_layers"],
            k=description["k"] or 1,
            choices_per_step=tokens_per_step * (description["k"] or 1),
        )

    def steps(self, train_step, state: TrainState, evaluator: Evaluator, *, until: int | None):
        """Runs every step that is left, or until a signal or `until` pauses the run."""
        experiment, done = self._experiment, self._start
        if until is not None and until <= done < experiment.steps:  # an earlier session came so far
            self.paused_by = f"--until {until}"
            return state
        if done < experiment.steps and self._evaluation_due(done) and not self._evaluated(done):
            self._evaluate(done, state, evaluator)  # a signal cut it short, or it is the first
        with (
            _progress(experiment.steps, self._start) as progress,
            self._data.train.iterate(self._start) as batches,
        ):
            pending = None
            for step in range(self._start, experiment.steps):
                with phases.phase("data", step):
                    batch = layout.global_batch(next(batches), self._mesh)
                state, metrics = train_step(state, batch)
                if step == self._start:
                    self._stop.hold()
                if pending is not None:
                    state = self._read(pending, state, step, progress)
                pending, done = metrics, step + 1
                self._checkpointer.check_error()
                if done == experiment.steps:
                    break
                evaluate, save = self._evaluation_due(done), _due(done, experiment.checkpoint_every)
                if evaluate or save:  # after the step's record, which a resumed run does not write
                    state, pending = self._read(pending, state, done, progress), None
                if evaluate:
                    self._evaluate(done, state, evaluator)
                if save:
                    self._save(done, state)
                with phases.waiting():
                    received = self._stop.poll()
                if received or done == until:
                    self.paused_by = received or f"--until {until}"
                    break
            if pending is not None:
                state = self._read(pending, state, done, progress)
            self._save(done, state)
            with phases.phase("save"):
                self._checkpointer.wait()
        if self.paused_by is None:
            self._stop.release()
        return state

    def _evaluation_due(self, done: int) -> bool:
        if done == 0:  # to see what training gains
            return self._experiment.init_from is not None
        return _due(done, self._experiment.eval_every)

    def _evaluated(self, done: int) -> bool:
        """Whether an earlier session has recorded the evaluation of this step."""
        here = recorded(Path(self._experiment.workdir) / METRICS, "eval", done)
        return bool(processes.from_first([here])[0])

    def _evaluate(self, done: int, state: TrainState, evaluator: Evaluator) -> None:
        """Records the held-out figures; a signal ends it at a batch, without a record."""
        values = evaluator.run_until(self._stop.poll, state.variables, done)
        if values is not None:
            self._records.write("eval", done, values)

    def _read(
        self, metrics: Any, state: TrainState, done: int, progress: Progress | Silent
    ) -> TrainState:
        """Handles the metrics of the step that ended at `done`; may roll the state back."""
        with phases.waiting():
            metrics = jax.device_get(metrics)
        phases.enter("step", done)
        if not metrics["accepted"]:
            norms = f"gradient norm {metrics['grad_norm']}, update norm {metrics['update_norm']}"
            progress.message(f"step {done} was refused: loss {metrics['loss']}, {norms}")
        self._accumulator.add(metrics)
        progress.update(
            done, loss=metrics["loss"], tokens_per_second=self._accumulator.tokens_per_second
        )
        if _due(done, self._experiment.log_every) or done == self._experiment.steps:
            values = self._accumulator.take()
            num_updates = int(metrics["num_updates"])  # of these parameters, also after a roll-back
            values["learning_rate"] = float(self._learning_rate(max(num_updates - 1, 0)))
            values |= self._pace.take(done)
            self._records.write("train", done, values)
            self.ledger.update(done)
            for text in (*self._health.update(done, values), *self._pace.warnings()):
                progress.message(f"warning: {text}")
                self._records.write("event", done, {"event": "warning", "text": text})
        # A step that was on its way at a roll-back still was one of the abandoned parameters.
        if metrics["exhausted"] and done > self._abandoned:
            self._abandoned = int(state.step)
            with phases.phase("restore"):
                state, text = self._roll_back(state, done)
            self._records.write("event", done, {"event": "rollback", "text": text})
        return state

    @phases.phase("save")
    def _save(self, step: int, state: TrainState) -> None:
        if step != self._saved:
            extra = {"data_position": step} | fingerprints_of(self._data) | self._layers
            self._checkpointer.save(step, changing(state), extra)
            self._saved = step


def _progress(steps: int, start: int) -> Progress | Silent:
    return Progress(steps, initial=start) if processes.is_first() else Silent()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

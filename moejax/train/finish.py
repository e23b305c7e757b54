"""The end of a run: held-out figures beside general-purpose compressors, samples, the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.data.pipeline import Loaders
from moejax.experiment import Experiment
from moejax.models.generate import generate
from moejax.models.transformer import Transformer
from moejax.train import phases, processes
from moejax.train.evaluate import Evaluator
from moejax.train.records import Records


@phases.phase("evaluate")
def finish(
    experiment: Experiment,
    model: Transformer,
    data: Loaders,
    variables: Any,
    evaluator: Evaluator,
    records: Records,
) -> dict[str, Any]:
    """Evaluates, samples and writes the run's last record, which it returns."""
    results: dict[str, Any] = evaluator.run(variables, experiment.steps)
    records.write("eval", experiment.steps, results)
    if experiment.prompts:  # before the baselines, which the first process computes alone
        results["sample"] = "\n\n".join(_continuations(experiment, model, data, variables))
    baselines = processes.by_first(data.compression_baselines) or {}
    results |= {f"{name.split()[0]}_bits_per_byte": value for name, value in baselines.items()}
    records.write("event", experiment.steps, {"event": "finished"} | results)
    return results


def _continuations(experiment, model, data, variables) -> list[str]:
    return continue_texts(
        model.at_step(experiment.steps),
        variables,
        data.tokenizer,
        experiment.prompts,
        experiment.sampling,
        seed=experiment.seed,
    )


def continue_texts(
    model,
    variables,
    tokenizer,
    prompts,
    sampling,
    *,
    seed: int,
    beginning: Sequence[int] | None = None,
) -> list[str]:
    """Each prompt followed by its continuation. A prompt starts a new document.

    `beginning` are the ids in front of it: the end token where None, as in training here.
    """
    first = [tokenizer.eos_id] if beginning is None else list(beginning)
    ids = [np.concatenate([first, tokenizer.encode(text)]).astype(np.int32) for text in prompts]
    new = generate(model, variables, ids, sampling, seed=seed, stop_id=tokenizer.eos_id)
    return [text + tokenizer.decode(n) for text, n in zip(prompts, new, strict=True)]

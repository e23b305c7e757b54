"""What a run's first record says about it."""

from __future__ import annotations

import logging
from typing import Any

import jax

from moejax.experiment import Experiment
from moejax.models.transformer import Transformer
from moejax.models.variables import parameters
from moejax.optim import freeze
from moejax.train.manifest import versions
from moejax.train.peak import peak_flops

_log = logging.getLogger(__name__)


def describe(experiment: Experiment, model: Transformer) -> dict[str, Any]:
    """The run's size, what of it trains, and its machine. Logs what is frozen, if anything is."""
    counted = experiment.size(model)
    return {
        "num_params": counted.params,
        "num_active_params": counted.active_params,
        "train_flops_per_token": counted.train_flops_per_token,
        "moe_layers": list(model.moe_layers),
        "num_experts": model.moe.num_experts if model.moe else 0,
        "k": getattr(model.moe.router, "k", None) if model.moe else None,
        "tokens_per_step": experiment.batch_size * experiment.sequence_length,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "peak_flops": peak_flops(),
        "trainable": str(_freeze_report(experiment, model)),
    }


def _freeze_report(experiment: Experiment, model: Transformer) -> freeze.FreezeReport:
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    chosen = experiment.chosen_experts(model)
    report = freeze.report(parameters(shapes), experiment.trainable, chosen)
    if report.num_frozen:
        _log.info("%s", report)
    return report

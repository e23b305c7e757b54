"""The model of `init_from`: completes a config that leaves its own out, or compares the two.

So `moejax train configs/router_tuning.py init_from=OLMoE-1B-7B-0924 model.boundaries=[11]` tunes
that model, and overrides reach inside it.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import fiddle as fdl

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.errors import UserError
from moejax.experiment import Experiment

_log = logging.getLogger(__name__)


def complete(config: fdl.Config, overrides: Sequence[str], *, trusted: bool) -> fdl.Config:
    """`config` with a model; any other than an `Experiment` without one is returned as it is.

    Args:
      config: from a file or a run.
      overrides: of the command line; only `init_from=` is looked at.
      trusted: let the config.json of a run name any code.

    Raises:
      UserError: there is no folder to take the model from, or it describes none.
    """
    if fdl.get_callable(config) is not Experiment or "model" in fdl.ordered_arguments(config):
        return config
    config = apply_overrides(config, [text for text in overrides if text.startswith("init_from=")])
    folder = getattr(config, "init_from", None)
    if folder is None:
        raise UserError("this config takes its model from a folder: give init_from=FOLDER")
    model, tokenizer, adapter = _described(pathlib.Path(folder), trusted=trusted)
    config.model = model
    if adapter is not None and "adapter" not in fdl.ordered_arguments(config):
        config.adapter = adapter
    if "tokenizer" not in fdl.ordered_arguments(config.data):
        config.data.tokenizer = tokenizer
    return config


def compare_with_source(experiment: Experiment, *, trusted: bool) -> None:
    """Logs where the model of `experiment` computes something else than that of its `init_from`.

    Shapes do not tell of an angle of RoPE, an epsilon or a window. Of a Hugging Face checkpoint,
    whoever reads it says so.

    Raises UserError where an adapter that both have is another: with another scale its factors
    would not be what was learnt.
    """
    from moejax.interop import hf
    from moejax.interop.same_model import differences

    folder = pathlib.Path(experiment.init_from or "")
    if experiment.init_from is None or hf.is_checkpoint(folder):
        return
    try:
        model, _, adapter = _described(folder, trusted=trusted)
        theirs, their_adapter = build_config(model), adapter and build_config(adapter)
    except UserError as error:
        _log.warning("whether the model is that of %s cannot be told: %s", folder, error)
        return
    for text in differences(experiment.model, theirs):
        _log.warning("%s holds another model: here %s", folder, text)
    if experiment.adapter is None or their_adapter is None:
        return  # of what one of them lacks the paths tell
    for part in ("linear", "experts", "mlp"):
        ours = getattr(experiment.adapter, part)
        if found := differences(ours, getattr(their_adapter, part), f"adapter.{part}"):
            raise UserError(f"{folder} holds another adapter: here {found[0]}")


def _described(
    folder: pathlib.Path, *, trusted: bool
) -> tuple[fdl.Config, fdl.Config, fdl.Config | None]:
    """(model without its vocabulary size, tokenizer with it, the adapter if there is one).

    A run's model is as the run trained it; of a published one, what trains is in float32.
    """
    # Imported here: most configs have a model, and a start should not wait for what reads others'.
    from moejax.data.subword import HFTokenizer
    from moejax.interop import hf
    from moejax.train.restore import TOKENIZER

    is_run, adapter = False, None
    if hf.is_checkpoint(folder):
        model = hf.model_config(folder)
        tokenizer: Any = fdl.Config(HFTokenizer, path=str(folder), vocab_size=model.vocab_size)
    else:
        found = load_config(folder, trusted=trusted)
        is_run = fdl.get_callable(found) is Experiment
        model = found.model if is_run else found
        adapter = found.adapter  # of a run or of an import
        if not is_run and adapter is not None:
            model.adapter = None  # it lies in one place, the experiment
        tokenizer = fdl.Config(HFTokenizer, path=str(folder / TOKENIZER))
    if not is_run:
        # config.json says how weights are stored. What trains needs more, because bfloat16 would
        # round small updates off; what is frozen stays in the dtype in which it is stored.
        model.param_dtype = "float32"
    model.vocab_size = None
    return model, tokenizer, adapter

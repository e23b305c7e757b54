"""The values of a config.json, under the names of both generations of transformers."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from moejax.errors import UserError
from moejax.interop.tensor_files import read_json

REQUIRED = object()

# Names of one value in different generations and architectures; a file has any of them.
_SYNONYMS = (
    ("num_experts", "num_local_experts", "n_routed_experts"),
    ("num_experts_per_tok", "experts_per_token"),
    ("dtype", "torch_dtype"),
)


def _names(key: str) -> tuple[str, ...]:
    return next((names for names in _SYNONYMS if key in names), (key,))


class ConfigJson:
    """A config.json that remembers what was asked of it, so that the rest can be reported."""

    def __init__(self, path: pathlib.Path, values: dict[str, Any] | None = None):
        self.path = path
        self.values = read_json(path) if values is None else values
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        """The value of `key` or of a synonym; `default`, called with this object if it can be.

        A JSON null counts as absent. Raises UserError where a required value is absent.
        """
        names = _names(key)
        self.asked.update(names)
        found = {name: self.values[name] for name in names if self.values.get(name) is not None}
        if not found:
            if default is REQUIRED:
                raise UserError(f"{self.path} lacks {' or '.join(names)}")
            return default(self) if isinstance(default, Callable) else default
        if len({repr(value) for value in found.values()}) > 1:
            stated = " and ".join(f"{name}={value!r}" for name, value in found.items())
            raise UserError(f"{self.path} contradicts itself: {stated}")
        return next(iter(found.values()))

    def refuse(self, text: str) -> UserError:
        """An error about this file."""
        return UserError(f"{self.path}: {text}")

    def unread(self) -> list[str]:
        """Keys that nothing asked for and that are not known to leave the logits alone."""
        return sorted(
            key
            for key, value in self.values.items()
            if key not in self.asked | _NO_EFFECT and value not in (None, [], {})
            # A switch that is off may be one that is on by default.
            if value or key not in _USUALLY_OFF
        )


# About training, generation, parallel layouts, files or the library itself.
_NO_EFFECT = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "aux_loss_alpha",
    "bos_token_id",
    "chunk_size_feed_forward",
    "eos_token_id",
    "ep_size",
    "id2label",
    "initial_context_length",
    "initializer_range",
    "input_jitter_noise",
    "keys_to_ignore_at_inference",
    "label2id",
    "max_window_layers",
    "model_type",
    "moe_implementation",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "seq_aux",
    "transformers_version",
    "use_cache",
}

# What files may state as false or 0, and these models lack anyway.
_USUALLY_OFF = {
    "add_cross_attention",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "hidden_dropout",
    "is_decoder",
    "is_encoder_decoder",
    "min_length",
    "no_repeat_ngram_size",
    "output_scores",
    "remove_invalid_values",
    "resid_pdrop",
    "return_dict_in_generate",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "torchscript",
    "use_bfloat16",
}

"""The logits of a checkpoint as moejax computes them, beside those of transformers.

For a user's own folder: the proof that its names, its config.json and our arithmetic were
understood. Needs the extra `hf`.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.errors import UserError
from moejax.layers.rope import LongRopeScaling
from moejax.models.output import Variables
from moejax.models.transformer import Transformer

# Positions of each row that are real; the rest is padding. The longest reaches beyond the windows
# of gpt-oss (128), the last is mostly padding.
_LENGTHS = (160, 160, 90, 7)
# Of the logits' standard deviation, at every position. Float32 gives 1e-5 in small models; one
# wrong tensor gives tenths and more.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far two sets of logits `[N, V]` are apart.

    Attributes:
      num_positions: N.
      num_apart: positions at which a logit differs by more than `TOLERANCE` times `spread`, or is
        no number.
      max_difference: of any logit.
      spread: standard deviation of the logits of transformers.
      same_argmax: share of positions at which both find the same token likeliest.
    """

    num_positions: int
    num_apart: int
    max_difference: float
    spread: float
    same_argmax: float

    @property
    def agrees(self) -> bool:
        """Whether no position is apart; logits that are all alike prove nothing."""
        return self.num_apart == 0 and self.spread > 0

    def __str__(self) -> str:
        lines = [
            f"  positions compared    {self.num_positions}",
            f"  maximum difference    {self.max_difference:.2e}",
            f"  spread of the logits  {self.spread:.2e}",
            f"  same likeliest token  {100 * self.same_argmax:.1f}%",
        ]
        if self.agrees:
            return "\n".join([*lines, "verdict: the logits agree"])
        apart = f"{self.num_apart} of {self.num_positions} positions differ by more than"
        verdict = f"verdict: the logits DISAGREE, {apart} {TOLERANCE:g} of the spread"
        if self.num_apart <= self.num_positions // 20:
            verdict += (
                "\nSo few may come from two experts of nearly the same score, of which float32 "
                "rounding chose another, or from a rarely chosen expert that was read wrongly."
            )
        return "\n".join([*lines, verdict])


def require_transformers(*others: str) -> None:
    """Raises UserError where torch, transformers or one of `others` cannot be imported."""
    for name in ("torch", "transformers", *others):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"comparing with transformers needs {name}, which cannot be imported ({error}): "
                "pip install 'moejax[hf]', or leave --check out"
            ) from error


def rows(model: Transformer) -> tuple[Int[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
    """(token ids, which are real): four rows, the same every time, two of them padded.

    None is longer than the model may read, or than the short factors of LongRoPE reach: behind
    them transformers 5 keeps the short factors and changes the amplitude alone.
    """
    scaling = getattr(getattr(model.block.attention, "rope", None), "scaling", None)
    short = scaling.original_context if isinstance(scaling, LongRopeScaling) else None
    longest = min(n for n in (max(_LENGTHS), model.max_length, short) if n is not None)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (len(_LENGTHS), longest))
    mask = np.arange(longest) < np.array(_LENGTHS)[:, None]
    return tokens.astype(np.int32), mask


def our_logits(
    model: Transformer,
    variables: Variables,
    tokens: Int[np.ndarray, "B S"],
    mask: Bool[np.ndarray, "B S"],
) -> Float[np.ndarray, "N V"]:
    """At the real positions, in float32 whatever the weights are stored in."""
    model = dataclasses.replace(model, dtype="float32", param_dtype="float32")

    @jax.jit
    def run(variables: Variables) -> jax.Array:
        segments = jnp.asarray(mask, jnp.int32)
        return model.apply(variables, jnp.asarray(tokens), segment_ids=segments).logits

    with jax.default_matmul_precision("highest"):
        return np.asarray(run(variables))[mask]


def their_logits(
    directory: str | os.PathLike[str],
    tokens: Int[np.ndarray, "B S"],
    mask: Bool[np.ndarray, "B S"],
    *,
    adapter: str | os.PathLike[str] | None = None,
) -> Float[np.ndarray, "N V"]:
    """The same from transformers, which reads the folder on its own and downloads nothing.

    With `adapter`, a folder of PEFT, PEFT reads that one.
    """
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        os.fspath(directory),
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        use_safetensors=True,
    )
    if adapter is not None:
        peft: Any = importlib.import_module("peft")
        model = peft.PeftModel.from_pretrained(model, os.fspath(adapter))
    with torch.no_grad():
        logits = (
            model.float()
            .eval()(torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask))
            .logits
        )
    return logits.numpy()[mask]


def compare(ours: Float[np.ndarray, "N V"], theirs: Float[np.ndarray, "N V"]) -> Comparison:
    """`ours` against `theirs`, position by position."""
    difference = np.abs(ours - theirs).max(axis=-1)
    spread = float(np.std(theirs))
    return Comparison(
        num_positions=len(theirs),
        num_apart=int((~(difference <= TOLERANCE * spread)).sum()),  # NaN is apart
        max_difference=float(np.max(difference)),
        spread=spread,
        same_argmax=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    )

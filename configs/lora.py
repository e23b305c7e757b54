"""Tunes a trained model with LoRA on another kind of text; the model itself is frozen.

Command   moejax train configs/tiny.py
          moejax train configs/lora.py
          of a published model:
          moejax import-hf OLMoE-1B-7B-0924 runs/olmoe
          moejax train configs/lora.py init_from=runs/olmoe workdir=runs/olmoe_lora
Cost      four minutes on two CPU cores for the tiny model
Result    3.298 to 2.832 bits per byte on held-out package descriptions (jax 0.10.2)
Numbers   rank 16 on the projections of attention and rank 4 on every routed expert, with alpha
          twice the rank, are ours; the rest is configs/router_tuning.py, whose text and steps
          these are.
"""

import fiddle as fdl

from configs import router_tuning
from moejax.adapters.lora import LoRA
from moejax.experiment import Experiment
from moejax.experts.lora_glu import LoRAGLU
from moejax.models.adapter import Adapter


def config() -> fdl.Config[Experiment]:
    """The model of `init_from`, adapted."""
    return _adapted(router_tuning.config.as_buildable(), "runs/lora")


def smoke() -> fdl.Config[Experiment]:
    """A small random model instead of a trained one: for tests."""
    return _adapted(router_tuning.smoke(), "runs/lora_smoke")


def _adapted(tuned: fdl.Config[Experiment], workdir: str) -> fdl.Config[Experiment]:
    tuned.adapter = fdl.Config(
        Adapter,
        targets="all-linear",
        linear=fdl.Config(LoRA, rank=16, alpha=32.0),
        experts=fdl.Config(LoRAGLU, rank=4, alpha=8.0),
    )
    tuned.trainable = ("lora/*",)
    tuned.workdir = workdir
    return tuned

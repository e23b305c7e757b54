"""Tunes a trained model with mixtures of LoRA on another kind of text; the model itself is frozen.

Command   moejax train configs/tiny.py
          moejax train configs/mixture_of_lora.py
          with another method:
          moejax train configs/mixture_of_lora.py:dynmole     (:comol, :remix)
          moejax train configs/mixture_of_lora.py:mixlora init_from=DENSE_MODEL
          docs/fine_tuning.md says what each of them is
Cost      three to four minutes each on two CPU cores for the tiny model, ReMix twice that
Result    3.298 to 2.855 bits per byte on held-out package descriptions (dynmole 2.846, comol 2.875,
          remix 2.890; one LoRA of configs/lora.py 2.832; jax 0.10.2). Of the two adapters per
          token, learned weights come to use 1.2 to 1.3 (effective support size), ReMix's 2.
Numbers   eight adapters of rank 8, two per token, are ours, small beside the tiny model's width;
          MixLoRA's and DynMoLE's loss weights are their papers'. Routed experts get plain LoRA. The
          rest is configs/lora.py.
"""

import fiddle as fdl

from configs import router_tuning
from moejax.adapters.comol import CoMoL, CoreBank
from moejax.adapters.dynmole import DynMoLE, EntropySwitch
from moejax.adapters.lora import LoRA
from moejax.adapters.mixed import MixedLinear
from moejax.adapters.remix import PlackettLuce, ReMix
from moejax.experiment import Experiment
from moejax.experts.dense import DenseGLU
from moejax.experts.lora_glu import LoRAGLU
from moejax.experts.mixlora import MixLoRA
from moejax.layers.mixing.bank import LoRABank
from moejax.layers.mixing.granularity import Token
from moejax.layers.mixing.router import TopK
from moejax.models.adapter import Adapter
from moejax.objectives.lm import NextToken
from moejax.objectives.remix import RLOO


def config() -> fdl.Config[Experiment]:
    """Two of eight adapters per token beside every projection of attention (MoLA's form)."""
    return _tuned(_mola(), "mixture_of_lora")


def dynmole() -> fdl.Config[Experiment]:
    """As many adapters as the router is undecided between."""
    return _tuned(_dynmole(), "dynmole")


def comol() -> fdl.Config[Experiment]:
    """Adapters that differ in a small core only."""
    return _tuned(_comol(), "comol")


def remix() -> fdl.Config[Experiment]:
    """Adapters of equal weight, drawn; each row is computed twice to learn from the difference."""
    return _with_draws(_tuned(_remix(), "remix"))


def mixlora() -> fdl.Config[Experiment]:
    """Mixtures of whole MLPs; for models with dense MLPs or shared experts."""
    return _tuned(fdl.Config(LoRA, rank=16, alpha=32.0), "mixlora", mlp=_mixlora())


def smoke() -> fdl.Config[Experiment]:
    """A small random model instead of a trained one: for tests."""
    return _small(_mola(), "mixture_of_lora")


def smoke_dynmole() -> fdl.Config[Experiment]:
    """The same with DynMoLE."""
    return _small(_dynmole(), "dynmole")


def smoke_comol() -> fdl.Config[Experiment]:
    """The same with CoMoL."""
    return _small(_comol(), "comol")


def smoke_remix() -> fdl.Config[Experiment]:
    """The same with ReMix."""
    return _with_draws(_small(_remix(), "remix"))


def smoke_mixlora() -> fdl.Config[Experiment]:
    """The same with MixLoRA: the first layer is dense, and the second has a shared expert."""
    small = _small(fdl.Config(LoRA, rank=2, alpha=4.0), "mixlora", mlp=_mixlora())
    small.model.first_k_dense = 1
    small.model.dense_ffn = fdl.Config(DenseGLU, d_ff=32)
    small.model.block.ffn.shared = fdl.Config(DenseGLU, d_ff=16)
    return small


def _bank(alpha: float = 16.0) -> fdl.Config:
    return fdl.Config(LoRABank, num_adapters=8, rank=8, alpha=alpha)


def _mola() -> fdl.Config:
    router = fdl.Config(TopK, granularity=fdl.Config(Token), k=2, balance_weight=1e-3)
    return fdl.Config(MixedLinear, router=router, bank=_bank())


def _dynmole() -> fdl.Config:
    return fdl.Config(DynMoLE, router=fdl.Config(EntropySwitch), bank=_bank())


def _comol() -> fdl.Config:
    bank = fdl.Config(CoreBank, num_adapters=8, rank=16, alpha=16.0)
    return fdl.Config(CoMoL, bank=bank)


def _remix() -> fdl.Config:
    return fdl.Config(ReMix, router=fdl.Config(PlackettLuce, k=2), bank=_bank(alpha=2.0))


def _mixlora() -> fdl.Config:
    router = fdl.Config(TopK, granularity=fdl.Config(Token), k=2, balance_weight=1e-3)
    return fdl.Config(MixLoRA, router=router, bank=_bank())


def _tuned(linear: fdl.Config, workdir: str, **others: fdl.Config) -> fdl.Config[Experiment]:
    return _adapted(router_tuning.config.as_buildable(), linear, workdir, others)


def _small(linear: fdl.Config, workdir: str, **others: fdl.Config) -> fdl.Config[Experiment]:
    return _adapted(router_tuning.smoke(), linear, f"{workdir}_smoke", others)


def _with_draws(tuned: fdl.Config[Experiment]) -> fdl.Config[Experiment]:
    tuned.objective = fdl.Config(RLOO, num_draws=2, next_token=fdl.Config(NextToken))
    return tuned


def _adapted(
    tuned: fdl.Config[Experiment],
    linear: fdl.Config,
    workdir: str,
    others: dict[str, fdl.Config],
) -> fdl.Config[Experiment]:
    experts = fdl.Config(LoRAGLU, rank=4, alpha=8.0)
    tuned.adapter = fdl.Config(
        Adapter, targets="all-linear", linear=linear, experts=experts, **others
    )
    tuned.trainable = ("lora/*",)
    tuned.workdir = f"runs/{workdir}"
    return tuned

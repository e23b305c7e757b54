"""Mixtures that MoE-PEFT cannot express are not written, and the error says why."""

import dataclasses
import re

import pytest

from moejax.adapters.comol import CoMoL
from moejax.adapters.lora import LoRA
from moejax.adapters.mixed import MixedLinear
from moejax.adapters.remix import ReMix
from moejax.errors import UserError
from moejax.experts.lora_glu import LoRAGLU
from moejax.experts.mixlora import MixLoRA
from moejax.interop import peft
from moejax.layers.mixing.bank import LoRABank, RsLoRABank
from moejax.layers.mixing.granularity import Sequence
from moejax.layers.mixing.router import Softmax, TopK
from moejax.models.adapter import Adapter
from tests.interop.mixtures import BANK, LLAMA, MIXLORA, MOLA
from tests.interop.peft_folders import adapted, factors
from tests.interop.tiny_checkpoints import MODELS


class _Doubled(LoRABank):
    """A bank that MoE-PEFT does not have."""

    @property
    def scale(self) -> float:
        """Twice the usual."""
        return 2 * super().scale


class _Sharper(TopK):
    """A router that MoE-PEFT does not have."""


def _mola(**changes):
    return dataclasses.replace(MOLA, linear=MixedLinear(**{"bank": BANK} | changes))


@pytest.mark.parametrize(
    "adapter, text",
    [
        (dataclasses.replace(MOLA, linear=CoMoL()), "no words for a CoMoL of moejax"),
        (dataclasses.replace(MOLA, linear=ReMix(bank=BANK)), "no words for a ReMix of moejax"),
        (_mola(bank=_Doubled(num_adapters=3)), "no words for a _Doubled of moejax"),
        (_mola(router=Softmax()), "no words for a Softmax of moejax, where it has TopK"),
        (_mola(router=TopK(granularity=Sequence())), "router.granularity is a Sequence"),
        (_mola(bank=BANK.clone(alpha=0.5)), "adapter.linear.bank.alpha=0.5, but MoE-PEFT takes wh"),
        (_mola(bank=RsLoRABank(alpha=0.0)), "lora_alpha=0 is not what belongs there"),
        (dataclasses.replace(MOLA, layers=(1,)), "layer 0 has no "),
        (dataclasses.replace(MOLA, targets=("layers.0.attention.query",)), "layer 1 has no self_a"),
        (
            Adapter(targets="all-linear", linear=MixedLinear(bank=BANK), mlp=MixLoRA(bank=BANK)),
            "adapter.linear is a MixedLinear beside a MixLoRA, where MoE-PEFT has plain LoRA",
        ),
        (
            dataclasses.replace(MIXLORA, mlp=MixLoRA(router=_Sharper(), bank=BANK)),
            "no words for a _Sharper",
        ),
        (
            dataclasses.replace(MIXLORA, linear=LoRA(alpha=1.5)),
            "adapter.linear.alpha=1.5, but MoE-PEFT takes whole numbers",
        ),
        (
            dataclasses.replace(MIXLORA, mlp=MixLoRA(router=TopK(balance_weight=-1.0), bank=BANK)),
            "router_aux_loss_coef=-1.0",
        ),
    ],
)
def test_a_mixture_that_moe_peft_cannot_express_is_not_written(adapter, text, tmp_path):
    model = adapted(LLAMA, adapter)
    with pytest.raises(UserError, match=re.escape(text)):
        peft.save(model, factors(model), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, adapter, text",
    [
        (
            "qwen2_moe",
            Adapter(targets=("shared.up",), linear=MixedLinear(bank=BANK)),
            "MoE-PEFT has no name for the adapter of ffn.shared.up",
        ),
        (
            "qwen2_moe",
            Adapter(targets=("shared.up",), mlp=MixLoRA(bank=BANK)),
            "MoE-PEFT has no name for the adapter of ffn.shared.up",
        ),
        (
            "olmoe",
            Adapter(
                targets=("q_proj", "experts.up"),
                linear=MixedLinear(bank=BANK),
                experts=LoRAGLU(rank=2),
            ),
            "MoE-PEFT has no name for the adapter of ffn.experts.up",
        ),
        (
            "deepseek_v3",
            Adapter(targets=("kv_down",), linear=MixedLinear(bank=BANK)),
            "MoE-PEFT has no name for the adapter of attention.kv_down",
        ),
        (
            "glm4_moe",
            Adapter(targets=("layers.0.ffn.up",), mlp=MixLoRA(bank=BANK)),
            "MoE-PEFT adapts the same modules in every layer",
        ),
    ],
)
def test_modules_that_moe_peft_does_not_have_are_not_written(name, adapter, text, tmp_path):
    model = adapted(MODELS[name], adapter)
    with pytest.raises(UserError, match=re.escape(text)):
        peft.save(model, factors(model), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())

"""A plain Llama, mixtures of adapters for it, and folders of MoE-PEFT written by hand."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from moejax.adapters.dynmole import DynMoLE, EntropySwitch
from moejax.adapters.lora import LoRA, RsLoRA
from moejax.adapters.mixed import MixedLinear
from moejax.attention.full import FullAttention
from moejax.experts.dense import DenseGLU
from moejax.experts.mixlora import MixLoRA
from moejax.interop import hf
from moejax.layers.mixing.bank import LoRABank, RsLoRABank
from moejax.layers.mixing.router import TopK
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import Rope
from moejax.models.adapter import Adapter
from moejax.models.block import Block
from moejax.models.transformer import Transformer
from tests.interop.numpy_llama import EPSILON, NUM_HEADS, NUM_KV_HEADS, THETA
from tests.interop.peft_folders import CONFIG, WEIGHTS
from tests.models.tiny_model import random_model_variables

D, F, LAYERS, E, R = 16, 12, 2, 3, 2
WIDTHS = {
    "self_attn.q_proj": (D, D),
    "self_attn.k_proj": (D, D // 2),
    "self_attn.v_proj": (D, D // 2),
    "self_attn.o_proj": (D, D),
    "mlp.gate_proj": (D, F),
    "mlp.up_proj": (D, F),
    "mlp.down_proj": (F, D),
}
LLAMA = Transformer(
    num_layers=LAYERS,
    d_model=D,
    vocab_size=24,
    block=Block(
        attention=FullAttention(
            num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, rope=Rope(theta=THETA)
        ),
        ffn=DenseGLU(d_ff=F),
        norm=RMSNorm(epsilon=EPSILON),
    ),
)
BANK = LoRABank(num_adapters=E, rank=R, alpha=3.0, dropout=0.1)
BALANCED = TopK(k=2, balance_weight=1e-2)
MIXLORA = Adapter(
    targets="all-linear",
    linear=LoRA(rank=3, alpha=5.0, dropout=0.05),
    mlp=MixLoRA(router=BALANCED, bank=BANK),
)
MOLA = Adapter(targets=("q_proj", "mlp.up_proj"), linear=MixedLinear(router=BALANCED, bank=BANK))
ADAPTERS = {
    "mixlora": MIXLORA,
    "mixlora_of_the_mlp": Adapter(
        targets=("up_proj", "down_proj"), mlp=MixLoRA(router=TopK(k=1), bank=BANK)
    ),
    "mixlora_of_two_scalings": Adapter(
        targets=("q_proj", "gate_proj"),
        linear=RsLoRA(rank=R, alpha=3.0, dropout=0.1),
        mlp=MixLoRA(bank=BANK),
    ),
    "mola": MOLA,
    "mola_rslora": Adapter(
        targets="all-linear",
        linear=MixedLinear(bank=RsLoRABank(num_adapters=4, rank=3, alpha=2.0, dropout=0.5)),
    ),
    "dynmole": Adapter(
        targets=("gate_proj", "up_proj", "down_proj"),
        linear=DynMoLE(router=EntropySwitch(top_p=0.6, threshold=0.8, q=1.4), bank=BANK),
    ),
}


def base(directory: pathlib.Path) -> pathlib.Path:
    """A Hugging Face folder of `LLAMA` with random weights."""
    hf.save(LLAMA, random_model_variables(LLAMA), directory)
    return directory


def mixture_tensors(peft_type: str, modules: tuple[str, ...], *, seed: int = 0) -> dict:
    """Random tensors of an adapter, named as MoE-PEFT names them."""
    rng = np.random.default_rng(seed)
    random = lambda *shape: (0.5 * rng.standard_normal(shape)).astype(np.float32)
    found = {}
    for layer in range(LAYERS):
        where = f"{peft_type.lower()}.layers.{layer}"
        if peft_type == "MIXLORA":
            found[f"{where}.mlp.moe_gate.weight"] = random(E, D)
        for module in modules:
            (into, out), own = WIDTHS[module], f"{where}.{module}"
            mixed = peft_type != "MIXLORA" or module.startswith("mlp")
            if peft_type != "MIXLORA":
                found[f"{own}.moe_gate.weight"] = random(E, into)
            for name in [f"{own}.experts.{e}" for e in range(E)] if mixed else [own]:
                found[f"{name}.lora_A.weight"] = random(R, into)
                found[f"{name}.lora_B.weight"] = random(out, R)
    return found


def described(peft_type: str, modules: tuple[str, ...], **values: Any) -> dict[str, Any]:
    """What MoE-PEFT writes into adapter_config.json."""
    own = {
        "bias": "none",
        "peft_type": peft_type,
        "r": R,
        "lora_alpha": 3,
        "lora_dropout": 0.05,
        "target_modules": [module.split(".")[1] for module in modules],
        "routing_strategy": peft_type.lower(),
        "num_experts": E,
        "base_model_name_or_path": "a/base",
        "task_type": "CAUSAL_LM",
    }
    top = {} if peft_type == "DYNMOLE" else {"top_k": 2}
    return own | top | values


def by_hand(
    directory: pathlib.Path, tensors: dict[str, np.ndarray], settings: dict[str, Any]
) -> pathlib.Path:
    """A folder of both."""
    directory.mkdir()
    safetensors.numpy.save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(settings))
    return directory

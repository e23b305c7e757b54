"""The training step of a cut Mixtral-8x7B, as a program for eight devices with two experts' worth.

The shape whose memory other trainers publish: 4 of its 32 layers, 4 sequences of 4,096 tokens per
device, eight experts on eight devices, full rematerialisation, bfloat16 activations and float32
parameters.
"""

from __future__ import annotations

from typing import Any

from moejax.attention.full import FullAttention
from moejax.balance.load_balance import TwoPassLoadBalance
from moejax.data.pack import BestFit
from moejax.data.pipeline import Data
from moejax.data.source import python_stdlib
from moejax.data.tokenizer import ByteTokenizer
from moejax.experiment import Experiment
from moejax.experts.glu import GLU
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import Rope
from moejax.models.block import Block
from moejax.models.moe import MoE
from moejax.models.transformer import Transformer
from moejax.objectives.lm import NextToken
from moejax.optim.optimizer import AdamW
from moejax.optim.schedule import WarmupCosine
from moejax.parallel.mesh import Mesh
from moejax.routers.topk import TopK

VOCABULARY, SEQUENCES, LENGTH = 32_000, 4, 4096


def mixtral(
    transport: Any, *, num_devices: int, implementation: str | None, d_expert: int = 14_336
) -> Experiment:
    """The experiment; its data are never read."""
    block = Block(
        attention=FullAttention(
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            rope=Rope(theta=1e6),
            linear=Linear(),
        ),
        ffn=MoE(
            num_experts=8,
            router=TopK(k=2),
            experts=GLU(d_ff=d_expert, implementation=implementation),
            transport=transport,
            balance=(TwoPassLoadBalance(weight=0.02),),
        ),
        norm=RMSNorm(),
    )
    return Experiment(
        model=Transformer(num_layers=4, d_model=4096, block=block, dtype="bfloat16", remat="full"),
        data=Data(train=python_stdlib(), tokenizer=ByteTokenizer(), packing=BestFit()),
        optimizer=AdamW(schedule=WarmupCosine(peak=3e-4, warmup_steps=10, final_fraction=0.1)),
        objective=NextToken(),
        mesh=Mesh(expert=num_devices),
        steps=100,
        batch_size=SEQUENCES * num_devices,
        sequence_length=LENGTH,
        workdir="unused",
    )

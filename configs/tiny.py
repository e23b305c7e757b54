"""A 10M-parameter MoE on the source code of the Python standard library.

Command   moejax train configs/tiny.py
"""

import fiddle as fdl
from fiddle.experimental import auto_config

from moejax.attention.full import FullAttention
from moejax.balance.load_balance import TwoPassLoadBalance
from moejax.balance.z_loss import RouterZLoss
from moejax.data.pack import BestFit
from moejax.data.pipeline import Data
from moejax.data.source import python_stdlib
from moejax.data.subword import BPE
from moejax.experiment import Experiment
from moejax.experts.glu import GLU
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import Rope
from moejax.models.block import Block
from moejax.models.generate import Sampling
from moejax.models.moe import MoE
from moejax.models.transformer import Transformer
from moejax.objectives.lm import NextToken
from moejax.optim.guard import Guard
from moejax.optim.optimizer import AdamW
from moejax.optim.schedule import WarmupCosine
from moejax.routers.topk import TopK
from moejax.transport.local import Local


@auto_config.auto_config
def config() -> Experiment:
    """The run of `make train`."""
    return Experiment(
        model=Transformer(
            num_layers=4,
            d_model=256,
            block=Block(
                attention=FullAttention(
                    num_heads=4,
                    num_kv_heads=2,
                    rope=Rope(theta=10_000.0),
                    qk_norm=RMSNorm(),
                    query_blocks=4,
                    linear=Linear(),
                ),
                ffn=MoE(
                    num_experts=16,
                    router=TopK(k=4),
                    experts=GLU(d_ff=128),
                    transport=Local(),
                    balance=(TwoPassLoadBalance(weight=0.01), RouterZLoss(weight=0.001)),
                ),
                norm=RMSNorm(),
            ),
        ),
        data=Data(
            train=python_stdlib(),
            tokenizer=BPE(vocab_size=4096),
            packing=BestFit(),
        ),
        optimizer=AdamW(schedule=WarmupCosine(peak=3e-3, warmup_steps=30)),
        objective=NextToken(),
        guard=Guard(),
        steps=600,
        batch_size=8,
        sequence_length=256,
        workdir="runs/tiny",
        prompts=(
            "def read_lines(path):\n",
            "class Stack:\n    def __init__(self):\n",
        ),
        sampling=Sampling(max_new_tokens=160),
    )


def smoke() -> fdl.Config:
    """Seconds on a laptop: for tests, and to try a change."""
    smoke_config = config.as_buildable()
    smoke_config.steps = 3
    return smoke_config

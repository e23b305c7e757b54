"""Tunes the routers of a trained model on another kind of text; everything else is frozen.

Command   moejax train configs/tiny.py
          moejax train configs/router_tuning.py
          of a published model:
          moejax import-hf OLMoE-1B-7B-0924 runs/olmoe
          moejax train configs/router_tuning.py init_from=runs/olmoe workdir=runs/tuned
          moejax export-hf runs/tuned OLMoE-1B-7B-tuned
          moejax train configs/router_tuning.py:roma init_from=runs/olmoe data.train.path=FILE
          moejax train configs/router_tuning.py:unlearn objective.layer=2 objective.expert=5 \\
              model.boundaries=[2,3] \\
              'trainable=["layers_2/ffn/experts/*@expert=5", "layers_2/ffn/router/*"]'
          docs/router_methods.md says what these need
Cost      about two minutes on two CPU cores for the tiny model
Result    3.298 to 3.250 bits per byte on held-out package descriptions (jax 0.10.2)
Numbers   the model and its tokenizer are those of `init_from`. Which routers train: all; the last
          five layers of OLMoE alone are model.boundaries=[11] trainable=["layers_11/*/router/*"].
          At a peak of 3e-2 the same run came to 3.280.
"""

import fiddle as fdl
from fiddle.experimental import auto_config

from moejax.attention.full import FullAttention
from moejax.balance.unbalanced import Unbalanced
from moejax.data.chat import Chat
from moejax.data.mixture import Mixture
from moejax.data.pack import BestFit
from moejax.data.pipeline import Data
from moejax.data.source import package_readmes, python_stdlib
from moejax.data.tokenizer import ByteTokenizer
from moejax.experiment import Experiment
from moejax.experts.glu import GLU
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.models.block import Block
from moejax.models.generate import Sampling
from moejax.models.moe import MoE
from moejax.models.transformer import Transformer
from moejax.objectives.lm import NextToken
from moejax.objectives.roma import RoMA
from moejax.objectives.seuf import UnlearnExpert
from moejax.optim.guard import Guard
from moejax.optim.optimizer import AdamW
from moejax.optim.schedule import WarmupCosine
from moejax.parallel.mesh import Mesh
from moejax.routers.topk import TopK
from moejax.transport.local import Local


@auto_config.auto_config
def config() -> Experiment:
    """The model of `init_from`, its routers tuned."""
    return Experiment(
        init_from="runs/tiny",
        trainable=("*/router/*",),
        data=Data(train=package_readmes(), packing=BestFit()),
        optimizer=AdamW(
            schedule=WarmupCosine(peak=1e-2, warmup_steps=10, final_fraction=0.0),
            weight_decay=0.0,
        ),
        objective=NextToken(),
        guard=Guard(),
        mesh=Mesh(),
        steps=160,
        batch_size=4,
        sequence_length=256,
        eval_every=40,
        workdir="runs/router_tuning",
        sampling=Sampling(max_new_tokens=160),
    )


def roma() -> fdl.Config:
    """Aligns the routing of samples that mean alike; needs prompts with responses."""
    aligned = config.as_buildable()
    aligned.data.train = fdl.Config(Chat, path="answers.jsonl")
    aligned.objective = fdl.Config(
        RoMA, neighbours="runs/neighbours.npz", next_token=fdl.Config(NextToken)
    )
    aligned.workdir = "runs/roma"
    return aligned


def unlearn() -> fdl.Config:
    """Forgets the package descriptions through one expert and keeps the standard library.

    `trainable` has to name that expert and its layer's router, as in the command above.
    """
    forgetting = config.as_buildable()
    forgetting.data.train = fdl.Config(
        Mixture,
        sources=(fdl.Config(package_readmes), fdl.Config(python_stdlib)),
        weights=(1.0, 1.0),
    )
    forgetting.objective = fdl.Config(UnlearnExpert, layer=0, expert=0)
    forgetting.workdir = "runs/unlearn"
    return forgetting


def smoke() -> fdl.Config:
    """A small random model instead of a trained one: for tests."""
    small = config.as_buildable()
    small.init_from = None
    small.model = fdl.Config(
        Transformer,
        num_layers=2,
        d_model=32,
        block=fdl.Config(
            Block,
            attention=fdl.Config(
                FullAttention, num_heads=2, num_kv_heads=1, linear=fdl.Config(Linear)
            ),
            ffn=fdl.Config(
                MoE,
                num_experts=4,
                router=fdl.Config(TopK, k=2),
                experts=fdl.Config(GLU, d_ff=16),
                transport=fdl.Config(Local),
                balance=(fdl.Config(Unbalanced),),
            ),
            norm=fdl.Config(RMSNorm),
        ),
    )
    small.data.tokenizer = fdl.Config(ByteTokenizer)
    small.optimizer.schedule.warmup_steps = 1
    small.mesh.data = 1
    small.steps = 3
    small.sequence_length = 64
    small.log_every = 1
    small.eval_every = 0
    small.workdir = "runs/router_tuning_smoke"
    return small

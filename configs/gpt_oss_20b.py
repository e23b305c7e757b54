"""gpt-oss-20b (20.9B parameters, 3.6B active) and gpt-oss-120b (116.8B, 5.1B active).

Command   moejax train configs/gpt_oss_20b.py:h100_64 data.train.path=DATA
          moejax train configs/gpt_oss_20b.py:large_h100_64 data.train.path=DATA
          moejax import-hf gpt-oss-20b runs/gpt_oss
          moejax train configs/gpt_oss_20b.py:tuning data.train.path=DATA
          DATA is a JSON Lines file, or a folder of them; gpt-oss-20b is a downloaded folder.
Cost      the authors took 2.1M H100-hours for the large one and almost ten times fewer for this
          one, post-training included (arXiv 2508.10925, section 2.3); not run here
Result    none here, and nothing was timed. `large_v5p_128` and `large_h100_64` were compiled and
          fit (`moejax plan`; figures in docs/benchmarks.md); of gpt-oss-20b's it is known that
          sizes divide and that parameters, gradients and moments fit
          (tests/configs/test_topologies.py)
Numbers   architecture: config.json of openai/gpt-oss-20b and gpt-oss-120b; they differ in layers
          and experts alone.
Ours      everything else: nothing is published about data, batch, learning rate or balancing
          (config.json says router_aux_loss_coef=0.9, which is not used here). The published experts
          are stored in 4 bits; here everything trains in float32 and multiplies in bfloat16. The
          YaRN of the released model is kept from the first step on; a model that is to stay short
          leaves it out with model.block.attention.rope.scaling=None.
"""

import fiddle as fdl
from fiddle.experimental import auto_config

from configs import router_tuning, tiny
from moejax.attention.full import FullAttention
from moejax.balance.load_balance import TwoPassLoadBalance
from moejax.balance.unbalanced import Unbalanced
from moejax.data.jsonl import JsonLines
from moejax.data.pack import BestFit
from moejax.data.pipeline import Data
from moejax.data.subword import HFTokenizer
from moejax.experiment import Experiment
from moejax.experts.glu import GLU
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import Rope, YarnScaling
from moejax.models.block import Block
from moejax.models.moe import MoE
from moejax.models.transformer import Transformer
from moejax.objectives.lm import NextToken
from moejax.optim.guard import Guard
from moejax.optim.optimizer import AdamW
from moejax.optim.schedule import WarmupCosine
from moejax.parallel.mesh import Mesh
from moejax.routers.topk import TopK
from moejax.transport.least_loaded import LeastLoaded


@auto_config.auto_config
def config() -> Experiment:
    """Pretraining, on devices that a topology below arranges."""
    return Experiment(
        model=Transformer(
            num_layers=24,
            d_model=2880,
            windows=(128, None),
            max_length=131_072,
            dtype="bfloat16",
            remat="full",
            block=Block(
                attention=FullAttention(
                    num_heads=64,
                    num_kv_heads=8,
                    head_dim=64,
                    rope=Rope(
                        theta=150_000.0,
                        scaling=YarnScaling(factor=32.0, original_context=4096, truncate=False),
                    ),
                    use_bias=True,
                    use_output_bias=True,
                    use_sinks=True,
                    linear=Linear(),
                ),
                ffn=MoE(
                    num_experts=32,
                    router=TopK(k=4, use_bias=True),
                    experts=GLU(d_ff=2880, activation="swiglu_clamped", use_bias=True),
                    transport=LeastLoaded(),
                    balance=(TwoPassLoadBalance(weight=0.01),),
                ),
                norm=RMSNorm(epsilon=1e-5),
            ),
        ),
        data=Data(
            train=JsonLines(path="data/pretraining"),
            tokenizer=HFTokenizer(path="gpt-oss-20b", vocab_size=201_088),
            packing=BestFit(),
        ),
        optimizer=AdamW(
            schedule=WarmupCosine(peak=3e-4, warmup_steps=2000, final_fraction=0.1),
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        objective=NextToken(),
        guard=Guard(),
        mesh=Mesh(),
        steps=250_000,
        batch_size=1024,
        sequence_length=4096,
        eval_every=5000,
        checkpoint_every=1000,
        workdir="runs/gpt_oss_20b",
    )


def tuning() -> fdl.Config:
    """The routers of the last five layers, from what `import-hf` wrote."""
    tuned, full = router_tuning.config.as_buildable(), config.as_buildable()
    tuned.init_from = "runs/gpt_oss"
    # Windows alternate, so that the last five layers are two stacks of two and one of one.
    tuned.trainable = tuple(f"layers_{first}/*/router/*" for first in (19, 20, 23))
    tuned.model, tuned.data = full.model, full.data
    tuned.model.boundaries = (19,)
    tuned.model.block.ffn.balance = (fdl.Config(Unbalanced),)
    tuned.data.train.path = "data/tuning"
    tuned.optimizer.schedule.peak = 1e-4
    tuned.batch_size = 64
    tuned.sequence_length = 1024
    tuned.workdir = "runs/gpt_oss_20b_tuned"
    return tuned


def smoke() -> fdl.Config:
    """The same model made small, on what `configs/tiny.py:smoke` trains on: for tests."""
    small, full = tiny.smoke(), config.as_buildable()
    small.model, small.optimizer = full.model, full.optimizer
    small.optimizer.schedule.warmup_steps = 1
    small.model.remat = "none"
    small.model.num_layers = 2
    small.model.windows = (16, None)
    small.model.d_model = 32
    small.model.block.attention.num_heads = 4
    small.model.block.attention.num_kv_heads = 1
    small.model.block.attention.head_dim = 8
    small.model.block.ffn.num_experts = 8
    small.model.block.ffn.router.k = 2
    small.model.block.ffn.experts.d_ff = 16
    small.workdir = "runs/gpt_oss_20b_smoke"
    small.prompts = ()
    return small


def large() -> fdl.Config:
    """gpt-oss-120b."""
    larger = config.as_buildable()
    larger.model.num_layers = 36
    larger.model.block.ffn.num_experts = 128
    larger.data.tokenizer.path = "gpt-oss-120b"
    larger.workdir = "runs/gpt_oss_120b"
    return larger


def h100_64() -> fdl.Config:
    """Eight nodes of eight H100: experts within a node, parameters split over all."""
    placed = config.as_buildable()
    placed.mesh.fsdp, placed.mesh.expert = 8, 8
    placed.num_microbatches = 16
    return placed


def v5p_128() -> fdl.Config:
    """A TPU v5p-128, which is 64 chips and so 64 devices."""
    placed = config.as_buildable()
    placed.mesh.fsdp, placed.mesh.expert = 8, 8
    placed.num_microbatches = 16
    return placed


def large_h100_64() -> fdl.Config:
    """gpt-oss-120b on eight nodes of eight H100."""
    placed = large()
    placed.mesh.fsdp, placed.mesh.expert = 8, 8
    placed.num_microbatches = 16
    return placed


def large_v5p_128() -> fdl.Config:
    """gpt-oss-120b on a TPU v5p-128, which is 64 chips and so 64 devices."""
    placed = large()
    placed.mesh.fsdp, placed.mesh.expert = 8, 8
    placed.num_microbatches = 16
    return placed

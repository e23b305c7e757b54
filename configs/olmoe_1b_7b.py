"""OLMoE-1B-7B: 6.9B parameters, 1.3B active, 64 experts of which 8 see a token.

Command   moejax train configs/olmoe_1b_7b.py:h100_64 data.train.path=DATA
          moejax import-hf OLMoE-1B-7B-0924 runs/olmoe
          moejax train configs/olmoe_1b_7b.py:tuning data.train.path=DATA
          DATA is a JSON Lines file, or a folder of them; OLMoE-1B-7B-0924 is a downloaded folder.
Cost      the authors took about 10 days on 256 H100 (appendix B); not run here
Result    none here, and nothing was timed. `v5p_128` and `h100_64` were compiled and fit
          (`moejax plan`; figures in docs/benchmarks.md)
Numbers   architecture: config.json of allenai/OLMoE-1B-7B-0924. Training: arXiv 2409.02060, table
          10, its first 5,033B tokens. Both auxiliary losses are means over layers, as there.
Ours      the balance loss is over the global batch (theirs: over a device's share of it), no decay
          of norms and embeddings, initialisation by fan-in (theirs: normal, 0.02, cut at 0.06), no
          annealing stage, remat, the meshes, and all of `tuning`'s numbers.
"""

import fiddle as fdl
from fiddle.experimental import auto_config

from configs import router_tuning, tiny
from moejax.attention.full import FullAttention
from moejax.balance.load_balance import TwoPassLoadBalance
from moejax.balance.unbalanced import Unbalanced
from moejax.balance.z_loss import RouterZLoss
from moejax.data.jsonl import JsonLines
from moejax.data.pack import BestFit
from moejax.data.pipeline import Data
from moejax.data.subword import HFTokenizer
from moejax.experiment import Experiment
from moejax.experts.glu import GLU
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import Rope
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
            num_layers=16,
            d_model=2048,
            max_length=4096,
            dtype="bfloat16",
            remat="full",
            block=Block(
                attention=FullAttention(
                    num_heads=16,
                    num_kv_heads=16,
                    rope=Rope(theta=10_000.0),
                    qk_norm=RMSNorm(epsilon=1e-5, num_axes=2),
                    linear=Linear(),
                ),
                ffn=MoE(
                    num_experts=64,
                    router=TopK(k=8, normalise="before"),
                    experts=GLU(d_ff=1024),
                    transport=LeastLoaded(),
                    balance=(TwoPassLoadBalance(weight=0.01), RouterZLoss(weight=0.001)),
                ),
                norm=RMSNorm(epsilon=1e-5),
            ),
        ),
        data=Data(
            train=JsonLines(path="data/pretraining"),
            tokenizer=HFTokenizer(path="OLMoE-1B-7B-0924", vocab_size=50304),
            packing=BestFit(),
        ),
        optimizer=AdamW(
            schedule=WarmupCosine(peak=4e-4, warmup_steps=2500, final_fraction=0.1),
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        objective=NextToken(),
        guard=Guard(),
        mesh=Mesh(),
        steps=1_200_000,
        batch_size=1024,
        sequence_length=4096,
        eval_every=5000,
        checkpoint_every=1000,
        workdir="runs/olmoe_1b_7b",
    )


def tuning() -> fdl.Config:
    """The routers of the last five layers, from what `import-hf` wrote."""
    tuned, full = router_tuning.config.as_buildable(), config.as_buildable()
    tuned.init_from = "runs/olmoe"
    tuned.trainable = ("layers_11/*/router/*",)
    tuned.model, tuned.data = full.model, full.data
    tuned.model.boundaries = (11,)
    tuned.model.block.ffn.balance = (fdl.Config(Unbalanced),)
    tuned.data.train.path = "data/tuning"
    tuned.optimizer.schedule.peak = 1e-4
    tuned.batch_size = 64
    tuned.sequence_length = 1024
    tuned.workdir = "runs/olmoe_1b_7b_tuned"
    return tuned


def smoke() -> fdl.Config:
    """The same model made small, on what `configs/tiny.py:smoke` trains on: for tests."""
    small, full = tiny.smoke(), config.as_buildable()
    small.model, small.optimizer = full.model, full.optimizer
    small.optimizer.schedule.warmup_steps = 1
    small.model.remat = "none"
    small.model.num_layers = 2
    small.model.d_model = 32
    small.model.block.attention.num_heads = 2
    small.model.block.attention.num_kv_heads = 2
    small.model.block.ffn.num_experts = 8
    small.model.block.ffn.router.k = 2
    small.model.block.ffn.experts.d_ff = 16
    small.workdir = "runs/olmoe_1b_7b_smoke"
    small.prompts = ()
    return small


def h100_64() -> fdl.Config:
    """Eight nodes of eight H100: experts within a node, parameters split over all."""
    placed = config.as_buildable()
    placed.mesh.fsdp, placed.mesh.expert = 8, 8
    placed.num_microbatches = 4
    return placed


def v5p_128() -> fdl.Config:
    """A TPU v5p-128, which is 64 chips and so 64 devices."""
    placed = config.as_buildable()
    placed.mesh.fsdp, placed.mesh.expert = 8, 8
    placed.num_microbatches = 4
    return placed

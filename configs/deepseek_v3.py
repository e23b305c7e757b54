"""DeepSeek-V3: 671B parameters, 37B active, 256 experts of which 8 see a token, and a shared one.

Command   moejax train configs/deepseek_v3.py:h100_512 data.train.path=DATA
          moejax import-hf DeepSeek-V3-bf16 runs/deepseek
          moejax train configs/deepseek_v3.py:tuning data.train.path=DATA
          DATA is a JSON Lines file, or a folder of them; DeepSeek-V3-bf16 is the downloaded folder,
          its weights stored in bfloat16 (the published ones are 8 bits wide and refused).
Cost      the authors took 2.664M H800-hours, 54 days on 2,048 (arXiv 2412.19437, table 1); not run
          here
Result    none here, and nothing was timed. `v5p_1024` and `h100_512` were compiled and fit
          (`moejax plan`; figures in docs/benchmarks.md)
Numbers   architecture: config.json of deepseek-ai/DeepSeek-V3. Training: section 4.2 of the paper:
          14.8T tokens, AdamW, peak and lowest decayed learning rate, warm-up, clipping, rate of the
          selection bias, and the weight of the balance loss per sequence.
Ours      the largest batch from the first step on (theirs grows from 3,072 to it over 469B tokens),
          one linear fall over the last 4.8T tokens (theirs: a cosine over 4.3T, then two constant
          rates), the selection bias moves until the end (theirs stops 500B before it), no loss of
          the token after the next, float32 weights and bfloat16 products (theirs: 8 bits),
          initialisation by fan-in (theirs: normal, 0.006), remat, the meshes, and all
          of `tuning`'s numbers. The YaRN of the released model is kept from the first step on;
          theirs came with long texts: model.block.attention.rope.scaling=None leaves it out.
"""

import fiddle as fdl
from fiddle.experimental import auto_config

from configs import router_tuning, tiny
from moejax.attention.mla import MultiHeadLatentAttention
from moejax.balance.load_balance import SequenceLoadBalance
from moejax.balance.loss_free import LossFreeBias
from moejax.data.jsonl import JsonLines
from moejax.data.pack import BestFit
from moejax.data.pipeline import Data
from moejax.data.subword import HFTokenizer
from moejax.experiment import Experiment
from moejax.experts.dense import DenseGLU
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
from moejax.optim.schedule import WSD
from moejax.parallel.mesh import Mesh
from moejax.routers.topk import TopK
from moejax.transport.least_loaded import LeastLoaded


@auto_config.auto_config
def config() -> Experiment:
    """Pretraining, on devices that a topology below arranges."""
    return Experiment(
        model=Transformer(
            num_layers=61,
            d_model=7168,
            first_k_dense=3,
            dense_ffn=DenseGLU(d_ff=18_432),
            max_length=163_840,
            dtype="bfloat16",
            remat="full",
            block=Block(
                attention=MultiHeadLatentAttention(
                    num_heads=128,
                    q_lora_rank=1536,
                    kv_lora_rank=512,
                    nope_head_dim=128,
                    rope_head_dim=64,
                    v_head_dim=128,
                    rope=Rope(
                        theta=10_000.0,
                        scaling=YarnScaling(
                            factor=40.0, original_context=4096, mscale=1.0, mscale_all_dim=1.0
                        ),
                    ),
                    latent_norm=RMSNorm(epsilon=1e-6),
                    linear=Linear(),
                ),
                ffn=MoE(
                    num_experts=256,
                    router=TopK(
                        k=8,
                        score="sigmoid",
                        normalise="after",
                        scale=2.5,
                        num_groups=8,
                        num_groups_kept=4,
                        group_score="top2",
                    ),
                    experts=GLU(d_ff=2048),
                    transport=LeastLoaded(),
                    balance=(LossFreeBias(rate=1e-3), SequenceLoadBalance(weight=1e-4)),
                    shared=DenseGLU(d_ff=2048),
                ),
                norm=RMSNorm(epsilon=1e-6),
            ),
        ),
        data=Data(
            train=JsonLines(path="data/pretraining"),
            tokenizer=HFTokenizer(path="DeepSeek-V3-bf16", vocab_size=129_280),
            packing=BestFit(),
        ),
        optimizer=AdamW(
            schedule=WSD(peak=2.2e-4, warmup_steps=2000, decay_fraction=0.32, final_fraction=0.1),
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        objective=NextToken(),
        guard=Guard(),
        mesh=Mesh(),
        steps=235_000,
        batch_size=15_360,
        sequence_length=4096,
        eval_every=5000,
        checkpoint_every=1000,
        workdir="runs/deepseek_v3",
    )


def tuning() -> fdl.Config:
    """The routers of the last five layers, from what `import-hf` wrote."""
    tuned, full = router_tuning.config.as_buildable(), config.as_buildable()
    tuned.init_from = "runs/deepseek"
    tuned.trainable = ("layers_56/*/router/*",)
    tuned.model, tuned.data = full.model, full.data
    tuned.model.boundaries = (56,)
    # The loaded selection bias is kept as it is.
    tuned.model.block.ffn.balance = (fdl.Config(LossFreeBias, rate=0.0),)
    tuned.data.train.path = "data/tuning"
    tuned.optimizer.schedule.peak = 1e-4
    tuned.batch_size = 64
    tuned.sequence_length = 1024
    tuned.workdir = "runs/deepseek_v3_tuned"
    return tuned


def smoke() -> fdl.Config:
    """The same model made small, on what `configs/tiny.py:smoke` trains on: for tests."""
    small, full = tiny.smoke(), config.as_buildable()
    small.model, small.optimizer = full.model, full.optimizer
    small.optimizer.schedule.warmup_steps = 1
    small.model.remat = "none"
    small.model.num_layers = 2
    small.model.d_model = 32
    small.model.first_k_dense = 1
    small.model.dense_ffn.d_ff = 32
    small.model.block.attention.num_heads = 2
    small.model.block.attention.q_lora_rank = 16
    small.model.block.attention.kv_lora_rank = 8
    small.model.block.attention.nope_head_dim = 8
    small.model.block.attention.rope_head_dim = 4
    small.model.block.attention.v_head_dim = 8
    small.model.block.ffn.num_experts = 8
    small.model.block.ffn.shared.d_ff = 16
    small.model.block.ffn.router.k = 2
    small.model.block.ffn.router.num_groups = 4
    small.model.block.ffn.router.num_groups_kept = 2
    small.model.block.ffn.experts.d_ff = 16
    small.workdir = "runs/deepseek_v3_smoke"
    small.prompts = ()
    return small


def h100_512() -> fdl.Config:
    """64 nodes of eight H100: an expert's weights lie within four nodes."""
    placed = config.as_buildable()
    placed.mesh.fsdp, placed.mesh.expert = 16, 32
    placed.num_microbatches = 30
    return placed


def v5p_1024() -> fdl.Config:
    """A TPU v5p-1024, which is 512 chips and so 512 devices."""
    placed = config.as_buildable()
    placed.mesh.fsdp, placed.mesh.expert = 16, 32
    placed.num_microbatches = 30
    return placed

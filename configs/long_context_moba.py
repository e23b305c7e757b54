"""Continues the tiny model on sequences eight times as long, with attention to blocks (MoBA).

Command   moejax train configs/tiny.py
          moejax train configs/long_context_moba.py
Cost      seven minutes of training on two CPU cores (jax 0.10.2) that other work kept busy: 250 to
          1,200 tokens/s over ten steps, 246,000 tokens in all
Result    1.873 to 1.833 bits per byte on the held-out files, in sequences of 2,048 tokens; with
          full attention in every layer (model.last_k_full=4), the same data and steps, 1.878 to
          1.829. One run each. The tiny model itself came to 1.853 in sequences of 256
Numbers   4 blocks of 64 keys are an eighth of a sequence; MoBA (arXiv 2502.13189) keeps its last
          three layers full, of four we keep one. A third of the tiny model's learning rate; neither
          it nor the blocks were tuned. RoPE is as it was.
"""

import fiddle as fdl

from configs import tiny
from moejax.attention.moba import MoBA
from moejax.experiment import Experiment


def config() -> fdl.Config[Experiment]:
    """Blocks in all layers but the last, which attends everything."""
    long = tiny.config.as_buildable()
    fdl.update_callable(long.model.block.attention, MoBA)
    long.model.block.attention.block_size = 64
    long.model.block.attention.top_k = 4
    long.model.last_k_full = 1
    long.init_from = "runs/tiny"
    long.optimizer.schedule.peak = 1e-3
    long.optimizer.schedule.warmup_steps = 10
    long.steps = 60
    long.batch_size = 2
    long.sequence_length = 2048
    long.workdir = "runs/long_context_moba"
    return long


def smoke() -> fdl.Config[Experiment]:
    """A small random model whose first layer goes from blocks to everything at the last step."""
    small = tiny.smoke()
    fdl.update_callable(small.model.block.attention, MoBA)
    small.model.block.attention.block_size = 4
    small.model.block.attention.top_k = 2
    small.model.block.attention.until_step = 2
    small.model.last_k_full = 1
    small.workdir = "runs/long_context_moba_smoke"
    return small

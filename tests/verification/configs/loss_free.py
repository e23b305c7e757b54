"""The small model of `tiny.py` with loss-free balancing, whose state a step updates."""

import fiddle as fdl

from configs import tiny
from moejax.balance.loss_free import LossFreeBias


def smoke() -> fdl.Config:
    small = tiny.smoke()
    small.model.block.ffn.balance = (fdl.Config(LossFreeBias, rate=0.01),)
    return small

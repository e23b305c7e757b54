"""DynMoLE: how many adapters a token gets follows from how undecided its router is.

Li et al., arXiv 2504.00661. The Tsallis entropy of the router's probabilities says whether a token
is for all adapters, each with its probability, or for the few that hold most of it (top-p).
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.adapters.mixed import MixedLinear
from moejax.errors import UserError
from moejax.layers.mixing.bank import LoRABank
from moejax.layers.mixing.mixture import Mixture, masked, row_balance
from moejax.layers.mixing.router import BALANCE, Router, check_k
from moejax.types import Context, Terms

ENTROPY = "adapter_entropy"
ENTROPY_EPSILON = 1e-5  # added to every probability before the entropy, as the authors' code does


class EntropySwitch(Router):
    """Weights are the probabilities p of the chosen adapters, not divided by their sum.

    Where the entropy of p, as a share of that of equal probabilities, is above `threshold`, all
    are chosen. Elsewhere, of the adapters in descending order, those up to which the sum of
    probabilities is at most `top_p`, and the first `keep` in any case.

    The loss gets `entropy_weight` times the mean entropy and `balance_weight` times the balance
    E sum_e f_e P_e, f being the mean weights and P the mean probabilities; both have gradients.
    The paper's code takes f and P over all layers and a batch, and the entropy also of padding;
    here f and P are those of each row and projection, and padding counts nowhere.

    Attributes:
      k: `keep` above; the code's keep_top_k.
      top_p: see above.
      threshold: see above; 1 or more never chooses all.
      q: order of the entropy (1 - sum p^q) / (q - 1).
      entropy_weight, balance_weight: see above.
    """

    k: int = 2
    top_p: float = 0.75
    threshold: float = 0.9
    q: float = 1.1
    entropy_weight: float = 1e-2
    balance_weight: float = 1e-3

    @property
    def loss_weights(self) -> dict[str, float]:
        """Of the entropy and the balance."""
        weights = {ENTROPY: self.entropy_weight, BALANCE: self.balance_weight}
        return {name: weight for name, weight in weights.items() if weight}

    @nn.compact
    def __call__(self, x: Float[Array, "B S F"], context: Context) -> Mixture:
        check_k(self.k, self.num_adapters)
        if self.q <= 0 or self.q == 1:
            raise UserError(f"router.q={self.q} must be positive and not 1: 1.1 is the paper's")
        # The logits are all that is kept for the gradients; the rest is computed again from them.
        weigh = jax.checkpoint(self._weigh, prevent_cse=False)
        weights, terms = weigh(self.gate()(x, context), context.token_mask)
        return Mixture(weights=weights, terms={name: terms[name] for name in self.loss_weights})

    def _weigh(self, logits: Array, mask: Array) -> tuple[Array, Terms]:
        probs = jax.nn.softmax(logits, axis=-1)
        entropy = tsallis_entropy(probs, self.q)
        few = _nucleus(probs, self.top_p, self.k)
        weights = jnp.where(few | (entropy > self.threshold)[..., None], probs, 0)
        return weights, {
            ENTROPY: masked(entropy, mask),
            BALANCE: row_balance(weights, probs, mask),
        }


def tsallis_entropy(probs: Float[Array, "B s E"], q: float) -> Float[Array, "B s"]:
    """(1 - sum p^q) / (q - 1) as a share of its value for equal probabilities: about 0 to 1."""
    num_adapters = probs.shape[-1]
    if num_adapters == 1:
        return jnp.zeros(probs.shape[:-1], probs.dtype)
    largest = (1 - num_adapters ** (1 - q)) / (q - 1)
    return (1 - ((probs + ENTROPY_EPSILON) ** q).sum(-1)) / (q - 1) / largest


def _nucleus(probs: Float[Array, "B s E"], top_p: float, keep: int) -> Bool[Array, "B s E"]:
    fixed = jax.lax.stop_gradient(probs)
    order = jnp.argsort(-fixed, axis=-1, stable=True)
    total = jnp.cumsum(jnp.take_along_axis(fixed, order, axis=-1), axis=-1)
    chosen = (total <= top_p) | (jnp.arange(probs.shape[-1]) < keep)
    rank = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(chosen, rank, axis=-1)


class DynMoLE(MixedLinear):
    """`MixedLinear` with `EntropySwitch`.

    The paper: 6 adapters of rank 24 with alpha 48 and dropout 0.05 on the MLPs' projections.
    """

    router: nn.Module = dataclasses.field(default_factory=EntropySwitch)


def example() -> DynMoLE:
    """A small instance, for the contract tests."""
    return DynMoLE(bank=LoRABank(num_adapters=4, rank=2))

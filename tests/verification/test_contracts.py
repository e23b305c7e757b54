"""The families' contracts find their family, pass what is right and name what is broken."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from moejax.adapters.lora import LoRA
from moejax.attention.full import FullAttention
from moejax.balance.z_loss import RouterZLoss
from moejax.errors import UserError
from moejax.experts.glu import GLU
from moejax.routers.topk import TopK
from moejax.transport.local import Local
from moejax.types import Routing
from moejax.verification.contracts import FAMILIES, broken_promises, contract, family_of


class CountsPadding(nn.Module):
    """A router whose scores depend on the mean over all tokens, padding included."""

    @nn.compact
    def __call__(self, x, context):
        kernel = self.param("kernel", nn.initializers.normal(), (x.shape[-1], 8))
        logits = (x - x.mean(axis=0)) @ kernel
        if context.intervention is not None:
            logits = context.intervention(logits, context)
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits), 2)
        if context.selection is not None:
            experts = context.selection
            weights = jnp.take_along_axis(jax.nn.softmax(logits), experts, axis=-1)
        probs = jax.nn.softmax(logits)
        return Routing(
            experts=experts, weights=weights, probs=probs, logits=logits, extras={}
        ), None


class IgnoresInterventions(TopK):
    """A router that does not add what it is asked to."""

    @nn.compact
    def __call__(self, x, context):
        return super().__call__(x, context.replace(intervention=None))


class Doubles(Local):
    """A transport that computes every choice twice."""

    def __call__(self, x, routing, weights, compute, *, axes=None):
        y, counts = super().__call__(x, routing, weights, compute, axes=axes)
        return 2 * y, counts


class WithoutAxes(Local):
    """A transport that does not take what a layer hands it."""

    def __call__(self, x, routing, weights, compute):
        return super().__call__(x, routing, weights, compute)


class NoMethod:
    """What is called like nothing in moejax."""

    def __call__(self, y):
        return y


@pytest.mark.parametrize(
    ("method", "family"),
    [
        (TopK(k=2), "routers"),
        (CountsPadding(), "routers"),
        (FullAttention(num_heads=2, num_kv_heads=1), "attention"),
        (GLU(d_ff=4), "experts"),
        (LoRA(), "adapters"),
        (Local(), "transport"),
        (RouterZLoss(weight=0.1), "balance"),
    ],
)
def test_a_method_is_told_by_how_it_is_called(method, family):
    assert family_of(method) == family


def test_every_family_has_a_contract_and_every_check_says_what_it_asks():
    for family in FAMILIES:
        assert contract(family).CHECKS
        assert all(check.__doc__ for check in contract(family).CHECKS)


def test_what_belongs_to_no_family_is_an_error_that_lists_them():
    with pytest.raises(UserError, match=r"is called with \(y\), and routers and attention"):
        family_of(NoMethod())


def broken(method):
    return {promise: how for promise, how in broken_promises(method) if how is not None}


def test_a_sound_method_breaks_nothing():
    assert broken(Local()) == {}


@pytest.mark.slow
def test_a_router_that_looks_at_padding_is_found_out(unchecked):
    assert "padding changes nothing" in broken(CountsPadding())
    promise = "an intervention comes before anything else"
    assert list(broken(IgnoresInterventions(k=2))) == [promise]


def test_a_transport_that_doubles_is_found_out():
    found = broken(Doubles())
    assert len(found) == 2
    assert all("Mismatched elements" in how for how in found.values())


def test_a_transport_that_takes_no_axes_is_found_out():
    found = broken(WithoutAxes())
    assert len(found) == 2
    assert all("unexpected keyword argument 'axes'" in how for how in found.values())

"""Mixtures of adapters in a whole model: attached, reported, trained, decoded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.adapters.comol import CoMoL, CoreBank
from moejax.adapters.dynmole import DynMoLE
from moejax.adapters.lora import LoRA
from moejax.adapters.mixed import MixedLinear
from moejax.adapters.remix import ReMix
from moejax.errors import UserError
from moejax.experts.dense import DenseGLU
from moejax.experts.lora_glu import LoRAGLU
from moejax.experts.mixlora import MixLoRA
from moejax.layers.mixing.bank import LoRABank
from moejax.layers.mixing.granularity import Sequence
from moejax.layers.mixing.router import TopK
from moejax.models.adapter import Adapter
from moejax.objectives.lm import NextToken
from moejax.objectives.remix import RLOO
from moejax.train.state import init_state
from moejax.types import named_leaves
from moejax.verification.contracts.cases import quick_jit
from tests.models.tiny_model import moe, random_model_variables, tiny, tokens
from tests.train.step_cases import GUARD, make_batch, make_step

BANK = LoRABank(num_adapters=4, rank=2)
BALANCED = TopK(balance_weight=1e-2)
BASE = tiny(first_k_dense=1, dense_ffn=DenseGLU(d_ff=8))
ADAPTERS = {
    "mola": Adapter(targets=("q_proj",), linear=MixedLinear(router=BALANCED, bank=BANK)),
    "sequence": Adapter(
        targets=("q_proj",), linear=MixedLinear(router=TopK(granularity=Sequence()), bank=BANK)
    ),
    "dynmole": Adapter(targets=("all-linear"), linear=DynMoLE(bank=BANK), experts=LoRAGLU(rank=2)),
    "comol": Adapter(targets=("v_proj",), linear=CoMoL(bank=CoreBank(num_adapters=3, rank=2))),
    "remix": Adapter(targets=("o_proj", "shared_expert.up_proj"), linear=ReMix(bank=BANK)),
    "mixlora": Adapter(
        targets="all-linear",
        linear=LoRA(rank=2),
        mlp=MixLoRA(router=BALANCED, bank=BANK),
        experts=LoRAGLU(rank=2),
    ),
}


# Compiling a step takes a processor ten seconds.
QUICK = ("mola", "remix")


@pytest.fixture(
    params=[pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ADAPTERS]
)
def model(request):
    return dataclasses.replace(BASE, adapter=ADAPTERS[request.param])


def test_fresh_it_changes_no_logit_bit_for_bit(model):
    variables = quick_jit(model.init)(jax.random.key(0))
    plain = {name: tree for name, tree in variables.items() if name != "lora"}
    ids = tokens((2, 5))
    adapted = quick_jit(model.apply)(variables, ids)
    if isinstance(model.adapter.experts, LoRAGLU):  # three grouped products instead of one kernel
        np.testing.assert_allclose(
            adapted.logits, quick_jit(BASE.apply)(plain, ids).logits, rtol=1e-5, atol=1e-6
        )
    else:
        np.testing.assert_array_equal(adapted.logits, quick_jit(BASE.apply)(plain, ids).logits)


def test_three_steps_move_the_adapters_alone_and_hold_no_state_for_the_base(model):
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    objective = RLOO() if isinstance(model.adapter.linear, ReMix) else NextToken()
    fresh = lambda: init_state(model, optimizer, GUARD, 0, trainable=("lora/*",))
    state = quick_jit(fresh)()
    before = jax.device_get(named_leaves(state))
    step = quick_jit(make_step(model, optimizer, objective=objective))
    for _ in range(3):
        state, metrics = step(state, make_batch())
    after = jax.device_get(named_leaves(state))
    trained = {path: x for path, x in after.items() if path.startswith("params/")}
    for path in trained:
        assert path.startswith("params/lora/")
        assert np.abs(after[path] - before[path]).max() > 0, path
    frozen = [path for path in after if path.startswith("frozen/")]
    assert frozen
    for path in frozen:
        np.testing.assert_array_equal(after[path], before[path])
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if jnp.ndim(x) > 0)
    assert moments == 2 * sum(x.size for x in trained.values())
    sizes = {n: t for n, t in metrics["measures"].items() if n.startswith("support_size/")}
    assert sizes.keys() == {"support_size/0", "support_size/1"}
    if isinstance(model.adapter.linear, ReMix):
        assert all(total == 2 * count for total, count in sizes.values())
    for name, weight in model.adapter.loss_weights.items():
        assert weight > 0
        assert metrics["terms"][name][0] > 0


def test_what_a_router_asks_for_enters_the_loss():
    """The gradient of the balance loss alone reaches the gates, of every layer."""
    model = dataclasses.replace(BASE, adapter=ADAPTERS["mola"])
    variables = random_model_variables(model)

    def balance(lora):
        return model.apply(variables | {"lora": lora}, tokens((2, 5))).terms["adapter_balance"][0]

    for path, leaf in named_leaves(quick_jit(jax.grad(balance))(variables["lora"])).items():
        assert (np.abs(leaf).max() > 0) == ("gate" in path or path.startswith("layers_0")), path
    assert model.loss_weights()["adapter_balance"] == 1e-2


@pytest.mark.parametrize("name", ["sequence", "mixlora", "remix"])
def test_decoding_equals_the_whole(name):
    model = dataclasses.replace(BASE, adapter=ADAPTERS[name])
    variables = random_model_variables(model)
    ids = tokens((2, 6))
    whole = quick_jit(model.apply)(variables, ids).logits
    step = quick_jit(
        lambda v, ids, positions: model.apply(v, ids, positions=positions, cache_length=6)
    )
    cache, found = model.init_cache(variables, 2, 6), []
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 6)):
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        out = step(variables | {"cache": cache}, ids[:, start:stop], positions)
        cache = out.cache
        found.append(out.logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=1e-4, atol=1e-5)


def test_a_prompt_beside_a_longer_one_is_continued_as_alone():
    """The padding behind it ends no sequence: the mean goes on from what the prompt held."""
    model = dataclasses.replace(BASE, adapter=ADAPTERS["sequence"])
    variables = random_model_variables(model)
    ids, step = tokens((1, 3)), quick_jit(model.apply, static_argnames="cache_length")
    whole = quick_jit(model.apply)(variables, ids).logits
    for padded in ([1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0]):
        segments = jnp.array([padded])
        at = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
        row = jnp.where(segments > 0, ids[0][at], 0)
        first = step(variables, row, segment_ids=segments, positions=at, cache_length=4)
        cached = variables | {"cache": first.cache}
        last = step(cached, ids[:, 2:], positions=jnp.array([[2]]), cache_length=4)
        np.testing.assert_allclose(last.logits[0, 0], whole[0, 2], rtol=1e-4, atol=1e-5)


def test_a_mean_that_would_count_a_token_twice_is_nan():
    """Other layers can go back and write a slot anew; of a sum nothing can be taken back."""
    model = dataclasses.replace(BASE, adapter=ADAPTERS["sequence"])
    variables = random_model_variables(model)
    step = quick_jit(model.apply, static_argnames="cache_length")
    first = step(variables, tokens((2, 3)), cache_length=4)
    cached = variables | {"cache": first.cache}
    again = step(cached, tokens((2, 1)), positions=jnp.array([[2], [3]]), cache_length=4)
    np.testing.assert_array_equal(np.isnan(again.logits).all(axis=(1, 2)), [True, False])
    assert np.isfinite(again.logits[1]).all()


@pytest.mark.parametrize(
    "adapter, text",
    [
        (
            Adapter(targets=("q_proj",), mlp=MixLoRA(bank=BANK)),
            "adapter.mlp is a MixLoRA, and adapter.targets reach no dense MLP",
        ),
        (
            Adapter(targets=("mlp.up_proj",), linear=DynMoLE(bank=BANK), mlp=MixLoRA(bank=BANK)),
            "adapter.linear is a DynMoLE, and adapter.targets reach no projection for it",
        ),
        (
            Adapter(
                targets=("q_proj", "mlp.up_proj"),
                linear=DynMoLE(bank=BANK),
                mlp=MixLoRA(bank=BANK, router=BALANCED),
            ),
            "give the loss term adapter_balance the weights 0.001 and 0.01: give it one",
        ),
        (
            Adapter(targets=("shared_expert_gate", "mlp.up_proj"), mlp=MixLoRA(bank=BANK)),
            "adapter.targets name ffn/shared/shared_gate, and adapter.mlp, which takes the place",
        ),
    ],
)
def test_what_would_have_no_effect_or_two_is_refused(adapter, text):
    gated = moe(shared=DenseGLU(d_ff=8, gated=True) if "gate" in adapter.targets[0] else None)
    model = tiny(ffn=gated, first_k_dense=1, dense_ffn=DenseGLU(d_ff=8), adapter=adapter)
    with pytest.raises(UserError, match=text):
        jax.eval_shape(lambda key: (model.loss_weights(), model.init(key))[1], jax.random.key(0))

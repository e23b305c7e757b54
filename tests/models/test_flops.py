"""Parameter counts and FLOPs against sums done by hand."""

import jax
import pytest

from moejax.adapters.lora import LoRA
from moejax.attention.mla import MultiHeadLatentAttention
from moejax.experts.dense import DenseGLU
from moejax.experts.glu import GLU
from moejax.models.adapter import Adapter
from moejax.models.flops import size
from moejax.models.variables import parameters
from moejax.optim import freeze
from moejax.planning import roofline
from moejax.planning.work import Work
from moejax.types import named_leaves
from tests.models.tiny_model import attention, dense, moe, tiny
from tests.planning import planned

# Width 16, four query and two key heads of width 4, vocabulary 24.
ATTENTION = 16 * 16 + 2 * 16 * 8 + 16 * 16
ONE_EXPERT = 3 * 16 * 8
ROUTER = 16 * 4
SHARED = 3 * 16 * 6 + 16  # with its sigmoid gate
NORMS = 2 * 16
QK_NORMS = 2 * 4
LENGTH = 10
VISIBLE = (LENGTH + 1) / 2  # mean number of keys of a causal query


def test_a_moe_model():
    got = size(tiny(), LENGTH)
    layer = ATTENTION + ROUTER + SHARED + NORMS + QK_NORMS
    assert got.params == 2 * (layer + 4 * ONE_EXPERT) + 2 * 24 * 16 + 16
    assert got.active_params == 2 * (layer + 2 * ONE_EXPERT) + 2 * 24 * 16 + 16
    matmul = 2 * (ATTENTION + ROUTER + SHARED + 2 * ONE_EXPERT) + 24 * 16
    assert got.train_flops_per_token == pytest.approx(6 * matmul + 2 * 12 * VISIBLE * 16)


def test_a_tied_head_is_counted_once_and_works():
    untied, tied = size(dense(), LENGTH), size(dense(tied_head=True), LENGTH)
    assert untied.params - tied.params == 24 * 16
    assert untied.train_flops_per_token == tied.train_flops_per_token


def test_biases_of_experts_are_parameters_but_no_matmul():
    plain, biased = (
        size(tiny(ffn=moe(experts=GLU(d_ff=8, use_bias=use))), LENGTH) for use in (False, True)
    )
    assert biased.params - plain.params == 2 * 4 * (8 + 8 + 16)
    assert biased.train_flops_per_token == plain.train_flops_per_token


def test_windows_and_dense_layers():
    model = tiny(
        num_layers=2,
        windows=(3, None),
        first_k_dense=1,
        dense_ffn=DenseGLU(d_ff=6),
        attention=attention(qk_norm=None),
    )
    got = size(model, LENGTH)
    matmul = 2 * ATTENTION + 3 * 16 * 6 + ROUTER + SHARED + 2 * ONE_EXPERT + 24 * 16
    visible = (1 + 2 + 3 * 8) / LENGTH + VISIBLE
    assert got.train_flops_per_token == pytest.approx(6 * matmul + 12 * visible * 16)


def test_latent_attention_has_keys_and_values_of_different_widths():
    attention = MultiHeadLatentAttention(
        num_heads=4, kv_lora_rank=6, q_lora_rank=5, nope_head_dim=3, rope_head_dim=2, v_head_dim=7
    )
    got = size(dense(attention=attention), LENGTH)
    matrices = 16 * 5 + 5 * 4 * 5 + 16 * (6 + 2) + 6 * 4 * (3 + 7) + 4 * 7 * 16 + 3 * 16 * 8
    assert got.params == matrices + (5 + 6) + NORMS + 2 * 24 * 16 + 16
    visible = VISIBLE * 4 * (6 * (3 + 2) + 6 * 7)
    assert got.train_flops_per_token == pytest.approx(6 * (matrices + 24 * 16) + visible)


def counted(model, *trainable):
    """FLOPs of training what the patterns match."""
    shapes = parameters(jax.eval_shape(model.init, jax.random.key(0)))
    frozen = freeze.split(shapes, trainable)[1]
    return size(model, LENGTH, frozen=named_leaves(frozen)).train_flops_per_token


LAYER = ATTENTION + 3 * 16 * 8
HEAD = 24 * 16
SCORES = VISIBLE * 16  # 4 of them forward and 8 backward
ADAPTED = 2 * (16 + 16)  # LoRA of rank 2 on the query


def test_frozen_weights_need_no_gradient_of_their_own():
    plain = dense(num_layers=2)
    model = dense(num_layers=2, adapter=Adapter(targets=("q_proj",), linear=LoRA(rank=2)))
    by_hand = 4 * (2 * LAYER + HEAD) + 6 * 2 * ADAPTED + 2 * 12 * SCORES
    assert counted(model, "lora/*") == pytest.approx(by_hand)
    everything = 6 * (2 * (LAYER + ADAPTED) + HEAD) + 2 * 12 * SCORES
    assert counted(model, "*") == size(model, LENGTH).train_flops_per_token == everything
    for model in (plain, dense(num_layers=2, tied_head=True)):
        assert counted(model, "embed/*") == pytest.approx(
            4 * 2 * LAYER + (6 if model.tied_head else 4) * HEAD + 2 * 12 * SCORES
        )
    found = size(plain, LENGTH)
    assert found.forward_flops_per_token == pytest.approx(found.train_flops_per_token / 3)


def test_below_what_trains_there_is_no_backward_pass():
    model = dense(num_layers=3, boundaries=(2,))
    last = 2 * 2 * LAYER + 2 * 4 * SCORES + 6 * LAYER + 12 * SCORES + 4 * HEAD
    assert counted(model, "layers_2/*") == pytest.approx(last)
    assert counted(model, "head/*") == pytest.approx(2 * 3 * LAYER + 3 * 4 * SCORES + 4 * HEAD)
    assert counted(model, "final_norm/*", "head/*") == pytest.approx(
        2 * 3 * LAYER + 3 * 4 * SCORES + 6 * HEAD
    )


def test_what_is_no_parameter_cannot_be_frozen():
    with pytest.raises(ValueError, match="params/head/kernel, which is no parameter"):
        size(dense(), LENGTH, frozen=["params/head/kernel"])


def test_a_plan_counts_what_trains():
    def flops(*overrides):
        experiment = planned.experiment(planned.SMOKE[0], *overrides)
        return roofline.flops_of(experiment, experiment.build_model(100), Work(), 1)

    whole, head = flops(), flops('trainable=["head/*"]')
    assert whole.executed == whole.model
    assert head.model < whole.model / 2
    again = flops('trainable=["head/*"]', 'model.remat="full"')
    assert again.model == head.model
    assert again.executed - again.model == pytest.approx(whole.model / 3)

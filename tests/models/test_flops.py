"""Parameter counts and FLOPs against sums done by hand."""

import pytest

from moejax.attention.mla import MultiHeadLatentAttention
from moejax.experts.dense import DenseGLU
from moejax.experts.glu import GLU
from moejax.models.flops import size
from tests.models.tiny_model import attention, dense, moe, tiny

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

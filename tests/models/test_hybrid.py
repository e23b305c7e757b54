"""Models of which some layers attend blocks and some everything, in one set of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention.full import FullAttention
from moejax.attention.mla import MultiHeadLatentAttention
from moejax.attention.moba import MoBA
from moejax.errors import UserError
from moejax.interop import description
from moejax.layers.short_convolution import ShortConvolution
from moejax.models.flops import size
from moejax.verification.contracts.cases import quick_jit
from tests.models.tiny_model import VOCAB, dense, random_model_variables, tokens

MOBA = MoBA(num_heads=4, num_kv_heads=2, block_size=3, top_k=2)
FULL = MOBA.full()
LENGTH = 14


def restacked(variables, model):
    """Layers stacked one after the other, as `model` stacks them."""
    rows = [
        jax.tree.map(lambda x, row=row: x[row : row + 1], tree)
        for name, tree in variables["params"].items()
        if name.startswith("layers_")
        for row in range(jax.tree.leaves(tree)[0].shape[0])
    ]
    params = {k: v for k, v in variables["params"].items() if not k.startswith("layers_")}
    for segment in model.segments:
        for member, name in enumerate(segment.names):
            own = [rows[index] for index in segment.indices(member)]
            params[name] = jax.tree.map(lambda *xs: jnp.concatenate(xs), *own)
    return variables | {"params": params}


def test_the_last_layers_attend_everything():
    model = dense(attention=MOBA, num_layers=3, last_k_full=1)
    found = [type(layer.block.attention) for s in model.segments for layer in s.layers]
    assert found == [MoBA, FullAttention]
    assert [segment.names for segment in model.segments] == [("layers_0",), ("layers_2",)]
    assert model.segments[1].layers[0].block.attention == FULL


def test_weights_of_a_full_model_serve_every_hybrid():
    """Where blocks hold the whole row all agree; otherwise each layer that is full matters."""
    ids = tokens((2, LENGTH))
    plain = dense(attention=FULL, num_layers=2)
    variables = random_model_variables(plain)
    logits = lambda model: np.asarray(model.apply(restacked(variables, model), ids).logits)
    whole = logits(plain)
    wide = MOBA.copy(top_k=5)
    for last in (0, 1):
        model = dense(attention=wide, num_layers=2, last_k_full=last)
        np.testing.assert_allclose(logits(model), whole, rtol=1e-4, atol=1e-5)
    hybrids = [logits(dense(attention=MOBA, num_layers=2, last_k_full=last)) for last in range(3)]
    np.testing.assert_array_equal(hybrids[2], whole)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert np.abs(hybrids[one] - hybrids[other])[:, 9:].max() > 1e-3


def test_windows_alternate_with_blocks():
    """A layer with a window attends it: the same as full attention with these windows."""
    ids = tokens((2, LENGTH))
    windows = {"num_layers": 2, "windows": (4, None)}
    mixed = dense(attention=MOBA, **windows)
    variables = random_model_variables(mixed)
    got = mixed.apply(variables, ids).logits
    full_after = dense(attention=MOBA, last_k_full=1, **windows)
    all_full = dense(attention=FULL, **windows).apply(restacked(variables, mixed), ids).logits
    hybrid = full_after.apply(restacked(variables, full_after), ids).logits
    np.testing.assert_allclose(hybrid, all_full, rtol=1e-5, atol=1e-6)
    assert np.abs(got - all_full).max() > 1e-3


@pytest.mark.parametrize("attention", [FULL, MOBA], ids=["full", "blocks"])
def test_a_full_layer_has_no_window(attention):
    """Its last token sees the first, which every window and block hides."""
    ids = tokens((1, LENGTH))
    other = ids.at[0, 0].set((ids[0, 0] + 1) % VOCAB)

    def reach(**changes):
        model = dense(attention=attention, windows=(2,), **changes)
        variables = random_model_variables(model)
        run = quick_jit(lambda ids: model.apply(variables, ids).logits[0, -1])
        return np.abs(run(ids) - run(other)).max()

    assert reach() == 0
    assert reach(last_k_full=1) > 1e-4
    model = dense(attention=attention, num_layers=3, windows=(2,), last_k_full=1)
    layers = [layer for s in model.segments for layer in s.layers for _ in range(s.count)]
    assert [layer.window for layer in layers] == [2, 2, None]


def test_decoding_equals_the_whole():
    """A layer of each kind, with convolved keys: their caches lie beside each other."""
    ids = tokens((2, LENGTH))
    attention = MOBA.copy(key_conv=ShortConvolution())
    model = dense(attention=attention, num_layers=3, windows=(None, 4, None), last_k_full=1)
    variables = random_model_variables(model)
    whole = model.apply(variables, ids).logits
    cache, logits = model.init_cache(variables, 2, LENGTH), []
    step = jax.jit(
        lambda cache, ids, at: model.apply(
            variables | {"cache": cache}, ids, positions=at, cache_length=LENGTH
        )
    )
    for start, stop in ((0, 5), *((t, t + 1) for t in range(5, LENGTH))):
        at = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        out = step(cache, ids[:, start:stop], at)
        cache = out.cache
        logits.append(out.logits)
    np.testing.assert_allclose(np.concatenate(logits, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"last_k_full": 1}])
def test_a_model_with_blocks_is_not_exported_as_one_without(changes):
    with pytest.raises(UserError, match="nearest is"):
        description.of(dense(attention=MOBA, num_layers=2, **changes))


def test_a_model_at_a_step_needs_no_step():
    ids = tokens((2, LENGTH))
    model = dense(attention=MOBA.copy(until_step=5), num_layers=2, last_k_full=1)
    variables = random_model_variables(model)
    for step in (4, 5):
        decided = model.at_step(step)
        assert decided.segments[0].names == model.segments[0].names
        expected = model.apply(variables, ids, step=step).logits
        np.testing.assert_allclose(
            decided.apply(variables, ids).logits, expected, rtol=1e-5, atol=1e-6
        )
    assert type(model.at_step(4).block.attention) is MoBA
    assert type(model.at_step(5).block.attention) is FullAttention
    plain = dense()
    assert plain.at_step(3) is plain


def test_flops_count_what_is_attended():
    """Of two layers one has blocks: by hand, for 14 tokens in blocks of 3, of which 2 are seen."""
    hybrid = dense(attention=MOBA, num_layers=2, last_k_full=1)
    full = dense(attention=FULL, num_layers=2)
    got = size(full, LENGTH).train_flops_per_token - size(hybrid, LENGTH).train_flops_per_token
    seen = sum(t % 3 + 1 + (3 if t >= 3 else 0) for t in range(LENGTH)) / LENGTH
    scores = 4 * sum(t // 3 for t in range(LENGTH)) / LENGTH
    assert got == pytest.approx(12 * ((LENGTH + 1) / 2 - seen) * 16 - 2 * scores * 4)
    by_group = dense(attention=MOBA.copy(selection="group"), num_layers=2, last_k_full=1)
    saved = (
        size(hybrid, LENGTH).train_flops_per_token - size(by_group, LENGTH).train_flops_per_token
    )
    assert saved == pytest.approx(2 * scores * 4 / 2)
    short = [dense(attention=attention) for attention in (MOBA, FULL)]  # two blocks, all seen
    assert len({size(model, 6).train_flops_per_token for model in short}) == 1
    windowed = [dense(attention=attention, windows=(4,)) for attention in (MOBA, FULL)]
    assert len({size(model, LENGTH).train_flops_per_token for model in windowed}) == 1


@pytest.mark.parametrize("last_k_full", [-1, 3])
def test_a_schedule_that_names_no_layer_says_so(last_k_full):
    with pytest.raises(
        UserError, match=rf"last_k_full={last_k_full} names no layers.*num_layers=2"
    ):
        dense(attention=MOBA, num_layers=2, last_k_full=last_k_full)


def test_attention_without_a_full_form_says_so():
    latent = MultiHeadLatentAttention(num_heads=4, kv_lora_rank=6)
    with pytest.raises(UserError, match=r"MultiHeadLatentAttention has no method full\(\)"):
        dense(attention=latent, last_k_full=1)

"""The whole model: independence of what must not matter, and the numbers that must hold."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.experts.dense import DenseGLU
from moejax.routers.topk import TopK
from tests.contract import float_dtypes, quick_jit
from tests.models.tiny_model import (
    VOCAB,
    as_float64,
    attention,
    dense,
    moe,
    random_model_variables,
    tiny,
    tokens,
)

LENGTH = 10
A, B = 4, 3  # lengths of two documents


@pytest.fixture(scope="module")
def windowed():
    """One dense layer, then twice (full, window), with variables and a compiled forward pass."""
    model = tiny(num_layers=5, windows=(3, None), first_k_dense=1, dense_ffn=DenseGLU(d_ff=6))
    run = quick_jit(
        lambda v, t, segments, positions: model.apply(
            v, t, segment_ids=segments, positions=positions
        )
    )
    return model, random_model_variables(model), run


@pytest.fixture(scope="module")
def packed():
    """(tokens, segment ids, positions): both documents in one row, then each alone, padded."""
    a, b = np.asarray(tokens((A,))), np.asarray(tokens((B,), seed=1))
    ids = np.zeros((3, LENGTH), np.int32)
    segments, positions = np.zeros_like(ids), np.zeros_like(ids)
    for row, start, document, segment in ((0, 0, a, 1), (0, A, b, 2), (1, 0, a, 1), (2, 0, b, 1)):
        where = (row, slice(start, start + len(document)))
        ids[where], segments[where] = document, segment
        positions[where] = np.arange(len(document))
    return ids, segments, positions


def test_packed_documents_equal_documents_alone(windowed, packed):
    _, variables, run = windowed
    logits = np.asarray(run(variables, *packed).logits)
    np.testing.assert_allclose(logits[0, :A], logits[1, :A], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[0, A : A + B], logits[2, :B], rtol=1e-4, atol=1e-5)


def test_a_token_changes_nothing_before_it_bit_for_bit(windowed, packed):
    _, variables, run = windowed
    ids, segments, positions = packed
    logits = np.asarray(run(variables, *packed).logits)
    for column in (2, A + 1):
        other = ids.copy()
        other[0, column] = (other[0, column] + 1) % VOCAB
        changed = np.asarray(run(variables, other, segments, positions).logits) != logits
        changed = changed.any(axis=-1)
        assert changed[0, column]
        allowed = (segments == segments[0, column]) & (np.arange(LENGTH) >= column)
        allowed[1:] = False
        assert not (changed & ~allowed).any()


def test_what_padding_holds_changes_nothing(windowed, packed):
    """Not even a token whose embedding is NaN."""
    _, variables, run = windowed
    ids, segments, positions = packed
    unused = (set(range(VOCAB)) - set(ids[segments > 0].tolist())).pop()
    embedding = variables["params"]["embed"]["embedding"].at[unused].set(jnp.nan)
    poisoned = variables | {"params": variables["params"] | {"embed": {"embedding": embedding}}}
    reference = run(variables, *packed)
    other = run(poisoned, np.where(segments > 0, ids, unused), segments, positions)
    mask = segments > 0
    np.testing.assert_array_equal(np.asarray(reference.logits)[mask], other.logits[mask])
    same = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(same, (reference.terms, reference.stats), (other.terms, other.stats))
    assert np.isfinite(other.logits).all()


def test_an_id_outside_the_vocabulary_gives_nan_not_another_token(windowed, packed):
    _, variables, run = windowed
    ids, segments, positions = packed
    ids = ids.copy()
    ids[0, 1] = VOCAB
    logits = np.asarray(run(variables, ids, segments, positions).logits)
    assert np.isnan(logits[0, 1]).all()
    assert np.isfinite(logits[1:]).all()


def test_decoding_ragged_prompts_equals_the_full_pass(windowed):
    """Prompts of 3 and 5 tokens prefilled together, then two tokens each, one at a time."""
    model, variables, run = windowed
    ids, lengths = np.asarray(tokens((2, LENGTH))), np.array([3, 5])
    ones = np.ones((2, LENGTH), np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    full = np.asarray(run(variables, ids, ones, positions).logits)

    @quick_jit
    def decode(cache, ids, mask, positions):
        out = model.apply(
            variables | {"cache": cache},
            ids,
            segment_ids=mask.astype(jnp.int32),
            positions=positions,
            cache_length=8,
        )
        return out.logits, out.cache

    mask = positions[:, :5] < lengths[:, None]
    cache = model.init_cache(variables, 2, 8)
    logits, cache = decode(cache, np.where(mask, ids[:, :5], 0), mask, positions[:, :5])
    rows = np.arange(2)
    np.testing.assert_allclose(logits[rows, lengths - 1], full[rows, lengths - 1], atol=1e-5)
    for step in range(2):
        at = (lengths + step)[:, None]
        token = np.take_along_axis(ids, at, axis=1)
        logits, cache = decode(cache, token, np.ones((2, 1), bool), at.astype(np.int32))
        np.testing.assert_allclose(logits[:, 0], full[rows, at[:, 0]], rtol=1e-4, atol=1e-5)


def test_unrolling_changes_nothing(windowed, packed):
    model, variables, run = windowed
    ids, segments, positions = packed
    unrolled = dataclasses.replace(model, unroll=4)
    forward = lambda v: unrolled.apply(v, ids, segment_ids=segments, positions=positions)
    ours, reference = quick_jit(forward)(variables), run(variables, *packed)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, ours, reference)


@pytest.mark.slow
def test_remat_changes_neither_loss_nor_gradients():
    """With the hand-written gradient of the experts; all policies: test_stack.py."""
    with jax.enable_x64(True):
        model = as_float64(tiny(ffn=moe(shared=None)))
        variables = random_model_variables(model)
        state = {"router_state": variables["router_state"]}

        def value_and_grad(remat):
            def loss(params):
                out = dataclasses.replace(model, remat=remat).apply(
                    {"params": params} | state, tokens((2, 5))
                )
                aux = sum(s / c for s, c in out.terms.values())
                return jnp.sum(jnp.sin(out.logits)) + aux

            return quick_jit(jax.value_and_grad(loss))(variables["params"])

        plain, full, dots = (value_and_grad(remat) for remat in ("none", "full", "dots"))
    for a, b, c in zip(*map(jax.tree.leaves, (plain, full, dots)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(a, c, rtol=1e-10, atol=1e-12)


def test_tied_head_and_soft_cap():
    model = dense(tied_head=True)
    variables = random_model_variables(model)
    assert "head" not in variables["params"]
    ids = tokens((1, 4))
    run = lambda m, v: quick_jit(lambda v: m.apply(v, ids).logits)(v)
    logits = run(model, variables)
    embedding = variables["params"]["embed"]["embedding"]
    head = {"head": {"kernel": embedding.T}}
    untied = run(dense(), variables | {"params": variables["params"] | head})
    np.testing.assert_allclose(logits, untied, rtol=1e-5, atol=1e-6)
    capped = run(dataclasses.replace(model, logit_soft_cap=2.0), variables)
    np.testing.assert_allclose(capped, 2 * np.tanh(logits / 2), rtol=1e-5, atol=1e-6)
    scaled = run(dataclasses.replace(model, embed_scale=0.5), variables)
    half = {"embed": {"embedding": embedding / 2}}
    halved = run(dense(), variables | {"params": variables["params"] | head | half})
    np.testing.assert_allclose(scaled, halved, rtol=1e-5, atol=1e-6)


def test_bf16_compute_on_float32_parameters_is_close_to_float32():
    model = dense()
    variables = random_model_variables(model)
    ids = tokens((2, 6))
    run = lambda m: quick_jit(lambda v: m.apply(v, ids).logits)(variables)
    exact, half = run(model), run(dataclasses.replace(model, dtype="bfloat16"))
    assert half.dtype == jnp.float32
    assert 0 < np.abs(exact - half).max() < 0.1 * np.std(exact) + 0.02


def test_dtype_policies():
    model = dataclasses.replace(tiny(), dtype="bfloat16", param_dtype="bfloat16")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    dtypes = lambda tree: {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}
    assert dtypes(shapes["params"]) == {"bfloat16"}
    assert dtypes(shapes["router_state"]) == {"float32"}
    out = jax.eval_shape(model.apply, shapes, tokens((1, 4)))
    assert out.logits.dtype == jnp.float32
    assert dtypes(out.terms) == {"float32"}


def test_float64_throughout():
    with jax.enable_x64(True):
        model = as_float64(tiny())
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        used = float_dtypes(model.apply, shapes, tokens((1, 4)))
    assert used == {"float64"}


def test_init_is_drawn_in_float32_scaled_and_independent_of_x64():
    model = dataclasses.replace(dense(), d_model=64, vocab_size=200)
    draw = lambda: quick_jit(model.init)(jax.random.key(0))["params"]
    params = draw()
    assert np.std(params["embed"]["embedding"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(params["layers_0"]["attention"]["query"]["kernel"]) == pytest.approx(
        64**-0.5, rel=0.05
    )
    np.testing.assert_array_equal(params["final_norm"]["scale"], 1)
    with jax.enable_x64(True):
        jax.tree.map(np.testing.assert_array_equal, params, draw())


def test_logical_axes_name_every_axis_of_every_leaf():
    model = tiny(num_layers=3, first_k_dense=1, dense_ffn=DenseGLU(d_ff=6))
    shapes, axes = jax.eval_shape(model.init, jax.random.key(0)), model.logical_axes()
    is_names = lambda leaf: isinstance(leaf, tuple)
    assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=is_names)
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=is_names), strict=True)
    assert all(shape.ndim == len(names) for shape, names in leaves)
    params = axes["params"]
    assert params["embed"]["embedding"] == ("vocab", "embed")
    assert params["head"]["kernel"] == ("embed", "vocab")
    layer = params["layers_1"]
    assert layer["attention"]["output"]["kernel"] == ("layers", "heads", "embed")
    assert layer["ffn"]["experts"]["gate"] == ("layers", "expert", "embed", "mlp")


@pytest.mark.parametrize(
    "pattern, moe_layers",
    [
        ({"num_layers": 4}, [0, 1, 2, 3]),
        ({"num_layers": 4, "first_k_dense": 2}, [2, 3]),
        ({"num_layers": 6, "moe_every": 2}, [1, 3, 5]),
        ({"num_layers": 6, "first_k_dense": 1, "moe_every": 2}, [2, 4]),
        ({"num_layers": 2, "first_k_dense": 5}, []),
    ],
)
def test_layer_patterns(pattern, moe_layers):
    model = tiny(dense_ffn=DenseGLU(d_ff=6), **pattern)
    assert list(model.moe_layers) == moe_layers
    assert (model.moe is None) == (not moe_layers)
    shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
    for index in range(model.num_layers):
        name, row = model.moe_layers.get(index, (None, None))
        if name is not None:
            assert shapes[name]["ffn"]["experts"]["gate"].shape[0] > row
    num_dense = sum(
        shapes[name]["ffn"]["gate"]["kernel"].shape[0]
        for name in shapes
        if name.startswith("layers_") and "experts" not in shapes[name]["ffn"]
    )
    assert num_dense == model.num_layers - len(moe_layers)


def test_router_state_is_updated_layer_by_layer():
    model = tiny(num_layers=3)
    state = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(model.init, jax.random.key(0))["router_state"],
    )
    load = jnp.array([[9, 1, 1, 1], [1, 9, 1, 1], [3, 3, 3, 3]])
    new = model.update_router_state(state, {"layers_0": {"load": load}})
    bias = new["layers_0"]["ffn"]["balance_1_correction_bias"]
    np.testing.assert_allclose(
        bias, 1e-2 * np.array([[-1, 1, 1, 1], [1, -1, 1, 1], [0, 0, 0, 0]]), rtol=1e-6
    )


def test_a_router_may_hand_a_carry_to_the_next_moe_layer():
    class Remembering(TopK):
        """Adds the logits of the MoE layers before it."""

        def initial_carry(self, num_tokens):
            return jnp.zeros((num_tokens, 4))

        def __call__(self, x, context):
            routing, _ = super().__call__(x, context)
            before = context.router_carry
            routing = dataclasses.replace(routing, extras={"before": jnp.abs(before).sum()})
            return routing, before + routing.logits

    model = tiny(
        num_layers=4,
        moe_every=2,
        dense_ffn=DenseGLU(d_ff=6),
        ffn=moe(router=Remembering(k=2), shared=None),
    )
    variables = random_model_variables(model)
    stats = quick_jit(model.apply)(variables, tokens((1, 3))).stats
    before = [float(stats[name]["before"][row]) for name, row in model.moe_layers.values()]
    assert before[0] == 0
    assert before[1] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"remat": "some"}, "model.remat='some' is not one of none, full, dots"),
        ({"num_layers": 0}, "model.num_layers=0 must be at least 1"),
        ({"moe_every": 0}, "model.moe_every=0 must be at least 1"),
        ({"dtype": "float16"}, "model.dtype='float16' is not one of float32, bfloat16, float64"),
        ({"windows": ()}, "model.windows="),
        ({"windows": (4, 0)}, "must name a window of at least 1 position"),
        ({"first_k_dense": 1}, "model.dense_ffn is None"),
    ],
)
def test_bad_options_are_one_clear_sentence(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_a_sequence_longer_than_the_model_allows_says_so():
    model = dense(max_length=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(UserError, match="4 tokens is longer than model.max_length=3"):
        jax.eval_shape(model.apply, shapes, tokens((1, 4)))


def test_a_model_without_a_vocabulary_says_so():
    with pytest.raises(UserError, match="model.vocab_size is not set"):
        dense(vocab_size=None).init(jax.random.key(0))


def test_prototypes_are_copied_not_shared():
    """One Linear prototype serves every projection; each has parameters of its own."""
    linear = attention().linear
    model = tiny(attention=attention(linear=linear), ffn=DenseGLU(d_ff=6, linear=linear))
    params = quick_jit(model.init)(jax.random.key(0))["params"]["layers_0"]
    kernels = [params["attention"][n]["kernel"] for n in ("key", "value")]
    kernels += [params["ffn"][n]["kernel"] for n in ("gate", "up")]
    first = [float(kernel[layer, 0, 0]) for kernel in kernels for layer in range(2)]
    assert len(set(first)) == len(first)
    assert isinstance(linear, nn.Module)

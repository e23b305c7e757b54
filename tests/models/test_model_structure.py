"""What a model consists of: layers, parameters, dtypes, axis names, and what it refuses."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.balance.load_balance import ShardLoadBalance
from moejax.errors import UserError
from moejax.experts.dense import DenseGLU
from moejax.verification.contracts.cases import float_dtypes, quick_jit
from tests.models.tiny_model import as_float64, attention, dense, moe, tiny, tokens

DENSE = DenseGLU(d_ff=6)


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
    model = tiny(num_layers=3, first_k_dense=1, dense_ffn=DENSE)
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
    assert layer["ffn"]["experts"]["gate"] == ("layers", "expert", "expert_embed", "expert_mlp")


@pytest.mark.parametrize(
    "pattern, moe_layers",
    [
        ({"num_layers": 4}, [0, 1, 2, 3]),
        ({"num_layers": 4, "first_k_dense": 2}, [2, 3]),
        ({"num_layers": 6, "moe_every": 2}, [1, 3, 5]),
        ({"num_layers": 6, "first_k_dense": 1, "moe_every": 2}, [2, 4]),
        ({"num_layers": 2, "first_k_dense": 2, "ffn": DENSE}, []),
    ],
)
def test_layer_patterns(pattern, moe_layers):
    model = tiny(dense_ffn=DENSE, **pattern)
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
        ({"first_k_dense": -1}, "model.first_k_dense=-1 must lie between 0 and model.num_layers=2"),
        ({"first_k_dense": 3}, "model.first_k_dense=3 must lie between 0 and model.num_layers=2"),
        ({"first_k_dense": 2, "dense_ffn": DENSE}, "leave none of model.num_layers=2 layers to"),
        ({"moe_every": 3, "dense_ffn": DENSE}, "model.moe_every=3 leave none of"),
        ({"logit_soft_cap": 0.0}, "model.logit_soft_cap=0.0 must be positive and finite"),
        ({"logit_soft_cap": -5.0}, "model.logit_soft_cap=-5.0 must be positive"),
        ({"logit_soft_cap": np.inf}, "model.logit_soft_cap=inf must be positive and finite"),
        ({"logit_soft_cap": np.nan}, "model.logit_soft_cap=nan must be positive and finite"),
    ],
)
def test_bad_options_are_one_clear_sentence(options, message, unchecked):
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


@pytest.mark.slow
def test_boundaries_change_how_layers_are_stacked_and_nothing_else():
    model = dense(num_layers=3)
    split = dataclasses.replace(model, boundaries=(1,))
    assert [(s.start, s.count) for s in split.segments] == [(0, 1), (1, 2)]
    init = lambda m: quick_jit(m.init)(jax.random.key(0))
    whole, parts = init(model), init(split)
    joined = jax.tree.map(
        lambda a, b: np.concatenate([a, b]),
        parts["params"]["layers_0"],
        parts["params"]["layers_1"],
    )
    jax.tree.map(np.testing.assert_array_equal, whole["params"]["layers_0"], joined)
    logits = [
        quick_jit(m.apply)(v, tokens((1, 4))).logits for m, v in ((model, whole), (split, parts))
    ]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("boundaries", [(0,), (3,), (1, -1)])
def test_a_boundary_outside_the_stack_is_an_error(boundaries):
    with pytest.raises(UserError, match=r"model.boundaries=.* between 1 and .* = 2"):
        dense(num_layers=3, boundaries=boundaries)


def test_a_rule_about_several_sequences_does_not_hinder_initialisation():
    model = tiny(ffn=moe(balance=(ShardLoadBalance(weight=1.0, num_shards=2),)))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    terms = jax.eval_shape(model.apply, shapes, tokens((2, 4))).terms
    assert set(terms) == {"balance_shard"}
    with pytest.raises(UserError, match="num_shards=2 does not divide the 3 sequences"):
        jax.eval_shape(model.apply, shapes, tokens((3, 4)))

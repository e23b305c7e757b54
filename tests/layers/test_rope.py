"""Frequencies equal those of transformers (golden file); the rotation is relative."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.layers.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling

GOLDEN = json.loads((pathlib.Path(__file__).parent.parent / "golden" / "rope.json").read_text())
LONGROPE = Rope(
    scaling=LongRopeScaling(
        short_factors=tuple(1 + i / 16 for i in range(8)),
        long_factors=tuple(1.0 + i for i in range(8)),
        short_amplitude=1.25,
        long_amplitude=1.25,
        original_context=4096,
    )
)
ROPES = {
    "default": Rope(),
    "partial": Rope(fraction=0.5),
    "linear": Rope(scaling=LinearScaling(factor=4.0)),
    "llama3": Rope(theta=500_000.0, scaling=Llama3Scaling()),
    "yarn": Rope(scaling=YarnScaling(factor=40.0, original_context=4096)),
    "yarn_not_truncated": Rope(
        scaling=YarnScaling(factor=40.0, original_context=4096, truncate=False)
    ),
    "deepseek_v3": Rope(
        scaling=YarnScaling(factor=40.0, original_context=4096, mscale=1.0, mscale_all_dim=0.5)
    ),
    "stated_factor": Rope(
        scaling=YarnScaling(factor=4.0, original_context=4096, attention_factor=1.25)
    ),
    "gpt_oss": Rope(
        theta=150_000.0, scaling=YarnScaling(factor=32.0, original_context=4096, truncate=False)
    ),
    "longrope_4096": LONGROPE.at(4096),
    "longrope_4097": LONGROPE.at(4097),
}


def test_every_golden_is_used():
    assert GOLDEN.keys() == ROPES.keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_frequencies_and_amplitude_equal_transformers(name):
    golden, rope = GOLDEN[name], ROPES[name]
    inverse = rope.frequencies(golden["head_dim"])
    # transformers computes in float32
    np.testing.assert_allclose(inverse, golden["inverse_frequencies"], rtol=1e-6)
    amplitude = rope.scaling.amplitude() if rope.scaling else 1.0
    assert amplitude == pytest.approx(golden["attention_factor"], rel=1e-12)


def test_goldens_tell_the_rules_apart():
    frequencies = [tuple(GOLDEN[n]["inverse_frequencies"]) for n in ("yarn", "yarn_not_truncated")]
    assert frequencies[0] != frequencies[1]
    assert GOLDEN["deepseek_v3"]["attention_factor"] != GOLDEN["yarn"]["attention_factor"]


def test_rotation_is_that_of_complex_numbers_and_leaves_the_rest_alone():
    rope = Rope(fraction=0.5, scaling=YarnScaling(factor=4.0, original_context=64))
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 16))
    positions = np.array([[0, 5, 7]])
    with jax.enable_x64(True):
        y = np.asarray(rope(jnp.asarray(x), jnp.asarray(positions)))
    angles = positions[0][:, None] * rope.frequencies(16)  # [S, rotary/2]
    turned = (x[..., :4] + 1j * x[..., 4:8]) * np.exp(1j * angles)[None, :, None]
    turned *= rope.scaling.amplitude()
    np.testing.assert_allclose(y[..., :4], turned.real, rtol=1e-12)
    np.testing.assert_allclose(y[..., 4:8], turned.imag, rtol=1e-12)
    np.testing.assert_array_equal(y[..., 8:], x[..., 8:])


def test_products_depend_on_the_distance_only():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 1, 1, 8))
    with jax.enable_x64(True):
        product = lambda i, j: np.sum(
            np.asarray(Rope()(jnp.asarray(q), jnp.array([[i]])))
            * np.asarray(Rope()(jnp.asarray(k), jnp.array([[j]])))
        )
        assert product(9, 4) == pytest.approx(product(105, 100), rel=1e-10)
        assert product(9, 4) != pytest.approx(product(9, 5), rel=1e-3)


def test_bf16_is_rotated_in_float32():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 4, 1, 8)), jnp.bfloat16)
    positions = jnp.array([[0, 1000, 2000, 3001]])
    y = Rope()(x, positions)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, Rope()(x.astype(jnp.float32), positions).astype(jnp.bfloat16))


@pytest.mark.parametrize("fraction", [0.0, 1.5, 0.4])
def test_a_fraction_that_does_not_fit_says_so(fraction):
    with pytest.raises(UserError, match="even number from 2 to 8"):
        Rope(fraction=fraction).frequencies(8)


def test_llama3_limits_must_be_ordered():
    with pytest.raises(UserError, match="must be above"):
        Llama3Scaling(low_frequency_factor=4.0, high_frequency_factor=4.0)


def test_long_rows_are_rotated_by_the_long_factors_at_every_position():
    """From the first position on, because the row is long, or because its cache is."""
    scaling = LongRopeScaling(
        short_factors=(1.0, 2.0),
        long_factors=(3.0, 5.0),
        short_amplitude=1.5,
        long_amplitude=1.75,
        original_context=3,
    )
    rope, x = Rope(scaling=scaling), np.random.default_rng(0).standard_normal((1, 4, 1, 4))
    turn = lambda x, length=None: np.asarray(
        rope(jnp.asarray(x), jnp.arange(x.shape[1])[None], length)
    )

    def expected(x, factors, amplitude):
        inverse = 10_000.0 ** -np.array([0, 0.5]) / factors
        angles = np.arange(x.shape[1])[:, None, None] * inverse
        turned = amplitude * (x[..., :2] + 1j * x[..., 2:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    with jax.enable_x64(True):
        short, long = expected(x[:, :3], [1, 2], 1.5), expected(x, [3, 5], 1.75)
        np.testing.assert_allclose(turn(x[:, :3]), short, rtol=1e-12)
        np.testing.assert_allclose(turn(x), long, rtol=1e-12)
        np.testing.assert_allclose(turn(x[:, :2], length=4), long[:, :2], rtol=1e-12)
        np.testing.assert_allclose(turn(x[:, :2], length=3), short[:, :2], rtol=1e-12)


def test_factors_must_be_as_many_as_frequencies():
    with pytest.raises(UserError, match="8 factors, but 12 rotated features need 6"):
        LONGROPE.at(1).frequencies(12)

"""What is taken for a dtype."""

import enum

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moejax.config import annotations
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.errors import UserError


class Mine:
    """A component with a dtype of its own, as Flax's layers have."""

    dtype = jnp.float32


class Texts:
    dtype = "float32"


class Number(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    "value",
    ["bfloat16", "int32", float, bool, np.float64, np.dtype("int8"), jnp.bfloat16, jnp.float32]
    + [ml_dtypes.bfloat16],
)
def test_names_and_scalar_types_are_dtypes(value):
    assert annotations.is_dtype_name(value)


@pytest.mark.parametrize("value", ["no_dtype", "Mine", Mine, Texts, Number, object, dict, 3])
def test_other_classes_are_none_whatever_attributes_they_have(value):
    assert not annotations.is_dtype_name(value)


@pytest.mark.parametrize("dtype", ["jnp.float32", "'float32'", "None", "object()"])
def test_a_class_with_a_dtype_that_does_not_fit_is_an_error_of_the_user(tmp_path, dtype):
    path = tmp_path / "mine.py"
    path.write_text(f"import jax.numpy as jnp\n\n\nclass Mine:\n    dtype = {dtype}\n")
    with pytest.raises(UserError, match=r"^model takes Transformer, not .*Mine"):
        apply_overrides(load_config("configs/tiny.py:smoke"), [f"model={path}:Mine"])

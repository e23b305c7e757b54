"""The grouped products in the words of `lax.ragged_dot_general`, which libraries share."""

from jax import lax

# left[rows of g].T @ right[rows of g], for every group
OVER_ROWS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def of_rows(*, transpose_rhs: bool) -> lax.RaggedDotDimensionNumbers:
    """lhs[r] @ rhs[group of r], or its transpose."""
    return lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose_rhs else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )

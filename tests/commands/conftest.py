"""A published checkpoint, as small as can be."""

import pytest

from tests.commands.published import publish


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A bfloat16 OLMoE of two layers with a tokenizer, as transformers stores them."""
    return publish(tmp_path_factory.mktemp("published") / "olmoe", dtype="bfloat16")

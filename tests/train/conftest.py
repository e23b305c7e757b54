"""The smoke experiment for tests of training."""

import dataclasses

import pytest

from tests.train.smoke_runs import build


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def smoke(tmp_path, cache):
    """Builds the smoke experiment with overrides, in a folder of its own; it samples nothing."""

    def without_samples(name, *overrides):
        return dataclasses.replace(build(tmp_path / name, cache, *overrides), prompts=())

    return without_samples

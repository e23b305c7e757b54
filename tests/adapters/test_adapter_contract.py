"""What every adapter promises; found by walking the package."""

import pytest

import moejax.adapters
from moejax.layers.linear import Linear
from moejax.verification.contracts.adapters import CHECKS, Case
from tests.contract import methods


@pytest.fixture(scope="module", params=methods(moejax.adapters, of=Linear))
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_promise(case, check):
    check(case)

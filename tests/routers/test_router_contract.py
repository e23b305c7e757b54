"""What every router promises; found by walking the package."""

import pytest

import moejax.routers
from moejax.verification.contracts.routers import CHECKS, Case
from tests.contract import methods


@pytest.fixture(scope="module", params=methods(moejax.routers))
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_promise(case, check):
    check(case)

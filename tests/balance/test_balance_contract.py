"""What every balance rule promises; found by walking the package."""

import pytest

import moejax.balance
from moejax.verification.contracts.balance import CHECKS, Case
from tests.contract import methods


@pytest.fixture(scope="module", params=methods(moejax.balance))
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_promise(case, check):
    check(case)
